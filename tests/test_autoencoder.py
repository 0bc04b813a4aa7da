"""Training an autoencoder: its three terms, a run of it, and the vae/ folder that it leaves."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cddistill import commands, config, data, models, train
from cddistill.method import per_sample
from cddistill.methods import METHODS
from cddistill.methods.autoencoder import crop, kl
from cddistill.net import Autoencoder, Net
from cddistill.perceptual import lpips

pytestmark = pytest.mark.usefixtures("one_device")


def settings(**changes):
    c = config.defaults("autoencoder")
    c.update(steps=4, batch_size=8, log_every=1, eval_every=4, checkpoint_every=4, eval_images=8)
    c.method.update(channels=(8, 16), ema_decay=0.5, lpips_crop=16)
    c.optim.lr = 1e-3
    c.data.update(size=16)
    c.update(changes)
    return c


@pytest.fixture(scope="module", autouse=True)
def _cheap_lpips():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips, "load", lambda trunk: Net(None, tiny.coarse_l2))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's workdir."""
    workdir = tmp_path_factory.mktemp("run")
    train.train(settings(), workdir)
    return workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """(folder of the exported autoencoder, what the command printed)."""
    out, said = tmp_path_factory.mktemp("exported") / "out", io.StringIO()
    with contextlib.redirect_stdout(said):
        commands.export_run(settings(), run, str(out))
    return out, said.getvalue()


def test_kl_is_that_of_gaussians():
    mean, std = np.float32([0.0, 1.0, -2.0]), np.float32([1.0, 1.0, 0.5])
    expected = -np.log(std) + (std**2 + mean**2) / 2 - 0.5
    rows = lambda x: jnp.asarray(x).reshape(3, 1, 1, 1)
    np.testing.assert_allclose(kl(rows(mean), rows(2 * np.log(std))), expected, atol=1e-6)


def test_the_same_crop_of_both_images():
    keys = per_sample(jax.random.key(0), np.arange(32))
    x = jnp.arange(32 * 8 * 8 * 3.0).reshape(32, 8, 8, 3)
    a = np.asarray(crop(keys, x, 3))
    assert a.shape == (32, 3, 3, 3)
    np.testing.assert_array_equal(a + 1, crop(keys, x + 1, 3))
    corners = {(int(v) // 3 % 64 // 8, int(v) // 3 % 8) for v in a[:, 0, 0, 0]}
    assert len(corners) > 12
    assert {r for r, _ in corners} <= set(range(6))
    assert crop(keys, x, 0) is x


def test_the_loss_is_the_sum_of_its_terms():
    """LPIPS has its weight times the number of steps between two evaluations, and none in the others."""
    method, batch = tiny.VARIANTS["autoencoder"], tiny.make_batch()
    n, key = tiny.namespace("autoencoder"), jax.random.key(0)
    for play, names in ((("vae",), {"mse", "kl"}), (("vae", "vae/lazy"), {"mse", "kl", "lpips"})):
        n.play = play
        total, terms = jax.jit(lambda key: method.loss(n, batch, key))(key)
        assert terms.keys() == names
        expected = terms["mse"] + method.kl_weight * terms["kl"] + 2 * method.lpips_weight * terms.get("lpips", 0.0)
        assert total == pytest.approx(float(expected))
    keys = per_sample(jax.random.split(key)[0], batch["index"])
    decoded = jax.jit(lambda x, keys: n.vae.decode(n.vae.encode(x, keys)))(batch["x0"], keys)
    np.testing.assert_allclose(terms["mse"], np.mean((decoded - batch["x0"]) ** 2), rtol=1e-4)


@pytest.mark.slow
def test_a_run_improves_and_its_folder_is_read_back(run, exported):
    out, said = exported
    assert float(said.split("at most ")[1].split()[0]) < 1e-2
    vae = models.load(out, "vae")
    factor = vae.encoder.module.scaling_factor
    assert f"scaling_factor {factor:.4f}" in said
    x = data.examples(config.resolve(settings()).data, "train", 512)["x0"]
    z = jax.jit(Autoencoder.encode)(vae, x)
    assert float(z.std()) == pytest.approx(1.0, abs=2e-2)
    assert z.shape[1:] == (8, 8, 4)
    scores = (run / "scores.json").read_text()
    assert all(name in scores for name in ("psnr", "lpips", "kl"))
    assert (run / "samples" / "000004.png").is_file()
    assert "The first images of the held-out test split." in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_file_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="an autoencoder is exported as a folder"):
        commands.export_run(settings(), run, str(tmp_path / "vae.safetensors"))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_teachers_vae_is_fine_tuned(exported):
    vae = models.load(exported[0], "vae")
    net = METHODS["autoencoder"]().init(jax.random.key(0), {"autoencoder": vae}, tiny.make_batch())["vae"]
    assert jax.tree.all(jax.tree.map(np.array_equal, net.params, vae.params))
    assert net.encoder.module.scaling_factor == vae.encoder.module.scaling_factor


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lpips_crop": 16}, "method.lpips_crop=16 is larger than the images of 8 px"),
        ({"channels": (8,) * 5}, r"images of \(8, 8\) px smaller by a factor of 16, which does not divide them"),
    ],
)
def test_options_that_do_not_fit_the_images_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        METHODS["autoencoder"](**options).init(jax.random.key(0), {"autoencoder": Autoencoder()}, tiny.make_batch())
