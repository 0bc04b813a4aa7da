"""Frozen networks in bfloat16: half the bytes, what trains starts from float32, exports are those of float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import build, checkpoint, commands, config, train
from cddistill.net import Net
from cddistill.perceptual import lpips

pytestmark = pytest.mark.usefixtures("one_device")


def settings(teacher, **changes):
    """Those of a student whose loss asks the frozen teacher."""
    c = config.defaults("codi")
    c.update(teacher=str(teacher), steps=2, batch_size=8, log_every=1, eval_every=100, report=False)
    c.update(changes)
    c.method.update(ode="teacher", space="x0", noise="predicted", delta_t=100)
    c.data.update(size=8, task="sr", scale=2)
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher whose weights bfloat16 does not hold."""
    path = tmp_path_factory.mktemp("unrounded")
    return tiny.save_teacher(path)[0]


@functools.cache
def parts(folder, **changes):
    return build.build(config.resolve(settings(folder, **changes)))


def test_matrices_halve_and_what_trains_starts_from_float32(folder):
    exact, lighter = parts(folder), parts(folder, frozen_dtype="bfloat16")
    held = build.in_frozen_dtype(lighter)
    for before, after in zip(jax.tree.leaves(exact.frozen), jax.tree.leaves(held.frozen), strict=True):
        assert after.nbytes * (2 if before.ndim > 1 else 1) == before.nbytes
        assert after.sharding == before.sharding
    for a, b in zip(jax.tree.leaves(exact.init()), jax.tree.leaves(lighter.init()), strict=True):
        np.testing.assert_array_equal(a, b)
    assert build.in_frozen_dtype(exact) is exact


def trained(folder, workdir, **changes):
    """Weights after two steps."""
    train.train(settings(folder, **changes), workdir)
    saved = checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)
    return saved.restore_weights(parts(folder, **changes).abstract).nets


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """(weights of runs that compute in bfloat16, frozen networks in float32 and in bfloat16; the workdir of these)."""
    workdirs = tmp_path_factory.mktemp("exact"), tmp_path_factory.mktemp("lighter")
    dtypes = zip(workdirs, ("float32", "bfloat16"), strict=True)
    return [trained(folder, path, dtype="bfloat16", frozen_dtype=frozen) for path, frozen in dtypes], workdirs[1]


def test_networks_that_compute_in_bfloat16_train_as_before(runs):
    """Their kernels are rounded to bfloat16 before each use anyhow, so the student is the same, bit for bit."""
    for a, b in zip(*map(jax.tree.leaves, runs[0]), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_networks_that_compute_in_float32_train_nearly_as_before(folder, tmp_path):
    """Weights of the teacher change by at most 2^-9 of themselves. Adam moves a weight by up to lr = 1e-4 in each of
    two steps, also where its gradient is near zero: there the sign may change, 4e-4 apart; elsewhere the two agree."""
    one, other = (trained(folder, tmp_path / frozen, frozen_dtype=frozen) for frozen in ("float32", "bfloat16"))
    gaps = [np.abs(np.asarray(a - b)).ravel() for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)]
    gaps = np.concatenate(gaps)
    assert 0 < gaps.max() <= 4.1e-4
    assert gaps.mean() < 2e-5


def test_an_export_has_the_weights_of_float32(runs, folder, tmp_path):
    """The workdir says bfloat16, and what is frozen is loaded as it lies there."""
    changes = {"dtype": "bfloat16", "frozen_dtype": "bfloat16"}
    loaded, state = commands.finished(settings(folder, **changes), runs[1], split=None)
    assert {x.dtype for x in jax.tree.leaves(loaded.frozen)} == {jnp.dtype("float32")}
    student = commands.generate.student_of(loaded, state)
    assert student.frozen is loaded.frozen


def test_another_frozen_dtype_is_another_run(runs, folder):
    with pytest.raises(ValueError, match="frozen_dtype: bfloat16 in the workdir, float32 now"):
        train.train(settings(folder, dtype="bfloat16"), runs[1])


def test_lpips_takes_bfloat16():
    """LPIPS is no flax module: its images stay float32."""
    params = jax.tree.map(lambda shape: 0.05 * tiny.randn(sum(shape), *shape), lpips.shapes("alex"),
                          is_leaf=lambda x: isinstance(x, tuple) and all(isinstance(i, int) for i in x))  # fmt: skip
    net = Net(params, lpips.alex)
    a, b = tiny.randn(0, 2, 32, 32, 3), tiny.randn(1, 2, 32, 32, 3)
    got, want = build.in_dtype(net, "bfloat16")(a, b), net(a, b)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0.05)
    assert (got != want).any()
