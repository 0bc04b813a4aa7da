"""What to say when a device's memory is full, and what the compiler leaves behind. Nothing heavy is imported."""

import contextlib
import ctypes
import re
from collections.abc import Mapping
from typing import Any

EXHAUSTED = "RESOURCE_EXHAUSTED"  # in the message of JAX's error
ASKED = re.compile(r"allocat\w+ (?:a buffer of )?([\d.]+) ?(bytes|[KMGT]i?B)", re.IGNORECASE)
REMEDIES = {
    "train": "lower batch_size={batch_size}, raise accumulate={accumulate}, set remat=True, or share the weights with "
    "fsdp=-1",
    "encode": "lower batch_size={batch_size}",
    "pairs": "lower pairs_batch={pairs_batch}",
}
OTHERS = "set decode_batch=1, or use larger devices"


def exhausted(said: str, mode: str, config: Mapping[str, Any]) -> str:
    """The sentence for a RESOURCE_EXHAUSTED error of JAX in a --mode of a config."""
    asked = ASKED.search(said)
    size = f" (it was asked for {asked[1]} {asked[2]})" if asked else ""
    return (
        f"the memory of a device, or of this machine, is full{size}: {REMEDIES.get(mode, OTHERS).format(**config)}; "
        "--mode=plan says what a config needs"
    )


def trim() -> None:
    """Return the memory that this process has freed to the operating system.

    Linux's malloc keeps it: after compiling a train step, gigabytes. On other systems nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
