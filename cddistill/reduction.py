"""Gradients that leave each device in float32, where networks compute in bfloat16.

A layer rounds its float32 kernel to bfloat16. JAX then also makes the gradient a product of that type, and the
partitioner sums the devices' products as they are: in bfloat16, rounding after each addition. Here the product for the
kernel's gradient is returned in float32, in which it is accumulated anyway, and so is the bias's; the sum over devices
is of these. The outputs of the layers do not change, nor do the gradients of their inputs.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

IMAGES = ("NHWC", "HWIO", "NHWC")


def in_float32(f, args, kwargs, context):
    """An interceptor of Flax's module calls, see `flax.linen.intercept_methods`: Dense and Conv in bfloat16."""
    module, own = context.module, LAYERS.get(type(context.module))
    rounds = own and module.dtype is not None and jnp.dtype(module.dtype) == jnp.bfloat16
    if not rounds or context.method_name != "__call__" or module.is_initializing() or module.promote_dtype is whole:
        return f(*args, **kwargs)
    layer = module.clone(parent=None, use_bias=False, promote_dtype=whole, **own)
    y = layer.apply({"params": {"kernel": module.get_variable("params", "kernel")}}, *args, **kwargs)
    return add(y, module.get_variable("params", "bias")) if module.use_bias else y


def whole(x, kernel, bias, dtype):
    """What a layer computes with: x in its type, and the kernel as it is."""
    return x.astype(dtype), kernel, bias


# ---- bias


@jax.custom_vjp
def add(y, bias):
    """y [..., c] + bias [c], in the type of y."""
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def add_backward(bias, dy):
    """Gradients of y and of the bias."""
    return dy, dy.sum([*range(dy.ndim - 1)], dtype=jnp.float32).astype(bias.dtype)


add.defvjp(lambda y, bias: (add(y, bias), bias), add_backward)


# ---- dense layers


def dot_general(x, kernel, dimension_numbers, precision=None):
    """jax.lax.dot_general for flax.linen.Dense."""
    return product(x, kernel)


@jax.custom_vjp
def product(x, kernel):
    """x [..., c] times the kernel [c, d], in the type of x."""
    return jnp.matmul(x, kernel.astype(x.dtype))


def product_backward(saved, dy):
    """Gradients of x and of the kernel."""
    x, kernel = saved
    rows = [*range(x.ndim - 1)]
    dk = jax.lax.dot_general(x, dy, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
    return jnp.matmul(dy, kernel.astype(x.dtype).T), dk.astype(kernel.dtype)


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), product_backward)


# ---- convolutions


def conv_general_dilated(x, kernel, strides, padding, *, lhs_dilation, rhs_dilation, dimension_numbers,
                         feature_group_count=1, precision=None):  # fmt: skip
    """jax.lax.conv_general_dilated for flax.linen.Conv of images, without dilation and groups; others as they were."""
    if x.ndim == 4 and not isinstance(padding, str) and {*lhs_dilation, *rhs_dilation, feature_group_count} == {1}:
        return convolution(x, kernel, tuple(strides), tuple(map(tuple, padding)))
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), strides, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers, feature_group_count=feature_group_count, precision=precision,
    )  # fmt: skip


def plain(x, kernel, strides, padding):
    """x [b, h, w, c] convolved with a kernel [kh, kw, c, d], in the type of x: [b, h', w', d]."""
    return jax.lax.conv_general_dilated(x, kernel.astype(x.dtype), strides, padding, dimension_numbers=IMAGES)


convolution = jax.custom_vjp(plain, nondiff_argnums=(2, 3))


def convolution_forward(x, kernel, strides, padding):
    """The output, and what `convolution_backward` needs."""
    return plain(x, kernel, strides, padding), (x, kernel)


def convolution_backward(strides, padding, saved, dy):
    """Gradients of x and of the kernel: that is x convolved with dy, over the batch; strides become dilations."""
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: plain(x, kernel, strides, padding), x)(dy)
    sizes = zip(kernel.shape, strides, dy.shape[1:], x.shape[1:], padding, strict=False)
    pads = [(low, k + (out - 1) * s - n - low) for k, s, out, n, (low, _) in sizes]
    dk = jax.lax.conv_general_dilated(
        x, dy, (1, 1), pads, rhs_dilation=strides, dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return dx, dk.astype(kernel.dtype)


convolution.defvjp(convolution_forward, convolution_backward)

LAYERS = {nn.Dense: {"dot_general": dot_general}, nn.Conv: {"conv_general_dilated": conv_general_dilated}}
