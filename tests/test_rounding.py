"""Fewer bits: rounding that keeps the mean, int8 codes, and an optimiser whose moments are stored so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from cddistill import build, checkpoint, config, rounding, sharding, train
from cddistill.optim import OptimConfig, optimizer

KEY = jax.random.key(0)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_mean_of_many_roundings_is_the_value(dtype):
    """Also of values that are far below the largest of their block, the six of a column. Tolerance: five standard
    errors of 4,000 roundings to one of two neighbours."""
    values = np.array([1.0, 0.7, -0.3, 0.011, -1e-5, 0.0], np.float32)[:, None]
    round_at_random = {"bfloat16": rounding.to_bfloat16, "int8": rounding.encode}[dtype]
    made = np.asarray(rounding.load(round_at_random(jnp.repeat(values, 4000, 1), KEY)), np.float64)
    assert [len(np.unique(row)) for row in made] == [1, 2, 2, 2, 2, 1]
    steps = np.ptp(made, 1)
    assert (steps <= {"bfloat16": 2**-7, "int8": 0.7}[dtype] * np.abs(values[:, 0])).all()
    assert (np.abs(made.mean(1) - values[:, 0]) <= 5 * 0.5 * steps / 4000**0.5).all()


def test_what_is_not_finite_stays_visible():
    x = jnp.asarray([[jnp.nan, jnp.inf, -jnp.inf, 1.0]])
    np.testing.assert_array_equal(rounding.load(rounding.to_bfloat16(x, KEY)), x)
    assert not jnp.isfinite(rounding.load(rounding.encode(x.T, KEY))).all()


def test_small_second_moments_never_become_zero():
    """Adam divides by their root: a zero would make a huge step of a small one."""
    x = jnp.full((64, 128), 1e-20).at[:, 0].set(1.0).T
    got = rounding.load(rounding.encode(x.T, KEY))
    assert (got > 0).all()
    assert (rounding.load(rounding.encode(jnp.zeros((64, 128)), KEY)) == 0).all()


def test_bytes():
    """One byte for a value, four for each slice along the largest axis; vectors and small arrays stay float32."""
    size = lambda x, dtype: sum(y.nbytes for y in jax.tree.leaves(rounding.store(x, dtype, KEY)))
    assert size(jnp.ones((3, 3, 64, 128)), "int8") == 9 * 64 * 128 + 4 * 128
    assert size(jnp.ones((3, 3, 64, 128)), "bfloat16") == 2 * 9 * 64 * 128
    assert size(jnp.ones(2**14), "int8") == 4 * 2**14
    assert size(jnp.ones((8, 8)), "int8") == 4 * 64


def distances(dtype, steps=400):
    """|w - target| of a quadratic with curvatures from 1e-4 to 1, every 100 updates."""
    target, curvature = tiny.randn(0, 64, 80), jnp.logspace(-4, 0, 64)[:, None]
    adam = optimizer(OptimConfig(lr=0.02, decay="linear", clip=0.0, state_dtype=dtype), steps)

    @jax.jit
    def play(w, state):
        def step(carry, _):
            w, state = carry
            updates, state = adam.update(curvature * (w - target), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, state), None, 100)[0]

    w, found = jnp.zeros_like(target), []
    state = adam.init(w)
    for _ in range(steps // 100):
        w, state = play(w, state)
        found.append(float(jnp.abs(w - target).mean()))
    return np.array(found), state


def test_moments_in_fewer_bits_descend_a_quadratic_as_float32_does():
    exact, whole = distances("float32")
    assert exact[-1] < 0.1 * exact[0]
    for dtype, size in (("bfloat16", 2), ("int8", 4)):
        found, state = distances(dtype)
        np.testing.assert_allclose(found, exact, rtol=0.1, atol=0.01)
        n = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
        assert n(state) < n(whole) / size * 1.1


def test_the_first_update_is_that_of_float32():
    """Moments are rounded after they have been used."""
    w, g = tiny.randn(0, 64, 80), tiny.randn(1, 64, 80)
    first = lambda dtype: (adam := optimizer(OptimConfig(state_dtype=dtype), 1)).update(g, adam.init(w), w)[0]
    for dtype in ("bfloat16", "int8"):
        np.testing.assert_array_equal(first(dtype), first("float32"))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_first_state_is_that_of_rounding_and_nothing_is_rounded_for_it(dtype):
    w = {"kernel": tiny.randn(0, 64, 80), "bias": tiny.randn(1, 80)}
    adam, whole = (optimizer(OptimConfig(clip=0.0, state_dtype=kind), 1) for kind in (dtype, "float32"))
    rounded = jax.tree.map(lambda x: rounding.store(x, dtype, KEY), whole.init(w))
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(adam.init(w))[1:], jax.tree.leaves(rounded))
    assert {x.dtype for x in jax.tree.leaves(adam.init(w))} >= {jnp.dtype(dtype)}
    program = jax.jit(adam.init).lower(w).as_text()
    assert "reduce" not in program
    assert "threefry" not in program  # random numbers


@pytest.mark.usefixtures("one_device")
@pytest.mark.slow
def test_resuming_is_bit_exact(teacher, tmp_path, monkeypatch):
    """Codes and their scales are a part of a checkpoint, and what is rounded depends on the update alone."""
    monkeypatch.setattr(rounding, "SMALLEST", 64)  # the test's network has small kernels
    settings = config.defaults("diffusion")
    settings.update(teacher=str(teacher), steps=4, batch_size=8, checkpoint_every=2, eval_every=100, report=False)
    settings.data.size, settings.optim.state_dtype = 8, "int8"
    abstract = build.build(config.resolve(settings)).abstract
    assert {jnp.dtype("int8")} <= {x.dtype for x in jax.tree.leaves(abstract.opt)}
    train.train(settings, tmp_path / "straight")
    train.train(settings, tiny.until(2, tmp_path / "straight", tmp_path / "resumed"))
    read = lambda name: checkpoint.Checkpoints(tmp_path / name / "checkpoints", read_only=True).restore(abstract, 4)
    jax.tree.map(np.testing.assert_array_equal, read("straight"), read("resumed"))


def test_codes_are_sharded_as_the_weights_are():
    w = {"kernel": jnp.zeros((3, 3, 256, 512)), "bias": jnp.zeros(512)}
    adam, mesh = optimizer(OptimConfig(state_dtype="int8"), 10), sharding.make_mesh(8, jax.devices())
    state = jax.eval_shape(adam.init, w)
    own = sharding.by_shape(mesh, w)["kernel"]
    found = jax.tree.leaves(sharding.by_shape(mesh, state))
    codes = [s for x, s in zip(jax.tree.leaves(state), found, strict=True) if x.dtype == jnp.int8]
    assert [s.spec for s in codes] == [own.spec] * 2
    assert "fsdp" in own.spec
