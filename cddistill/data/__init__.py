"""Data: sources of images or latents, their splits, and batches that depend on nothing but seed and position."""

from cddistill.data.loader import DataConfig, batches, examples, load

__all__ = ["DataConfig", "batches", "examples", "load"]
