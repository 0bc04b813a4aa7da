"""Edits of the embedded icons: the same thing in another style, or in another skin tone, with an instruction."""

import collections
import dataclasses
import itertools
from typing import NamedTuple

from cddistill.data.contracts import Source
from cddistill.data.images import resize
from cddistill.data.sources.icons import Icons, caption, checked, pack, pictures
from cddistill.data.splits import in_order, members


@dataclasses.dataclass(frozen=True)
class IconEdits(Source):
    """Pairs of icons before and after an edit. No options."""

    def open(self, config, split):
        return IconPairs(config, split)

    def fingerprint(self, opened):
        return Icons().fingerprint(opened)


class Edit(NamedTuple):
    """What can happen to a drawing: rows of icons.csv before and after, by skin tone."""

    instruction: str  # with a place for the new skin tone, if it changes
    before: dict[str, tuple[str, int]]  # {tone: (style, row)}
    after: dict[str, tuple[str, int]]


class IconPairs:
    """Edits of one split of the concepts, as `IconImages` splits them; the label is the group, the caption that of the
    edited icon.

    "redraw it in noto style" keeps the skin tone, one that both styles have; "make the skin tone dark" keeps the style.
    """

    num_labels = 9

    def __init__(self, config, split):
        self.size = checked(config.size)
        styles, self.labels = pack()
        drawings = collections.defaultdict(lambda: collections.defaultdict(dict))  # name -> style -> tone -> place
        for style, rows in styles.items():
            for i, row in enumerate(rows):
                drawings[f"{row['concept']}/{row['name']}"][style].setdefault(row["tone"], (style, i))
        edits = {key: edit for name in drawings for key, edit in edits_of(name, drawings[name])}
        concepts = {*members({key.split("/")[0] for key in edits}, split)}
        self.elements = [edits[key] for key in in_order(edits) if key.split("/")[0] in concepts]

    def __len__(self):
        return len(self.elements)

    def element(self, i, rng):
        """Edit i, in random skin tones, or without rng in the first that it has."""
        instruction, before, after = self.elements[i]
        if before is after:
            ordered = list(itertools.permutations(before, 2))
        else:
            ordered = [(tone, tone) for tone in before if tone in after]
        old, new = ordered[0 if rng is None else rng.integers(len(ordered))]
        (style, row), (edited_style, edited_row) = before[old], after[new]
        record = pack()[0][edited_style][edited_row]
        return {
            "image": resize(pictures(style)[row], self.size),
            "edited": resize(pictures(edited_style)[edited_row], self.size),
            "instruction": instruction.format(tone=new.replace("-", " ").replace("+", " and ") or "yellow"),
            "caption": caption(record),
            "label": self.labels[record["group"]],
        }


def edits_of(name: str, styles):
    """(key, Edit) of everything that can happen to the drawings {style: {tone: place}} of a name."""
    for old, new in itertools.permutations(styles, 2):
        if styles[old].keys() & styles[new].keys():
            yield f"{name}/{old}/{new}", Edit(f"redraw it in {new} style", styles[old], styles[new])
    for style, tones in styles.items():
        if len(tones) > 1:
            yield f"{name}/{style}", Edit("make the skin tone {tone}", tones, tones)
