"""Rows that --mode=encode wrote: latents, text embeddings, conditions and captions."""

import numpy as np

from cddistill import io
from cddistill.data import shards


def is_encoded(folder) -> bool:
    """Whether a split's folder has shards; versions before these wrote .npy files, and other manifests."""
    path = folder / shards.MANIFEST
    return path.is_file() and "format" in io.read_json(path, "encode again")


class EncodedItems(shards.Shards):
    """The rows of a split that --mode=encode wrote: see `shards.Shards`. They are not augmented."""

    kind = shards.Kind(
        *("encode", "encoded rows", "data.path"),
        {"row": dict, "made_by": str, "seed": int, "fingerprints": dict, "imageless": list | None},
    )

    def __init__(self, folder, config):
        super().__init__(folder, config.skip_bad)
        self.encoded, self.null_label = self.manifest, np.int32(config.num_classes)
        if config.task.conditional and "cond" not in self.manifest["row"]:
            raise ValueError(
                f"task {config.task_name} on precomputed arrays needs conditions, and {folder} has none: "
                "--mode=encode with the same data.task writes them"
            )

    def names(self) -> list[str]:
        """The names of the files in the folder that are read."""
        return [shards.MANIFEST, shards.NULL, *(shards.shard_file("", int(k)).name for k in self.numbers)]

    def item(self, i, rng=None):
        """Item i, with the keys of `Pixels.item`."""
        item = super().item(i)
        label = np.int32(item["text"].get("class_labels", self.null_label))
        if not 0 <= label <= self.null_label:
            raise ValueError(
                f"row {i} of {self.folder} has the label {label}, and labels are in 0 .. {self.null_label}, the null "
                "label: set data.num_classes to the number of classes"
            )
        item |= {"null": {"class_labels": self.null_label}} if "class_labels" in item["text"] else {}
        if shape := self.manifest.get("imageless"):  # of prompts only
            item |= {"x0": np.zeros(shape, np.float32), "imageless": np.bool_(True)}
        return item | {"label": label}
