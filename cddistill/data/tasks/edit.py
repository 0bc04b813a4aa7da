"""Editing by instruction (InstructPix2Pix, Brooks et al. 2023): the condition is the image before the edit."""

import dataclasses

import numpy as np

from cddistill.data import images
from cddistill.data.contracts import Task
from cddistill.data.resample import to_float

CHANGED = 4 / 255  # a pixel has changed if a channel differs by more


@dataclasses.dataclass(frozen=True)
class Editing(Task):
    """The text is the instruction, the target the edited image. For data that have both. No options."""

    input_label = "picture to edit"

    def target(self, element):
        if "edited" not in element:
            raise ValueError("data.task edit needs an edited image for every image, and here is none")
        return to_float(element["edited"])

    def text(self, element):
        if "instruction" not in element:
            raise ValueError("data.task edit needs an instruction for every image, and here is none")
        return element["instruction"]

    def condition(self, element, rng):
        return to_float(element["image"])

    def read(self, path, size):
        return to_float(images.fit(images.read(path), size))

    def references(self, cond):
        return {"not edited": cond}

    def regions(self, cond, truth):
        changed = np.float32(np.abs(cond - truth).max(-1) > CHANGED)
        return {"in the changed region": changed, "outside of it": 1 - changed}

    def encode(self, autoencoder, cond):
        """Latents without the scaling factor, which InstructPix2Pix's extra channels are."""
        return autoencoder.encode(cond * 2.0 - 1.0) / autoencoder.encoder.module.scaling_factor
