"""Super-resolution: the condition is the image downsampled by `scale` and resized to its original size."""

import dataclasses
from typing import Literal

import numpy as np

from cddistill.data import images
from cddistill.data.contracts import Task
from cddistill.data.degrade import realesrgan, sharpen
from cddistill.data.resample import resample, to_float, to_uint8
from cddistill.typed import Count


@dataclasses.dataclass(frozen=True)
class SuperResolution(Task):
    """The condition is the low-resolution image, upsampled by bicubic interpolation."""

    scale: Count = 4  # factor from the low to the high resolution
    degradation: Literal["bicubic", "realesrgan"] = "bicubic"  # "realesrgan": two stages of blur,
    # resizing, noise and JPEG
    sharpen: bool = False  # unsharp-mask the targets, as Real-ESRGAN does

    input_label = "low-resolution picture"
    input_is_target = True

    def check(self, size):
        if size % self.scale:
            raise ValueError(f"data.size {size} must be divisible by data.scale {self.scale}")

    def target(self, element):
        image = super().target(element)
        return sharpen(image) if self.sharpen else image

    def condition(self, element, rng):
        return sr(element["target"], rng, self.scale, self.degradation)

    def read(self, path, size):
        return upsample(images.fit(images.read(path), size // self.scale), size)

    def read_whole(self, path, size):
        image, small = images.read(path), size // self.scale
        if min(image.size) < small:
            sides = "{} x {}".format(*image.size)
            raise ValueError(
                f"{images.name_of(path)} is {sides} px, and a tile {small} x {small}: sample it without tiles"
            )
        return upsample(np.asarray(image), (image.height * self.scale, image.width * self.scale))

    def input_note(self, size):
        small = size // self.scale
        larger = f"a larger image is first downsampled to {small} x {small}, unless there is --tiles"
        return f"{small} x {small} px become {size} x {size}; {larger}"

    def in_browser(self, size):
        return {"kind": "sr", "small": size // self.scale}

    def references(self, cond):
        return {"bicubic": cond}


def sr(image, rng, scale, degradation):
    """The image [h,w,c] in [0, 1], degraded and downsampled by `scale`, then resized to [h,w,c], in [0, 1]."""
    small = realesrgan(image, rng, scale) if degradation == "realesrgan" else downsample(image, scale)
    return upsample(small, image.shape[:2])


def downsample(image, scale):
    """Image [h,w,c] in [0, 1] -> uint8 [h/scale,w/scale,c], antialiased bicubic."""
    h, w, _ = image.shape
    if h % scale or w % scale:
        raise ValueError(f"an image of {h}x{w} px cannot be downsampled by {scale}: its sides must be divisible by it")
    return to_uint8(resample(image, (h // scale, w // scale), "cubic"))


def upsample(image, size):
    """Small uint8 image [h,w,c] -> conditioning image float32 [H,W,c] in [0, 1], bicubic. size is H = W, or (H, W)."""
    size = (size, size) if np.ndim(size) == 0 else tuple(size)
    return np.clip(resample(to_float(image), size, "cubic"), 0, 1)
