"""Batches as a pure function of seed and position: hosts, threads and resuming change nothing."""

import dataclasses
import functools
import sys

import grain
import numpy as np

from cddistill.data import tasks
from cddistill.data.arrays import Arrays
from cddistill.data.degrade import sharpen
from cddistill.data.emoji import Emoji
from cddistill.data.folder import Folder
from cddistill.data.odepairs import OdePairs
from cddistill.data.scenes import Scenes
from cddistill.data.splits import SPLITS
from cddistill.data.tfds_images import TfdsImages

PIXELS = {"emoji": Emoji, "scenes": Scenes, "folder": Folder, "tfds": TfdsImages}
SOURCES = (*PIXELS, "arrays")
TASKS = ("none", "sr")
KEPT = ("x0", "text", "null", "cond", "imageless")  # of an item, in a batch


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run is trained and evaluated on."""

    source: str = "emoji"  # emoji, scenes, folder, tfds or arrays
    path: str = ""  # folder of images or of arrays; name of a tensorflow dataset
    size: int = 32  # pixels, height and width
    num_classes: int = 9  # labels are 0 .. num_classes - 1; num_classes itself is the null label
    task: str = "none"  # or sr: what the conditioning image is
    scale: int = 4  # sr: how many times smaller
    degradation: str = "bicubic"  # sr: or realesrgan
    sharpen: bool = False  # unsharp-mask the images first, as Real-ESRGAN does with its targets
    flip: bool = True  # mirror at random; in training only
    x0_shape: tuple[int, ...] = ()  # arrays that are texts alone: height, width, channels of what is drawn for them
    pairs: str = ""  # folder that --mode=pairs has written: batches then have as many noise-to-image pairs, too
    skip_bad: bool = False  # leave out images of a folder, or shards of pairs, that cannot be read, instead of stopping

    def __post_init__(self):
        for name, known in (("source", SOURCES), ("task", TASKS), ("degradation", tasks.DEGRADATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"data.{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("size", "scale", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if self.task == "sr" and self.source != "arrays" and self.size % self.scale:
            raise ValueError(f"data.size {self.size} must be divisible by data.scale {self.scale}")


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Items of a source of uint8 images: augmented, labelled and conditioned."""

    source: object  # element(i, rng) -> {"image": uint8 [h,w,3], "label", "caption", and images "depth", "edited"}
    config: DataConfig
    augment: bool

    def __len__(self):
        return len(self.source)

    def item(self, i, rng):
        """x0 float32 [h,w,3] in [-1, 1]; with a task cond float32 [h,w,3] in [0, 1]; text, null, label, caption."""
        config = self.config
        item = self.source.element(i, rng if self.augment else None)
        if self.augment and config.flip and rng.random() < 0.5:
            item |= {name: item[name][:, ::-1] for name in ("image", "depth", "edited") if name in item}
        image = np.float32(item.pop("image")) / np.float32(255)
        if config.sharpen:
            image = sharpen(image)
        if config.task == "sr":
            item["cond"] = tasks.sr(image, rng, config.scale, config.degradation)
        label, null = np.int32(item["label"]), np.int32(config.num_classes)
        item |= {"text": {"class_labels": label}, "null": {"class_labels": null}}
        return item | {"x0": image * 2 - 1, "label": label}


def load(config, split="train", augment=True):
    """A finite dataset: len() and item(i, rng), one example as a dict of arrays and strings (see Pixels.item).

    An item's random choices (mirroring, drawing, degradation) come from rng alone; only the train split is augmented.
    Raises ValueError, in one sentence, for data that is missing, unreadable or of the wrong shape.
    """
    augment = augment and split == "train"
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    source = open_source(config, split)
    if not len(source):
        raise ValueError(f"the {split} split of {config.source} {config.path} is empty; add images")
    if config.source == "arrays":
        return source
    if source.num_labels > config.num_classes:
        raise ValueError(f"{config.source} has {source.num_labels} labels; data.num_classes is {config.num_classes}")
    return Pixels(source, config, augment)


@functools.lru_cache(maxsize=4)  # so that a folder is read through only once
def open_source(config, split):
    """The source named by the config."""
    return (PIXELS | {"arrays": Arrays})[config.source](config, split)


def batches(config, split="train", *, batch_size, seed, start=0, rows=slice(None)):
    """Infinite iterator over dicts of numpy arrays, from step `start`; `batch_size` is global, `rows` are this host's.

    x0 float32 [b,h,w,c] in [-1, 1] (of texts alone zeros, and imageless bool [b]); with a task cond float32 [b,h,w,c]
    in [0, 1]; text and null as a teacher takes them ({"class_labels": int32 [b]} or {"encoder_hidden_states": float32
    [b,l,d]}); index int32 [b], the row's number in the global batch; with data.pairs also pairs, {noise, x0, text,
    null} of as many rows, and others, to each row the pair of the next one. Row r of step k is element k * batch_size +
    r of an endless stream that is reshuffled every epoch, and its randomness is keyed by that number. Threads prepare
    the next steps meanwhile.
    """
    pairs = shuffled(load_pairs(config.pairs, config.skip_bad), seed + 1) if config.pairs else None
    stream = Steps(shuffled(load(config, split), seed), pairs, batch_size, np.arange(batch_size, dtype=np.int32)[rows])
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(stream)[start:].to_iter_dataset(options))


@functools.lru_cache(maxsize=4)  # so that checksums are compared only once
def load_pairs(folder, skip_bad=False):
    """The pairs in a folder, checked; see OdePairs."""
    return OdePairs(folder, skip_bad)


def shuffled(dataset, seed):
    """An endless stream of items; every epoch has each item once, in an order and with randomness of its own."""
    order, choices = (int(s) for s in np.random.SeedSequence(seed).generate_state(2))
    positions = grain.MapDataset.range(len(dataset)).shuffle(seed=order).repeat()
    return positions.random_map(dataset.item, seed=choices)


@dataclasses.dataclass(frozen=True)
class Steps:
    """This host's rows of every step's batch, by step."""

    stream: grain.MapDataset
    pairs: grain.MapDataset | None
    batch_size: int
    rows: np.ndarray

    def __len__(self):
        return sys.maxsize // self.batch_size

    def __getitem__(self, step):
        items = [self.stream[step * self.batch_size + int(row)] for row in self.rows]
        kept = [{name: item[name] for name in KEPT if name in item} for item in items]
        batch = stack(kept) | {"index": self.rows}
        if self.pairs is not None:
            others = (self.rows + 1) % self.batch_size
            pairs = {row: self.pairs[step * self.batch_size + int(row)] for row in {*self.rows, *others}}
            batch["pairs"], batch["others"] = (stack([pairs[row] for row in rows]) for rows in (self.rows, others))
        return batch


def examples(config, split="test", n=0, seed=0):
    """The first n items of a split (all if n <= 0), stacked: as in batches, and label and caption, a list of str.

    Never augmented and always the same: a random degradation of item i depends on (seed, i) alone.
    """
    dataset = load(config, split, augment=False)
    n = len(dataset) if n <= 0 else min(n, len(dataset))
    return stack([dataset.item(i, np.random.default_rng([seed, i])) for i in range(n)])


def stack(items):
    """A list of equal dicts as one dict of stacked arrays; strings become a list."""
    first = items[0]
    if isinstance(first, dict):
        return {name: stack([item[name] for item in items]) for name in first}
    return items if isinstance(first, str) else np.stack(items)
