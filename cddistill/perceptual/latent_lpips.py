"""LatentLPIPS: LPIPS of a VAE's latents, with a VGG16-BN trained on latents (Kang et al. 2024, arXiv:2405.05967).

d(a, b) = sum_l mean_hw  w_l . (f_l(a) / |f_l(a)| - f_l(b) / |f_l(b)|)^2,   |f| = sqrt(f . f + 1e-8),   w_l >= 0

`ensemble.ensemble` turns it into E-LatentLPIPS. The network is that of the package elatentlpips: it has the last two of
LPIPS' max-pools only, and its features are taken after them, not before.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float

from cddistill import checksums, io
from cddistill.models import files, folders
from cddistill.models.blocks import GroupNorm
from cddistill.models.convert import abbreviate
from cddistill.net import Net
from cddistill.perceptual.lpips import VGG, conv, distance, max_pool
from cddistill.typed import Limit, Width, fit, within

Latents = Float[Array | np.ndarray, "n h w c"]
# The published names of the convolutions, net.slice<s>.<i>; each is followed by its batch norm, net.slice<s>.<i + 1>.
CONVS = {1: (0, 3), 2: (7, 10), 3: (14, 17, 20), 4: (24, 27, 30), 5: (34, 37, 40)}
FILE = "latent_lpips.safetensors"  # in the folder of a pipeline that has one for its VAE
NORM = ("weight", "bias", "running_mean", "running_var")


# Autoencoders that LatentLPIPS was published for, and the channels of their latents.
FAMILIES = {"sd15": 4, "sd21": 4, "sdxl": 4, "sd3": 16, "flux": 16}


@dataclasses.dataclass(frozen=True)
class LatentLPIPS:
    """The network as a function of its parameters {"convs": [(kernel, bias)] * 13, "heads": [w] * 5}.

    Batch norms are folded into the convolutions. A layer (kernel, bias, scale, shift) has a group norm after its
    convolution, as in other published networks of this kind and those that `methods.latent_lpips` trains.
    """

    family: str  # one of FAMILIES, or the name of any other autoencoder
    pools: tuple[int, ...] = (4, 5)  # the stages, 1 to 5, that end in a max-pool
    pooled: bool = True  # features are taken after the max-pool, not before
    groups: int = 32  # of group norms
    dtype: Any = jnp.float32  # compute type of convolutions; features are compared in float32

    def __call__(self, params, a: Latents, b: Latents) -> Float[Array, " n"]:
        """Distances float32 [n] >= 0 of pairs of scaled latents [n, h, w, c], h and w at least 2^len(pools).

        Raises ValueError for other shapes. The gradient is finite everywhere.
        """
        return distance(params, self.features(params, a), self.features(params, b))

    def features(self, params, x: Latents) -> list:
        """One feature map per stage, each pixel normalised to unit length over channels."""
        return [normalize_channels(x) for x in self.maps(params, x)]

    def maps(self, params, x: Latents) -> list:
        """One feature map per stage, not normalised."""
        channels, smallest = params["convs"][0][0].shape[2], 2 ** len(self.pools)
        if x.ndim != 4 or x.shape[3] != channels or min(x.shape[1:3]) < smallest:
            wanted = f"latents [n, h, w, {channels}] of at least {smallest} x {smallest}"
            raise ValueError(f"LatentLPIPS of the family {self.family} takes {wanted}, not {x.shape}")
        x, maps, layers = jnp.asarray(x, self.dtype), [], iter(params["convs"])
        for stage, convs in enumerate(VGG, 1):
            for _ in convs:
                x = self._layer(x, *next(layers))
            before, x = x, max_pool(x, 2) if stage in self.pools else x
            maps.append(x if self.pooled else before)
        return maps

    def _layer(self, x, kernel, bias, *norm):
        x = conv(x, jnp.asarray(kernel, self.dtype), jnp.asarray(bias, self.dtype))
        if norm:
            norm = {"params": dict(zip(("scale", "bias"), norm, strict=True))}
            x = GroupNorm(self.groups, 1e-5, self.dtype).apply(norm, x)
        return jax.nn.relu(x)


class Layout(NamedTuple):
    """The architecture, as stored in a file's metadata."""

    channels: int  # of latents
    widths: tuple[int, ...]  # channels of each stage
    pools: tuple[int, ...] = LatentLPIPS.pools
    pooled: bool = LatentLPIPS.pooled
    groups: int = LatentLPIPS.groups


LAYOUT = {  # what its fields may be
    "channels": Width,
    "widths": Annotated[tuple[Width, ...], Limit("five widths", lambda x: len(x) == 5)],
    "pools": tuple[Annotated[int, within(least=1, most=5)], ...],
    "pooled": bool,
    "groups": Annotated[int, within(least=1, most=2**16)],
}


def normalize_channels(x):
    """x float32, scaled to unit length over the last axis."""
    x = x.astype(jnp.float32)
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-8)  # inside the root: the gradient is finite at 0


def init_convs(key, channels: int, widths) -> list[tuple]:
    """Random layers (kernel, bias, scale, shift) of stages of these widths; channels are those of the latents."""
    layers = [width for width, stage in zip(widths, VGG, strict=True) for _ in stage]
    inputs, keys = [channels, *layers[:-1]], jax.random.split(key, len(layers))
    he = jax.nn.initializers.he_normal()
    return [
        (he(k, (3, 3, i, o)), jnp.zeros(o), jnp.ones(o), jnp.zeros(o))
        for k, i, o in zip(keys, inputs, layers, strict=True)
    ]


def load(path, family: str = "", dtype=jnp.float32) -> Net:
    """LatentLPIPS as a net: net(a, b) -> float32 [n] >= 0 for latents [n, h, w, c] of its family's autoencoder.

    Latents are scaled like the diffusion model's, to about unit variance, as those of models.load's Autoencoder.
    path is a PyTorch state dict of the package elatentlpips, <family>_latest_vgg16_tuned.pth, a file of `save`, or a
    pipeline's folder or embedded model ("pocket") that has latent_lpips.safetensors. family is needed only if neither
    metadata nor file name gives it. dtype is the compute type of the convolutions. As one of the frozen nets it is not
    trained, heads included. Raises ValueError naming the file if it is missing, truncated, of another family or holds
    anything but the expected weights.
    """
    file = _file(path)
    if not file.is_file():
        published = f"download {family or '<family>'}_latest_vgg16_tuned.pth of the package elatentlpips"
        own = f"make one for the family {family} with configs/latent_lpips.py"
        raise ValueError(f"{file} is missing: {published if family in ('', *FAMILIES) else own}")
    tensors, metadata = files.read(file).tensors, _metadata(file)
    family = _family(file, metadata.get("family", ""), family)
    layout = _layout(file, metadata, family)
    state = _check_weights(tensors, layout, family, file)
    return Net(
        {
            "convs": [_read_layer(state, s, i) for s, slice_ in CONVS.items() for i in slice_],
            "heads": [jnp.asarray(state[f"lin{k}.model.1.weight"].reshape(-1)) for k in range(5)],
        },
        LatentLPIPS(family, layout.pools, layout.pooled, layout.groups, dtype),
    )


def _file(path) -> Path:
    """The file of weights that `load` reads for a path; it may be missing."""
    embedded, given = folders.ASSETS / path, io.local(path)
    if embedded.is_dir():
        checksums.check_shipped(embedded)
    return next((folder / FILE for folder in (embedded, given) if folder.is_dir()), given)


def required(option: str, metric: str, family: str = "") -> Net:
    """`load` for an option of a method. Raises ValueError, naming the option, if no weights are given."""
    if not metric:
        raise ValueError(
            f"{option}='latent_lpips' needs method.metric: a file of weights such as sd15_latest_vgg16_tuned.pth, or a "
            f"pipeline that has its own, such as pocket; {option}='lpips' needs none"
        )
    return load(metric, family)


def outline(metric: str, family: str = "") -> Net:
    """The net of a file with jax.ShapeDtypeStruct for its weights; the published one of its family if it is missing."""
    if _file(metric).is_file():
        return jax.eval_shape(functools.partial(load, metric, family))
    family = _family(Path(metric), "", family)
    layout = Layout(FAMILIES[family], tuple(stage[-1] for stage in VGG))

    def params():
        convs = init_convs(jax.random.key(0), layout.channels, layout.widths)
        return {"convs": [layer[:2] for layer in convs], "heads": [jnp.zeros(width) for width in layout.widths]}

    return Net(jax.eval_shape(params), LatentLPIPS(family, layout.pools, layout.pooled, layout.groups))


def save(net: Net, path) -> Path:
    """Write a net to a safetensors file with its family and layout, under the published names; returns the path."""
    state = {f"lin{k}.model.1.weight": np.reshape(w, (1, -1, 1, 1)) for k, w in enumerate(net.params["heads"])}
    places = [(s, i) for s, slice_ in CONVS.items() for i in slice_]
    for (s, i), (kernel, bias, *norm) in zip(places, net.params["convs"], strict=True):
        state |= {f"net.slice{s}.{i}.weight": np.transpose(kernel, (3, 2, 0, 1)), f"net.slice{s}.{i}.bias": bias}
        state |= {f"net.slice{s}.{i + 1}.{name}": x for name, x in zip(NORM, norm, strict=False)}
    state = {name: np.ascontiguousarray(x) for name, x in state.items()}
    channels, widths = net.params["convs"][0][0].shape[2], tuple(len(w) for w in net.params["heads"])
    layout = Layout(channels, widths, net.apply.pools, net.apply.pooled, net.apply.groups)
    metadata = {"family": net.apply.family, "layout": json.dumps(layout._asdict())}
    safetensors.numpy.save_file(state, path, metadata=metadata)
    Path(path).chmod(0o644)  # safetensors makes files that only their owner can read
    return Path(path)


def torch_shapes(channels: int, widths, norm=NORM) -> dict[str, tuple[int, ...]]:
    """{published name: shape, in PyTorch's layout} for latents of these channels and stages of these widths."""
    shapes, inputs = {}, channels
    for (s, slice_), width in zip(CONVS.items(), widths, strict=True):
        for i in slice_:
            shapes |= {f"net.slice{s}.{i}.weight": (width, inputs, 3, 3), f"net.slice{s}.{i}.bias": (width,)}
            shapes |= {f"net.slice{s}.{i + 1}.{name}": (width,) for name in norm}
            inputs = width
    return shapes | {f"lin{k}.model.1.weight": (1, width, 1, 1) for k, width in enumerate(widths)}


def _metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file, empty for other formats."""
    if file.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(file, "numpy") as opened:
        return opened.metadata() or {}


def _family(file: Path, stored: str, family: str) -> str:
    """The family of a file: from its metadata (stored), else from its name, else the one that is asked for."""
    prefix = file.name.split("_")[0]
    stored = stored or (prefix if prefix in FAMILIES else "")
    if not stored and family not in FAMILIES:
        known = f"one of {', '.join(FAMILIES)}"
        raise ValueError(
            f"the family {family!r} is not {known}"
            if family
            else f"the name of {file} does not begin with the family of its autoencoder: pass family, {known}"
        )
    if stored and family and stored != family:
        raise ValueError(f"{file} is LatentLPIPS of the family {stored}, not {family}")
    return stored or family


def _layout(file: Path, metadata: dict[str, str], family: str) -> Layout:
    """The layout in a file's metadata, or the published one."""
    if "layout" not in metadata:
        return Layout(FAMILIES[family], tuple(stage[-1] for stage in VGG))
    try:
        stored = io.parse_json(metadata["layout"])
        options = {k: fit(x, LAYOUT[k], k) for k, x in stored.items()}
        return Layout(**options)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has a layout that cannot be read ({error}): export it again") from error


def _check_weights(tensors, layout: Layout, family: str, file: Path) -> dict[str, np.ndarray]:
    """The weights in a file as float32; ValueError for any unexpected name, shape or sign."""
    heads, norm = [f"lin{k}.model.1.weight" for k in range(5)], ()  # no norms: `save` has folded them
    if "net.slice1.1.weight" in tensors or any(name.endswith("running_var") for name in tensors):
        norm = NORM if any(name.endswith("running_var") for name in tensors) else NORM[:2]
    expected = torch_shapes(layout.channels, layout.widths, norm)
    duplicates = {f"lins.{k}.model.1.weight": head for k, head in enumerate(heads)}
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{file} lacks {abbreviate(missing)}: it is not a LatentLPIPS")
    extra = sorted(tensors.keys() - expected.keys() - duplicates.keys())
    if extra := [name for name in extra if not name.endswith(".num_batches_tracked")]:
        raise ValueError(f"{file} has {abbreviate(extra)}, for which LatentLPIPS has no place")
    if wrong := [f"{n} {tensors[n].shape}, not {shape}" for n, shape in expected.items() if tensors[n].shape != shape]:
        raise ValueError(f"{file} has the wrong shape for the family {family}: {abbreviate(wrong)}")
    state = {name: np.asarray(tensors[name], np.float32) for name in expected}
    if negative := [name for name in heads if not (state[name] >= 0).all()]:
        raise ValueError(f"{file} has negative weights in {abbreviate(negative)}, so its distances could be negative")
    for name, head in duplicates.items():
        if name in tensors and not np.array_equal(np.asarray(tensors[name], np.float32), state[head]):
            raise ValueError(f"{file} has two versions of one weight, {name} and {head}: download it again")
    return state


def _read_layer(state, s: int, i: int) -> tuple:
    """(kernel [h, w, in, out], bias) with the batch norm folded in, or (kernel, bias, scale, shift) with group norm."""
    kernel, bias = state[f"net.slice{s}.{i}.weight"].transpose(2, 3, 1, 0), state[f"net.slice{s}.{i}.bias"]
    norm = [state[name] for n in NORM if (name := f"net.slice{s}.{i + 1}.{n}") in state]
    if len(norm) == len(NORM):
        weight, shift, mean, var = norm
        factor, norm = weight / np.sqrt(var + 1e-5), []
        kernel, bias = kernel * factor, (bias - mean) * factor + shift
    return tuple(map(jnp.asarray, (kernel, bias, *norm)))
