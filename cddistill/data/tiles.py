"""Images larger than a network's, in overlapping square tiles: cut apart, and blended together again."""

import numpy as np

OVERLAP = 0.25  # of neighbouring tiles, at least, as a part of their side (ours)


def starts(length: int, size: int, unit: int = 1) -> list[int]:
    """Where tiles of `size` px start on a side of `length` px: as few as overlap enough, evenly spaced.

    All three are multiples of `unit`, the pixels of an image that are one of its latent, where tiles are cut.
    """
    length, size = length // unit, size // unit
    step = size - int(np.ceil(size * OVERLAP))
    n = 1 + int(np.ceil((length - size) / max(step, 1)))
    return (unit * np.rint(np.linspace(0, length - size, n)).astype(int)).tolist()


def cut(image: np.ndarray, size: int) -> np.ndarray:
    """The tiles [n, size, size, c] of an image [h, w, c] with h, w >= size, row by row."""
    rows, columns = (starts(length, size) for length in image.shape[:2])
    return np.stack([image[y : y + size, x : x + size] for y in rows for x in columns])


def join(tiles: np.ndarray, shape: tuple[int, int], unit: int = 1) -> np.ndarray:
    """The image float32 [*shape, c] of the tiles [n, size, size, c] that `cut` makes of one, or of its latent.

    Where tiles overlap, it is their mean with weights that fall linearly towards the inner borders of each.
    """
    size = tiles.shape[1]
    rows, columns = (weights(length, size, unit) for length in shape)
    image = np.zeros((*shape, tiles.shape[-1]), np.float32)
    grid = [(row, column) for row in rows for column in columns]
    for tile, ((y, down), (x, across)) in zip(tiles, grid, strict=True):
        image[y : y + size, x : x + size] += np.float32(np.outer(down, across))[..., None] * tile
    return image


def weights(length: int, size: int, unit: int = 1) -> list[tuple[int, np.ndarray]]:
    """(start, weights float64 [size]) of each tile along a side; at every pixel the weights of its tiles sum to 1."""
    at = starts(length, size, unit)
    found = [np.ones(size) for _ in at]
    for before, after, left, right in zip(found, found[1:], at, at[1:], strict=False):
        overlap = left + size - right
        rise = (np.arange(overlap) + 0.5) / overlap
        before[-overlap:] *= rise[::-1]
        after[:overlap] *= rise
    total = np.zeros(length)  # other than 1 only where three tiles overlap
    for start, values in zip(at, found, strict=True):
        total[start : start + size] += values
    return [(start, values / total[start : start + size]) for start, values in zip(at, found, strict=True)]
