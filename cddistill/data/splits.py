"""Assign names to splits by hash, so that adding or removing names never moves another name."""

import hashlib

SPLITS = ("train", "validation", "test")  # 80, 10 and 10 %


def digest(name: str) -> int:
    """A pseudo-random 64-bit number that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def split_of(name: str) -> str:
    """The split that a name belongs to."""
    return {0: "test", 1: "validation"}.get(digest(name) % 10, "train")


def members(names, split: str) -> list[str]:
    """The names of a split in a fixed pseudo-random order, so that the first n are a random sample."""
    return in_order(name for name in names if split_of(name) == split)


def in_order(names) -> list[str]:
    """Names in a fixed pseudo-random order."""
    return sorted(names, key=lambda name: (digest(name), name))
