"""What an index of millions of images in shards costs a host: seconds and memory of building and of opening it.

    python -m benchmarks.index [--rows=12000000] [--shards=1200]

The shards are empty files and their samples are made up, so that what is measured is the index and not a disk: names
are hashed, rows are written, mapped, divided into splits and shuffled as for a run, and their sides, which are made up,
too, are divided into aspect-ratio buckets. Each part is a process of its own.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from cddistill.data import buckets, index, order, sides
from cddistill.data.indexed import IndexedImages, divide
from cddistill.data.splits import digest


class MadeUp:
    """Shards of as many samples as their names say, 000001-10000.made."""

    suffix, shards = "made", "a folder of *.made"

    def is_shard(self, name: str) -> bool:
        return name.endswith(".made")

    def scan(self, path: Path, shard: str) -> index.Found:
        """Samples of 60 kB one after another."""
        rows = np.zeros(int(shard.split("-")[1].removesuffix(".made")), index.ROW)
        rows["at"], rows["size"] = np.arange(len(rows)) * 61_440, 61_440
        rows["digest"] = [digest(f"{shard}/{i:09}") for i in range(len(rows))]
        return index.Found(rows)

    def sample(self, path: Path, shard: str, at: int, size: int):
        raise ValueError("samples of this benchmark have no images")

    def sides(self, path: Path, shard: str, rows: np.ndarray) -> index.Found:
        """Of ten aspect ratios."""
        found = np.empty(len(rows), sides.SIDES)
        found["width"], found["height"] = 512 + 64 * (np.arange(len(rows)) % 10), 512
        return index.Found(found)


def build(folder: str) -> str:
    """Index the shards."""
    return f"indexed {len(index.open_index(folder, MadeUp()).rows)} rows"


def start(folder: str) -> str:
    """What a start needs: the index, its splits, and the first positions in both orders."""
    found = index.open_index(folder, MadeUp())
    rows = divide(found, None, "auto")["train"]
    split = Layout(found, rows)
    digests = [order.digest(split, 0, window) for window in (0, 10_000)]
    return f"opened {len(found.rows)} rows, {len(rows)} for training, orders {' '.join(digests)}"


def divided(folder: str) -> str:
    """What data.buckets adds to a start: the sides of the training images, made before, and their buckets."""
    found = index.open_index(folder, MadeUp())
    split = Layout(found, divide(found, None, "auto")["train"])
    shapes = buckets.parse(",".join(f"{512 + 64 * k}x512" for k in range(10)))
    return f"divided {len(split)} rows into {len(buckets.divide(split.sides(), shapes))} buckets"


class Layout(IndexedImages):
    """The rows of a split without images."""

    def __init__(self, found, rows):
        self.index, self.rows, self.ends, self.format, self.skip = found, rows, found.ends, MadeUp(), False


def measured(work, folder: str, queue) -> None:
    """Put what `work` says, its seconds, and by how many MB the peak of this process's memory rose."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    cpu, said = time.process_time(), work(folder)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    queue.put(f"{said}: {seconds:.1f} s, {cpu:.1f} s of CPU, {peak:.0f} MB at the peak")


def main(rows: int, shards: int) -> None:
    """Print a line for each part."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for k in range(shards):
            (Path(folder) / f"{k:06}-{rows // shards}.made").touch()
        for work in (build, start, divided, divided):
            process = context.Process(target=measured, args=(work, folder, queue := context.Queue()))
            process.start()
            print(queue.get(), flush=True)
            process.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=12_000_000)
    parser.add_argument("--shards", type=int, default=1_200)
    main(**vars(parser.parse_args()))
