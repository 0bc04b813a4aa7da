"""A folder of images, optionally with captions and labels. Every file is checked once before the first step."""

import concurrent.futures
import dataclasses
import json
import logging
import time
from pathlib import Path

from PIL import Image

from cddistill.data.contracts import Source
from cddistill.data.images import SUFFIXES, fit, read, to_rgb
from cddistill.data.splits import SPLITS, in_order, members

CACHE_BYTES = 2**30  # of decoded images kept in memory
PROGRESS_EVERY = 10  # seconds between progress messages


@dataclasses.dataclass(frozen=True)
class Folder(Source):
    """Images in the folder data.path and its sub-folders. No options."""

    def open(self, config, split):
        return FolderImages(config, split)


class FolderImages:
    """Images in the sub-folders train, validation and test. Without these, images are split by a hash of their name.

    The caption of cat.jpg is in cat.txt, or in a line of data.path/metadata.jsonl: {"file_name": "a/cat.jpg",
    "text": "a cat"}. That line may also have an integer "label". Images without one get the null label.
    """

    def __init__(self, config, split):
        self.root, self.size, self.null = Path(config.path), config.size, config.num_classes
        if not config.path or not self.root.is_dir():
            raise ValueError(f"data.path {config.path!r} is not a folder; set it to a folder of images")
        files = [p for p in self.root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not files:
            raise ValueError(f"there is no image in {self.root}; expected files like *{', *'.join(SUFFIXES)}")
        self.metadata = read_metadata(self.root / "metadata.jsonl")
        self.num_labels = max((record.get("label", -1) + 1 for record in self.metadata.values()), default=0)
        self.names = readable_names(self.root, self.split_names(files, split), config.skip_bad)
        self.cache = {}

    def split_names(self, files, split):
        """Paths of the split's files relative to the root, in a fixed pseudo-random order."""
        names = [p.relative_to(self.root).as_posix() for p in files]
        if any(name.split("/")[0] in SPLITS for name in names if "/" in name):
            return in_order(name for name in names if name.startswith(f"{split}/"))
        return members(names, split)

    def __len__(self):
        return len(self.names)

    def element(self, i, rng):
        """Image i."""
        name = self.names[i]
        element = self.cache.get(name) or self.open(name)
        if len(self.cache) < CACHE_BYTES // element["image"].nbytes:
            self.cache[name] = element
        return dict(element)

    def open(self, name):
        """Read an image, its caption and its label."""
        image = fit(read(self.root / name, name), self.size)
        sidecar = (self.root / name).with_suffix(".txt")
        caption = sidecar.read_text("utf-8").strip() if sidecar.exists() else ""
        return {"image": image, "label": self.null, "caption": caption} | self.metadata.get(name, {})


def read_metadata(path):
    """{file name: {"caption", "label"}} from a metadata.jsonl, with the keys that a line has; {} without the file."""
    records = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], 1):
        try:
            record = json.loads(line)
            known = records[record["file_name"]] = {}
            if "text" in record:
                known["caption"] = str(record["text"])
            if "label" in record:
                known["label"] = int(record["label"])
            if known.get("label", 0) < 0:
                raise ValueError("a label must not be negative")
        except (ValueError, KeyError, TypeError) as error:
            example = '{"file_name": "a.jpg", "text": "a cat"}'
            raise ValueError(f"line {number} of {path} is not like {example}: {error!r}") from error
    return records


def readable_names(root, names, skip_bad):
    """The names of images that can be decoded. Raises ValueError naming those that cannot, unless skip_bad is set."""
    bad, last = {}, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = pool.map(lambda name: decode_error(root, name), names)
        for done, (name, problem) in enumerate(zip(names, problems, strict=True), 1):
            if problem:
                bad[name] = problem
            if time.monotonic() - last > PROGRESS_EVERY:
                logging.warning("checked %d of %d images in %s", done, len(names), root)
                last = time.monotonic()
    summary = f"{len(bad)} of {len(names)} images in {root} cannot be used: {'; '.join(list(bad.values())[:3])}"
    if bad and not skip_bad:
        raise ValueError(f"{summary} (data.skip_bad=True skips them)")
    if bad:
        logging.warning("%s; skipped", summary)
    return [name for name in names if name not in bad]


def decode_error(root, name):
    """The error of decoding an image file, or "". Decodes all of it: the header does not show a truncated file."""
    try:
        with Image.open(root / name) as image:
            image.draft(None, (1, 1))  # JPEG: decode at 1/8 of the size, which finds the same errors faster
            to_rgb(image, name)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # from Pillow, for broken files
        return str(error) if str(error).startswith(name) else f"{name} cannot be read ({error})"
    return ""
