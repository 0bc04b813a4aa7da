"""Floats to pixels, image files, and grids: figures with labels, enlarged so that single pixels are visible."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cddistill import io

PAPER, INK = (24, 24, 27), (212, 212, 216)  # a dark background suits light and dark pages
GAP = 4  # px between images
FORMATS = {  # by suffix: Pillow's format and its options
    ".png": ("PNG", {"optimize": True}),
    ".jpg": ("JPEG", {"quality": 95}),
    ".jpeg": ("JPEG", {"quality": 95}),
    ".webp": ("WEBP", {"lossless": True}),
}


def to_uint8(images, name: str = "") -> np.ndarray:
    """Images [n,h,w,1 or 3], floats (clipped to [0, 1]) or uint8, as uint8 RGB.

    The only place that turns generated floats into pixels. Raises ValueError for other shapes and types and, naming the
    image and the set that it belongs to, for values that are not finite.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"a grid takes images [n, h, w, 1 or 3], not {images.shape}")
    if np.issubdtype(images.dtype, np.floating):
        check_finite(images, name)
        images = np.rint(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)
    if images.dtype != np.uint8:
        raise ValueError(f"a grid takes floats in [0, 1] or uint8, not {images.dtype}")
    return np.repeat(images, 3 // images.shape[3], 3)


def check_finite(images, name: str = "") -> None:
    """ValueError naming the first of the images [n,h,w,c] with a value that is not finite: it would be drawn black."""
    bad = np.flatnonzero(~np.isfinite(images).all((1, 2, 3)))
    if len(bad):
        where = f"image {bad[0]} of {len(images)}" + f" in {name!r}" * bool(name)
        more = f", and so are {len(bad) - 1} more" * (len(bad) > 1)
        raise ValueError(
            f"{where} is not finite (NaN or infinity){more}: check that labels, data and weights suit the network, and "
            "try config.dtype=float32"
        )


def grid(images, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """Images [n,h,w,c] as one figure uint8 [H,W,3], row by row; nearly square unless `columns` is given."""
    images = to_uint8(images)
    columns = min(columns or int(np.ceil(len(images) ** 0.5)), len(images))
    rows = -(-len(images) // columns)
    return _paste([images[i * columns : (i + 1) * columns] for i in range(rows)], scale, left=0)


def side_by_side(rows: Mapping[str, np.ndarray], scale: int | None = None) -> np.ndarray:
    """One labelled row per entry; column i shows example i: uint8 [H,W,3].

    All entries are images [n,h,w,c] of the same shape. `scale` enlarges each pixel; by default images become about
    96 px. Raises ValueError if the shapes differ.
    """
    shapes = {label: np.shape(images)[:3] for label, images in rows.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"rows of a grid need images of one size and number, not {shapes}")
    scale = scale or enlargement(next(iter(shapes.values()))[1])
    font = ImageFont.load_default(size=14)
    left = max(int(font.getlength(label)) for label in rows) + 24
    figure = Image.fromarray(_paste([to_uint8(images, label) for label, images in rows.items()], scale, left))
    pen, height = ImageDraw.Draw(figure), (figure.height - GAP) / len(rows)
    for i, label in enumerate(rows):
        pen.text((left - 12, GAP + (i + 0.5) * height - GAP / 2), label, INK, font, anchor="rm")
    return np.asarray(figure)


def enlargement(height: int) -> int:
    """How often each pixel is repeated, so that images of this height become about 96 px."""
    return max(1, round(96 / height))


def encoded(image: np.ndarray, suffix: str = ".png") -> bytes:
    """A uint8 image [h,w,3] as the bytes of an image file, of a format in FORMATS."""
    name, options = FORMATS[suffix]
    file = BytesIO()
    Image.fromarray(image).save(file, name, **options)
    return file.getvalue()


def save_image(path, image: np.ndarray) -> None:
    """Write a uint8 image [h,w,3] atomically, in the format of the suffix. Raises ValueError for other suffixes."""
    io.write_atomic(path, encoded(image, image_suffix(path)))


def image_suffix(path) -> str:
    """The suffix of an image file to be written, in lower case. Raises ValueError unless it is one of FORMATS."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        said = f"ends in {suffix!r}" if suffix else "has no suffix"
        raise ValueError(f"--output={path} {said}: images are written as {', '.join(FORMATS)}")
    return suffix


def outputs(inputs: Sequence[Path], output, many: bool) -> list[PurePath]:
    """The file for each input's image: `output` itself or, with `many`, a file in that folder.

    a.jpg becomes a.png there; where another input would become that, too, all keep their suffix: a.jpg.png. Raises
    ValueError for a file name without a known suffix, for one where a folder is due, and if an input would be
    overwritten.
    """
    output = io.path(output)
    if not many:
        image_suffix(output)
        chosen = [output]
    elif output.suffix.lower() in FORMATS:
        raise ValueError(f"--output={output} names an image and --input is a folder: give a folder as --output, too")
    else:
        plain = len({path.stem.casefold() for path in inputs}) == len(inputs)  # some file systems ignore case
        chosen = [output / f"{path.stem if plain else path.name}.png" for path in inputs]
    read = {path.resolve() for path in inputs}
    if lost := [path for path in chosen if path.resolve() in read]:
        raise ValueError(f"--output={output} would overwrite the input {lost[0].name}: choose another place")
    return chosen


def _paste(rows, scale, left):
    """Paste rows of uint8 images [n,h,w,3] into one figure, with a left margin of `left` px."""
    height, width = (size * scale + GAP for size in rows[0].shape[1:3])
    figure = np.empty((len(rows) * height + GAP, left + max(map(len, rows)) * width + GAP, 3), np.uint8)
    figure[:] = np.array(PAPER, np.uint8).reshape(1, 1, 3)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = GAP + i * height, GAP + left + j * width
            figure[y : y + height - GAP, x : x + width - GAP] = image.repeat(scale, 0).repeat(scale, 1)
    return figure
