"""Canny to image: the condition is the edges of the image (Canny 1986), as in ControlNet."""

import dataclasses
from typing import Annotated

import jax.image
import numpy as np
from scipy import ndimage
from skimage import feature

from cddistill.data import images
from cddistill.data.contracts import Task
from cddistill.data.resample import to_float
from cddistill.typed import RISING, NonNegative, within

LUMA = np.float32([0.299, 0.587, 0.114])  # ITU-R 601
Blur = Annotated[float, within(least=0, most=100)]


@dataclasses.dataclass(frozen=True)
class Canny(Task):
    """Edges from scikit-image's Canny detector. Its settings are drawn uniformly from ranges, which are ours."""

    canny_sigma: Annotated[tuple[Blur, Blur], RISING] = (0.5, 1.5)  # px, of the Gaussian blur
    canny_low: Annotated[tuple[NonNegative, NonNegative], RISING] = (0.05, 0.15)  # threshold of luma's gradient
    canny_high: Annotated[tuple[NonNegative, NonNegative], RISING] = (0.15, 0.35)  # upper threshold

    best_metric = None
    input_label = "photograph, or its edges in black and white"

    def __post_init__(self):
        if self.canny_low[1] > self.canny_high[0]:
            raise ValueError(f"data.canny_low {self.canny_low} must not exceed data.canny_high {self.canny_high}")

    @property
    def ranges(self):
        return self.canny_sigma, self.canny_low, self.canny_high

    def condition(self, element, rng):
        return picture_of(edges(element["target"], *(rng.uniform(*ends) for ends in self.ranges)))

    def central_edges(self, image):
        """Edges with the settings in the middle of the ranges."""
        return edges(image, *map(np.mean, self.ranges))

    def read(self, path, size):
        image = images.fit(images.read(path), size)
        if {*np.unique(image)} <= {0, 255} and (image[..., :1] == image).all():
            return to_float(image)
        return picture_of(self.central_edges(to_float(image)))

    def input_note(self, size):
        return f"edges of {size} px are taken from the image; an image of {size} px in pure black and white is edges"

    def in_browser(self, size):
        return {"kind": "canny", "edges": [float(np.mean(ends)) for ends in self.ranges]}

    def measures(self, generated, truth, cond):
        pairs = zip(generated, truth, strict=True)
        return {"Edge F1": np.array([f1(self.central_edges(a), self.central_edges(b)) for a, b in pairs])}

    def encode(self, autoencoder, cond):
        """Edges at the latents' size, -1 to 1, one channel."""
        latents = jax.eval_shape(autoencoder.encode, cond)
        return jax.image.resize(cond[..., :1], (*latents.shape[:3], 1), "linear") * 2.0 - 1.0


def edges(image, sigma: float, low: float, high: float) -> np.ndarray:
    """Edges of an image [h, w, 3] in [0, 1], bool [h, w]."""
    return feature.canny(image @ LUMA, sigma, low, high)


def picture_of(found) -> np.ndarray:
    """Edges, bool [h, w], as the condition: white, float32 [h, w, 3], the channels that published ControlNets take."""
    return np.repeat(np.float32(found)[..., None], 3, -1)


def f1(found, wanted, tolerance: int = 1) -> float:
    """F1 of edges, bool [h, w]: a pixel is right if the other image has an edge at most `tolerance` px away, also
    diagonally. 1 if there are no edges in either image."""
    if not found.any() and not wanted.any():
        return 1.0
    square = np.ones((2 * tolerance + 1,) * 2, bool)
    near = lambda a, b: float((a & ndimage.binary_dilation(b, square)).sum() / max(a.sum(), 1))
    precision, recall = near(found, wanted), near(wanted, found)
    return 2 * precision * recall / max(precision + recall, 1e-12)
