"""Which name belongs to which split: by hash, so that it never changes when other names come or go."""

import hashlib

SPLITS = ("train", "validation", "test")  # 80 / 10 / 10


def digest(name: str) -> int:
    """A stable pseudo-random 64-bit number for a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def split_of(name: str) -> str:
    """The split of a name."""
    return {0: "test", 1: "validation"}.get(digest(name) % 10, "train")


def members(names, split: str) -> list[str]:
    """The names of a split in a stable pseudo-random order, so that the first n are a fair sample."""
    return in_order(name for name in names if split_of(name) == split)


def in_order(names) -> list[str]:
    """Names in a stable pseudo-random order."""
    return sorted(names, key=lambda name: (digest(name), name))
