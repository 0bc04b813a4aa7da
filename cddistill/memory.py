"""What to say when a device's memory is full. Nothing heavy is imported."""

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
