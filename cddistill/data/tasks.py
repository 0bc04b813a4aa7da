"""Tasks: pure functions from an image to its conditioning image."""

import numpy as np

from cddistill.data.degrade import realesrgan
from cddistill.data.resample import resample, to_uint8

DEGRADATIONS = ("bicubic", "realesrgan")


def sr(image, rng, scale, degradation):
    """Super-resolution: the image [h,w,c] in [0, 1], made small by the factor `scale` and resized back, in [0, 1]."""
    small = realesrgan(image, rng, scale) if degradation == "realesrgan" else downsample(image, scale)
    return upsample(small, image.shape[:2])


def downsample(image, scale):
    """Image [h,w,c] in [0, 1] -> uint8 [h/scale,w/scale,c], antialiased bicubic."""
    h, w, _ = image.shape
    if h % scale or w % scale:
        raise ValueError(f"an image of {h}x{w} px cannot be made smaller by {scale}: its sides must be divisible by it")
    return to_uint8(resample(image, (h // scale, w // scale), "cubic"))


def upsample(image, size):
    """Small uint8 image [h,w,c] -> conditioning image float32 [H,W,c] in [0, 1], bicubic; size: H = W, or (H, W)."""
    size = (size, size) if np.ndim(size) == 0 else tuple(size)
    return np.clip(resample(np.float32(image) / np.float32(255), size, "cubic"), 0, 1)
