"""Conditioning images: resampling against Pillow, the parts of the degradation, ranges and determinism."""

import numpy as np
import pytest
from PIL import Image

from cddistill.data import TASKS, configure, degrade, examples
from cddistill.data.resample import matrix, resample
from cddistill.data.tasks.sr import downsample, sr, upsample


@pytest.fixture
def image():
    return (examples(configure(), "test", 1)["x0"][0] + 1) / 2


# --- resampling


@pytest.mark.parametrize(("n", "m"), [(32, 8), (8, 32), (30, 7), (5, 5)])
def test_cubic_equals_pillow(n, m):
    """Both are Keys' kernel with a = -0.5, widened for downsampling; Pillow's floats are float32 too."""
    x = np.random.default_rng(0).random((n, n), np.float32)
    pillow = np.asarray(Image.fromarray(x).resize((m, m), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(resample(x[..., None], (m, m), "cubic")[..., 0], pillow, atol=2e-6)


def test_other_kinds_equal_hand_computed_values():
    x = np.arange(8, dtype=np.float32).reshape(8, 1, 1)
    np.testing.assert_allclose(resample(x, (4, 1), "area").ravel(), [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_allclose(resample(x, (3, 1), "area").ravel(), [1.0, 3.5, 6.0])  # windows 0-2, 2-5, 5-7
    np.testing.assert_allclose(resample(x, (2, 1), "bilinear").ravel(), [1.5, 5.5])  # two pixels: no antialiasing
    np.testing.assert_allclose(resample(x, (16, 1), "bilinear").ravel()[:4], [0, 0.25, 0.75, 1.25])
    half = (-0.75 * (1.5**3 - 5 * 1.5**2 + 8 * 1.5 - 4), 1.25 * 0.125 - 2.25 * 0.25 + 1)  # Keys' kernel, a = -0.75
    np.testing.assert_allclose(matrix(8, 4, "bicubic")[1], [0, half[0], half[1], half[1], half[0], 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["cubic", "area", "bilinear", "bicubic"])
@pytest.mark.parametrize(("n", "m"), [(32, 8), (7, 20), (9, 1), (1, 4)])
def test_resampling_preserves_constants(kind, n, m):
    np.testing.assert_allclose(matrix(n, m, kind).sum(1), 1, atol=1e-6)


# --- super-resolution


def test_sr_shape_and_range(image):
    cond = sr(image, np.random.default_rng(0), 4, "bicubic")
    assert cond.shape == image.shape
    assert cond.dtype == np.float32
    assert 0 <= cond.min() < cond.max() <= 1
    assert 0 < np.abs(cond - image).mean() < 0.1


def test_sr_preserves_constants():
    flat = np.full((32, 32, 3), 51 / 255, np.float32)
    np.testing.assert_allclose(sr(flat, None, 4, "bicubic"), flat, atol=1e-6)


def test_cond_is_the_upsampled_small_image(image):
    """Training and sampling upsample the same: an 8-bit image of the small size."""
    small = downsample(image, 4)
    assert small.dtype == np.uint8
    assert small.shape == (8, 8, 3)
    np.testing.assert_array_equal(sr(image, None, 4, "bicubic"), upsample(small, 32))
    assert upsample(small, (32, 64)).shape == (32, 64, 3)


def test_downsampling_approximately_inverts_upsampling(image):
    small = downsample(image, 4)
    again = downsample(upsample(small, 32), 4)
    assert np.abs(again.astype(int) - small).mean() < 8  # of 255; the two filters are no exact inverses


@pytest.mark.parametrize("degradation", ["bicubic", "realesrgan"])
def test_indivisible_sides_are_refused(degradation):
    with pytest.raises(ValueError, match="30x32 px cannot be downsampled by 4: its sides must be divisible by it"):
        sr(np.zeros((30, 32, 3), np.float32), np.random.default_rng(0), 4, degradation)


# --- Real-ESRGAN


def test_random_kernels_are_symmetric_and_sum_to_one():
    rng = np.random.default_rng(0)
    for _ in range(200):
        kernel = degrade.random_kernel(rng, (0.2, 3.0))
        assert kernel.shape[0] == kernel.shape[1]
        assert 7 <= len(kernel) <= 21
        assert len(kernel) % 2 == 1
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(kernel, kernel[::-1, ::-1], atol=1e-6)


def test_blur_kernel_has_the_given_widths_and_direction():
    kernel = degrade.blur_kernel(21, (2.5, 1.0), np.pi / 6)
    x, y = degrade.grid(21)
    covariance = [[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)]
    widths, axes = np.linalg.eigh(covariance)
    np.testing.assert_allclose(np.sqrt(widths), [1.0, 2.5], rtol=0.02)
    assert abs(axes[:, 1] @ [np.cos(np.pi / 6), np.sin(np.pi / 6)]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("beta", "plateau", "expected"),
    [(4.0, False, np.exp(-(0.25**4) / 2)), (0.5, False, np.exp(-0.25)), (2.0, True, 16 / 17)],
)
def test_generalised_and_plateau_kernels_equal_hand_computed_values(beta, plateau, expected):
    kernel = degrade.blur_kernel(21, (2.0, 2.0), 0.0, beta, plateau)
    assert kernel[10, 11] / kernel[10, 10] == pytest.approx(expected)  # at half a width


@pytest.mark.parametrize("cutoff", [np.pi / 5, np.pi / 2, np.pi])
def test_sinc_passes_low_and_stops_high_frequencies(cutoff):
    kernel = degrade.sinc_kernel(21, cutoff)
    assert kernel.sum() == pytest.approx(1, abs=1e-5)
    gain = np.abs(np.fft.rfft(kernel.sum(0), 256))
    frequency = np.linspace(0, np.pi, len(gain))
    assert gain[0] == pytest.approx(1, abs=1e-5)
    assert gain[frequency < cutoff - 0.5].min(initial=1) > 0.75
    assert gain[frequency > cutoff + 0.5].max(initial=0) < 0.25


def test_sinc_is_smooth_at_its_centre():
    np.testing.assert_allclose(degrade.sinc_kernel(7, 0.01), 1 / 49, rtol=1e-3)  # with a low cutoff it is a plain mean


def test_blur_is_convolution_with_a_reflected_border():
    image = np.random.default_rng(0).random((9, 6, 3), np.float32)
    kernel = np.random.default_rng(1).random((5, 5), np.float32)
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    direct = sum(kernel[4 - i, 4 - j] * padded[i : i + 9, j : j + 6] for i in range(5) for j in range(5))
    np.testing.assert_allclose(degrade.blur(image, kernel), direct, atol=1e-5)


def test_noise_has_the_given_strength():
    grey = np.full((128, 128, 3), 0.5, np.float32)
    for is_grey in (True, False):
        noise = degrade.gaussian_noise(grey, np.random.default_rng(0), 20.0, is_grey)
        assert noise.std() * 255 == pytest.approx(20, rel=0.05)
        assert noise.shape[-1] == (1 if is_grey else 3)
    ramp = np.broadcast_to(np.linspace(0, 1, 256, dtype=np.float32)[:, None, None], (256, 256, 3))
    noise = degrade.poisson_noise(ramp, np.random.default_rng(0), 2.0, grey=False)
    np.testing.assert_allclose(noise[192:].std(), 2 * np.sqrt(0.875 / 256), rtol=0.05)  # variance = mean / photons
    assert noise[:8].std() < 0.2 * noise[192:].std()


@pytest.mark.parametrize("size", [32, 48])
def test_degradation_depends_only_on_the_seed(size):
    image = np.random.default_rng(0).random((size, size, 3), np.float32)
    runs = [[degrade.realesrgan(image, np.random.default_rng(seed), 4) for seed in range(30)] for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == (size // 4, size // 4, 3)
        assert a.dtype == np.uint8
    assert len({run.tobytes() for run in runs[0]}) == 30


def test_degradation_approximately_preserves_the_mean(image):
    """Blur, resizing and unbiased noise; JPEG and clipping shift it a little."""
    bright = 0.25 + image / 2
    means = [degrade.realesrgan(bright, np.random.default_rng(k), 4).mean((0, 1)) / 255 for k in range(60)]
    np.testing.assert_allclose(np.mean(means, axis=0), bright.mean((0, 1)), atol=0.03)


def test_sharpening_preserves_constants_and_raises_contrast(image):
    flat = np.full((16, 16, 3), 0.4, np.float32)
    np.testing.assert_allclose(degrade.sharpen(flat), flat, atol=1e-6)
    sharp = degrade.sharpen(image)
    assert 0 <= sharp.min() <= sharp.max() <= 1
    assert sharp.std() > image.std()


# --- what pages ask for


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (TASKS["sr"](scale=2), {"kind": "sr", "small": 16}),
        (TASKS["inpaint"](paste=True), {"kind": "inpaint", "paste": True}),
        (TASKS["depth"]("metres"), {"kind": "depth", "metres": True}),
        (TASKS["depth"](), {"kind": "depth", "metres": False}),
        (TASKS["edit"](), {"kind": "image"}),
    ],
)
def test_the_exported_page_is_told_the_options(task, expected):
    assert task.in_browser(32) == expected
