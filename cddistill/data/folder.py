"""A folder of images, with captions if there are any; every file is read once before the first step."""

import concurrent.futures
import json
import logging
import time
from pathlib import Path

from PIL import Image

from cddistill.data.images import SUFFIXES, fit, read, to_rgb
from cddistill.data.splits import SPLITS, in_order, members

CACHE_BYTES = 2**30  # of decoded images kept in memory
SIGN_OF_LIFE = 10  # seconds between lines of progress


class Folder:
    """Images below config.path, in sub-folders train, validation and test or else split by a hash of the file's name.

    A caption is the text file beside an image (cat.jpg, cat.txt), or the line of metadata.jsonl in config.path
    {"file_name": "a/cat.jpg", "text": "a cat"}, which may also give an integer "label"; else that is the null label.
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
        self.names = readable(self.root, self.of_split(files, split), config.skip_bad)
        self.read = {}

    def of_split(self, files, split):
        """Names of the split's files, relative to the root."""
        names = [p.relative_to(self.root).as_posix() for p in files]
        if any(name.split("/")[0] in SPLITS for name in names if "/" in name):
            return in_order(name for name in names if name.startswith(f"{split}/"))
        return members(names, split)

    def __len__(self):
        return len(self.names)

    def element(self, i, rng):
        """Image i."""
        name = self.names[i]
        element = self.read.get(name) or self.open(name)
        if len(self.read) < CACHE_BYTES // element["image"].nbytes:
            self.read[name] = element
        return dict(element)

    def open(self, name):
        """The image of a name and what is known about it."""
        image = fit(read(self.root / name, name), self.size)
        sidecar = (self.root / name).with_suffix(".txt")
        caption = sidecar.read_text("utf-8").strip() if sidecar.exists() else ""
        return {"image": image, "label": self.null, "caption": caption} | self.metadata.get(name, {})


def read_metadata(path):
    """{file name: {"caption", "label"}, as far as given} of a metadata.jsonl, empty if there is none."""
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


def readable(root, names, skip_bad):
    """The names of images that can be decoded; ValueError naming those that cannot, unless they are to be skipped."""
    bad, last = {}, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = pool.map(lambda name: fault(root, name), names)
        for done, (name, problem) in enumerate(zip(names, problems, strict=True), 1):
            if problem:
                bad[name] = problem
            if time.monotonic() - last > SIGN_OF_LIFE:
                logging.warning("checked %d of %d images in %s", done, len(names), root)
                last = time.monotonic()
    summary = f"{len(bad)} of {len(names)} images in {root} cannot be used: {'; '.join(list(bad.values())[:3])}"
    if bad and not skip_bad:
        raise ValueError(f"{summary} (data.skip_bad=True leaves them out)")
    if bad:
        logging.warning("%s; left out", summary)
    return [name for name in names if name not in bad]


def fault(root, name):
    """What is wrong with an image file, or nothing. Reads all of it: a header says nothing about a cut-off end."""
    try:
        with Image.open(root / name) as image:
            image.draft(None, (1, 1))  # JPEG: decodes to an eighth of the size, which finds the same faults faster
            to_rgb(image, name)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, for broken files
        return str(error) if str(error).startswith(name) else f"{name} cannot be read ({error})"
    return ""
