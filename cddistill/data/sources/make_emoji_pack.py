"""Make the embedded emoji pack (python -m cddistill.data.sources.make_emoji_pack fluent3d_32.npz); users need not."""

import csv
import sys

import numpy as np

from cddistill import checksums
from cddistill.data.sheets import sheet
from cddistill.data.sources.emoji import ASSETS, TONES


def make(npz, out):
    """Write emoji.csv, emoji_bases.webp and emoji_tones.webp (each tone minus the one before it, mod 256)."""
    data = np.load(npz)
    row_of = {caption: i for i, caption in enumerate(data["captions"])}
    bases, tones, rows = [], [], []
    for i in np.flatnonzero(~data["toned"]):
        caption = str(data["captions"][i])
        toned = [row_of[name] for name in (f"{caption}: {tone} skin tone" for tone in TONES) if name in row_of]
        bases.append(data["images"][i])
        tones.extend(np.diff(data["images"][[i, *toned]], axis=0) + np.uint8(128))  # lossless: uint8 wraps
        rows.append([data["base"][i], data["group"][i], caption, len(toned)])
    lossless = {"format": "WEBP", "lossless": True, "quality": 100, "method": 6}
    sheet(np.stack(bases), 40).save(out / "emoji_bases.webp", **lossless)
    sheet(np.stack(tones), len(TONES)).save(out / "emoji_tones.webp", **lossless)
    with (out / "emoji.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["base", "group", "caption", "tones"], *rows])
    checksums.write_shipped(out)


if __name__ == "__main__":
    make(sys.argv[1], ASSETS)
