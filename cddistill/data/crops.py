"""From pictures of any size to squares of data.size px: data.crop."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cddistill.data.images import fit

RENAMED = {"depth": "depth_map"}  # a person's depth in an element, see `contracts.Element`
TRIES = 100  # crops that are drawn until no depth map is constant in one, so that it says something

Element = dict[str, Any]  # `contracts.Element`, whose images may be PIL images that are still to be cropped


class Crop(NamedTuple):
    """A way to make squares: of an image when it is read, and of all images of an element when it is used."""

    check: Callable[[tuple[int, int], int, str], None]  # its sides, size, its name: ValueError if it is too small
    keep: Callable[[Image.Image, int], Any]  # an image as it stays in memory
    cut: Callable[[Element, int, np.random.Generator | None], Element]  # the element, of which images become squares
    whole: Callable[[Element, int], Element]  # the same with all that any of its squares can show, for checks


def kept(crop: Crop, size: int, name: str, image: Image.Image, others: dict[str, tuple[str, Image.Image]]) -> Element:
    """The images of an element as they stay in memory. others are {"edited" or "depth": (its name, the image)}.

    Raises ValueError for an image that is too small to be cropped, or another that has not its size.
    """
    crop.check(image.size, size, name)
    for other_name, other in others.values():
        if other.size != image.size:
            sizes = "{} x {} px, but {} x {}".format(*other.size, *image.size)
            raise ValueError(f"{other_name} is {sizes} is {name}: save both at one size")
    found = {RENAMED.get(key, key): crop.keep(other, size) for key, (_, other) in others.items()}
    return {"image": crop.keep(image, size)} | found


def check_size(sides: tuple[int, int], size: int, name: str) -> None:
    """ValueError for an image with a side below `size` px."""
    if min(sides) < size:
        shape = "{} x {} px".format(*sides)
        raise ValueError(f"{name} is {shape}, and data.size={size} is cropped: leave it out, or set data.crop=resize")


def crop_alike(element: Element, size: int, rng: np.random.Generator | None) -> Element:
    """The same square of each image: a random one, or without rng the one in the centre."""
    free = np.array(element["image"].size) - size
    for _ in range(TRIES):
        left, top = (int(x) for x in (free // 2 if rng is None else rng.integers(0, free + 1)))
        found = of_images(element, lambda x, at=(left, top, left + size, top + size): x.crop(at))
        if rng is None or not any(x.mode == "F" and np.ptp(x) == 0 for x in images_of(found).values()):
            break
    return of_images(found, np.asarray)


def extended(element: Element, size: int) -> Element:
    """Each image whole, its border repeated to a square whose side is a multiple of `size`."""
    side = -(-max(element["image"].size) // size) * size

    def extend(image):
        rest = (0, side - image.height), (0, side - image.width)
        return np.pad(image, (*rest, (0, 0))[: np.ndim(image)], "edge")

    return of_images(element, extend)


def images_of(element: Element) -> dict[str, Image.Image]:
    """The PIL images of an element."""
    return {key: x for key, x in element.items() if isinstance(x, Image.Image)}


def of_images(element: Element, function: Callable) -> Element:
    """The element with function(image) for each PIL image."""
    return element | {key: function(x) for key, x in images_of(element).items()}


CROPS = {
    "resize": Crop(lambda *_: None, fit, lambda element, *_: element, lambda element, _: element),
    "random": Crop(check_size, lambda image, _: image, crop_alike, extended),
}
