"""Inpainting: the condition is the image with its hole filled grey, and the hole's mask as the fourth channel."""

import dataclasses
import glob
from typing import Literal

import jax.image
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from cddistill.data import images
from cddistill.data.contracts import Task
from cddistill.data.resample import to_float

GREY = 0.5  # of the hole
MASK_SUFFIX = "_mask"  # photo_mask.png is the mask of photo.jpg


@dataclasses.dataclass(frozen=True)
class Inpainting(Task):
    """Generate what is missing. The shapes of holes are ours: CoDi's paper only shows unions of rectangles."""

    hole: Literal["rectangles", "brush", "half"] = "rectangles"  # union of 1 to 3; strokes; half of the image
    paste: bool = False  # put the known pixels of the input over those of the generated image

    best_metric = None  # PSNR prefers blurred holes
    any_shape = False  # holes are drawn in squares
    input_label, input_control = "picture: paint over what is to be generated", "brush"
    input_is_target = True

    def check(self, size):
        if size < 8:
            raise ValueError(f"inpainting needs a data.size of at least 8, not {size}")

    def condition(self, element, rng):
        image = element["target"]
        return masked(image, HOLES[self.hole](image.shape[0], rng))

    def input_files(self, paths):
        return [path for path in paths if not path.stem.endswith(MASK_SUFFIX)]

    def read(self, path, size):
        image, mask = image_and_mask(path)
        hole = images.fit(mask.convert("RGB"), size)[..., 0] >= 128
        if hole.all() or not hole.any():
            problem = "covers all of the image" if hole.all() else "is empty"
            raise ValueError(
                f"the hole of {images.name_of(path)} {problem}: white in the mask, or transparent, is generated"
            )
        return masked(to_float(images.fit(image, size)), hole)

    def input_note(self, size):
        return f"generated where the image is transparent, or its mask (name{MASK_SUFFIX}.png) is white; {size} px"

    def in_browser(self, size):
        return {"kind": "inpaint", "paste": self.paste}

    def references(self, cond):
        return {"grey hole": cond[..., :3]}

    def regions(self, cond, truth):
        return {"in the hole": cond[..., 3]}

    def finish(self, generated, cond):
        hole = cond[..., 3:]
        return generated * hole + cond[..., :3] * (1 - hole) if self.paste else generated

    def encode(self, autoencoder, cond):
        """The mask at the latents' size and the latents of the image with a grey hole: Stable Diffusion inpainting's
        extra channels, in its order."""
        latents = autoencoder.encode(cond[..., :3] * 2.0 - 1.0)
        mask = jax.image.resize(cond[..., 3:], (*latents.shape[:3], 1), "nearest")
        return jnp.concatenate([mask, latents], -1)


def masked(image, hole):
    """Condition [h, w, 4] of an image [h, w, 3] in [0, 1] and a hole, bool [h, w]."""
    mask = np.float32(hole)[..., None]
    return np.concatenate([image * (1 - mask) + np.float32(GREY) * mask, mask], -1)


def rectangles(size: int, rng) -> np.ndarray:
    """Union of 1 to 3 rectangles with sides of 1/8 to 1/2 of the image, bool [size, size]."""
    hole = np.zeros((size, size), bool)
    for _ in range(rng.integers(1, 4)):
        h, w = rng.integers(size // 8, size // 2 + 1, 2)
        top, left = rng.integers(size - h + 1), rng.integers(size - w + 1)
        hole[top : top + h, left : left + w] = True
    return hole


def brush(size: int, rng) -> np.ndarray:
    """1 to 3 strokes of 3 to 6 points with widths of 1/12 to 1/5 of the image, bool [size, size]; never all of it."""
    image = Image.new("1", (size, size))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, 4)):
        points = rng.uniform(0, size, (rng.integers(3, 7), 2))
        width = int(max(2, rng.uniform(size / 12, size / 5)))
        draw.line([tuple(p) for p in points], 1, width)
        for x, y in points:  # round ends and joints
            draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], 1)
    return np.array(image)


def half(size: int, rng) -> np.ndarray:
    """The left, right, upper or lower half, bool [size, size]."""
    hole = np.zeros((size, size), bool)
    hole[: size // 2] = True
    return np.rot90(hole, rng.integers(4)).copy()


HOLES = {"rectangles": rectangles, "brush": brush, "half": half}


def image_and_mask(path) -> tuple[Image.Image, Image.Image]:
    """A person's image in RGB, and its mask in mode L: the image's alpha or a mask file beside it.

    path is a file or a PIL image. Raises ValueError if there is no mask, or one of another size.
    """
    image = images.read(path)
    if not isinstance(path, Image.Image) and (
        files := sorted(path.parent.glob(f"{glob.escape(path.stem)}{MASK_SUFFIX}.*"))
    ):
        mask = images.read(files[0]).convert("L")
        if mask.size != image.size:
            sizes = "{} x {} px, and its image {} x {}".format(*mask.size, *image.size)
            raise ValueError(f"{files[0]} is {sizes}: save the mask at the size of {path.name}")
        return image, mask
    alpha = images.read_alpha(path)
    if alpha is None:
        example = f"{path.stem}{MASK_SUFFIX}.png" if hasattr(path, "stem") else "an alpha channel"
        raise ValueError(f"{images.name_of(path)} has no hole: make it transparent there, or put {example} beside it")
    return image, Image.eval(alpha, lambda a: 255 - a)
