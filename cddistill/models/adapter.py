"""Three ways to condition a UNet, frozen or trained, on an image; each leaves its output unchanged at first.

Two are branches, copies of the UNet's encoder:
* controlnet (Zhang et al. 2023; what CoDi's figure and code do): h' = h + ZeroConv(h_copy(z_t + E(c)))
* mu_blend (CoDi, Mei et al. 2024, sec. 3.1 as written):           h' = (1 - mu) h + mu h_copy(E(c)),  mu starts at 0
The third changes the UNet itself:
* concat (Saharia et al. 2022; InstructPix2Pix, inpainting):       conv_in takes [z_t, c]; its weights for c start at 0
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from cddistill.models.blocks import conv
from cddistill.models.configured import Widths
from cddistill.models.init import init_params_jax, weight_shapes
from cddistill.models.unet import Apply, Encoder, Residuals, UNet2DConditionModel, conditioning
from cddistill.net import Adapted, Denoiser, Net
from cddistill.typed import Width

# Options of our encoder that diffusers' ControlNet lacks, with the only values that a branch may have.
UNET_ONLY = {"center_input_sample": False, "time_embedding_dim": None, "time_cond_proj_dim": None, "conv_in_kernel": 3}
COPIED = ("conv_in", "time_embedding", "class_embedding", "add_embedding", "down_blocks_", "mid_block")


class ControlNetConditioningEmbedding(nn.Module):
    """E(c): conditioning image [b, h, w, c] to the UNet's first features; each further width halves h and w."""

    widths: tuple[int, ...]
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, cond):
        h = nn.silu(conv(self.widths[0], 3, self.dtype, "conv_in")(cond))
        for i, (narrow, wide) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            h = nn.silu(conv(narrow, 3, self.dtype, f"blocks_{2 * i}")(h))
            h = nn.silu(conv(wide, 3, self.dtype, f"blocks_{2 * i + 1}", stride=2)(h))
        return conv(self.features, 3, self.dtype, "conv_out")(h)


class Branch(Encoder):
    """A copy of the UNet's encoder. The two kinds differ in its input and in how its features become residuals."""

    conditioning_channels: Width = 3
    conditioning_embedding_out_channels: Widths = (16, 32, 96, 256)

    def to_config(self) -> dict:
        return {k: v for k, v in super().to_config().items() if k not in UNET_ONLY}

    def example(self):
        (z_t, t), kwargs = super().example()
        size = z_t.shape[1] * 2 ** (len(self.conditioning_embedding_out_channels) - 1)
        return (z_t, t, jnp.zeros((1, size, size, self.conditioning_channels))), kwargs

    def embed(self, cond, z_t):
        """E(c) at z_t's resolution, or zero without a condition."""
        factor, c = 2 ** (len(self.conditioning_embedding_out_channels) - 1), self.conditioning_channels
        expected = (z_t.shape[0], z_t.shape[1] * factor, z_t.shape[2] * factor, c)
        if cond is None:
            return jnp.zeros((*z_t.shape[:3], self.block_out_channels[0]), self.dtype)
        if cond.shape != expected:
            raise ValueError(
                f"the conditioning image has shape {cond.shape}, this branch needs {expected}: "
                f"{c} channels and {factor} times the size of z_t"
            )
        e = ControlNetConditioningEmbedding(
            self.conditioning_embedding_out_channels, self.block_out_channels[0], self.dtype,
            name="controlnet_cond_embedding",
        )  # fmt: skip
        return e(cond)

    @nn.compact
    def __call__(
        self, z_t, t, cond=None, *, conditioning_scale=1.0, encoder_hidden_states=None, class_labels=None,
        added_cond_kwargs=None, concat=None,
    ):  # fmt: skip
        """Residuals for z_t [b, h, w, c], timesteps t [b], image cond [b, k h, k w, c] in [0, 1] or None.

        k = 2^(number of embedding widths - 1). Raises ValueError for a cond of another shape.
        """
        context = None if encoder_hidden_states is None else encoder_hidden_states.astype(self.dtype)
        emb = self.embedding(t, class_labels, added_cond_kwargs, None)
        skips, mid = self.encode(self.branch_input(z_t, cond, concat, context), emb, context)
        return self.residuals(skips, mid, conditioning_scale)


class ControlNetModel(Branch):
    """diffusers' ControlNet: the copy receives z_t + E(c); zero convolutions turn its features into residuals."""

    def branch_input(self, z_t, cond, concat, context):
        h = self.start(z_t, concat, context)
        return h if cond is None else h + self.embed(cond, z_t)

    def residuals(self, skips, mid, conditioning_scale):
        def zero_conv(h, name):
            return conditioning_scale * conv(h.shape[-1], 1, self.dtype, name)(h)

        down = tuple(zero_conv(h, f"controlnet_down_blocks_{i}") for i, h in enumerate(skips))
        return Residuals(down, zero_conv(mid, "controlnet_mid_block"))


class MuBlendModel(Branch):
    """CoDi's blend as the paper writes it: the copy receives only E(c), blended in by one learnable scalar.

    Only the shape of z_t is used, and concat not at all.
    """

    def branch_input(self, z_t, cond, concat, context):
        return self.embed(cond, z_t)

    def residuals(self, skips, mid, conditioning_scale):
        mu = conditioning_scale * self.param("mu", nn.initializers.zeros, ())
        return Residuals(tuple(mu * h for h in skips), mu * mid, 1.0 - mu)


BRANCHES = {"controlnet": ControlNetModel, "mu_blend": MuBlendModel}
ADAPTERS = (*BRANCHES, "concat")
Conditioning = Literal["none", *ADAPTERS]  # of a student, as methods' options name it


def moves(kind: str, freeze_backbone: bool) -> tuple[str, ...]:
    """Names of the nets that a student trains; kind, the way it is conditioned, is one of ADAPTERS or "none"."""
    names = ("backbone",) * (not freeze_backbone) + ("branch",) * (kind in BRANCHES)
    if not names:
        raise ValueError(f"method.freeze_backbone with method.adapter={kind!r} leaves nothing to train")
    return names


def exports(kind: str, freeze_backbone: bool) -> dict[str, str]:
    """{subfolder of the exported pipeline: net} for the nets of `moves`."""
    parts = {"backbone": "unet", "branch": "controlnet"}
    return {parts[name]: name for name in moves(kind, freeze_backbone)}


def condition_space(kind: str) -> str:
    """Space of the condition that such a student takes: "pixels", "latent", or "" for none."""
    return {"none": "", "concat": "latent"}.get(kind, "pixels")


def condition(kind: str, batch):
    """The batch's condition for such a student: None, an image in [0, 1], or its latent (pixel models: the image)."""
    return {"": None, "pixels": batch.get("cond"), "latent": batch.get("cond_latent", batch.get("cond"))}[
        condition_space(kind)
    ]


def kind_of(denoiser: Denoiser, controlnet: Net | None, channels: int) -> str:
    """How a network for z_t of `channels` takes a condition, as methods' option `adapter` names it, or "none"."""
    if controlnet is not None:
        return "controlnet"
    return "concat" if has_concat_channels(denoiser, channels) else "none"


def without_condition(batch):
    """The batch with a condition of zeros in place of an image or its latent, as InstructPix2Pix has it."""
    return batch | {name: jnp.zeros_like(batch[name]) for name in ("cond", "cond_latent") if name in batch}


def student_nets(frozen, key, kind: str, batch, freeze_backbone: bool) -> dict[str, Net]:
    """The nets of `moves` at step 0, whose output equals the teacher's, or its output with frozen["controlnet"].

    batch gives the shapes of x0 and cond. Raises ValueError for a condition that this teacher or kind cannot take.
    """
    nets, trained = {}, moves(kind, freeze_backbone)
    if "backbone" in trained:
        teacher, concat = frozen["teacher"], kind == "concat"
        nets["backbone"] = widen(teacher, batch) if concat else jax.tree.map(jnp.copy, teacher)
    if "branch" in trained and "controlnet" in frozen:
        nets["branch"] = jax.tree.map(jnp.copy, frozen["controlnet"])
    elif "branch" in trained:
        widths = embedding_widths(batch["cond"], batch["x0"])
        nets["branch"] = make_branch(frozen["teacher"], key, kind, batch["cond"].shape[-1], widths)
    return nets


@dataclasses.dataclass(frozen=True)
class Conditioned:
    """A UNet and its branch as one function of {"unet": ..., "branch": ...}, whose text also has the condition."""

    unet: Apply
    branch: Apply

    @property
    def module(self):
        return self.unet.module

    def __call__(self, params, z_t, t, text, **kwargs):
        text = dict(text)
        residuals = self.branch(params["branch"], z_t, t, text, text.pop("cond"))
        return self.unet(params["unet"], z_t, t, text, residuals=residuals, **kwargs)


def joined(denoiser, branch: Net | None):
    """A denoiser with its branch, for methods that treat both as one network: see `with_condition`."""
    if branch is None:
        return denoiser
    return denoiser.replace(
        params={"unet": denoiser.params, "branch": branch.params}, apply=Conditioned(denoiser.apply, branch.apply)
    )


def parts(kind: str, name: str) -> tuple[str, ...]:
    """The nets that make up a network of this name, in methods that train a `joined` one."""
    return (name, f"{name}_branch") if kind in BRANCHES else (name,)


def copied(kind: str, nets: dict, frozen) -> dict:
    """The nets with a copy of frozen["controlnet"] for each, where this kind has a branch."""
    return nets | {
        part: jax.tree.map(jnp.copy, frozen["controlnet"]) for name in nets for part in parts(kind, name)[1:]
    }


def whole(n, kind: str, name: str, average: bool = False):
    """n.<name> with its branch, or their moving averages."""
    net, *branch = (getattr(n, part + "_ema" * average) for part in parts(kind, name))
    return joined(net, *(branch or [None]))


def teacher(n, kind: str) -> Denoiser:
    """The teacher, with its ControlNet where this kind has a branch."""
    return joined(n.teacher, n.controlnet if kind in BRANCHES else None)


def with_condition(kind: str, batch):
    """The batch with the condition among the text inputs, also the null ones: a `joined` network takes them so, or one
    with further input channels."""
    if kind == "none":
        return batch
    given = {"concat" if kind == "concat" else "cond": condition(kind, batch)}
    return batch | {name: conditioning(batch[name]) | given for name in ("text", "null")}


def check_conditional(frozen, kind: str, batch) -> None:
    """ValueError if a method that learns from a conditional teacher has another one."""
    concat = has_concat_channels(frozen["teacher"], batch["x0"].shape[-1])
    if kind != "none" and not (concat if kind == "concat" else "controlnet" in frozen):
        raise ValueError(
            f"with method.adapter={kind!r} this method needs a teacher that takes the condition: fine-tune one first "
            "with method diffusion, and set "
            + ("config.teacher to its folder" if kind == "concat" else "config.controlnet to its controlnet/")
        )


def student(n, freeze_backbone: bool, average: bool = False) -> Adapted:
    """The student of these nets, or of their moving averages; a frozen backbone is the teacher."""
    suffix = "_ema" if average else ""
    backbone = n.teacher if freeze_backbone else getattr(n, f"backbone{suffix}")
    return Adapted(backbone, getattr(n, f"branch{suffix}", None))


def make_branch(teacher: Denoiser, key, kind: str = "controlnet", cond_channels: int = 3, embedding_channels=(16,)):
    """A branch that leaves the teacher's output unchanged at first: apply(params, z_t, t, text, cond) -> Residuals.

    kind is "controlnet" or "mu_blend". The conditioning image has cond_channels channels and 2^(n-1) times the size of
    z_t, n = len(embedding_channels): (16,) for pixel models, ControlNet's (16, 32, 96, 256) for Stable Diffusion's
    latents. The encoder's weights are copies of the teacher's. Raises ValueError for a teacher that is not a
    UNet2DConditionModel or that has options which diffusers' ControlNet lacks.
    """
    unet = teacher.module
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError("only a UNet2DConditionModel, from models.load or models.init, can have a branch")
    if kind not in BRANCHES:
        raise ValueError(f"branch kind {kind!r} is not one of {', '.join(BRANCHES)}")
    config = unet.to_config()
    for name, default in UNET_ONLY.items():
        if config[name] != default:
            raise ValueError(f"a branch cannot be made for a UNet with {name} = {config[name]!r}")
    shared = {f: v for f, v in config.items() if f in Encoder.__dataclass_fields__}
    embed = {"conditioning_channels": cond_channels, "conditioning_embedding_out_channels": tuple(embedding_channels)}
    module = BRANCHES[kind].from_config(shared | embed, dtype=unet.dtype, remat=unet.remat, flash=unet.flash)
    return Net(branch_params(module, teacher.params, key), Apply(module))


def branch_params(module, unet_params, key):
    """The encoder's weights copied from the UNet (so that either may be donated), E(c) random, output layers zero."""
    shapes = weight_shapes(module)
    copied = {name: jax.tree.map(jnp.copy, unet_params[name]) for name in shapes if name.startswith(COPIED)}
    embedding = init_params_jax(shapes["controlnet_cond_embedding"], key)
    if isinstance(module, ControlNetModel):
        embedding["conv_out"] = jax.tree.map(jnp.zeros_like, embedding["conv_out"])
    zeros = {k: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), v) for k, v in shapes.items() if k not in copied}
    return zeros | copied | {"controlnet_cond_embedding": embedding}


def embedding_widths(cond, x0) -> tuple[int, ...]:
    """Widths of E(c) for these batch arrays: the first n + 1 of ControlNet's (16, 32, 96, 256) for n halvings.

    Raises ValueError if cond is not x0's size times 1, 2, 4 or 8.
    """
    ratio = cond.shape[1] / x0.shape[1]
    if ratio not in (1, 2, 4, 8) or cond.shape[2] != ratio * x0.shape[2]:
        raise ValueError(f"a condition of {cond.shape[1:3]} is not 1, 2, 4 or 8 times as large as x0, {x0.shape[1:3]}")
    return (16, 32, 96, 256)[: int(ratio).bit_length()]


def widen(teacher: Denoiser, batch) -> Denoiser:
    """The teacher with input channels for batch["cond"] after those of x0; their weights start at zero.

    A teacher that already has them (InstructPix2Pix, inpainting) is only copied. Raises ValueError for a condition that
    has not x0's size, and for a network whose in_channels match neither x0 nor x0 with the condition.
    """
    unet, (x0, cond) = teacher.module, (batch["x0"].shape, condition("concat", batch).shape)
    if cond[1:3] != x0[1:3]:
        raise ValueError(f"adapter 'concat' needs a condition of x0's size, {x0[1:3]}, not {cond[1:3]}")
    channels, params = x0[-1] + cond[-1], jax.tree.map(jnp.copy, teacher.params)
    if not isinstance(unet, UNet2DConditionModel) or unet.in_channels not in (x0[-1], channels):
        raise ValueError(f"adapter 'concat' needs a UNet2DConditionModel with in_channels {x0[-1]} or {channels}")
    padding = ((0, 0), (0, 0), (0, channels - unet.in_channels), (0, 0))
    params["conv_in"]["kernel"] = jnp.pad(params["conv_in"]["kernel"], padding)
    return teacher.replace(params=params, apply=Apply(unet.clone(in_channels=channels)))


def has_concat_channels(teacher: Denoiser, channels: int) -> bool:
    """Whether a network has input channels for a condition after the `channels` of z_t."""
    return getattr(teacher.module, "in_channels", channels) > channels
