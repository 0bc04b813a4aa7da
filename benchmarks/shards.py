"""How many images a second each format gives on this machine: a folder, WebDataset, parquet and ArrayRecord.

    python -m benchmarks.shards [--images=1000] [--pixels=256] [--batches=20]

The same JPEGs, random pixels made smooth, lie in each format in shards of 100. Rows are read with the loader's threads
in both orders, with files in the page cache: it is the work of the CPU that is compared, which a slow disk adds to.
"""

import argparse
import dataclasses
import io
import tarfile
import tempfile
import time
from pathlib import Path

import msgpack
import numpy as np
from PIL import Image

from cddistill import data

SHARD = 100  # images


def jpeg(i: int, pixels: int) -> bytes:
    """A file of about the size of a photograph's."""
    small = np.random.default_rng(i).integers(0, 255, (pixels // 8, pixels // 8, 3), np.uint8)
    image = Image.fromarray(small).resize((pixels, pixels), Image.Resampling.BICUBIC)
    image.save(file := io.BytesIO(), "jpeg", quality=90)
    return file.getvalue()


def folder(root: Path, files: list[bytes]) -> None:
    """A file and a text file for each image."""
    for i, content in enumerate(files):
        (root / f"{i:06}.jpg").write_bytes(content)
        (root / f"{i:06}.txt").write_text(f"picture {i}")


def webdataset(root: Path, files: list[bytes]) -> None:
    """Tar files."""
    for k in range(0, len(files), SHARD):
        with tarfile.open(root / f"{k:06}.tar", "w") as tar:
            for i, content in enumerate(files[k : k + SHARD], k):
                for suffix, x in (("jpg", content), ("txt", f"picture {i}".encode())):
                    member = tarfile.TarInfo(f"{i:06}.{suffix}")
                    member.size = len(x)
                    tar.addfile(member, io.BytesIO(x))


def parquet(root: Path, files: list[bytes]) -> None:
    """Parquet files of one row group each."""
    import pyarrow
    import pyarrow.parquet

    for k in range(0, len(files), SHARD):
        part = files[k : k + SHARD]
        table = pyarrow.table({"jpg": part, "caption": [f"picture {k + i}" for i in range(len(part))]})
        pyarrow.parquet.write_table(table, root / f"{k:06}.parquet")


def array_record(root: Path, files: list[bytes]) -> None:
    """ArrayRecord files of msgpack maps."""
    from array_record.python.array_record_module import ArrayRecordWriter

    for k in range(0, len(files), SHARD):
        writer = ArrayRecordWriter(str(root / f"{k:06}.array_record"), "group_size:1")
        for i, content in enumerate(files[k : k + SHARD], k):
            writer.write(msgpack.packb({"image": content, "caption": f"picture {i}"}))
        writer.close()


def rate(config: data.DataConfig, batches: int) -> tuple[float, float]:
    """(images a second, ms of CPU an image) of the loader, after its first batch."""
    stream = data.batches(config, batch_size=32, seed=0)
    next(stream)
    began, cpu = time.monotonic(), time.process_time()
    for _ in range(batches):
        next(stream)
    return 32 * batches / (time.monotonic() - began), 1000 * (time.process_time() - cpu) / (32 * batches)


def main(images: int, pixels: int, batches: int) -> None:
    """Print a row for each format and order."""
    files = [jpeg(i, pixels) for i in range(images)]
    print(
        f"{images} JPEGs of {pixels} x {pixels} px, {np.mean([len(x) for x in files]) / 1000:.0f} kB each", flush=True
    )
    print("| format | order | images/s | ms of CPU an image |\n|---|---|---|---|", flush=True)
    for write in (folder, webdataset, parquet, array_record):
        with tempfile.TemporaryDirectory() as root:
            write(Path(root), files)
            config = data.configure(source=write.__name__, path=root, size=pixels, split="all")
            for window in (0,) if write is folder else (0, 2 * SHARD):
                found = rate(dataclasses.replace(config, window=window), batches)
                order = f"window of {window}" if window else "whole"
                print(f"| `{write.__name__}` | {order} | {found[0]:.0f} | {found[1]:.2f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20)
    main(**vars(parser.parse_args()))
