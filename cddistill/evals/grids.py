"""Pictures of pictures: uint8 grids of images, with labels, enlarged so that every pixel can be seen."""

import io
import os
import pathlib
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (24, 24, 27), (212, 212, 216)  # a dark wall suits pictures on light and on dark pages
GAP = 4  # px between pictures


def to_uint8(images) -> np.ndarray:
    """Images [n,h,w,1 or 3], floats in [0, 1] (clipped to it) or uint8, as uint8 RGB. Raises ValueError for others."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"a grid takes images [n, h, w, 1 or 3], not {images.shape}")
    if np.issubdtype(images.dtype, np.floating):
        images = np.rint(np.clip(np.nan_to_num(images), 0.0, 1.0) * 255.0).astype(np.uint8)  # nan is shown black
    if images.dtype != np.uint8:
        raise ValueError(f"a grid takes floats in [0, 1] or uint8, not {images.dtype}")
    return np.repeat(images, 3 // images.shape[3], 3)


def grid(images, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """Images [n,h,w,c] as one picture uint8 [H,W,3], row by row; as square as can be unless `columns` is given."""
    images = to_uint8(images)
    columns = min(columns or int(np.ceil(len(images) ** 0.5)), len(images))
    rows = -(-len(images) // columns)
    return _paste([images[i * columns : (i + 1) * columns] for i in range(rows)], scale, left=0)


def side_by_side(rows: Mapping[str, np.ndarray], scale: int | None = None) -> np.ndarray:
    """One labelled row per entry, the i-th column showing one subject: uint8 [H,W,3].

    All entries are images [n,h,w,c] of one shape; `scale` enlarges each pixel, to pictures of about 96 px by default.
    Raises ValueError if their shapes differ.
    """
    shapes = {label: np.shape(images)[:3] for label, images in rows.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"rows of a grid need images of one size and number, not {shapes}")
    scale = scale or max(1, round(96 / next(iter(shapes.values()))[1]))
    font = ImageFont.load_default(size=14)
    left = max(int(font.getlength(label)) for label in rows) + 24
    picture = Image.fromarray(_paste([to_uint8(images) for images in rows.values()], scale, left))
    pen, height = ImageDraw.Draw(picture), (picture.height - GAP) / len(rows)
    for i, label in enumerate(rows):
        pen.text((left - 12, GAP + (i + 0.5) * height - GAP / 2), label, INK, font, anchor="rm")
    return np.asarray(picture)


def png(picture: np.ndarray) -> bytes:
    """A uint8 picture [h,w,3] as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def save_png(path, picture: np.ndarray) -> None:
    """Write a uint8 picture [h,w,3]; whoever reads the file sees all of it or the one before."""
    replace(path, png(picture))


def replace(path, content: bytes) -> None:
    """Write a file at once: a reader, or a crash, never finds half of it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _paste(rows, scale, left):
    """Rows of uint8 images [n,h,w,3] on one sheet, `left` px from its edge."""
    height, width = (size * scale + GAP for size in rows[0].shape[1:3])
    sheet = np.empty((len(rows) * height + GAP, left + max(map(len, rows)) * width + GAP, 3), np.uint8)
    sheet[:] = np.array(PAPER, np.uint8).reshape(1, 1, 3)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            y, x = GAP + i * height, GAP + left + j * width
            sheet[y : y + height - GAP, x : x + width - GAP] = image.repeat(scale, 0).repeat(scale, 1)
    return sheet
