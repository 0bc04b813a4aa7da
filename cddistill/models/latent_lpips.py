"""LatentLPIPS: LPIPS on a VAE's latents, by a VGG16-BN trained on latents (Kang et al. 2024, arXiv:2405.05967).

d(a, b) = sum_l mean_hw  w_l . (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)^2,   |f| = sqrt(f . f + 1e-8),   w_l >= 0

`augment.ensemble` makes E-LatentLPIPS of it. The network is that of the package elatentlpips: where pixel LPIPS has
five max-pools and reads features before each, it has the last two and reads features behind them.
"""

import dataclasses
import json
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

    Batch norms are folded into the convolutions. A layer (kernel, bias, scale, shift) has a group norm behind its
    convolution, as other published networks of this kind do, and those that `methods.latent_lpips` trains.
    """

    family: str  # one of FAMILIES, or the name of any other autoencoder
    pools: tuple[int, ...] = (4, 5)  # the stages, 1 to 5, that end in a max-pool
    pooled: bool = True  # features are read behind the max-pool, not before
    groups: int = 32  # of the group norms
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
        return [unit(x) for x in self.maps(params, x)]

    def maps(self, params, x: Latents) -> list:
        """One map per stage, as the convolutions give it."""
        channels, smallest = params["convs"][0][0].shape[2], 2 ** len(self.pools)
        if x.ndim != 4 or x.shape[3] != channels or min(x.shape[1:3]) < smallest:
            wanted = f"latents [n, h, w, {channels}] of at least {smallest} x {smallest}"
            raise ValueError(f"LatentLPIPS of the family {self.family} takes {wanted}, not {x.shape}")
        x, taps, layers = jnp.asarray(x, self.dtype), [], iter(params["convs"])
        for stage, convs in enumerate(VGG, 1):
            for _ in convs:
                x = self._layer(x, *next(layers))
            before, x = x, max_pool(x, 2) if stage in self.pools else x
            taps.append(x if self.pooled else before)
        return taps

    def _layer(self, x, kernel, bias, *norm):
        x = conv(x, jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype))
        if norm:
            norm = {"params": dict(zip(("scale", "bias"), norm, strict=True))}
            x = GroupNorm(self.groups, 1e-5, self.dtype).apply(norm, x)
        return jax.nn.relu(x)


class Layout(NamedTuple):
    """What a file says about its network."""

    channels: int  # of latents
    widths: tuple[int, ...]  # channels of each stage
    pools: tuple[int, ...] = LatentLPIPS.pools
    pooled: bool = LatentLPIPS.pooled
    groups: int = LatentLPIPS.groups


def unit(x):
    """Vectors on the last axis scaled to unit length, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-8)  # inside the root: the gradient is finite at 0


def init_convs(key, channels: int, widths) -> list[tuple]:
    """Random layers (kernel, bias, scale, shift) of stages of these widths, for latents of so many channels."""
    layers = [width for width, stage in zip(widths, VGG, strict=True) for _ in stage]
    inputs, keys = [channels, *layers[:-1]], jax.random.split(key, len(layers))
    he = jax.nn.initializers.he_normal()
    return [
        (he(k, (3, 3, i, o)), jnp.zeros(o), jnp.ones(o), jnp.zeros(o))
        for k, i, o in zip(keys, inputs, layers, strict=True)
    ]


def load(path, family: str = "", dtype=jnp.float32) -> Net:
    """LatentLPIPS as a net: net(a, b) -> f32[n] for scaled latents [n, h, w, c] of its family's autoencoder.

    path is a state dict of the package elatentlpips, <family>_latest_vgg16_tuned.pth, or a file that `save` wrote;
    family need only be given for a file whose name does not say it. dtype is what convolutions compute in. Nothing can
    train the weights, heads included, as long as the net is kept among the frozen ones. Raises ValueError, naming the
    file, if it is missing, truncated, of another family or holds anything but the expected weights.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        published = f"download {family or '<family>'}_latest_vgg16_tuned.pth of the package elatentlpips"
        own = f"make one for the family {family} with configs/latent_lpips.py"
        raise ValueError(f"{file} is missing: {published if family in ('', *FAMILIES) else own}")
    tensors, said = files.read(file).tensors, _metadata(file)
    family = _family(file, said.get("family", ""), family)
    layout = _layout(file, said, family)
    state = _checked(tensors, layout, family, file)
    return Net(
        {
            "convs": [_layer(state, s, i) for s, slice_ in CONVS.items() for i in slice_],
            "heads": [jnp.asarray(state[f"lin{k}.model.1.weight"].reshape(-1)) for k in range(5)],
        },
        LatentLPIPS(family, layout.pools, layout.pooled, layout.groups, dtype),
    )


def save(net: Net, path) -> Path:
    """Write a net as safetensors with its family and layout; the names are the published ones, less folded norms."""
    state = {f"lin{k}.model.1.weight": np.reshape(w, (1, -1, 1, 1)) for k, w in enumerate(net.params["heads"])}
    places = [(s, i) for s, slice_ in CONVS.items() for i in slice_]
    for (s, i), (kernel, bias, *norm) in zip(places, net.params["convs"], strict=True):
        state |= {f"net.slice{s}.{i}.weight": np.transpose(kernel, (3, 2, 0, 1)), f"net.slice{s}.{i}.bias": bias}
        state |= {f"net.slice{s}.{i + 1}.{name}": x for name, x in zip(NORM, norm, strict=False)}
    state = {name: np.ascontiguousarray(x) for name, x in state.items()}
    channels, widths = net.params["convs"][0][0].shape[2], tuple(len(w) for w in net.params["heads"])
    layout = Layout(channels, widths, net.apply.pools, net.apply.pooled, net.apply.groups)
    said = {"family": net.apply.family, "layout": json.dumps(layout._asdict())}
    safetensors.numpy.save_file(state, path, metadata=said)
    Path(path).chmod(0o644)  # safetensors makes files that only their owner can read
    return Path(path)


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """The published weights by name, as PyTorch lays them out."""
    return _shapes(FAMILIES[family].channels, [stage[-1] for stage in VGG], NORM)


def _shapes(inputs: int, widths, norm) -> dict[str, tuple[int, ...]]:
    found = {}
    for (s, slice_), channels in zip(CONVS.items(), widths, strict=True):
        for i in slice_:
            found |= {f"net.slice{s}.{i}.weight": (channels, inputs, 3, 3), f"net.slice{s}.{i}.bias": (channels,)}
            found |= {f"net.slice{s}.{i + 1}.{name}": (channels,) for name in norm}
            inputs = channels
    return found | {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate(widths)}


def _metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself."""
    if file.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(file, "numpy") as opened:
        return opened.metadata() or {}


def _family(file: Path, said: str, family: str) -> str:
    """The family of a file, by what it or its name says; the one asked for if it says nothing."""
    named = file.name.split("_")[0]
    said = said or (named if named in FAMILIES else "")
    if not said and family not in FAMILIES:
        wanted = f"one of {', '.join(FAMILIES)}"
        raise ValueError(
            f"the family {family!r} is not {wanted}"
            if family
            else f"the name of {file} does not begin with the family of its autoencoder: say which, {wanted}"
        )
    if said and family and said != family:
        raise ValueError(f"{file} is LatentLPIPS of the family {said}, not {family}")
    return said or family


def _layout(file: Path, said: dict[str, str], family: str) -> Layout:
    """The layout of a file: its own, or else the published one."""
    if "layout" not in said:
        return Layout(FAMILIES[family].channels, tuple(stage[-1] for stage in VGG))
    try:
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(said["layout"]).items()}
        return Layout(**lists)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has a layout that cannot be read ({error}): export it again") from error


def _checked(tensors, layout: Layout, family: str, file: Path) -> dict[str, np.ndarray]:
    """The weights in a file, in float32, after every comparison that can be made."""
    heads, norm = [f"lin{k}.model.1.weight" for k in range(5)], ()  # folded by `save`
    if "net.slice1.1.weight" in tensors or any(name.endswith("running_var") for name in tensors):
        norm = NORM if any(name.endswith("running_var") for name in tensors) else NORM[:2]
    wanted = _shapes(layout.channels, layout.widths, norm)
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


def _layer(state, s: int, i: int) -> tuple:
    """(kernel [h, w, in, out], bias) of a convolution with its batch norm in it, or with its group norm beside it."""
    kernel, bias = state[f"net.slice{s}.{i}.weight"].transpose(2, 3, 1, 0), state[f"net.slice{s}.{i}.bias"]
    norm = [state[name] for n in NORM if (name := f"net.slice{s}.{i + 1}.{n}") in state]
    if len(norm) == len(NORM):
        weight, shift, mean, var = norm
        factor, norm = weight / np.sqrt(var + 1e-5), []
        kernel, bias = kernel * factor, (bias - mean) * factor + shift
    return tuple(map(jnp.asarray, (kernel, bias, *norm)))
