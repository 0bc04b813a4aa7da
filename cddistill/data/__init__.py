"""Data: sources of images or latents, tasks, splits, and batches that depend only on the seed and the position."""

from cddistill.data.loader import (
    DataConfig,
    batches,
    configure,
    defaults,
    examples,
    fingerprint,
    first_of_each,
    load,
    order_digest,
    parts_of,
    shown,
)
from cddistill.data.sources import SOURCES
from cddistill.data.tasks import TASKS

__all__ = [
    "SOURCES",
    "TASKS",
    "DataConfig",
    "batches",
    "configure",
    "defaults",
    "examples",
    "fingerprint",
    "first_of_each",
    "load",
    "order_digest",
    "parts_of",
    "shown",
]
