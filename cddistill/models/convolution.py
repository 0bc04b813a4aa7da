"""A convolution whose kernel gradient is fast on CPUs.

XLA computes a kernel's gradient as a convolution that contracts over the batch and the pixels. On CPUs it then reaches
a third to a sixth of the forward speed; a matrix product for each tap of the kernel takes about half as long
(benchmarks/convolution.py).
"""

import functools
import itertools

import jax
import jax.numpy as jnp

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
LARGE = 2**22  # multiplications per tap; below that, nine products take longer to compile than they save


def conv_general_dilated(x, kernel, strides, padding, *, lhs_dilation, rhs_dilation, dimension_numbers,
                         feature_group_count=1, precision=None, preferred_element_type=None):  # fmt: skip
    """jax.lax.conv_general_dilated for flax.linen.Conv without dilation and groups; reverse mode only on CPUs."""
    plain = {*lhs_dilation, *rhs_dilation, feature_group_count} == {1} and precision is preferred_element_type is None
    known = all(isinstance(n, int) for n in x.shape)  # not exported for any batch size
    large = known and x.ndim == 4 and x.size * kernel.shape[-1] >= LARGE
    if plain and large and jax.default_backend() == "cpu":
        return conv2d(x, kernel, tuple(strides), tuple(map(tuple, padding)))
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers, feature_group_count=feature_group_count, precision=precision,
        preferred_element_type=preferred_element_type,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv2d(x, kernel, strides, padding):
    """x [b, h, w, c] convolved with kernel [kh, kw, c, d]: [b, h', w', d]."""
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=DIMENSIONS)


def forward(x, kernel, strides, padding):
    """The output, and what `backward` needs."""
    return conv2d(x, kernel, strides, padding), (x, kernel)


def backward(strides, padding, saved, dy):
    """Gradients of x, as XLA computes it, and of the kernel, tap by tap."""
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: conv2d.fun(x, kernel, strides, padding), x)(dy)
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    ends = [s * (n - 1) + 1 for s, n in zip(strides, dy.shape[1:3], strict=True)]

    def tap(i, j):
        shifted = padded[:, i : i + ends[0] : strides[0], j : j + ends[1] : strides[1]]
        return jnp.matmul(columns(shifted).T, columns(dy), preferred_element_type=jnp.float32)

    taps = [tap(i, j) for i, j in itertools.product(*map(range, kernel.shape[:2]))]
    return dx, jnp.stack(taps).reshape(kernel.shape).astype(kernel.dtype)


def columns(x):
    """[b, h, w, c] as [b h w, c]."""
    return x.reshape(-1, x.shape[-1])


conv2d.defvjp(forward, backward)
