"""Depth to image: the condition is the inverse depth, normalised for each image, near surfaces bright."""

import dataclasses
from typing import Literal

import jax.image
import numpy as np

from cddistill.data import captions, images
from cddistill.data.contracts import Task


@dataclasses.dataclass(frozen=True)
class Depth(Task):
    """For data with a depth map. CoDi's paper takes estimated depth; its estimator is not named."""

    depth_files: Literal["inverse", "metres"] = "inverse"  # of a person's maps: near is bright, or distances

    input_suffixes = captions.MAPS
    input_label, input_control = "depth map", "file"
    best_metric = None

    def condition(self, element, rng):
        if "depth_map" in element:
            return self.from_map(element["depth_map"], "its depth map")
        if "depth" not in element:
            raise ValueError("data.task depth needs a depth map for every image, and here is none")
        return normalised(1 / element["depth"], "a depth map")

    def input_files(self, paths):
        """Maps beside pictures have names as photo_depth.png."""
        maps = [path for path in paths if path.stem.endswith(captions.DEPTH_SUFFIX)]
        return maps or paths

    def read(self, path, size):
        return self.from_map(images.fit(images.read_map(path), size), images.name_of(path))

    def from_map(self, depth, name):
        """The condition of a person's depth map [h, w]. Raises ValueError, naming it, for one that says nothing."""
        if self.depth_files == "metres":
            if (depth <= 0).any():
                raise ValueError(f"{name} holds distances of 0 or less: fill them first, or use depth_files=inverse")
            depth = 1 / depth
        return normalised(depth, name)

    def input_note(self, size):
        stored = {"inverse": "near is bright", "metres": "in metres"}[self.depth_files]
        return f"the input is a depth map (grey image or .npy), {stored}, resized to {size} x {size}"

    def in_browser(self, size):
        return {"kind": "depth", "metres": self.depth_files == "metres"}

    def encode(self, autoencoder, cond):
        """Inverse depth at the latents' size, -1 to 1, one channel: Stable Diffusion 2 depth's extra channel."""
        latents = jax.eval_shape(autoencoder.encode, cond)
        small = jax.image.resize(cond[..., :1], (*latents.shape[:3], 1), "cubic")
        low, high = small.min((1, 2, 3), keepdims=True), small.max((1, 2, 3), keepdims=True)
        return 2.0 * (small - low) / (high - low) - 1.0


def normalised(inverse, name) -> np.ndarray:
    """Inverse depth [h, w] scaled to 0 (farthest) .. 1 (nearest), float32 [h, w, 3]: published ControlNets take three
    channels. Raises ValueError, naming it, for maps that are constant or not finite."""
    low, high = inverse.min(), inverse.max()
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{name} holds NaN or infinite values: fill them first")
    if high <= low:
        raise ValueError(f"{name} is constant: it says nothing about depth")
    return np.repeat(np.float32((inverse - low) / (high - low))[..., None], 3, -1)
