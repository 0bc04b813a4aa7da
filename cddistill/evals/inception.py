"""Inception-v3 (Szegedy et al. 2015, arXiv:1512.00567) as published FIDs use it: pool3 features, 2048 numbers an image.

The network of TensorFlow's classify_image_graph_def (2015-12-05) differs from the paper's later releases: average pools
divide by the pixels inside of the image, and the last block pools by the maximum. Its weights are the user's file of
the PyTorch port, FILE, under the layer names of that file; batch norms are folded into the convolutions.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cddistill.models import files
from cddistill.net import Net
from cddistill.perceptual.lpips import WeightsMissing, max_pool

FILE = "pt_inception-2015-12-05-6726825d.pth"  # the name ends in the first digits of the file's SHA-256
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SIDE = 299  # px
SMALLEST = 75  # px; in smaller images the last feature map would be empty
FEATURES = 2048
EPSILON = 1e-3  # of the batch norms
CLASSES = 1008  # of this network's head, which is not used; torchvision's own weights have 1000

Maps = Float[Array, "n h w c"]


def load(path: Path) -> Net:
    """The feature extractor as a net: features(images [n, h, w, 3] in [0, 255]) -> float32 [n, 2048].

    Images are 299 px; others of at least 75 px work too. The file is read without PyTorch, and no code in it is run.
    Raises WeightsMissing if it is not there, ValueError if it holds another network.
    """
    check(path)
    tensors, wanted = files.read(path).tensors, shapes()
    head = getattr(tensors.get("fc.weight"), "shape", None)
    if head != (CLASSES, FEATURES):
        raise ValueError(f"{path} is not the network of FID (fc.weight is {head}): download {URL} to it")
    return Net({name: folded(tensors, name, shape, path) for name, shape in wanted.items()}, apply)


def check(path: Path) -> None:
    """Raise WeightsMissing, which says what to download, if the file is not there."""
    if not path.is_file():
        raise WeightsMissing(f"{path} is not there: download {URL} to it")


def digest(path: Path) -> str:
    """The first 8 digits of a file's SHA-256; those of the published weights end its name."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def folded(tensors, name: str, shape: tuple[int, ...], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(kernel HWIO, bias) of a convolution without bias merged with the batch norm after it."""
    norms = ("weight", "bias", "running_mean", "running_var")
    expected = {f"{name}.conv.weight": shape} | {f"{name}.bn.{norm}": shape[:1] for norm in norms}
    for key, size in expected.items():
        if key not in tensors or tensors[key].shape != size:
            found = f"{key} {tensors[key].shape}" if key in tensors else f"no {key}"
            raise ValueError(f"{path} has {found}, where {size} is expected: download {URL} to it")
    kernel, scale, bias, mean, variance = (np.asarray(tensors[key], np.float64) for key in expected)
    scale = scale / np.sqrt(variance + EPSILON)
    kernel = kernel.transpose(2, 3, 1, 0) * scale.reshape(1, 1, 1, -1)
    return kernel.astype(np.float32), (bias - mean * scale).astype(np.float32)


@functools.cache
def shapes() -> dict[str, tuple[int, ...]]:
    """{layer: shape of its kernel, OIHW}."""
    found = {}

    def noted(name, x, channels, kernel=1, stride=1, same=False):
        size = pair(kernel)
        found[name] = (channels, x.shape[-1], *size)
        return convolve(x, jnp.zeros((*size, x.shape[-1], channels)), jnp.zeros(channels), stride, same)

    jax.eval_shape(functools.partial(network, noted), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.float32))
    return found


def apply(params, images: Float[Array | np.ndarray, "n h w 3"]) -> Float[Array, "n 2048"]:
    """The mean over pixels of the last block, for images in [0, 255], which need not be whole numbers."""

    def layer(name, x, channels, kernel=1, stride=1, same=False):
        return convolve(x, *params[name], stride, same)

    return network(layer, (images.astype(jnp.float32) - 128.0) / 128.0)


# ---- the architecture; layer(name, x, channels, kernel, stride, same) is a convolution, a batch norm and a ReLU


def network(layer: Callable, x: Maps) -> Float[Array, "n 2048"]:
    """Images in about [-1, 1] to features; the paper's table 1."""
    x = layer("Conv2d_1a_3x3", x, 32, 3, stride=2)
    x = layer("Conv2d_2a_3x3", x, 32, 3)
    x = max_pool(layer("Conv2d_2b_3x3", x, 64, 3, same=True), 3)
    x = layer("Conv2d_3b_1x1", x, 80)
    x = max_pool(layer("Conv2d_4a_3x3", x, 192, 3), 3)
    for block, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
        x = block_35(named(layer, block), x, pooled)
    x = reduction_35(named(layer, "6a"), x)
    for block, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        x = block_17(named(layer, block), x, width)
    x = reduction_17(named(layer, "7a"), x)
    x = block_8(named(layer, "7b"), x, mean_pool)
    return block_8(named(layer, "7c"), x, same_max_pool).mean((1, 2))


def named(layer: Callable, block: str) -> Callable:
    """The layers of a block."""
    return lambda name, *args, **kwargs: layer(f"Mixed_{block}.{name}", *args, **kwargs)


def chain(layer: Callable, stem: str, x: Maps, *layers) -> jax.Array:
    """Layers stem_1, stem_2 ..., each (channels, kernel), at the same size."""
    for i, (channels, kernel) in enumerate(layers, 1):
        x = layer(f"{stem}_{i}", x, channels, kernel, same=True)
    return x


def block_35(layer: Callable, x: Maps, pooled: int) -> jax.Array:
    """Figure 5 of the paper, at 35 x 35, with a 5 x 5 convolution."""
    return jnp.concatenate([
        layer("branch1x1", x, 64),
        chain(layer, "branch5x5", x, (48, 1), (64, 5)),
        chain(layer, "branch3x3dbl", x, (64, 1), (96, 3), (96, 3)),
        layer("branch_pool", mean_pool(x), pooled),
    ], -1)  # fmt: skip


def reduction_35(layer: Callable, x: Maps) -> jax.Array:
    """35 x 35 to 17 x 17."""
    narrow = chain(layer, "branch3x3dbl", x, (64, 1), (96, 3))
    narrow = layer("branch3x3dbl_3", narrow, 96, 3, stride=2)
    return jnp.concatenate([layer("branch3x3", x, 384, 3, stride=2), narrow, max_pool(x, 3)], -1)


def block_17(layer: Callable, x: Maps, width: int) -> jax.Array:
    """Figure 6 of the paper with n = 7, at 17 x 17."""
    row, column = (1, 7), (7, 1)
    double = ((width, 1), (width, column), (width, row), (width, column), (192, row))
    return jnp.concatenate([
        layer("branch1x1", x, 192),
        chain(layer, "branch7x7", x, (width, 1), (width, row), (192, column)),
        chain(layer, "branch7x7dbl", x, *double),
        layer("branch_pool", mean_pool(x), 192),
    ], -1)  # fmt: skip


def reduction_17(layer: Callable, x: Maps) -> jax.Array:
    """17 x 17 to 8 x 8."""
    small = layer("branch3x3_2", layer("branch3x3_1", x, 192), 320, 3, stride=2)
    large = chain(layer, "branch7x7x3", x, (192, 1), (192, (1, 7)), (192, (7, 1)))
    return jnp.concatenate([small, layer("branch7x7x3_4", large, 192, 3, stride=2), max_pool(x, 3)], -1)


def block_8(layer: Callable, x: Maps, pool: Callable) -> jax.Array:
    """Figure 7 of the paper, at 8 x 8."""
    single = layer("branch3x3_1", x, 384)
    double = chain(layer, "branch3x3dbl", x, (448, 1), (384, 3))
    return jnp.concatenate([
        layer("branch1x1", x, 320),
        layer("branch3x3_2a", single, 384, (1, 3), same=True),
        layer("branch3x3_2b", single, 384, (3, 1), same=True),
        layer("branch3x3dbl_3a", double, 384, (1, 3), same=True),
        layer("branch3x3dbl_3b", double, 384, (3, 1), same=True),
        layer("branch_pool", pool(x), 192),
    ], -1)  # fmt: skip


def pair(kernel) -> tuple[int, int]:
    """Height and width of a kernel."""
    return kernel if isinstance(kernel, tuple) else (kernel, kernel)


def convolve(x: Maps, kernel, bias, stride: int, same: bool) -> jax.Array:
    """ReLU of a convolution, padded to the same size or not at all."""
    pads = [(n // 2, n // 2) if same else (0, 0) for n in kernel.shape[:2]]
    axes = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=axes)
    return jax.nn.relu(out + jnp.reshape(bias, (1, 1, 1, -1)))


def mean_pool(x: Maps) -> Maps:
    """Means of 3 x 3 windows over the pixels that lie inside of the image."""
    total = lambda y: jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def same_max_pool(x: Maps) -> Maps:
    """Maxima of 3 x 3 windows."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
