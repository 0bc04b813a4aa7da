"""Real-world degradation of Real-ESRGAN (Wang et al. 2021, arXiv:2107.10833): blur, resize, noise and JPEG, twice.

    stage 1: blur -> resize -> noise -> JPEG
    stage 2: blur -> resize -> noise
    end:     resize to the target -> sinc -> JPEG, or JPEG -> resize -> sinc, each with probability 1/2

Images are float32 [h,w,3] in [0, 1]. Ranges are from the published training configuration unless noted.
"""

import dataclasses
import io

import numpy as np
from PIL import Image
from scipy import fft
from scipy.special import j1

from cddistill.data.resample import resample, to_float, to_uint8

SIZES = np.arange(7, 22, 2)  # kernel sizes, pixels; range from the reference implementation's defaults, unverified
SHAPES = ("gaussian", "gaussian", "generalised", "generalised", "plateau", "plateau")  # isotropic, then anisotropic
SHAPE_PROBS = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
SINC_PROB = 0.1  # of a sinc filter instead of a blur
BETA = {"gaussian": (1.0, 1.0), "generalised": (0.5, 4.0), "plateau": (1.0, 2.0)}
RESIZE_KINDS = ("area", "bilinear", "bicubic")
GREY_PROB = 0.4  # of the same noise in all channels
JPEG_QUALITY = (30.0, 95.0)
FINAL_SINC_PROB = 0.8
GREY = np.float32([0.299, 0.587, 0.114])  # BT.601 luma


@dataclasses.dataclass(frozen=True)
class Stage:
    """Ranges of one stage of blur, resize and noise."""

    blur_prob: float
    blur: tuple[float, float]  # standard deviation, pixels
    resize_probs: tuple[float, float, float]  # of up, down, keep
    resize: tuple[float, float]  # factor
    gaussian: tuple[float, float]  # standard deviation, 8-bit levels
    poisson: tuple[float, float]  # scale of shot noise


FIRST = Stage(1.0, (0.2, 3.0), (0.2, 0.7, 0.1), (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
SECOND = Stage(0.8, (0.2, 1.5), (0.3, 0.4, 0.3), (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))
GAUSSIAN_PROB = 0.5  # else Poisson


def realesrgan(image, rng, scale):
    """Image [h,w,3] in [0, 1] -> degraded uint8 [h/scale,w/scale,3]. All randomness comes from rng."""
    h, w, _ = image.shape
    if h % scale or w % scale:
        raise ValueError(f"an image of {h}x{w} px cannot be downsampled by {scale}: its sides must be divisible by it")
    target = (h // scale, w // scale)
    image = jpeg(stage(image, rng, FIRST, (h, w)), rng)
    image = stage(image, rng, SECOND, target)
    ringing = rng.random() < FINAL_SINC_PROB
    final = sinc_kernel(rng.choice(SIZES), rng.uniform(np.pi / 3, np.pi)) if ringing else np.ones((1, 1), np.float32)
    shrink = lambda x: np.clip(blur(resample(x, target, rng.choice(RESIZE_KINDS)), final), 0, 1)
    image = jpeg(shrink(image), rng) if rng.random() < 0.5 else shrink(jpeg(image, rng))
    return to_uint8(image)


def stage(image, rng, ranges, base):
    """Blur, resize to `base` (height, width) times a random factor, add noise. The result is in [0, 1]."""
    if rng.random() < ranges.blur_prob:
        image = blur(image, random_kernel(rng, ranges.blur))
    low, high = ranges.resize
    factor = (rng.uniform(1, high), rng.uniform(low, 1), 1.0)[rng.choice(3, p=ranges.resize_probs)]
    size = [max(1, round(side * factor)) for side in base]
    image = np.clip(resample(image, size, rng.choice(RESIZE_KINDS)), 0, 1)
    kind, scale = (gaussian_noise, ranges.gaussian) if rng.random() < GAUSSIAN_PROB else (poisson_noise, ranges.poisson)
    return np.clip(image + kind(image, rng, rng.uniform(*scale), grey=rng.random() < GREY_PROB), 0, 1)


def random_kernel(rng, sigma_range):
    """A blur kernel [k,k] that sums to 1, with random size, shape, widths and angle; a sinc with SINC_PROB."""
    size = rng.choice(SIZES)
    if rng.random() < SINC_PROB:  # cutoffs from the reference implementation's defaults, unverified
        return sinc_kernel(size, rng.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi))
    shape = rng.choice(len(SHAPES), p=SHAPE_PROBS)
    sigma = rng.uniform(*sigma_range, 2)
    if shape % 2 == 0:
        sigma[1] = sigma[0]
    low, high = BETA[SHAPES[shape]]
    # Below or above 1 with probability 1/2 each: from the reference implementation's defaults, unverified.
    beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    return blur_kernel(size, sigma, rng.uniform(-np.pi, np.pi), beta, plateau=SHAPES[shape] == "plateau")


def blur_kernel(size, sigma, angle, beta=1.0, plateau=False):
    """exp(-q^beta / 2), or 1 / (1 + q^beta) for plateau; q: squared distance over sigma (pixels), rotated by angle."""
    x, y = grid(size)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    q = ((u / sigma[0]) ** 2 + (v / sigma[1]) ** 2) ** beta
    kernel = 1 / (1 + q) if plateau else np.exp(-q / 2)
    return (kernel / kernel.sum()).astype(np.float32)


def sinc_kernel(size, cutoff):
    """Ideal circular low-pass filter with a cutoff in radians per pixel. It causes ringing, as oversharpening does."""
    r = np.hypot(*grid(size))
    with np.errstate(invalid="ignore"):
        kernel = np.where(r > 0, cutoff * j1(cutoff * r) / (2 * np.pi * r), cutoff**2 / (4 * np.pi))
    return (kernel / kernel.sum()).astype(np.float32)


def grid(size):
    """Coordinates of a kernel's taps, in pixels from its centre."""
    axis = np.arange(size) - size // 2
    return np.meshgrid(axis, axis)


def blur(image, kernel):
    """Convolution with a kernel [k,k], k odd. The image is mirrored at its border."""
    h, w, _ = image.shape
    k = len(kernel)
    padded = np.pad(np.moveaxis(image, 2, 0), ((0, 0), (k // 2, k // 2), (k // 2, k // 2)), mode="reflect")
    shape = [fft.next_fast_len(side, real=True) for side in padded.shape[1:]]  # the wrap-around is cropped below
    spectrum = fft.rfft2(padded, shape) * fft.rfft2(kernel, shape)
    blurred = fft.irfft2(spectrum, shape)[:, k - 1 : k - 1 + h, k - 1 : k - 1 + w]
    return np.ascontiguousarray(np.moveaxis(blurred, 0, 2))


def gaussian_noise(image, rng, sigma, grey):
    """White noise; sigma is in 8-bit levels."""
    h, w, c = image.shape
    return rng.standard_normal((h, w, 1 if grey else c), np.float32) * np.float32(sigma / 255)


def poisson_noise(image, rng, scale, grey):
    """Shot noise times `scale`. The photon count of white is the number of grey levels in the image.

    That number is rounded up to a power of two, as in the reference implementation (unverified).
    """
    levels = np.rint((image @ GREY[:, None] if grey else image) * 255)
    photons = 2 ** np.ceil(np.log2(max(2, np.count_nonzero(np.bincount(levels.astype(np.uint8).ravel())))))
    levels /= 255
    return ((rng.poisson(levels * photons) / photons - levels) * scale).astype(np.float32)


def jpeg(image, rng):
    """JPEG compression at a random quality."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(image)).save(buffer, "JPEG", quality=round(rng.uniform(*JPEG_QUALITY)))
    with Image.open(buffer) as decoded:
        return to_float(decoded)


def sharpen(image, weight=0.5, radius=51, threshold=10):
    """Unsharp mask where the residual exceeds `threshold` 8-bit levels, as Real-ESRGAN sharpens its targets.

    Numbers are the reference implementation's defaults, unverified.
    """
    sigma = 0.15 * radius + 0.35  # the usual width of a Gaussian in a window of `radius` pixels
    kernel = blur_kernel(radius, (sigma, sigma), 0.0)
    residual = image - blur(image, kernel)
    mask = blur((np.abs(residual) * 255 > threshold).astype(np.float32), kernel)
    return image + mask * (np.clip(image + weight * residual, 0, 1) - image)
