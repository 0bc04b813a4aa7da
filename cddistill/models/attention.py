"""Attention as in diffusers: transformer blocks over image tokens, and plain spatial self-attention."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from cddistill.models.blocks import GroupNorm, conv

WEIGHTS = 2**20  # that `loop` computes at a time, if at least 64 queries have no more


def attention(q, k, v, causal: bool = False, flash: bool = True):
    """softmax(q k^T / sqrt(d)) v of q [b, l, heads, d] and k, v [b, m, heads, d], the softmax in float32.

    XLA computes it or, with flash, something that never stores the [l, m] weights: a fused kernel or, on CPUs, a loop
    over queries. A kernel has no second or forward-mode derivative, and GSPMD cannot shard it. Both are used only in
    programs traced under an abstract mesh (sharding.inside, jax.set_mesh), which gives the platform and the axes to
    shard the batch over. Exported programs are traced without a mesh, so they run on any platform.
    """
    mesh, static = jax.sharding.get_abstract_mesh(), all(isinstance(n, int) for n in (*q.shape, *k.shape))
    if causal or not flash or mesh.abstract_device is None or AxisType.Explicit in mesh.axis_types or not static:
        return xla(q, k, v, causal)
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto)
    divisible = q.shape[0] % math.prod(mesh.shape[name] for name in axes) == 0
    name = kernel(mesh.abstract_device.platform, q.dtype, q.shape[1], k.shape[1], q.shape[3])
    if name == "loop":
        return loop(q, k, v)
    if name == "xla" or not divisible:
        return xla(q, k, v)
    return shard_rows(KERNELS[name], axes)(q, k, v)


def kernel(platform: str, dtype, q_len: int, k_len: int, width: int) -> str:
    """The kernel, a key of KERNELS, "loop" or "xla", for q_len queries and k_len keys in heads of this width."""
    if platform == "cpu":
        return "loop"
    if platform == "tpu" and q_len % 128 == k_len % 128 == 0 and width <= 128:
        return "pallas"
    half_precision = dtype in (jnp.bfloat16, jnp.float16)
    even = q_len % 2 == k_len % 2 == 0  # JAX has no gradients for odd lengths, such as CLIP's 77 tokens
    if platform == "gpu" and half_precision and even and width <= 128 and width % 8 == 0 and cudnn_runs():
        return "cudnn"
    return "xla"


def cudnn_runs() -> bool:
    """Whether this machine has NVIDIA GPUs, Ampere or newer; elsewhere JAX cannot even trace cuDNN's kernel."""
    try:
        return all(float(gpu.compute_capability) >= 8.0 for gpu in jax.devices("cuda"))
    except RuntimeError:  # no GPU
        return False


def shard_rows(f, axes: tuple[str, ...]):
    """f on each device's shard of the batch, over these mesh axes; inside pmap and shard_map there are none left."""
    rows = P(axes)
    return jax.shard_map(f, in_specs=rows, out_specs=rows, axis_names={*axes}, check_vma=False) if axes else f


def xla(q, k, v, causal: bool = False):
    """XLA's attention: any size, derivative and platform."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")


def loop(q, k, v):
    """Some queries at a time, whose weights are computed again in the backward pass: a few MB stay in a CPU's cache."""
    (b, length, heads, d), keys = q.shape, k.shape[1]
    q = jnp.swapaxes(q, 1, 2).reshape(b * heads, length, d)
    # keys last: the gradients of k and v are then products that transpose a small factor, not the weights
    k, v = (x.transpose(0, 2, 3, 1).reshape(b * heads, d, keys) for x in (k, v))

    def some(q):
        logits = jnp.einsum("bld,bdm->blm", q, k, preferred_element_type=jnp.float32) * d**-0.5
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        h = jnp.einsum("blm,bdm->bld", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (h / weights.sum(-1, keepdims=True)).astype(v.dtype)

    size = at_a_time(length, b * heads * keys)
    if size == length:
        h = some(q)
    else:
        parts = jnp.swapaxes(q.reshape(b * heads, length // size, size, d), 0, 1)
        h = jnp.swapaxes(jax.lax.map(jax.checkpoint(some), parts), 0, 1)
    return jnp.swapaxes(h.reshape(b, heads, length, d), 1, 2)


def at_a_time(length: int, weights: int) -> int:
    """How many queries `loop` takes at a time if each has so many weights: 64, 128 or 256, or all, if undividable."""
    most = 1 << min(max((WEIGHTS // weights).bit_length() - 1, 6), 8)
    size = math.gcd(length, most)
    return size if size >= 64 else length


def cudnn(q, k, v):
    """NVIDIA's fused kernel."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def pallas(q, k, v):
    """JAX's flash attention for TPUs, in tiles of up to 512 tokens."""
    tile_q, tile_k = math.gcd(q.shape[1], 512), math.gcd(k.shape[1], 512)
    tiles = flash_attention.BlockSizes(
        block_b=1, block_q=tile_q, block_k_major=tile_k, block_k=tile_k,
        block_q_major_dkv=tile_q, block_q_dkv=tile_q, block_k_major_dkv=tile_k, block_k_dkv=tile_k,
        block_q_dq=tile_q, block_k_major_dq=tile_k, block_k_dq=tile_k,
    )  # fmt: skip
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    h = flash_attention.flash_attention(q, k, v, sm_scale=q.shape[-1] ** -0.5, block_sizes=tiles)
    return jnp.swapaxes(h, 1, 2)


KERNELS = {"cudnn": cudnn, "pallas": pallas}


def attend(x, context, heads: int, bias: bool, dtype, flash: bool):
    """Multi-head attention from x [b, l, d] to context [b, m, e]: [b, l, d]. Call inside a compact module."""
    d = x.shape[-1]
    if d % heads:
        raise ValueError(f"{d} channels cannot be split into {heads} attention heads")
    q = nn.Dense(d, use_bias=bias, dtype=dtype, name="to_q")(x)
    k = nn.Dense(d, use_bias=bias, dtype=dtype, name="to_k")(context)
    v = nn.Dense(d, use_bias=bias, dtype=dtype, name="to_v")(context)
    q, k, v = (y.reshape(*y.shape[:2], heads, d // heads) for y in (q, k, v))
    h = attention(q, k, v, flash=flash).reshape(x.shape)
    return nn.Dense(d, dtype=dtype, name="to_out_0")(h)


class Attention(nn.Module):
    """Self- or cross-attention of a transformer block."""

    heads: int
    dtype: Any = jnp.float32
    flash: bool = True

    @nn.compact
    def __call__(self, x, context):
        return attend(x, context, self.heads, False, self.dtype, self.flash)


class SpatialAttention(nn.Module):
    """Residual self-attention over pixels; head_dim is the width of a head here, unlike in the UNet's config."""

    head_dim: int
    groups: int
    eps: float
    dtype: Any = jnp.float32
    flash: bool = True

    @nn.compact
    def __call__(self, x, context=None):
        b, h, w, c = x.shape
        tokens = GroupNorm(self.groups, self.eps, self.dtype, name="group_norm")(x).reshape(b, h * w, c)
        if c % self.head_dim:
            raise ValueError(f"{c} channels cannot be split into heads of width attention_head_dim = {self.head_dim}")
        return x + attend(tokens, tokens, c // self.head_dim, True, self.dtype, self.flash).reshape(x.shape)


class GEGLU(nn.Module):
    """Gated linear unit with the exact (erf) GELU."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        x, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x), 2, -1)
        return x * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """The transformer block's MLP; its hidden layer is four times as wide."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        h = GEGLU(4 * x.shape[-1], self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(h)  # net_1 is dropout


class BasicTransformerBlock(nn.Module):
    """Self-attention (or a first cross-attention), cross-attention, MLP; each after a LayerNorm."""

    heads: int
    only_cross_attention: bool = False
    dtype: Any = jnp.float32
    flash: bool = True

    @nn.compact
    def __call__(self, x, context):
        norm1, norm2, norm3 = (
            nn.LayerNorm(1e-5, dtype=self.dtype, use_fast_variance=False, name=f"norm{i}") for i in (1, 2, 3)
        )
        attend = partial(Attention, self.heads, self.dtype, self.flash)
        h = norm1(x)
        x = x + attend(name="attn1")(h, context if self.only_cross_attention else h)
        x = x + attend(name="attn2")(norm2(x), context)
        return x + FeedForward(self.dtype, name="ff")(norm3(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over pixels between two projections, which are 1x1 convolutions or linear layers."""

    heads: int
    depth: int
    groups: int
    linear: bool = False
    only_cross_attention: bool = False
    dtype: Any = jnp.float32
    flash: bool = True

    @nn.compact
    def __call__(self, x, context):
        b, h, w, c = x.shape

        def project(y, name):  # the same product; only the kernel's stored shape differs
            if self.linear:
                return nn.Dense(c, dtype=self.dtype, name=name)(y)
            return conv(c, 1, self.dtype, name)(y)

        y = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)  # not norm_eps
        y = project(y, "proj_in").reshape(b, h * w, c)
        for i in range(self.depth):
            y = BasicTransformerBlock(
                self.heads, self.only_cross_attention, self.dtype, self.flash, name=f"transformer_blocks_{i}"
            )(y, context)
        return x + project(y.reshape(x.shape), "proj_out")
