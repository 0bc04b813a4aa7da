"""Image files and arrays to uint8 RGB images of one size."""

import contextlib

import numpy as np
from PIL import Image, ImageOps

ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)  # of Pillow, for files that it cannot read
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = {"1": "L", "L": "L", "LA": "RGBA", "P": "RGBA", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA"}
"""PIL modes that are accepted, and the mode each is converted to before alpha is composited on white."""


def to_rgb(image, name):
    """A PIL image as RGB: grey is repeated, alpha is composited on white, the EXIF orientation is applied."""
    if image.mode not in FORMATS:
        bands = len(image.getbands())
        raise ValueError(f"{name} has {bands} channel(s) of mode {image.mode}; convert it to 8-bit grey or RGB")
    image = ImageOps.exif_transpose(image).convert(FORMATS[image.mode])
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read(path, name=None):
    """An image file or PIL image, in RGB. Raises ValueError, naming it, if it cannot be read."""
    name = name or path
    if isinstance(path, Image.Image):
        return to_rgb(path, "the image")
    try:
        with Image.open(path) as file:
            return to_rgb(file, name)
    except ERRORS as error:
        raise ValueError(f"{name} cannot be read ({error})") from error


def read_alpha(path):
    """The alpha channel of an image file or PIL image, oriented as `read` does: mode L, or None without one."""
    with contextlib.nullcontext(path) if isinstance(path, Image.Image) else Image.open(path) as image:
        if not image.has_transparency_data:
            return None
        return ImageOps.exif_transpose(image).convert("RGBA").getchannel("A")


def from_array(array, name):
    """A uint8 array [h,w] or [h,w,1|2|3|4] as a PIL image. Raises ValueError, naming it, for other arrays."""
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise ValueError(f"{name} is {array.dtype} {array.shape}; expected uint8 [h,w] or [h,w,c] with 1 to 4 channels")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def fit(image, size):
    """A PIL image as uint8 [size,size,3]: shorter side resized (bicubic, antialiased), then centre-cropped."""
    scale = size / min(image.size)
    w, h = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = (w - size) // 2, (h - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def resize(array, size):
    """A square uint8 array [h,h,3] resized to [size,size,3]."""
    return array if len(array) == size else fit(Image.fromarray(array), size)
