"""Many small images of one size as one image file, row by row."""

from pathlib import Path

import numpy as np
from PIL import Image


def tiles(path: Path, size: int) -> np.ndarray:
    """The size x size tiles of a sheet, row by row, uint8 [n, size, size, 3]; the last ones may be white padding.

    Raises ValueError, in one sentence, if the file is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            sheet = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is part of this package and cannot be read ({error}): reinstall cddistill") from error
    h, w, _ = sheet.shape
    grid = sheet.reshape(h // size, size, w // size, size, 3).swapaxes(1, 2)
    return grid.reshape(-1, size, size, 3)


def sheet(images: np.ndarray, columns: int) -> Image.Image:
    """Images [n, h, w, 3] as one image; empty tiles at the end are white."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * columns, h, w, c), 255, np.uint8)
    grid[:n] = images
    return Image.fromarray(grid.reshape(rows, columns, h, w, c).swapaxes(1, 2).reshape(rows * h, columns * w, c))
