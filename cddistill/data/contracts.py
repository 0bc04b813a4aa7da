"""The interfaces of data sources and tasks. A run has one of each.

Both are frozen dataclasses. Their fields are options with defaults: config.data.<field>.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from cddistill.data.images import SUFFIXES
from cddistill.data.resample import to_float

Element = dict[str, Any]
"""One example from a source of images: "image" uint8 [h, w, 3], "label" int, "caption" str. Some sources add "depth"
float32 [h, w], "mask" uint8 [h, w] (0: background, k: object k), "edited" uint8 [h, w, 3] and "instruction" str, or
"depth_map" float32 [h, w], a person's, see `tasks.depth.Depth`; sources that decode pictures add "place", a
`crops.Place`."""

NULL_FILES = {"text": "null.npy", "text_embeds": "null_text_embeds.npy", "input_ids": "null_input_ids.npy"}
"""Files of encoded data with the empty prompt's row, by the array that it belongs to."""


@runtime_checkable
class Images(Protocol):
    """One split of a source of images.

    It may also have `name(i)`, a text that identifies example i, and `layout()`, for data in shards: the positions in
    the order in which they lie there, uint32 [n], and the number of them up to and with each shard, int [shards].
    Those of a source that is `bucketed` have `sides()`, the width and height of each picture, int [n, 2], 0 where they
    cannot be read, without decoding all; their `element` takes a third argument, (height, width) instead of data.size.
    """

    num_labels: int  # 0 if there are no labels

    def __len__(self) -> int: ...

    def element(self, i: int, rng: np.random.Generator | None) -> Element:
        """Example i, resized to config.data.size. rng makes random choices; without it the first option is taken."""


@runtime_checkable
class Items(Protocol):
    """One split of precomputed examples. They are used as stored: no task processes them.

    Examples of several shapes have `buckets`, {(height, width) of their images: Items of one shape}.
    """

    def __len__(self) -> int: ...

    def item(self, i: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """Example i, with the keys of `loader.Pixels.usable`."""


@runtime_checkable
class Source(Protocol):
    """A data set format. To add one, write `cddistill/data/sources/<name>.py` and list it in its `__init__`."""

    precomputed: ClassVar[bool] = False  # `open` returns Items (for example latents) instead of Images
    note: ClassVar[str] = ""  # a sentence for the notes of the report, or ""
    sized: ClassVar[bool] = False  # elements have their "place", for data.size_conditions=own
    bucketed: ClassVar[bool] = False  # what `open` returns has what data.buckets needs, see `Images`

    def open(self, config, split: str) -> Images | Items:
        """The split "train", "validation" or "test". Raises ValueError, in one sentence, for unreadable data."""

    def fingerprint(self, opened: Images | Items) -> dict[str, str]:
        """What a split, as opened, is read from: {"pictures": "12 files (0f1e2d3c)"}. A text changes when its files do.

        What is made from the data keeps it. It must be cheap, see `data.digests`; {} if nothing can change.
        """
        return {}


@runtime_checkable
class Task(Protocol):
    """The condition and the target of a student. To add one, write `cddistill/data/tasks/<name>.py` and list it in its
    `__init__`."""

    conditional: ClassVar[bool] = True  # False: no conditioning image
    any_shape: ClassVar[bool] = True  # False: only for squares
    input_suffixes: ClassVar[tuple[str, ...]] = SUFFIXES  # of files in a user's folder that may be inputs
    input_label: ClassVar[str] = "condition"  # what an input is, in a few words
    input_control: ClassVar[Literal["picture", "brush", "file"]] = "picture"  # how a page asks for it; brush: a hole
    input_is_target: ClassVar[bool] = False  # an input is a picture like the targets; False: like the conditions
    best_metric: ClassVar[str | None] = "val/psnr"  # preview metric that selects the best checkpoint (highest)

    def check(self, size: int) -> None:
        """Raise ValueError if this task cannot use data.size (pixels)."""

    def target(self, element: Element) -> np.ndarray:
        """The image to generate, float32 [h, w, 3] in [0, 1]."""
        return to_float(element["image"])

    def text(self, element: Element) -> str:
        """The prompt that describes the target."""
        return element["caption"]

    def condition(self, element: Element, rng: np.random.Generator) -> np.ndarray | None:
        """The conditioning image, float32 [h, w, c] in [0, 1]. element["target"] holds the result of `target`."""

    def input_files(self, paths: list[Path]) -> list[Path]:
        """Those of the files in a user's folder, with one of `input_suffixes`, that are inputs by themselves."""
        return paths

    def read(self, path: Path, size: int) -> np.ndarray:
        """The condition [size, size, c] in [0, 1] from a user's image file, for --mode=sample."""
        raise ValueError(f"--input={path}: this task takes no input")

    def read_whole(self, path: Path, size: int) -> np.ndarray:
        """The condition [h, w, c] of a user's file at its own size, of which each tile [size, size, c] is a condition.

        Raises ValueError if the task has no such tiles, or for a file that is smaller than one.
        """
        raise ValueError(f"inputs of this task cannot be cut into tiles: sample {path} without --tiles (tiles=True)")

    def input_note(self, size: int) -> str:
        """A sentence that says how an input is processed, or ""."""
        return ""

    def in_browser(self, size: int) -> dict[str, Any]:
        """How the exported page makes a condition of an input: "kind", a name in CONDITIONS of `web/engine.mjs`, and
        what that function needs to know."""
        return {"kind": "image"}

    def picture(self, cond: np.ndarray) -> np.ndarray:
        """Conditions [n, h, w, c] as images [n, h, w, 1 or 3] in [0, 1], for image grids."""
        return cond[..., :3]

    def references(self, cond: np.ndarray) -> Mapping[str, np.ndarray]:
        """Baselines without a network, as rows of the report: {"bicubic": images [n, h, w, 3]}."""
        return {}

    def regions(self, cond: np.ndarray, truth: np.ndarray) -> Mapping[str, np.ndarray]:
        """Parts of the images that are scored by themselves: {"in the hole": weights [n, h, w] in [0, 1]}."""
        return {}

    def measures(self, generated: np.ndarray, truth: np.ndarray, cond: np.ndarray) -> Mapping[str, np.ndarray]:
        """The task's own measures of generated images, targets and conditions [n, h, w, c]: {"Edge F1": [n]}."""
        return {}

    def finish(self, generated, cond):
        """Generated images [n, h, w, 3] as they leave, such as with the known pixels of their conditions."""
        return generated

    def encode(self, autoencoder, cond):
        """Latents of conditions [n, h, w, c], for students that take their condition in latent space."""
        return autoencoder.encode(cond * 2.0 - 1.0)
