"""Convolutions that are fast on CPUs: their kernel gradients, and those of an enlarged image.

XLA computes a kernel's gradient as a convolution that contracts over the batch and the pixels. On CPUs it then reaches
a third to a sixth of the forward speed; a matrix product for each tap of the kernel takes about half as long. Of an
image enlarged by nearest neighbours, 3 x 3 pixels are at most 2 x 2 different ones: 4/9 of the products suffice
(benchmarks/convolution.py).
"""

import functools
import itertools

import jax
import jax.numpy as jnp

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
LARGE = 2**22  # multiplications per tap; below that, nine products take longer to compile than they save
SMALL = 64  # pixels; of fewer, arranging kernels takes longer than it saves


def conv_general_dilated(x, kernel, strides, padding, *, lhs_dilation, rhs_dilation, dimension_numbers,
                         feature_group_count=1, precision=None, preferred_element_type=None):  # fmt: skip
    """jax.lax.conv_general_dilated for flax.linen.Conv without dilation and groups; reverse mode only on CPUs."""
    plain = {*lhs_dilation, *rhs_dilation, feature_group_count} == {1} and precision is preferred_element_type is None
    if plain and worth_it(x, kernel.shape[-1]):
        return conv2d(x, kernel, tuple(strides), tuple(map(tuple, padding)))
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers, feature_group_count=feature_group_count, precision=precision,
        preferred_element_type=preferred_element_type,
    )  # fmt: skip


def worth_it(x, features: int) -> bool:
    """Whether a convolution of x to that many features is large enough, in a program that is traced for a CPU.

    The platform is that of the abstract mesh, as for `attention`; exported programs have none, and run on any.
    """
    device, known = jax.sharding.get_abstract_mesh().abstract_device, all(isinstance(n, int) for n in x.shape)
    on_cpu = device is not None and device.platform == "cpu"
    return on_cpu and known and x.ndim == 4 and x.size * features >= LARGE


def saves(x, features: int) -> bool:
    """Whether `of_enlarged` takes fewer products for x [b, h, w, c] and that many features."""
    return worth_it(x, 4 * features) and x.shape[1] * x.shape[2] >= SMALL


def enlarged(x):
    """x [b, h, w, c] by nearest neighbours: [b, 2h, 2w, c]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def of_enlarged(x, kernel, strides, padding, **options):
    """x [b, h, w, c], enlarged by nearest neighbours and convolved with kernel [3, 3, c, d]: [b, 2h, 2w, d].

    For flax.linen.Conv, as `conv_general_dilated`, where it `saves`; strides and padding must be 1.
    """
    (b, h, w, c), d = x.shape, kernel.shape[-1]
    # Output pixels of even rows see rows i - 1, i and i of x, those of odd rows i, i and i + 1; and so for columns.
    halves = lambda k: jnp.stack([jnp.stack([k[0], k[1] + k[2]]), jnp.stack([k[0] + k[1], k[2]])])  # [parity, tap, ...]
    kernels = halves(jnp.moveaxis(halves(kernel), 2, 0))  # [column's parity and tap, row's parity and tap, c, d]
    kernels = kernels.transpose(3, 1, 4, 2, 0, 5).reshape(2, 2, c, 4 * d)
    y = conv_general_dilated(x, kernels, (1, 1), ((1, 1), (1, 1)), **options).reshape(b, h + 1, w + 1, 2, 2, d)
    y = jnp.stack([y[:, :-1, :, 0], y[:, 1:, :, 1]], 2)  # [b, h, row's parity, w + 1, column's parity, d]
    return jnp.stack([y[:, :, :, :-1, 0], y[:, :, :, 1:, 1]], 4).reshape(b, 2 * h, 2 * w, d)


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
