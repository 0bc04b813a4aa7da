"""The embedded icons: five colour sets at 64 px, each drawing with its name, style and group.

assets/ICONS.md names the authors and licences of the sets.
"""

import collections
import csv
import dataclasses
import functools

from cddistill import checksums
from cddistill.data.contracts import Source
from cddistill.data.digests import of_files
from cddistill.data.images import resize
from cddistill.data.sheets import tiles
from cddistill.data.sources.emoji import ASSETS
from cddistill.data.splits import in_order, members

STYLES = {  # the word for it in captions, and the set's name
    "fluent": "fluent-emoji", "flat": "fluent-emoji-flat", "noto": "noto", "twemoji": "twemoji",
    "emojione": "emojione",
}  # fmt: skip
SIZE = 64


@dataclasses.dataclass(frozen=True)
class Icons(Source):
    """The embedded icons. No options."""

    def open(self, config, split):
        return IconImages(config, split)

    def fingerprint(self, opened):
        files = ("icons.csv", *(f"icons_{style}.webp" for style in STYLES))
        return {"pictures": of_files(ASSETS, files, times=False)}


class IconImages:
    """Icons of one split; the label is one of 9 groups, in order of name.

    Split by concept: all drawings of a name, in every style and skin tone, are in the same split. All skin tones of a
    name in one style count as one element. The caption is "red apple, noto style".
    """

    num_labels = 9

    def __init__(self, config, split):
        self.size = checked(config.size)
        styles, self.labels = pack()
        variants = collections.defaultdict(list)
        for style, rows in styles.items():
            for i, row in enumerate(rows):
                variants[f"{row['concept']}/{row['name']}/{style}"].append((style, i))
        by_concept = collections.defaultdict(list)
        for key in in_order(variants):
            by_concept[key.split("/")[0]].append(variants[key])
        concepts = members(by_concept, split)
        # one style of every concept first, then their second style ..., so that the first n are of n concepts
        rounds = range(max(map(len, by_concept.values())))
        self.elements = [by_concept[c][k] for k in rounds for c in concepts if k < len(by_concept[c])]

    def __len__(self):
        return len(self.elements)

    def element(self, i, rng):
        """Icon i: a skin tone at random, or without rng the first, which has none."""
        variants = self.elements[i]
        style, row = variants[0 if rng is None else rng.integers(len(variants))]
        record = pack()[0][style][row]
        return {
            "image": resize(pictures(style)[row], self.size),
            "label": self.labels[record["group"]],
            "caption": caption(record),
        }


def checked(size: int) -> int:
    """data.size; ValueError if it is larger than the icons."""
    if size > SIZE:
        raise ValueError(f"icons are {SIZE} px; data.size must be at most that, not {size}")
    return size


def caption(record) -> str:
    """The name in words, skin tones if there are any, and the style."""
    tones = "".join(f", {tone.replace('-', ' ')} skin tone" for tone in record["tone"].split("+") if tone)
    return f"{record['name'].replace('-', ' ')}{tones}, {record['style']} style"


@functools.cache
def pack():
    """({style: rows of icons.csv in the order of its sheet}, {group: label})."""
    path = ASSETS / "icons.csv"
    checksums.check_shipped(ASSETS, "icons.csv")
    try:
        rows = list(csv.DictReader(path.read_text("utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is part of this package and cannot be read ({error}): reinstall cddistill") from error
    styles = {style: [row for row in rows if row["style"] == style] for style in STYLES}
    return styles, {group: i for i, group in enumerate(sorted({row["group"] for row in rows}))}


@functools.cache
def pictures(style):
    """All drawings of a style, uint8 [n, 64, 64, 3]."""
    path, expected = ASSETS / f"icons_{style}.webp", len(pack()[0][style])
    checksums.check_shipped(ASSETS, path.name)
    images = tiles(path, SIZE)
    if len(images) < expected:
        raise ValueError(f"{path} has {len(images)} images instead of {expected}: reinstall cddistill")
    return images
