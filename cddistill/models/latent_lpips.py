"""LatentLPIPS: LPIPS on a VAE's latents, by a VGG16-BN trained on latents (Kang et al. 2024, arXiv:2405.05967).

d(a, b) = sum_l mean_hw  w_l . (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)^2,   |f| = sqrt(f . f + 1e-8),   w_l >= 0

`augment.ensemble` makes E-LatentLPIPS of it. The network is that of the package elatentlpips: where pixel LPIPS has
five max-pools and reads features before each, it has the last two and reads features behind them.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from cddistill.models import files
from cddistill.models.blocks import GroupNorm
from cddistill.models.convert import few
from cddistill.models.lpips import VGG, conv, distance, max_pool
from cddistill.net import Net

Latents = Float[Array | np.ndarray, "n h w c"]
# The published names of the convolutions, net.slice<s>.<i>; each is followed by its batch norm, net.slice<s>.<i + 1>.
CONVS = {1: (0, 3), 2: (7, 10), 3: (14, 17, 20), 4: (24, 27, 30), 5: (34, 37, 40)}
NORM = ("weight", "bias", "running_mean", "running_var")


class Family(NamedTuple):
    """An autoencoder: its latents, as diffusion models see them, are (z - shift) * scale."""

    channels: int
    scale: float
    shift: float = 0.0


FAMILIES = {
    "sd15": Family(4, 0.18215),
    "sd21": Family(4, 0.18215),
    "sdxl": Family(4, 0.13025),
    "sd3": Family(16, 1.5305, 0.0609),
    "flux": Family(16, 0.3611, 0.1159),
}


def scaled(family: str, z):
    """Latents as diffusion models see them, and as the metric takes them, of what an autoencoder puts out."""
    return (z - FAMILIES[family].shift) * FAMILIES[family].scale


@dataclasses.dataclass(frozen=True)
class LatentLPIPS:
    """The network as a function of its weights {"convs": [(kernel, bias)] * 13, "heads": [w] * 5}.

    Batch norms are folded into the convolutions. A layer (kernel, bias, scale, shift) has a group norm of 32 groups
    behind its convolution, as other published networks of this kind do.
    """

    family: str
    pools: tuple[int, ...] = (4, 5)  # the stages, 1 to 5, that end in a max-pool
    pooled: bool = True  # features are read behind the max-pool, not before
    dtype: Any = jnp.float32  # of the convolutions; features are compared in float32

    def __call__(self, params, a: Latents, b: Latents, spatial: bool = False) -> Float[Array, " n *hw"]:
        """float32 [n], or with spatial a map [n, h, w] whose mean it is if h and w are multiples of 4."""
        features = self.features(params, a), self.features(params, b)
        if not spatial:
            return distance(params, *features)
        maps = [(fa - fb) ** 2 @ w for fa, fb, w in zip(*features, params["heads"], strict=True)]
        return sum(jax.image.resize(x, a.shape[:3], "bilinear") for x in maps)

    def features(self, params, x: Latents) -> list:
        """One map per stage, each pixel scaled to unit length."""
        channels, smallest = FAMILIES[self.family].channels, 2 ** len(self.pools)
        if x.ndim != 4 or x.shape[3] != channels or min(x.shape[1:3]) < smallest:
            wanted = f"latents [n, h, w, {channels}] of at least {smallest} x {smallest}"
            raise ValueError(f"LatentLPIPS of the family {self.family} takes {wanted}, not {x.shape}")
        x, taps, layers = jnp.asarray(x, self.dtype), [], iter(params["convs"])
        for stage, convs in enumerate(VGG, 1):
            for _ in convs:
                x = self._layer(x, *next(layers))
            before, x = x, max_pool(x, 2) if stage in self.pools else x
            taps.append(unit(x if self.pooled else before))
        return taps

    def _layer(self, x, kernel, bias, *norm):
        x = conv(x, jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype))
        if norm:
            x = GroupNorm(32, 1e-5, self.dtype).apply({"params": dict(zip(("scale", "bias"), norm, strict=True))}, x)
        return jax.nn.relu(x)


def unit(x):
    """Vectors on the last axis scaled to unit length, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-8)  # inside the root: the gradient is finite at 0


def load(path, family: str = "", dtype=jnp.float32) -> Net:
    """LatentLPIPS as a net: net(a, b) -> f32[n] for scaled latents [n, h, w, c] of a family of FAMILIES.

    path is a state dict of the package elatentlpips, <family>_latest_vgg16_tuned.pth, or a file that `save` wrote;
    family need only be given for a file whose name does not say it. dtype is what convolutions compute in. Nothing can
    train the weights, heads included, as long as the net is kept among the frozen ones. Raises ValueError, naming the
    file, if it is missing, truncated, of another family or holds anything but the expected weights.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: download {family or '<family>'}_latest_vgg16_tuned.pth of the package elatentlpips"
        )
    tensors = files.read(file).tensors
    family = _family(file, family)
    state = _checked(tensors, family, file)
    return Net(
        {
            "convs": [_folded(state, s, i) for s, slice_ in CONVS.items() for i in slice_],
            "heads": [jnp.asarray(state[f"lin{k}.model.1.weight"].reshape(-1)) for k in range(5)],
        },
        LatentLPIPS(family, dtype=dtype),
    )


def save(net: Net, path) -> Path:
    """Write a net that `load` made as safetensors with its family; the names are the published ones, less the norms."""
    names = [f"net.slice{s}.{i}" for s, slice_ in CONVS.items() for i in slice_]
    state = {f"lin{k}.model.1.weight": np.reshape(w, (1, -1, 1, 1)) for k, w in enumerate(net.params["heads"])}
    for name, (kernel, bias) in zip(names, net.params["convs"], strict=True):
        state |= {f"{name}.weight": np.asarray(kernel).transpose(3, 2, 0, 1), f"{name}.bias": np.asarray(bias)}
    state = {name: np.ascontiguousarray(x) for name, x in state.items()}
    safetensors.numpy.save_file(state, path, metadata={"family": net.apply.family})
    Path(path).chmod(0o644)  # safetensors makes files that only their owner can read
    return Path(path)


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """The published weights by name, as PyTorch lays them out."""
    found, inputs = {}, FAMILIES[family].channels
    for (s, slice_), stage in zip(CONVS.items(), VGG, strict=True):
        for i, channels in zip(slice_, stage, strict=True):
            found |= {f"net.slice{s}.{i}.weight": (channels, inputs, 3, 3), f"net.slice{s}.{i}.bias": (channels,)}
            found |= {f"net.slice{s}.{i + 1}.{name}": (channels,) for name in NORM}
            inputs = channels
    return found | {f"lin{k}.model.1.weight": (1, stage[-1], 1, 1) for k, stage in enumerate(VGG)}


def _family(file: Path, family: str) -> str:
    """The family of a file, by what it or its name says; the one asked for if it says nothing."""
    said = file.name.split("_")[0]
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, "numpy") as opened:
            said = (opened.metadata() or {}).get("family", said)
    if (family or said) not in FAMILIES:
        wanted = f"one of {', '.join(FAMILIES)}"
        raise ValueError(
            f"the family {family!r} is not {wanted}"
            if family
            else f"the name of {file} does not begin with the family of its autoencoder: say which, {wanted}"
        )
    if family and said in FAMILIES and said != family:
        raise ValueError(f"{file} is LatentLPIPS of the family {said}, not {family}")
    return family or said


def _checked(tensors, family: str, file: Path) -> dict[str, np.ndarray]:
    """The weights in a file, in float32, after every comparison that can be made."""
    wanted, heads = shapes(family), [f"lin{k}.model.1.weight" for k in range(5)]
    if not any(name.endswith("running_var") for name in tensors):  # folded by `save`
        norms = tuple(f"net.slice{s}.{i + 1}." for s, slice_ in CONVS.items() for i in slice_)
        wanted = {name: shape for name, shape in wanted.items() if not name.startswith(norms)}
    doubles = {f"lins.{k}.model.1.weight": head for k, head in enumerate(heads)}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise ValueError(f"{file} lacks {few(missing)}: it is no LatentLPIPS")
    extra = sorted(tensors.keys() - wanted.keys() - doubles.keys())
    if extra := [name for name in extra if not name.endswith(".num_batches_tracked")]:
        raise ValueError(f"{file} has {few(extra)}, for which LatentLPIPS has no place")
    if wrong := [f"{n} {tensors[n].shape}, not {shape}" for n, shape in wanted.items() if tensors[n].shape != shape]:
        raise ValueError(f"{file} has the wrong shape for the family {family}: {few(wrong)}")
    state = {name: np.asarray(tensors[name], np.float32) for name in wanted}
    if negative := [name for name in heads if not (state[name] >= 0).all()]:
        raise ValueError(f"{file} has negative weights in {few(negative)}, so its distances could be negative")
    for double, head in doubles.items():
        if double in tensors and not np.array_equal(np.asarray(tensors[double], np.float32), state[head]):
            raise ValueError(f"{file} has two versions of one weight, {double} and {head}: download it again")
    return state


def _folded(state, s: int, i: int):
    """(kernel [h, w, in, out], bias) of a convolution and its batch norm."""
    kernel, bias = state[f"net.slice{s}.{i}.weight"].transpose(2, 3, 1, 0), state[f"net.slice{s}.{i}.bias"]
    norm = f"net.slice{s}.{i + 1}."
    if f"{norm}running_var" in state:
        weight, shift, mean, var = (state[norm + name] for name in NORM)
        factor = weight / np.sqrt(var + 1e-5)
        kernel, bias = kernel * factor, (bias - mean) * factor + shift
    return jnp.asarray(kernel), jnp.asarray(bias)
