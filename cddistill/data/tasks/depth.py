"""Depth to image: the condition is the inverse depth, normalised for each image, near surfaces bright."""

import dataclasses

import jax.image
import numpy as np
from PIL import Image

from cddistill.data import images
from cddistill.data.contracts import Task

FILES = ("inverse", "metres")


@dataclasses.dataclass(frozen=True)
class Depth(Task):
    """For data with a depth map. CoDi's paper takes estimated depth; its estimator is not named."""

    depth_files: str = "inverse"  # what a person's depth maps hold: near is bright; or "metres": distances

    best_metric = None

    def __post_init__(self):
        if self.depth_files not in FILES:
            raise ValueError(f"data.depth_files must be one of {', '.join(FILES)}, not {self.depth_files!r}")

    def condition(self, element, rng):
        if "depth" not in element:
            raise ValueError("data.task depth needs a depth map for every image: these data have none")
        return normalised(1 / element["depth"], "a depth map")

    def read(self, path, size):
        depth = read_map(path)
        if self.depth_files == "metres":
            if not (depth > 0).all():
                raise ValueError(f"{path} holds distances of 0 or less: fill them first, or use depth_files=inverse")
            depth = 1 / depth
        return normalised(images.fit(Image.fromarray(depth), size), path)

    def input_note(self, size):
        stored = {"inverse": "near is bright", "metres": "in metres"}[self.depth_files]
        return f"the input is a depth map, {stored}, resized to {size} x {size}"

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


def read_map(path) -> np.ndarray:
    """A depth map float32 [h, w] from a .npy file, or an 8 or 16-bit image file with one channel or three equal ones.

    path may also be a PIL image. Raises ValueError, naming it, for anything else.
    """
    if not isinstance(path, Image.Image) and path.suffix == ".npy":
        values = np.load(path, allow_pickle=False)
    else:
        try:
            with path if isinstance(path, Image.Image) else Image.open(path) as image:
                values = np.asarray(image)
        except Exception as error:  # Pillow raises almost anything for broken files
            raise ValueError(f"{path} cannot be read ({error})") from error
    if values.ndim == 3 and (values == values[..., :1]).all():
        values = values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "uif":
        raise ValueError(f"{path} is {values.dtype} {values.shape}; expected a depth map of one channel")
    return values.astype(np.float32)
