"""Pairs of noise and the teacher's ODE sample, in shards on disk: what `data.pairs` reads.

Noise is not stored: it is a function of the seed and the row number.
"""

from pathlib import Path

import numpy as np

from cddistill.checksums import crc32
from cddistill.data import shards

KIND = shards.Kind(
    *("pairs", "pairs", "data.pairs"),
    {"seed": int, "x0": list, "teacher": str, "weights": str, "lora": str, "lora_scale": int | float, "made_by": str,
     "fingerprints": dict | None},
)  # fmt: skip


def noise(seed: int, row: int, shape) -> np.ndarray:
    """The unit Gaussian noise of a row, float32. It does not depend on shards or batches.

    Philox increments its counter from the low word, so rows differ in a high word: their noise never overlaps.
    """
    return np.random.Generator(np.random.Philox(key=seed, counter=row << 128)).standard_normal(shape, np.float32)


def read_manifest(folder) -> dict:
    """The content of manifest.json: see `shards.read_manifest`."""
    return shards.read_manifest(folder, KIND)


def describe(manifest: dict, k: int) -> dict:
    """Metadata in the header of shard k. The checksum of the first row's noise stands for all rows."""
    first = shards.shard_rows(manifest, k).start
    return shards.describe(manifest, k) | {"noise": crc32(noise(manifest["seed"], first, manifest["x0"]))}


class OdePairs(shards.Shards):
    """The rows of a folder written by --mode=pairs: see `shards.Shards`.

    Raises ValueError also for a shard whose noise this version of numpy does not generate.
    """

    kind = KIND

    def check_shard(self, file: Path, k: int, header: dict) -> None:
        """Raise ValueError if this numpy version does not generate the noise of shard k."""
        if describe(self.manifest, k)["noise"] != header.get("noise"):
            raise ValueError(
                f"numpy {np.__version__} does not generate the noise that {file} was made from "
                f"({self.manifest['made_by']}): install that numpy version, or make the pairs again"
            )

    def item(self, i, rng=None):
        """Usable row i, with its noise, float32 [h,w,c]."""
        number = self.number(int(i))
        return super().item(i) | {"noise": noise(self.manifest["seed"], number, self.manifest["x0"])}
