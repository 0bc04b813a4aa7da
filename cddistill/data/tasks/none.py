"""No conditioning image: class-to-image, text-to-image or unconditional generation."""

import dataclasses

from cddistill.data.contracts import Task


@dataclasses.dataclass(frozen=True)
class Unconditional(Task):
    """Images are generated from the class or the prompt only. No options."""

    conditional = False
    best_metric = None

    def condition(self, element, rng):
        return None
