"""Gradients that devices sum in float32: layers' values and gradients, and the operands of the collectives."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import config, outline, reduction, sharding
from cddistill.models.blocks import conv

LAYERS = {
    "dense": (nn.Dense(6, dtype=jnp.bfloat16), (4, 5, 3)),
    "dense without bias": (nn.Dense(6, use_bias=False, dtype=jnp.bfloat16), (4, 3)),
    "conv": (conv(6, 3, jnp.bfloat16, None), (4, 8, 7, 3)),
    "conv of stride 2": (conv(6, 3, jnp.bfloat16, None, 2), (4, 8, 7, 3)),
    "conv padded on one side": (conv(6, 3, jnp.bfloat16, None, 2, ((0, 1), (0, 1))), (4, 8, 8, 3)),
    "conv of another kind": (nn.Conv(6, (3,), padding="VALID", dtype=jnp.bfloat16), (4, 8, 3)),
}


def gradients(layer, params, x, dy):
    """(output, gradients of the weights and of x), compiled."""

    def both(params, x):
        out, back = jax.vjp(lambda params, x: layer.apply({"params": params}, x), params, x)
        return out, back(dy.astype(out.dtype))

    return jax.jit(both)(params, x)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_the_same_and_gradients_of_weights_are_those_of_float32(name):
    """They equal those of a layer that computes in float32 on the same rounded values, but for the order of sums."""
    layer, shape = LAYERS[name]
    x = tiny.randn(0, *shape).astype(jnp.bfloat16)
    params = layer.init(jax.random.key(0), x)["params"]
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    dy = tiny.randn(1, *jax.eval_shape(layer.apply, {"params": params}, x).shape).astype(jnp.bfloat16)
    out, (_, dx) = gradients(layer, params, x, dy)
    _, (exact, _) = gradients(layer.clone(dtype=jnp.float32), rounded, x.astype(jnp.float32), dy)
    with nn.intercept_methods(reduction.in_float32):
        same, (wide, same_dx) = gradients(layer, params, x, dy)
    np.testing.assert_array_equal(out, same)
    np.testing.assert_array_equal(dx, same_dx)
    rtol = 1e-2 if name == "conv of another kind" else 1e-5  # its kernel's gradient stays bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), wide, exact)


def summed(program):
    """{type: bytes} that the all-reduces and reduce-scatters of a lowered program sum."""
    found = {}
    for kind, dims in re.findall(r" = \(?(\w+)\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)\(", program):
        found[kind] = found.get(kind, 0) + int(np.prod([int(n) for n in dims.split(",") if n] or [1]))
    return found


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.silu(conv(16, 3, jnp.bfloat16, "conv")(x))
        return nn.Dense(8, dtype=jnp.bfloat16, name="dense")(x)


@pytest.mark.parametrize("fsdp", [1, 8])
def test_what_devices_sum_is_float32(fsdp, tmp_path):
    """The program as the partitioner leaves it: later, XLA for CPUs computes all of bfloat16 in float32."""
    net, x = Small(), jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.float32)
    mesh = sharding.make_mesh(fsdp)
    params = jax.eval_shape(net.init, jax.random.key(0), x)
    layout = sharding.by_shape(mesh, params, min_elements=64)
    given = sharding.laid_out(params, layout), jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.by_row(mesh))
    found = {}
    for how in ("same", "float32"):
        grad = jax.grad(lambda p, x: (net.apply(p, x).astype(jnp.float32) ** 2).mean())
        program = jax.jit(sharding.inside(mesh, grad, how), out_shardings=layout).lower(*given)
        folder = tmp_path / how
        program.compile({"xla_dump_to": str(folder), "xla_dump_hlo_pass_re": "spmd-partition.*"})
        (file,) = [p for p in folder.iterdir() if "after_spmd-partitioning" in p.name]
        found[how] = summed(file.read_text())
    n = sum(x.size for x in jax.tree.leaves(params))
    assert found["same"].get("bf16", 0) >= n
    assert "bf16" not in found["float32"]
    assert found["float32"]["f32"] >= n


@pytest.mark.parametrize("how", ["same", "float32"])
def test_a_run_takes_the_option_through_rematerialised_blocks(how, teacher):
    """Convolutions of the traced step that give float32 from bfloat16: each kernel's gradient, with the option only."""
    settings = config.defaults("diffusion")
    settings.update(teacher=str(teacher), batch_size=8, dtype="bfloat16", remat=True, fsdp=8, reduce_dtype=how)
    settings.data.size = 8
    run = outline.outline(config.resolve(settings), sharding.make_mesh(8))
    (turn,) = run.parts.experiment.method.turns()
    traced = run.parts.driver().step.trace(run.parts.abstract, run.parts.frozen, run.parts.batch, (turn,))
    wide = re.findall(r"conv_general_dilated\[[^\]]*?preferred_element_type=float32", str(traced.jaxpr))
    kernels = sum(x.ndim == 4 for x in jax.tree.leaves(run.parts.abstract.nets))
    assert len(wide) == (kernels if how == "float32" else 0)
