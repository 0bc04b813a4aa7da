"""Training on images of several shapes (data.buckets): each image in the bucket of the nearest aspect ratio, each batch
of one bucket, in an order that is a pure function of the seed and the step."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from cddistill.data.order import permuted, shuffled
from cddistill.typed import Limit

MAX_SIDE = 2**14  # px of an image
Shape = tuple[int, int]  # (height, width)


def parse(text: str) -> tuple[Shape, ...]:
    """Shapes of a text like "512x512,576x448", widths x heights; () for "". Raises ValueError for any other text."""
    found = [re.fullmatch(r"(\d{1,5})x(\d{1,5})", part.strip()) for part in text.split(",")] if text else []
    shapes = tuple((int(match[2]), int(match[1])) for match in found if match)
    if len({*shapes}) < len(found) or not all(1 <= side <= MAX_SIDE for shape in shapes for side in shape):
        raise ValueError(text)
    return shapes


def readable(text: str) -> bool:
    """Whether `parse` takes a text."""
    try:
        return bool(parse(text)) or not text
    except ValueError:
        return False


def named(shape: Shape) -> str:
    """A shape as `parse` takes it: "576x448" for (448, 576)."""
    height, width = shape
    return f"{width}x{height}"


SHAPES = Limit(
    f"widths x heights like 512x512,576x448, each once and with sides of 1 to {MAX_SIDE} px, or nothing", readable
)


def divide(sides: np.ndarray, shapes: tuple[Shape, ...]) -> dict[Shape, np.ndarray]:
    """{shape: the numbers of its images, uint32} for shapes that have some; sides are [n, 2], (width, height).

    An image belongs to the shape whose aspect ratio is nearest, by its logarithm; the first of several. Images whose
    sides are not known, 0, belong to the first.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.log(sides[:, 0] / sides[:, 1])
    number, best = np.zeros(len(sides), np.uint16), np.full(len(sides), np.inf)
    for k, (height, width) in enumerate(shapes):
        distance = np.abs(ratios - np.log(width / height))
        closer = distance < best
        number[closer], best[closer] = k, distance[closer]
    rows = {shape: np.flatnonzero(number == k).astype(np.uint32) for k, shape in enumerate(shapes)}
    return {shape: x for shape, x in rows.items() if len(x)}


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The images of one bucket, in its shape: `contracts.Images`."""

    source: Any  # of all, whose `element` takes a shape
    rows: np.ndarray  # their positions there
    shape: Shape

    @property
    def num_labels(self):
        return self.source.num_labels

    def __len__(self):
        return len(self.rows)

    def name(self, i):
        """That of the source."""
        return self.source.name(int(self.rows[i]))

    def element(self, i, rng):
        """Image i of the bucket."""
        return self.source.element(int(self.rows[i]), rng, self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Which bucket each step has. Every image is used once an epoch; what fills no batch of its bucket waits for the
    next epoch, so that in the long run no image is used more often than another."""

    sizes: np.ndarray  # images in each bucket, int64
    batch_size: int
    seed: int

    def __call__(self, step: int) -> tuple[int, int]:
        """(the bucket of a step from 0, how many batches of this bucket came before)."""
        epoch = self.epoch(step)
        first = self.before(epoch)
        ends = np.cumsum(self.before(epoch + 1) - first)
        place = int(permuted(int(ends[-1]), self.seed, epoch)[step - int(first.sum())])
        bucket = int(np.searchsorted(ends, place, "right"))
        return bucket, int(first[bucket]) + place - (int(ends[bucket - 1]) if bucket else 0)

    def before(self, epoch: int) -> np.ndarray:
        """The number of whole batches of each bucket in the first epochs, int64."""
        return epoch * self.sizes // self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to: the last one before which there are at most `step` batches."""
        epoch = step * self.batch_size // int(self.sizes.sum())
        while self.before(epoch + 1).sum() <= step:
            epoch += 1
        return epoch


@dataclasses.dataclass(frozen=True, eq=False)
class InTurn:
    """An endless stream of items, of which `batch_size` that follow each other are of one bucket."""

    streams: list  # endless, one for each bucket
    schedule: Schedule

    @classmethod
    def of(cls, parts: Mapping[Shape, Any], seed: int, batch_size: int, window: int = 0) -> "InTurn":
        """That of data sets by shape; `window` is that of `shuffled`."""
        sizes = np.array([len(part) for part in parts.values()], np.int64)
        streams = [shuffled(part, (seed, k), window) for k, part in enumerate(parts.values())]
        return cls(streams, Schedule(sizes, batch_size, seed))

    def __getitem__(self, k: int):
        step, row = divmod(int(k), self.schedule.batch_size)
        bucket, number = self.batch(step)
        return self.streams[bucket][number * self.schedule.batch_size + row]

    @functools.lru_cache(64)  # noqa: B019  (as long as the run)
    def batch(self, step: int) -> tuple[int, int]:
        """As the schedule has it, looked up once for all rows of a step."""
        return self.schedule(step)
