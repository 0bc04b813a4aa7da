"""Batches that depend only on the seed and the position, not on hosts, threads or resuming."""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import grain
import numpy as np

from cddistill import typed
from cddistill.data.buckets import MAX_SIDE, SHAPES, InTurn, Part, divide, parse
from cddistill.data.contracts import Source, Task
from cddistill.data.digests import of_files
from cddistill.data.encoded import EncodedItems
from cddistill.data.lines import Lines, open_lines
from cddistill.data.listing import patiently, report_bad
from cddistill.data.ode_pairs import OdePairs
from cddistill.data.order import digest, shuffled
from cddistill.data.sources import SOURCES
from cddistill.data.splits import SPLITS
from cddistill.data.tasks import TASKS
from cddistill.typed import Count, Natural, within

REPLACED = 100  # bad items in a row that are replaced by the next
OPTIONAL = ("name", "layout")  # of contracts.Images
IMAGES = ("image", "depth", "depth_map", "edited", "mask")  # of an element, which are mirrored together
KEPT = ("x0", "text", "null", "cond", "cond_latent", "imageless", "time_ids", "caption")  # of an item, in a batch


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data of a run. `configure` makes one from plain values, with the options of its source and task.

    source and task may be given by name, with their default options.
    """

    source: Source | str = SOURCES["emoji"]()
    task: Task | str = TASKS["none"]()
    path: str = ""  # folder of images or arrays, file of prompts, or name or folder of a tensorflow dataset
    prompts: str = ""  # text file, a prompt on each line: training draws from it, instead of the images' captions
    size: Annotated[int, within(least=1, most=MAX_SIDE)] = 32  # pixels, height and width
    num_classes: Count = 9  # labels are 0 .. num_classes - 1; the null label is num_classes
    flip: bool = True  # mirror training images at random
    buckets: Annotated[str, SHAPES] = ""  # 512x512,576x448: widths x heights of training images, each of which
    # goes to the one of the nearest aspect ratio; "" = squares of data.size
    size_conditions: Literal["full", "own"] = "full"  # SDXL's sizes in training: of an image that is whole, or each
    # image's own size and crop; validation, test and samples have those of a whole one
    pairs: str = ""  # folder written by --mode=pairs; adds one pair of noise and x0 per row to each batch
    skip_bad: bool = False  # take the next image for an unreadable one, and skip bad pairs, instead of stopping
    threads: Count = 4  # that read and decode images; the batches do not depend on it
    window: Natural = 0  # of data in shards: shuffle these, and so many images (10,000, say) of shards that follow

    def __post_init__(self):
        for kind in REGISTRIES:
            if isinstance(name := getattr(self, kind), str):
                object.__setattr__(self, kind, registered(kind, name)())
        if not self.source.precomputed:
            self.task.check(self.size)
        check_sizes(self)

    @property
    def source_name(self) -> str:
        return name_in(SOURCES, self.source)

    @property
    def task_name(self) -> str:
        return name_in(TASKS, self.task)


def check_sizes(config: DataConfig) -> None:
    """ValueError for data.size_conditions or data.buckets that the source or another option cannot go with."""
    if config.size_conditions == "full" and not config.buckets:
        return
    source = f"data.source={config.source_name}"
    if config.size_conditions == "own" and not (config.source.sized or config.source.precomputed):
        raise ValueError(
            f"data.size_conditions=own needs the pictures' own sizes, which {source} does not have: set it to full"
        )
    if not config.buckets:
        return
    if config.source.precomputed:
        raise ValueError(f"data.buckets cannot go with {source}, whose folder has the shapes of its rows: leave it out")
    refused = {
        f"{source}, whose images are not of several shapes, or of sizes that only reading all of them tells":
            not config.source.bucketed,
        f"data.task={config.task_name}, which is for squares": not config.task.any_shape,
        "data.window, which orders all images as one": config.window,
        "data.pairs, which have one shape": config.pairs,
    }  # fmt: skip
    for what, refuses in refused.items():
        if refuses:
            raise ValueError(f"data.buckets cannot go with {what}: leave one of them out")
    for height, width in parse(config.buckets):
        try:
            config.task.check(height)
            config.task.check(width)
        except ValueError as error:
            raise ValueError(f"{width}x{height} in data.buckets: {error}") from error


REGISTRIES = {"source": SOURCES, "task": TASKS}


def registered(kind: str, name) -> type:
    """The class of a source or task by its name. Raises ValueError naming those that there are."""
    if not isinstance(name, str) or name not in REGISTRIES[kind]:
        raise ValueError(f"data.{kind}={name!r} must be one of {', '.join(REGISTRIES[kind])}")
    return REGISTRIES[kind][name]


def name_in(registry, value) -> str:
    """The name under which a value's class is registered."""
    return next(name for name, cls in registry.items() if cls is type(value))


def defaults() -> dict[str, Any]:
    """The defaults of config.data, including the options of all sources and tasks."""
    plain = {f.name: f.default for f in dataclasses.fields(DataConfig)}
    plain |= {kind: name_in(registry, plain[kind]) for kind, registry in REGISTRIES.items()}
    return plain | {f.name: f.default for cls in option_classes() for f in dataclasses.fields(cls)}


def option_classes() -> list[type]:
    """The source and task classes, whose fields are options."""
    return [cls for registry in REGISTRIES.values() for cls in registry.values()]


def configure(**values) -> DataConfig:
    """A DataConfig from the names of a source and a task, their options and the common fields.

    Options of other sources and tasks have no effect, but their types are checked. Raises ValueError, in one sentence,
    for an unknown name, a wrong type or a value out of range.
    """
    common = {f.name for f in dataclasses.fields(DataConfig)}
    known = {f"data.{name}": value for name, value in defaults().items()}
    for name in values:
        typed.choose(f"config key data.{name}", known, f"data.{name}")
    values = defaults() | values
    chosen = {}
    for kind, registry in REGISTRIES.items():
        choice = registered(kind, values[kind])
        for cls in registry.values():
            options = typed.check_types(cls, {f.name: values[f.name] for f in dataclasses.fields(cls)}, "data.")
            if cls is choice:
                chosen[kind] = cls(**options)
    fields = {name: x for name, x in values.items() if name in common and name not in REGISTRIES}
    return DataConfig(**chosen, **typed.check_types(DataConfig, fields, "data."))


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Items from a source of uint8 images: augmented, labelled and with a condition."""

    source: object  # contracts.Images
    config: DataConfig
    augment: bool
    prompts: Lines | None = None  # drawn from instead of captions
    sized: bool = False  # items have time_ids, their own sizes
    bad: set[int] = dataclasses.field(default_factory=set)  # positions that were named

    def __len__(self):
        return len(self.source)

    def __getattr__(self, name):
        """What only some sources have: `contracts.Images` lists it."""
        if name in OPTIONAL:
            return getattr(self.source, name)
        raise AttributeError(name)

    def item(self, i, rng):
        """`usable` item i, with data.skip_bad the next one for one that is bad: a choice of the data, not of hosts."""
        for at in range(i, i + REPLACED):
            try:
                return patiently(self.usable, at % len(self), rng)
            except ValueError as error:
                if not self.config.skip_bad:
                    raise
                last = error
                self.say_bad(at % len(self), error)
        raise ValueError(f"{REPLACED} images one after another cannot be used, at last this: {last}")

    def say_bad(self, i, error):
        """Name an item that is replaced, once."""
        if i not in self.bad:
            self.bad.add(i)
            logging.warning("%s; replaced by the next (%d so far)", error, len(self.bad))

    def usable(self, i, rng):
        """x0 float32 [h,w,3] in [-1, 1]; the task's cond, float32 [h,w,c] in [0, 1]; text, null, label, caption.

        Data without images have imageless, True, as well; with `sized` there are time_ids, float32 [6].
        """
        config, task = self.config, self.config.task
        element = self.source.element(i, rng if self.augment else None)
        if self.augment and config.flip and rng.random() < 0.5:
            element |= {name: element[name][:, ::-1] for name in IMAGES if name in element}
            element |= {name: element[name].mirrored() for name in ("place",) if name in element}
        element["target"] = task.target(element)
        cond = task.condition(element, rng)
        label, null = label_of(element["label"], config), np.int32(config.num_classes)
        item = {name: x for name, x in element.items() if name not in ("image", "target", "place")}
        caption = task.text(element) if self.prompts is None else self.prompts[int(rng.integers(len(self.prompts)))]
        item |= {"x0": element["target"] * 2 - 1, "label": label, "caption": caption}
        item |= {"text": {"class_labels": label}, "null": {"class_labels": null}}
        item |= {"time_ids": element["place"].time_ids()} if self.sized else {}
        return item if cond is None else item | {"cond": cond}


def label_of(value, config) -> np.int32:
    """The label of an element; ValueError for one that is no class and not the null label, such as NaN."""
    if np.ndim(value) or np.asarray(value).dtype.kind not in "iu" or not 0 <= value <= config.num_classes:
        raise ValueError(
            f"{config.source_name} {config.path} has the label {value!r}, and labels are whole numbers in 0 .. "
            f"{config.num_classes - 1} (data.num_classes - 1)"
        )
    return np.int32(value)


def load(config, split="train", augment=True):
    """A finite dataset with len() and item(i, rng): one example as a dict of arrays and strings, see `Pixels.item`.

    Random choices (mirroring, emoji variant, degradation) come only from rng. Only the train split is augmented.
    Raises ValueError, in one sentence, for data that is missing, unreadable or of the wrong shape.
    """
    augment, sized = augment and split == "train", config.size_conditions == "own" and split == "train"
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    source = open_source(squares(config), split)
    if not len(source):
        raise ValueError(f"the {split} split of {config.source_name} {config.path} is empty; add images")
    if config.source.precomputed and config.prompts:
        raise ValueError(
            f"data.prompts cannot go with data.source={config.source_name}, whose text is encoded already: set "
            "data.prompts when --mode=encode makes them"
        )
    if config.source.precomputed:
        return source
    if source.num_labels > config.num_classes:
        raise ValueError(
            f"{config.source_name} has {source.num_labels} labels; data.num_classes is {config.num_classes}"
        )
    drawn = open_lines(config.prompts, "data.prompts") if config.prompts and split == "train" else None
    return Pixels(source, config, augment, drawn, sized)


def squares(config: DataConfig) -> DataConfig:
    """The same data without what a source does not look at: the shapes and sizes of training images."""
    return dataclasses.replace(config, buckets="", size_conditions="full")


@functools.lru_cache(maxsize=4)  # so that a folder is checked only once
def open_source(config, split):
    """The split of the configured source."""
    return config.source.open(config, split)


def fingerprint(config, split="train") -> dict[str, str]:
    """What a split is read from, by kind, as texts that change when it does: see `Source.fingerprint`."""
    found = config.source.fingerprint(open_source(squares(config), split))
    if config.prompts and split == "train":
        path = open_lines(config.prompts, "data.prompts").path
        found = found | {"drawn prompts": of_files(path.parent, [path.name])}
    return found


def without_captions(batch: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a batch."""
    return {name: x for name, x in batch.items() if name != "caption"}


def batches(
    config, split="train", *, batch_size, seed, start=0, rows=slice(None), prepare=without_captions, pairs_only=False
):
    """Infinite iterator over batches, from step `start`. `batch_size` is global; `rows` selects this host's rows.

    A batch is a dict of numpy arrays. x0 is float32 [b,h,w,c] in [-1, 1], of one bucket in training; text-only data has
    zeros and imageless, bool [b]. Tasks with a condition add cond, float32 [b,h,w,c] in [0, 1]. text and null are a
    UNet's text inputs: {"class_labels": int32 [b]} or {"encoder_hidden_states": float32 [b,l,d]}. index, int32 [b], is
    the row in the global batch. data.pairs adds pairs, {noise, x0, text, null} for b rows, and others: others[i] =
    pairs[i+1], modulo the global batch; with pairs_only there is nothing else. Row r of step k is element k *
    batch_size + r of an endless stream, reshuffled every epoch; that number seeds its randomness. Threads make the
    next batches, and pass them, with caption, a list of b str, through `prepare`.
    """
    pairs = shuffled(load_pairs(config.pairs, config.skip_bad), seed + 1) if config.pairs else None
    index = np.arange(batch_size, dtype=np.int32)[rows]
    if parts := parts_of(config, split):
        items = InTurn.of(parts, seed, batch_size, config.window)
    else:
        items = None if pairs_only else shuffled(load(config, split), seed, config.window)
    stream = Steps(items, pairs, batch_size, index, prepare)
    threads = 1 if config.source.precomputed else config.threads  # without decoding, several only share one lock
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8)
    return iter(grain.MapDataset.source(stream)[start:].to_iter_dataset(options))


def order_digest(config, split="train", *, seed):
    """16 hexadecimal digits that hosts have in common if `batches` gives them the same examples in the same order."""
    if parts := parts_of(config, split):
        return " ".join(digest(part, (seed, k), config.window) for k, part in enumerate(parts.values()))
    return digest(load(config, split), seed, config.window)


@functools.lru_cache(maxsize=4)
def parts_of(config, split="train") -> dict[tuple[int, int], Pixels | EncodedItems]:
    """The training images in each of data.buckets that has some, or the rows that were encoded so, by the images'
    (height, width); {} without buckets, and of other splits.

    Raises ValueError for sizes that cannot be known, and for images that are too small to be cropped.
    """
    if config.source.precomputed:
        return getattr(load(config, split), "buckets", {})
    if not config.buckets or split != "train":
        return {}
    pixels = load(config, "train")
    sides = pixels.source.sides()
    found = {}
    for shape, rows in divide(sides, parse(config.buckets)).items():
        if getattr(config.source, "crop", "") == "random":
            small = rows[(sides[rows] < shape[::-1]).any(1)]
            said = [f"{pixels.name(i)} is {sides[i][0]} x {sides[i][1]} px" for i in small[:3]]
            what = f"{len(small)} images are smaller than {shape[1]}x{shape[0]}, their bucket, and are cropped"
            report_bad(said * bool(said), what, config.skip_bad)
        found[shape] = dataclasses.replace(pixels, source=Part(pixels.source, rows, shape), bad=set())
    return found


def numbers_of(config) -> dict[tuple[int, int], int]:
    """{(height, width): number of training images} of buckets that have some; {} without buckets."""
    return {shape: len(part) for shape, part in parts_of(config).items()}


def first_of_each(config) -> dict[tuple[int, int], dict[str, Any]]:
    """{(height, width): two training rows of this bucket as they are loaded, with captions}; {} without buckets."""
    return {shape: Steps(shuffled(part, 0), None, 2, np.arange(2), dict)[0] for shape, part in parts_of(config).items()}


def shown(config) -> str:
    """The split whose rows show what a run is built for: squares of data.size, which encoded rows of several shapes
    are in validation and test only."""
    return "validation" if config.source.precomputed and parts_of(config) else "train"


@functools.lru_cache(maxsize=4)  # so that checksums are verified only once
def load_pairs(folder, skip_bad=False):
    """The pairs in a folder, verified; see `OdePairs`."""
    return OdePairs(folder, skip_bad)


@dataclasses.dataclass(frozen=True)
class Steps:
    """This host's rows of each batch, indexed by step."""

    stream: grain.MapDataset | InTurn | None
    pairs: grain.MapDataset | None
    batch_size: int
    rows: np.ndarray
    prepare: Callable[[dict[str, Any]], dict[str, Any]]

    def __len__(self):
        return sys.maxsize // self.batch_size

    def __getitem__(self, step):
        batch = {"index": self.rows}
        if self.stream is not None:
            items = [self.stream[step * self.batch_size + int(row)] for row in self.rows]
            batch |= stack([{name: item[name] for name in KEPT if name in item} for item in items])
        if self.pairs is not None:
            others = (self.rows + 1) % self.batch_size
            pairs = {row: self.pairs[step * self.batch_size + int(row)] for row in {*self.rows, *others}}
            batch["pairs"], batch["others"] = (stack([pairs[row] for row in rows]) for rows in (self.rows, others))
        return self.prepare(batch)


def examples(config, split="test", n=0, seed=0, numbers=None):
    """The first n items of a split (all if n <= 0), or those of these numbers, stacked as in `batches`, with label and
    caption (a list of str).

    Never augmented. The random degradation of item i depends only on (seed, i). ValueError for rows of several shapes.
    """
    dataset = load(config, split, augment=False)
    if hasattr(dataset, "buckets"):
        raise ValueError(f"the {split} rows of {config.path} have several shapes: take those of validation or test")
    numbers = range(len(dataset))[: n if n > 0 else None] if numbers is None else map(int, numbers)
    return stack([dataset.item(i, np.random.default_rng([seed, i])) for i in numbers])


def stack(items):
    """Stack a list of dicts with the same keys into one dict of arrays; strings become a list.

    What is one array in all items, such as the null text, is kept once: the result is a view that cannot be written.
    """
    first = items[0]
    if isinstance(first, dict):
        return {name: stack([item[name] for item in items]) for name in first}
    if isinstance(first, np.ndarray) and len(items) > 1 and all(x is first for x in items):
        return np.broadcast_to(first, (len(items), *first.shape))
    return items if isinstance(first, str) else np.stack(items)
