"""The embedded images: Fluent Emoji 3D at 32 px, (c) Microsoft, MIT licence (see assets/LICENSE.fluentui-emoji)."""

import collections
import csv
import dataclasses
import functools
from pathlib import Path

import numpy as np

from cddistill import checksums
from cddistill.data.contracts import Source
from cddistill.data.digests import of_files
from cddistill.data.images import resize
from cddistill.data.sheets import tiles
from cddistill.data.splits import members

ASSETS = Path(__file__).parents[1] / "assets"
TONES = ["light", "medium-light", "medium", "medium-dark", "dark"]
SIZE = 32


@dataclasses.dataclass(frozen=True)
class Emoji(Source):
    """The embedded emoji. No options."""

    note = "The networks are conditioned on the image's group, as the teacher was; bicubic upscaling is not."

    def open(self, config, split):
        return EmojiImages(config, split)

    def fingerprint(self, opened):
        return {"pictures": of_files(ASSETS, ("emoji.csv", "emoji_bases.webp", "emoji_tones.webp"), times=False)}


class EmojiImages:
    """1852 emoji; the label is one of 9 groups, in order of name. All skin tones of an emoji count as one element."""

    num_labels = 9

    def __init__(self, config, split):
        if config.size > SIZE:
            raise ValueError(f"emoji are {SIZE} px; data.size must be at most that, not {config.size}")
        self.size = config.size
        self.variants = pack()
        self.bases = members(self.variants, split)

    def __len__(self):
        return len(self.bases)

    def element(self, i, rng):
        """Emoji i: a variant at random, or without rng the first, which has no skin tone."""
        variants = self.variants[self.bases[i]]
        image, label, caption = variants[0 if rng is None else rng.integers(len(variants))]
        return {"image": resize(image, self.size), "label": label, "caption": caption}


@functools.cache
def pack():
    """All variants of all emoji, {base: [(uint8 [32,32,3], label, caption), ...]}."""
    checksums.check_shipped(ASSETS, "emoji")
    with (ASSETS / "emoji.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = {group: i for i, group in enumerate(sorted({row["group"] for row in rows}))}
    images, steps = (tiles(ASSETS / f"emoji_{name}.webp", SIZE) for name in ("bases", "tones"))
    variants, used = collections.defaultdict(list), 0
    for row, image in zip(rows, images, strict=False):  # the last tiles of the sheet are padding
        n = int(row["tones"])
        deltas = steps[used : used + n] - np.uint8(128)  # each tone minus the one before it, mod 256
        used += n
        toned = np.cumsum([image, *deltas], axis=0, dtype=np.uint8)
        captions = [row["caption"], *(f"{row['caption']}: {tone} skin tone" for tone in TONES[:n])]
        label = labels[row["group"]]
        variants[row["base"]].extend((x, label, caption) for x, caption in zip(toned, captions, strict=True))
    return dict(variants)
