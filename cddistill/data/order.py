"""In which order the examples of a data set are used: a pure function of the seed and the position."""

import dataclasses
import functools
import hashlib
import sys

import grain
import numpy as np

FIRST = 1024  # positions that `digest` tells apart


def shuffled(dataset, seed: int | tuple[int, ...], window: int = 0) -> grain.MapDataset:
    """An endless stream of items. Each epoch has every item once, with a new order and new random choices.

    With a window the shards are shuffled, and in the row that they make, each `window` items by themselves: whoever
    reads them one after another reads few shards at a time. Raises ValueError for a data set without shards.
    """
    order, choices = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    if window:
        layout = getattr(dataset, "layout", lambda: None)()
        if layout is None:
            raise ValueError(
                f"data.window={window} needs data in shards: set data.source to one of these, or window to 0"
            )
        positions = grain.MapDataset.range(sys.maxsize).map(ShardOrder(*layout, window, order))
    else:
        positions = grain.MapDataset.range(len(dataset)).shuffle(seed=order).repeat()
    return positions.random_map(dataset.item, seed=choices)


@dataclasses.dataclass(frozen=True, eq=False)
class ShardOrder:
    """Maps position k of an endless stream to one of a data set whose shards are read one after another."""

    order: np.ndarray  # positions of the data set, shard after shard
    ends: np.ndarray  # how many there are up to and with each shard
    window: int
    seed: int

    def __call__(self, k: int) -> int:
        n = len(self.order)
        epoch, at = divmod(k, n)
        number, inside = divmod(at, self.window)
        size = min(self.window, n - number * self.window)
        at = number * self.window + permuted(size, self.seed, epoch, number)[inside]
        shards, ends = self.shards(epoch)
        place = int(np.searchsorted(ends, at, "right"))
        return int(self.order[self.ends[shards[place]] - (ends[place] - at)])

    @functools.lru_cache(4)  # noqa: B019  (as long as the run)
    def shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the number of positions up to and with each."""
        sizes = np.diff(self.ends, prepend=0)
        shards = permuted(len(sizes), self.seed, epoch)
        return shards, np.cumsum(sizes[shards])


@functools.lru_cache(64)
def permuted(n: int, *seed: int) -> np.ndarray:
    """0 ... n - 1 in a pseudo-random order."""
    return np.random.default_rng(seed).permutation(n)


def digest(dataset, seed: int | tuple[int, ...], window: int = 0) -> str:
    """16 hexadecimal digits that two hosts have in common if they read the same examples in the same order.

    From the first FIRST positions, and the names of what is there, if the data set has them.
    """
    name = getattr(dataset, "name", str)
    found = shuffled(Positions(dataset), seed, window)
    said = "\n".join(name(found[k]) for k in range(min(FIRST, len(dataset))))
    return hashlib.sha256(f"{len(dataset)}\n{said}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


class Positions:
    """A data set whose items are their positions."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def item(self, i, rng):
        """i."""
        return i

    def layout(self):
        """That of the data set."""
        return getattr(self.dataset, "layout", lambda: None)()
