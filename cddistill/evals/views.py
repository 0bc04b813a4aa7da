"""How published metrics see an image: uint8 [h, w, 3] to the 299 px of Inception-v3 or the pixels of CLIP.

The way of resizing moves FID by whole points (Parmar et al. 2022, arXiv:2104.11222), so it belongs to the protocol.
"""

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

SIDE = 299  # px

Pixels = UInt8[np.ndarray, "h w 3"]
View = Float[np.ndarray, "299 299 3"]  # in [0, 255], not rounded


def clean(image: Pixels) -> View:
    """As clean-fid: Pillow's bicubic resizing of each channel in float32, antialiased, cut to [0, 255], not rounded."""
    channels = [Image.fromarray(x.astype(np.float32)) for x in np.moveaxis(image, -1, 0)]  # of mode F
    resized = [np.asarray(x.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for x in channels]
    return np.clip(np.stack(resized, -1), 0.0, 255.0)


def tensorflow(image: Pixels) -> View:
    """As the first FIDs and EDM: bilinear without antialiasing, row i taken at i h / 299 (TensorFlow 1's default)."""
    x = image.astype(np.float32)
    for axis, n in enumerate(image.shape[:2]):
        at = np.arange(SIDE) * (n / SIDE)
        low = at.astype(int)
        share = (at - low).astype(np.float32).reshape(-1, *[1] * (2 - axis))
        first, second = (np.take(x, np.minimum(i, n - 1), axis) for i in (low, low + 1))
        x = first + (second - first) * share
    return x


def square(image: Pixels, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The largest square in the middle, resized by Pillow's Lanczos filter to size x size px (GigaGAN's evaluation)."""
    cut = centre(image, min(image.shape[:2]))
    return np.asarray(Image.fromarray(cut).resize((size, size), Image.Resampling.LANCZOS))


def clean_256(image: Pixels) -> View:
    """Cropped and resized to 256 px in 8 bits, then as clean-fid."""
    return clean(square(image, 256))


def clean_512(image: Pixels) -> View:
    """Cropped and resized to 512 px in 8 bits, then as clean-fid."""
    return clean(square(image, 512))


def patch(image: Pixels) -> View:
    """The 299 x 299 px in the middle, not resized; a smaller image is resized as a whole, as in DMD2's evaluation."""
    return clean(centre(image, SIDE) if min(image.shape[:2]) >= SIDE else image)


def centre(image: Pixels, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The size x size px in the middle; of an odd margin the half is rounded to the even number, as in torchvision."""
    top, left = (round((n - size) / 2) for n in image.shape[:2])
    return image[top : top + size, left : left + size]
