"""The convolution of networks on CPUs equals XLA's, with its gradients and their gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cddistill import sharding
from cddistill.models import convolution
from cddistill.models.blocks import Upsample2D, conv
from cddistill.models.convolution import LARGE, conv2d, conv_general_dilated, of_enlarged

UNDILATED = {"lhs_dilation": (1, 1), "rhs_dilation": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def on_mesh(f):
    return sharding.inside(sharding.make_mesh(), f)


def xlas(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [
        (3, (1, 1), ((1, 1), (1, 1))),
        (3, (2, 2), ((0, 1), (0, 1))),  # diffusers' downsampling
        (3, (2, 1), ((1, 1), (1, 1))),
        (1, (1, 1), ((0, 0), (0, 0))),
        (4, (2, 2), ((1, 1), (1, 1))),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_outputs_and_gradients_are_xlas(size, strides, padding, dtype):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), dtype) for s in ((2, 9, 8, 5), (size, size, 5, 4)))
    (y, back), (expected, back_xla) = (
        jax.vjp(lambda *args, f=f: f(*args, strides, padding), x, kernel) for f in (conv2d, xlas)
    )
    np.testing.assert_array_equal(y, expected)
    dy = jnp.asarray(rng.normal(size=y.shape), dtype)
    for a, b in zip(back(dy), back_xla(dy), strict=True):
        assert a.dtype == b.dtype
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(a.astype("f"), b.astype("f"), rtol=tolerance, atol=10 * tolerance)


def test_second_derivatives_are_xlas():
    """As in an R1 penalty: the gradient, with respect to the kernel, of the squared gradient of x."""
    rng = np.random.default_rng(0)
    x, kernel = (rng.normal(size=s).astype("f") for s in ((2, 6, 6, 3), (3, 3, 3, 4)))

    def penalty(f, kernel):
        slope = jax.grad(lambda x: (f(x, kernel, (1, 1), ((1, 1), (1, 1))) ** 3).sum())(x)
        return (slope**2).sum()

    ours, xla = (jax.grad(lambda k, f=f: penalty(f, k))(kernel) for f in (conv2d, xlas))
    np.testing.assert_allclose(ours, xla, rtol=1e-4)


def test_large_convolutions_of_networks_use_it():
    x = jnp.zeros((16, 16, 16, 32))
    assert x.size * 32 >= LARGE
    layer = conv(32, 3, jnp.float32, None)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)
    traced = lambda x: str(jax.make_jaxpr(on_mesh(layer.apply))(params, x))
    assert "custom_vjp" in traced(x)
    assert "custom_vjp" not in traced(x[:1])  # small ones compile sooner
    assert "custom_vjp" not in str(jax.make_jaxpr(layer.apply)(params, x))  # exported ones run on any platform


def test_grouped_and_dilated_ones_are_xlas():
    x, kernel = jnp.ones((16, 16, 16, 32)), jnp.ones((3, 3, 16, 32))
    f = lambda **options: conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), **UNDILATED | options)
    assert f(feature_group_count=2).shape == (16, 16, 16, 32)


@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
def test_an_enlarged_image_is_convolved_as_if_written_out(size, monkeypatch):
    """With gradients, and their gradients as in an R1 penalty."""
    monkeypatch.setattr(convolution, "LARGE", 0)  # the small convolution's gradients are ours, too
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), "f") for s in ((2, *size, 3), (3, 3, 3, 4)))
    ones = ((1, 1), ((1, 1), (1, 1)))

    def written_out(x, kernel):
        return xlas(x.repeat(2, 1).repeat(2, 2), kernel, *ones)

    def penalty(f, kernel):
        return (jax.grad(lambda x: (f(x, kernel) ** 3).sum())(x) ** 2).sum()

    ours = on_mesh(lambda x, kernel: of_enlarged(x, kernel, *ones, **UNDILATED))
    (y, back), (expected, back_xla) = (jax.vjp(f, x, kernel) for f in (ours, written_out))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    dy = jnp.asarray(rng.normal(size=y.shape), "f")
    for a, b in zip(back(dy), back_xla(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        *(jax.grad(lambda k, f=f: penalty(f, k))(kernel) for f in (ours, written_out)), rtol=1e-4
    )


def test_upsampling_of_networks_saves_products():
    x = jnp.zeros((1, 16, 16, 64))
    params = jax.eval_shape(Upsample2D(64).init, jax.random.key(0), x)
    flops = jax.jit(on_mesh(Upsample2D(64).apply)).lower(params, x).compile().cost_analysis()["flops"]
    assert flops < 0.6 * 2 * 9 * 64 * 64 * 32 * 32


def test_programs_for_export_enlarge_outside_of_the_convolution():
    """jax2onnx has an operation for flax's Conv, whatever function the layer computes with."""
    seen = []

    def watched(call, args, options, context):
        if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
            seen.append(args[0].shape)
        return call(*args, **options)

    with nn.intercept_methods(watched):
        jax.eval_shape(lambda: Upsample2D(64).init_with_output(jax.random.key(0), jnp.zeros((1, 64, 64, 64))))
    assert seen == [(1, 128, 128, 64)]
