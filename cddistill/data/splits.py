"""Assign names to splits, by folder or by hash. By hash, adding or removing names never moves another name."""

import functools
import hashlib

import numpy as np

from cddistill.checksums import mixed

SPLITS = ("train", "validation", "test")  # 80, 10 and 10 %
SPELLINGS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}
"""Names of a split's folder, in any case of the letters."""


def digest(name: str) -> int:
    """A pseudo-random 64-bit number that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def split_of(name: str) -> str:
    """The split that a name belongs to."""
    return {0: "test", 1: "validation"}.get(digest(name) % 10, "train")


def members(names, split: str) -> list[str]:
    """The names of a split in a fixed pseudo-random order, so that the first n are a random sample."""
    return in_order(name for name in names if split_of(name) == split)


def in_order(names) -> list[str]:
    """Names in a fixed pseudo-random order."""
    return sorted(names, key=lambda name: (digest(name), name))


@functools.lru_cache(maxsize=4)
def of_numbers(n: int) -> dict[str, np.ndarray]:
    """{split: those of 0 ... n - 1 that belong to it, uint32, in a fixed pseudo-random order}."""
    digests = mixed(np.arange(n, dtype=np.uint64))
    order = np.argsort(digests, kind="stable").astype(np.uint32)
    number = np.minimum(digests[order] % np.uint64(10), 2)
    return {split: order[number == k] for split, k in (("train", 2), ("validation", 1), ("test", 0))}


# ---- rules: {split: names} of names like "train/cat/1.png" and {top folder: its split}, {} without such folders


def by_hash(names, folders) -> dict[str, list[str]]:
    """80, 10 and 10 % by hash, whatever the folders are called."""
    return {split: members(names, split) for split in SPLITS}


def by_folder(names, folders) -> dict[str, list[str]]:
    """By folder; by hash without such folders."""
    if not folders:
        return by_hash(names, folders)
    return {split: in_order(n for n in names if folders.get(top(n)) == split) for split in SPLITS}


def filled(names, folders) -> dict[str, list[str]]:
    """By folder. A test or validation split without images takes 10 % of train, at least one of its images."""
    parts = by_folder(names, folders) if folders else {"train": in_order(names), "validation": [], "test": []}
    for split in ("test", "validation"):
        if not parts[split]:
            train = parts["train"]
            n = max(len(train) // 10, min(1, len(train) - 1))
            parts |= {split: train[:n], "train": train[n:]}
    return parts


def everywhere(names, folders) -> dict[str, list[str]]:
    """Every name in every split."""
    return dict.fromkeys(SPLITS, in_order(names))


RULES = {"auto": by_folder, "hash": by_hash, "fill": filled, "all": everywhere}


def split_folders(names) -> dict[str, str]:
    """{top folder: its split}, where names are divided into folders like train/ and val/, or {}.

    One of the exact names train, validation and test is enough; other spellings count from two splits on. ValueError
    if two folders are the same split.
    """
    tops = {top(name) for name in names} - {""}
    found = {folder: s for s, spellings in SPELLINGS.items() for folder in sorted(tops) if folder.lower() in spellings}
    if not tops & set(SPLITS) and len(set(found.values())) < 2:
        return {}
    for split in SPLITS:
        same = [f"{folder}/" for folder, s in found.items() if s == split]
        if len(same) > 1:
            raise ValueError(f"{' and '.join(same)} are both the {split} split: rename or remove one of them")
    return found


def top(name: str) -> str:
    """The first folder of a path, "" without one."""
    return name.split("/")[0] if "/" in name else ""
