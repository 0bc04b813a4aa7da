"""Image grids: uint8 figures with labels, enlarged so that single pixels are visible."""

from collections.abc import Mapping
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cddistill import io

PAPER, INK = (24, 24, 27), (212, 212, 216)  # a dark background suits light and dark pages
GAP = 4  # px between images


def to_uint8(images) -> np.ndarray:
    """Images [n,h,w,1 or 3], floats (clipped to [0, 1]) or uint8, as uint8 RGB. Raises ValueError for others."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"a grid takes images [n, h, w, 1 or 3], not {images.shape}")
    if np.issubdtype(images.dtype, np.floating):
        images = np.rint(np.clip(np.nan_to_num(images), 0.0, 1.0) * 255.0).astype(np.uint8)  # nan becomes black
    if images.dtype != np.uint8:
        raise ValueError(f"a grid takes floats in [0, 1] or uint8, not {images.dtype}")
    return np.repeat(images, 3 // images.shape[3], 3)


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
    scale = scale or max(1, round(96 / next(iter(shapes.values()))[1]))
    font = ImageFont.load_default(size=14)
    left = max(int(font.getlength(label)) for label in rows) + 24
    figure = Image.fromarray(_paste([to_uint8(images) for images in rows.values()], scale, left))
    pen, height = ImageDraw.Draw(figure), (figure.height - GAP) / len(rows)
    for i, label in enumerate(rows):
        pen.text((left - 12, GAP + (i + 0.5) * height - GAP / 2), label, INK, font, anchor="rm")
    return np.asarray(figure)


def png(image: np.ndarray) -> bytes:
    """A uint8 image [h,w,3] as the bytes of a PNG file."""
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return file.getvalue()


def save_png(path, image: np.ndarray) -> None:
    """Write a uint8 image [h,w,3] as a PNG file, atomically."""
    io.write_atomic(path, png(image))


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
