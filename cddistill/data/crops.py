"""From pictures of any size to images of one shape: data.crop. A size is the side of a square, or (height, width)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cddistill.data.images import covering, fit, read, read_map, shape_of, whole

RENAMED = {"depth": "depth_map"}  # a person's depth in an element, see `contracts.Element`
TRIES = 100  # crops that are drawn until no depth map is constant in one, so that it says something

Element = dict[str, Any]  # `contracts.Element`, whose images may be PIL images that are still to be cropped
Size = int | tuple[int, int]


class Crop(NamedTuple):
    """A way to make images of one size: of an image when it is read, and of all of an element when it is used."""

    check: Callable[[tuple[int, int], Size, str], None]  # its sides, size, its name: ValueError if it is too small
    keep: Callable[[Image.Image, Size], Any]  # an image as it stays in memory
    cut: Callable[[Element, Size, np.random.Generator | None], Element]  # the element, with images of this size
    whole: Callable[[Element, int], Element]  # the same with all that any of its squares can show, for checks
    read: Callable[[Any, str, Size], Image.Image]  # an image file, its name and size, decoded


class Place(NamedTuple):
    """Where an image comes from: a picture that was resized and cropped. Pairs are (height, width), in pixels."""

    original: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]  # (top, left) of the crop, in the resized picture
    shape: tuple[int, int]

    def mirrored(self) -> "Place":
        """That of the mirror image, which is a crop of the mirrored picture."""
        top, left = self.corner
        return self._replace(corner=(top, self.resized[1] - self.shape[1] - left))

    def time_ids(self) -> np.ndarray:
        """SDXL's size conditions, float32 [6], in the order of `models.prompt.time_ids`."""
        return np.array([*self.original, *self.corner, *self.shape], np.float32)


def placed(sides: tuple[int, int], size: Size) -> Place:
    """The place of what `fit` makes of a picture with these sides, (width, height)."""
    resized, corner = covering(sides, size)
    return Place(*(tuple(pair[::-1]) for pair in (sides, resized, corner)), shape_of(size))


def decoded(crop: Crop, size: Size, name: str, file, others: dict[str, tuple[str, Any]]) -> Element:
    """`kept` of image files: paths, or opened. Raises ValueError, naming it, also for one that cannot be read."""
    readers = {"edited": crop.read, "depth": lambda file, what, _: read_map(file, what)}
    others = {key: (what, readers[key](other, what, size)) for key, (what, other) in others.items()}
    return kept(crop, size, name, crop.read(file, name, size), others)


def kept(crop: Crop, size: Size, name: str, image: Image.Image, others: dict[str, tuple[str, Image.Image]]) -> Element:
    """The images of an element as they stay in memory. others are {"edited" or "depth": (its name, the image)}.

    Raises ValueError for an image that is too small to be cropped, or another that has not its size.
    """
    sides = whole(image).sides
    crop.check(sides, size, name)
    for other_name, other in others.values():
        if whole(other).sides != sides:
            sizes = "{} x {} px, but {} x {}".format(*whole(other).sides, *sides)
            raise ValueError(f"{other_name} is {sizes} is {name}: save both at one size")
    found = {RENAMED.get(key, key): crop.keep(other, size) for key, (_, other) in others.items()}
    return {"image": crop.keep(image, size), "place": placed(sides, size)} | found


def check_size(sides: tuple[int, int], size: Size, name: str) -> None:
    """ValueError for an image that is smaller than `size`."""
    height, width = shape_of(size)
    if sides[0] < width or sides[1] < height:
        shape = "{} x {} px".format(*sides)
        what = f"data.size={size}" if np.ndim(size) == 0 else f"the bucket {width}x{height} of data.buckets"
        raise ValueError(f"{name} is {shape}, and {what} is cropped: leave it out, or set data.crop=resize")


def crop_alike(element: Element, size: Size, rng: np.random.Generator | None) -> Element:
    """The same part of each image: a random one, or without rng the one in the centre."""
    height, width = shape_of(size)
    sides = element["image"].size
    free = np.array(sides) - (width, height)
    for _ in range(TRIES):
        left, top = (int(x) for x in (free // 2 if rng is None else rng.integers(0, free + 1)))
        found = of_images(element, lambda x, at=(left, top, left + width, top + height): x.crop(at))
        if rng is None or not any(x.mode == "F" and np.ptp(x) == 0 for x in images_of(found).values()):
            break
    return of_images(found, np.asarray) | {"place": Place(sides[::-1], sides[::-1], (top, left), (height, width))}


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


RESIZE = Crop(
    lambda *_: None,
    fit,
    lambda element, *_: element,
    lambda element, _: element,
    lambda file, name, _: read(file, name),
)
CROPS = {
    "resize": RESIZE,
    "draft": RESIZE._replace(read=lambda file, name, size: read(file, name, shape_of(size))),
    "random": Crop(check_size, lambda image, _: image, crop_alike, extended, RESIZE.read),
}
