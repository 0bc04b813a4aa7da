"""Prompts without images: a text file with one on each line, for methods that need no images."""

import dataclasses

import numpy as np

from cddistill.data.contracts import Source
from cddistill.data.digests import of_files
from cddistill.data.lines import open_lines
from cddistill.data.splits import of_numbers


@dataclasses.dataclass(frozen=True)
class PromptFile(Source):
    """The prompts in the file data.path, in UTF-8. Blank lines are left out. No options."""

    note = "The data are prompts without images: samples are compared with those of the teacher, not with the truth."

    def open(self, config, split):
        return Prompts(open_lines(config.path, "data.path"), config, split)

    def fingerprint(self, opened):
        return {"prompts": of_files(opened.lines.path.parent, [opened.lines.path.name])}


class Prompts:
    """The prompts of a split, by hash of their line's number: lines that are added to the end move no other.

    An image is black, and marked as missing: see `loader.Pixels.usable`. Labels are the null label.
    """

    num_labels = 0

    def __init__(self, lines, config, split):
        self.lines, self.rows = lines, of_numbers(len(lines))[split]
        self.image, self.null = np.zeros((config.size, config.size, 3), np.uint8), config.num_classes
        if config.task.conditional:
            raise ValueError(f"data.task {config.task_name} makes conditions from images, and prompts have none")

    def __len__(self):
        return len(self.rows)

    def element(self, i, rng):
        """Prompt i."""
        caption = self.lines[int(self.rows[i])]
        return {"image": self.image, "label": self.null, "caption": caption, "imageless": np.bool_(True)}
