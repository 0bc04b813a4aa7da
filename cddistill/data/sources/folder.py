"""A folder of images, optionally with captions and labels. Some files are read before the first step."""

import collections
import dataclasses
import functools
import posixpath
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from cddistill import sharding
from cddistill.data.captions import FILES, Captions, read_captions
from cddistill.data.contracts import Source
from cddistill.data.crops import CROPS, Crop, decoded
from cddistill.data.digests import of_files, of_values
from cddistill.data.images import SUFFIXES, is_image, read, sides_of
from cddistill.data.listing import check_some, data_path, files_below, patiently, read_all
from cddistill.data.splits import RULES, SPLITS, split_folders, top

CACHE_BYTES = 2**30  # of decoded images kept in memory


@dataclasses.dataclass(frozen=True)
class Folder(Source):
    """Images in the folder data.path and its sub-folders."""

    split: Literal[*RULES] = "auto"  # by folders like train/ and val/, else by hash; see splits.RULES
    crop: Literal[*CROPS] = "resize"  # shorter side to data.size, centre cropped; "draft": the same of JPEGs that are
    # decoded at 1/2, 1/4 or 1/8 of their size if that suffices; "random": crops at their own size
    folder_labels: bool = False  # an image's label is the folder it lies in, as in cat/1.png

    sized = bucketed = True

    def open(self, config, split):
        try:
            return FolderImages(scan(self, config.path, config.skip_bad), config, split, CROPS[self.crop])
        except ValueError:
            scan.cache_clear()  # the folder may be mended before the next attempt
            raise

    def fingerprint(self, opened):
        records = map(opened.record, opened.names)
        return {"pictures": of_files(opened.root, opened.names), "captions and labels": of_values(records)}


class Contents(NamedTuple):
    """What a folder holds, apart from pixels."""

    root: Path
    parts: dict[str, list[str]]  # names of images by split
    records: dict[str, dict[str, Any]]  # by name: what `Captions.records` has
    num_labels: int


class FolderImages:
    """Images in the sub-folders train, validation and test. Without these, images are split by a hash of their name.

    The caption of cat.jpg is in cat.txt or cat.caption, or in a line of a metadata.jsonl or metadata.csv in the folder
    itself or a sub-folder, with a file name relative to it: {"file_name": "a/cat.jpg", "text": "a cat"}. That line may
    also have a "label", a number or the name of a class, an edited image with an instruction, or a depth map, which may
    also lie beside the image as cat_depth.png. Images without a label get the null label.
    """

    def __init__(self, contents: Contents, config, split: str, crop: Crop):
        self.root, self.records, self.num_labels = contents.root, contents.records, contents.num_labels
        self.size, self.null, self.task, self.crop = config.size, config.num_classes, config.task, crop
        self.skip = config.skip_bad
        if not contents.parts[split]:
            raise ValueError(
                f"the {split} split of folder {self.root} is empty ({sizes(contents.parts)}): add images, or set "
                "data.split to 'fill', which takes it from train, or to 'all', which puts every image in every split"
            )
        self.cache, self.room = {}, CACHE_BYTES
        self.further = any(FILES & record.keys() for record in self.records.values())
        self.names = contents.parts[split]
        check_some(lambda i: self.check(self.names[i]), len(self), f"images in {self.root}", config.skip_bad)

    def __len__(self):
        return len(self.names)

    def name(self, i):
        """The path of image i."""
        return self.names[i]

    def sides(self):
        """The width and height of each image, int32 [n, 2], from the headers of the files."""
        names = [f"{self.root / name}" for name in self.names]
        found = read_all(lambda name: patiently(sides_of, name), names, f"headers of images in {self.root}", self.skip)
        return np.array([found.get(name, (0, 0)) for name in names], np.int32)

    def element(self, i, rng, shape=None):
        """Image i, of data.size or of a shape (height, width)."""
        size = shape or self.size
        return self.crop.cut(dict(self.opened(self.names[i], size)), size, rng)

    def opened(self, name, size):
        """`open`, kept while there is room."""
        if (name, size) in self.cache:
            return self.cache[name, size]
        element = self.open(name, size)
        pixels = (x for x in element.values() if isinstance(x, np.ndarray | Image.Image))
        needed = sum(x.nbytes if isinstance(x, np.ndarray) else 4 * x.width * x.height for x in pixels)
        if needed <= self.room:
            self.cache[name, size], self.room = element, self.room - needed
        return element

    def open(self, name, size):
        """Read an image, and add its caption and label, and what else there is.

        Raises ValueError, naming it, for a file that cannot be read or that has not the size of the image.
        """
        record = self.record(name)
        paths = {key: record.pop(key) for key in ("edited", "depth") if key in record}
        others = {key: (path, self.root / path) for key, path in paths.items()}
        return decoded(self.crop, size, name, self.root / name, others) | record

    def check(self, name):
        """Raise ValueError, naming it, for an image that cannot be used."""
        if self.further:
            self.check_whole(name)
        else:
            read(self.root / name, name, least=(1, 1))
            self.crop.check(sides_of(self.root / name, name), self.size, name)

    def check_whole(self, name):
        """Raise ValueError, naming it, for an image from which the task cannot make a target and a condition."""
        element = self.crop.whole(dict(self.opened(name, self.size)), self.size)
        try:
            element["target"] = self.task.target(element)
            self.task.text(element)
            self.task.condition(element, np.random.default_rng(0))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def record(self, name):
        """The label and the caption of an image, and the names of its other files."""
        return {"label": self.null, "caption": ""} | self.records.get(name, {})


# ---- what a folder holds


@functools.lru_cache(maxsize=4)  # so that all splits share one look at the folder
def scan(source: Folder, path: str, skip_bad: bool) -> Contents:
    """List a folder, divide it into splits, and read its captions and labels. Says in a line what was found."""
    root = data_path(path, "a folder of images")
    files = files_below(root)
    images = [name for name in files if is_image(name)]
    if not images:
        raise ValueError(f"there is no image in {root}; expected files like *{', *'.join(SUFFIXES)}")
    folders = {} if source.split == "hash" else split_folders(images)
    captions = read_captions(root, images, files, skip_bad)
    used_otherwise = {record[key] for record in captions.records.values() for key in FILES & record.keys()}
    left = captions.unread | used_otherwise
    parts = RULES[source.split]([name for name in images if name not in left], folders)
    used = list(dict.fromkeys(name for names in parts.values() for name in names))
    classes = class_folders(used, folders)
    if source.folder_labels:
        captions = label_by_folder(root, used, classes, captions)
    if sharding.is_host0():
        left_out = {*files} - {*used} - captions.files - captions.unread
        found = ", ".join([count(len(used), "image"), *described(used, captions, left_out)])
        by = {"auto": "folder" if folders else "hash of the name"}.get(source.split, f"data.split={source.split!r}")
        rest = [f"{sizes(parts)}, by {by}", *hints(used, parts, folders, classes, captions)]
        print(f"{root}: {found}; {'; '.join(rest)}", flush=True)
    num_labels = max((record.get("label", -1) + 1 for record in captions.records.values()), default=0)
    return Contents(root, parts, captions.records, num_labels)


def class_folders(names, folders) -> dict[str, str]:
    """{image: the folder it lies in} if each is in one folder, as in cat/1.png or train/cat/1.png; else {}."""
    paths = {name: name.removeprefix(f"{top(name)}/") if top(name) in folders else name for name in names}
    found = {name: posixpath.dirname(path) for name, path in paths.items()}
    return found if all(folder and "/" not in folder for folder in found.values()) else {}


def label_by_folder(root: Path, names, classes, captions: Captions) -> Captions:
    """The captions with labels by class folder. ValueError if some image has none, or the metadata has labels too."""
    if not classes:
        raise ValueError(f"data.folder_labels=True needs each image of {root} in one folder, as in cat/1.png")
    if any("label" in record for record in captions.records.values()):
        raise ValueError(f"data.folder_labels=True, and the metadata in {root} has labels too: use one of them")
    numbers = {name: i for i, name in enumerate(sorted({*classes.values()}))}
    for name in names:
        captions.records.setdefault(name, {})["label"] = numbers[classes[name]]
    return captions._replace(classes=[*numbers])


# ---- what was found, in words


def described(names, captions: Captions, left_out) -> list[str]:
    """Phrases like "36 captions" and "3 left out (.heic)"."""
    records = [captions.records.get(name, {}) for name in names]
    bare = [name for name, record in zip(names, records, strict=True) if not record.get("caption")]
    labels = sum("label" in record for record in records)
    said = [count(len(names) - len(bare), "caption")]
    if 0 < len(bare) < len(names):
        said.append(f"{count(len(bare), 'image')} without one ({some(bare)})")
    for key, noun in (("edited", "edited image"), ("depth", "depth map")):
        if n := sum(key in record for record in records):
            said.append(count(n, noun))
    if labels:
        said.append(count(labels, "label") + (f" ({some(captions.classes)})" if captions.classes else ""))
    if captions.unmatched:
        unmatched = count(len(captions.unmatched), "name")
        said.append(f"{unmatched} in the metadata without an image ({some(captions.unmatched)})")
    if captions.unused:
        said.append(f"metadata keys not used: {some(captions.unused)}")
    kinds = collections.Counter(map(kind, sorted(left_out))).most_common()
    if kinds:
        listed = ", ".join(f"{n} {what}" if len(kinds) > 1 else what for what, n in kinds)
        said.append(f"{len(left_out)} left out ({listed})")
    return said


def hints(names, parts, folders, classes, captions: Captions) -> list[str]:
    """Phrases on what else may be meant."""
    said = []
    missing = [split for split, part in parts.items() if not part]
    if 0 < len(missing) < len(parts["train"]):
        said.append(f"data.split='fill' takes {' and '.join(missing)} from train")
    inner = [name for name in names if top(name.partition("/")[2]) in SPLITS]
    if inner and not folders:
        said.append(f"{'/'.join(inner[0].split('/')[:2])}/ is no split: it does not lie in data.path itself")
    if not any(captions.records.values()) and len({*classes.values()}) > 1:
        said.append(f"data.folder_labels=True makes labels of the folders ({some(sorted({*classes.values()}))})")
    return said


def kind(name: str) -> str:
    """Why a file is left out: its suffix, or for an image its folder, which is no split."""
    if is_image(name):
        return f"in {top(name)}/" if top(name) else "outside the folders of the splits"
    return posixpath.splitext(name)[1].lower() or "without a suffix"


def sizes(parts) -> str:
    """Splits and their numbers of images."""
    return ", ".join(f"{split} {len(names)}" for split, names in parts.items())


def count(n: int, noun: str) -> str:
    """A number of things: "1 image", "2 images", "no images"."""
    return f"{n or 'no'} {noun}{'' if n == 1 else 's'}"


def some(names) -> str:
    """The first names, escaped where they cannot be printed."""
    first = [name.encode("utf-8", "backslashreplace").decode() for name in names[:3]]
    return ", ".join(first) + (", ..." if len(names) > 3 else "")
