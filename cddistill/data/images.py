"""Image files and arrays to uint8 RGB images of one size."""

import contextlib
import importlib.util
import io
import math
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from cddistill.data.listing import is_hiccup

AVIF = (".avif",) if importlib.util.find_spec("PIL._avif") else ()  # not in every build of Pillow
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", *AVIF)
FORMATS = {
    **dict.fromkeys(("1", "L", "I;16", "I;16L", "I;16B", "I;16N", "I"), "L"),
    **dict.fromkeys(("RGB", "RGBX", "CMYK", "YCbCr", "HSV"), "RGB"),
    **dict.fromkeys(("P", "PA", "LA", "RGBA", "RGBa"), "RGBA"),
}
"""PIL modes that are accepted, and the mode each is converted to before alpha is composited on white."""

KEY_GAIN = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}  # of PNG's transparent colour, by how the pixels are stored
TURNS = dict(enumerate([Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90], start=2))  # by the EXIF orientation  # fmt: skip
WHOLE = "whole"  # key of the info of a PIL image
MAX_PIXELS = 2**26  # of an image resized as a whole, before it is cropped


class Whole(NamedTuple):
    """The file that a PIL image was read from."""

    sides: tuple[int, int]  # its (width, height), upright
    box: tuple[float, float, float, float]  # left, top, right and bottom of the picture in the PIL image, pixels


def is_image(name: str) -> bool:
    """Whether a file has the name of an image that can be read."""
    return name.lower().endswith(SUFFIXES)


def to_rgb(image, name):
    """A PIL image as 8-bit RGB: its first frame, upright by its EXIF orientation, with transparency on white.

    Grey is repeated, CMYK is converted by Pillow's formula, 16-bit values keep their upper 8 bits. Colour profiles are
    not applied. Raises ValueError, naming it, for floating point and other modes.
    """
    if image.mode not in FORMATS:
        bands = len(image.getbands())
        raise ValueError(f"{name} has {bands} channel(s) of mode {image.mode}; convert it to 8-bit grey or RGB")
    stored = image.tile[0][3] if getattr(image, "tile", None) else image.mode  # lost once the pixels are loaded
    image.load()
    clear, turn = transparent(image, stored), TURNS.get(orientation(image))
    if image.mode.startswith("I"):
        image = upper_bits(image, name)
    image = image.convert(FORMATS[image.mode])
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if clear is not None:
        image.paste("white", mask=Image.fromarray(clear))
    return image if turn is None else image.transpose(turn)


def orientation(image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the tags cannot be read, for they say nothing of the pixels."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow raises almost anything for odd tags
        return 1


def upright(image, sides):
    """(width, height), exchanged if the image lies on its side."""
    return sides[::-1] if 5 <= orientation(image) <= 8 else sides


def whole(image) -> Whole:
    """The file of a PIL image that was not cropped since, also if it was decoded at a fraction of its size."""
    return image.info.get(WHOLE, Whole(image.size, (0, 0, *image.size)))


def shown(sides, decoded, turn) -> tuple[float, float, float, float]:
    """`Whole.box` of a file with these upright sides, decoded to such ones and then turned by its EXIF orientation.

    A last row and column as stored may have been decoded from fewer pixels than the others.
    """
    by = 2 ** round(math.log2(max(sides) / max(decoded)))
    w, h = sides[0] / by, sides[1] / by
    left = decoded[0] - w if turn in (2, 3, 6, 7) else 0
    top = decoded[1] - h if turn in (3, 4, 7, 8) else 0
    return (left, top, left + w, top + h)


def transparent(image, stored):
    """Where a grey or RGB image has the colour that its file declares transparent, bool [h,w]; None without one.

    Pillow gives the colour as the file has it: in fewer or more bits than the pixels. stored is its raw mode.
    """
    key = image.info.get("transparency")
    if key is None or image.mode not in ("1", "L", "RGB", "I", "I;16"):
        return None
    pixels = np.asarray(image)
    if image.mode == "1":
        return pixels == bool(key)
    key = np.floor(np.multiply(key, KEY_GAIN.get(stored, 1)))
    return (pixels == key).all(-1) if image.mode == "RGB" else pixels == key


def upper_bits(image, name):
    """A 16-bit grey image in 8 bits. ValueError for values outside 16 bits, whose scale is unknown."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(f"{name} has values {pixels.min()} to {pixels.max()}; convert it to 8-bit grey or RGB")
    return Image.fromarray((pixels >> 8).astype(np.uint8))


def name_of(path) -> str:
    """A file's path, for messages; a PIL image has no name."""
    return "the image" if isinstance(path, Image.Image) else str(path)


def read(path, name=None, least=None):
    """An image file (its path, or it opened) or PIL image, in RGB. Raises ValueError, naming it, if it cannot be read.

    With least, (height, width) in pixels, a JPEG is decoded at the smallest of 1, 1/2, 1/4 and 1/8 of its size at which
    it still covers that; see `whole`. It finds the same errors. Errors of the disk or the network pass.
    """
    name = name or name_of(path)
    try:
        if isinstance(path, Image.Image):
            return to_rgb(path, name)
        with Image.open(path) as file:
            if not least or not isinstance(file, JpegImageFile):
                return to_rgb(file, name)
            sides = upright(file, file.size)
            file.draft(None, upright(file, least[::-1]))
            image = to_rgb(file, name)
            image.info[WHOLE] = Whole(sides, shown(sides, image.size, orientation(file)))
            return image
    except Exception as error:  # Pillow raises almost anything for broken files
        if is_hiccup(error):
            raise
        said = str(error) or type(error).__name__
        raise ValueError(said if said.startswith(f"{name} ") else f"{name} cannot be read ({said})") from error


def sides_of(path, name=None) -> tuple[int, int]:
    """(width, height) of an image file as `read` returns it, from its header. ValueError, naming it, for any other."""
    try:
        with Image.open(path) as file:
            return upright(file, file.size)
    except Exception as error:  # Pillow raises almost anything for broken files
        if is_hiccup(error):
            raise
        raise ValueError(f"{name or name_of(path)} cannot be read ({error})") from error


def read_alpha(path):
    """The alpha channel of an image file or PIL image, upright as `read` returns it: mode L, or None without one."""
    with contextlib.nullcontext(path) if isinstance(path, Image.Image) else Image.open(path) as image:
        if not image.has_transparency_data:
            return None
        alpha, turn = image.convert("RGBA").getchannel("A"), TURNS.get(orientation(image))
        return alpha if turn is None else alpha.transpose(turn)


def read_map(path, name=None) -> Image.Image:
    """A depth map as a PIL image of floats (mode F), from a .npy file or an 8 or 16-bit image with equal channels.

    path may also be an opened file or a PIL image. Raises ValueError, naming it, for anything else; pickled objects are
    never loaded.
    """
    name = name or name_of(path)
    try:
        values = stored_values(path)
    except Exception as error:  # Pillow raises almost anything for broken files
        if is_hiccup(error):
            raise
        raise ValueError(f"{name} cannot be read ({error})") from error
    numbers = values.dtype.kind in "uif" and values.size > 0
    if numbers and values.ndim == 3 and (values.shape[2] == 1 or (values == values[..., :1]).all()):
        values = values[..., 0]
    if not numbers or values.ndim != 2:
        raise ValueError(f"{name} is {values.dtype} {values.shape}; expected a depth map of one channel, [h, w]")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        return Image.fromarray(values.astype(np.float32))


def stored_values(path) -> np.ndarray:
    """The numbers in a .npy file, an image file or a PIL image. ValueError for colours of a palette: they are none."""
    if is_npy(path):
        try:
            values = np.load(path, allow_pickle=False)
        except OSError:
            raise
        except Exception:  # objects, no whole array, or an odd header, for which numpy raises many types
            values = None
        if not isinstance(values, np.ndarray):  # an archive of several is none either
            raise ValueError("it holds no array of numbers; save one with numpy.save")
        return values
    with contextlib.nullcontext(path) if isinstance(path, Image.Image) else Image.open(path) as image:
        if image.mode in ("P", "PA"):
            raise ValueError("its pixels are colours of a palette; save it in 8 or 16-bit grey")
        return np.asarray(image)


def is_npy(path) -> bool:
    """Whether this is a .npy file: by its name, or if it is opened by its first bytes."""
    if isinstance(path, io.BytesIO):
        return bytes(path.getbuffer()[:6]) == b"\x93NUMPY"
    return not isinstance(path, Image.Image) and path.suffix.lower() == ".npy"


def from_array(array, name):
    """A uint8 array [h,w] or [h,w,1|2|3|4] as a PIL image, one of other numbers [h,w] as a map (mode F), which is no
    picture. Raises ValueError, naming it, for other arrays."""
    array = np.asarray(array)
    if array.ndim == 2 and array.size and array.dtype != np.uint8 and array.dtype.kind in "uif":
        return Image.fromarray(array.astype(np.float32))
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or not array.size:
        raise ValueError(f"{name} is {array.dtype} {array.shape}; expected uint8 [h,w] or [h,w,c] with 1 to 4 channels")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def fit(image, size):
    """A PIL image as uint8 [h,w,3], with h = w = size or (h, w) = size: resized to cover this (bicubic, antialiased),
    then centre-cropped.

    A depth map becomes float32 [h,w]; it is resized bilinearly, so that no distance turns negative at an edge.
    """
    method = Image.Resampling.BILINEAR if image.mode == "F" else Image.Resampling.BICUBIC
    height, width = shape_of(size)
    sides, (x0, y0, x1, y1) = whole(image)
    (w, h), (left, top) = covering(sides, size)
    if w * h > MAX_PIXELS or sides != image.size:  # 2 x 16000 px, say: resize only the part that is kept
        sx, sy = (x1 - x0) / w, (y1 - y0) / h
        box = (x0 + left * sx, y0 + top * sy, x0 + (left + width) * sx, y0 + (top + height) * sy)
        return np.asarray(image.resize((width, height), method, box))
    image = image.resize((w, h), method)
    return np.asarray(image.crop((left, top, left + width, top + height)))


def shape_of(size) -> tuple[int, int]:
    """(height, width) of a size in pixels: one number for squares, or (height, width)."""
    return (size, size) if np.ndim(size) == 0 else tuple(size)


def covering(sides, size) -> tuple[tuple[int, int], tuple[int, int]]:
    """((width, height), (left, top)) to which `fit` resizes an image of these sides (width, height), and crops it."""
    height, width = shape_of(size)
    scale = max(width / sides[0], height / sides[1])
    w, h = (max(least, round(side * scale)) for least, side in zip((width, height), sides, strict=True))
    return (w, h), ((w - width) // 2, (h - height) // 2)


def resize(array, size):
    """A square uint8 array [h,h,3] resized to [size,size,3]."""
    return array if len(array) == size else fit(Image.fromarray(array), size)
