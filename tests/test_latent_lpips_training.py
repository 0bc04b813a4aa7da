"""Training a latent LPIPS: losses, distortions, and both runs up to the file that Diffusion2GAN loads."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_config import load
from tiny import randn

from cddistill import build, commands, config, health, models, train
from cddistill.method import per_sample
from cddistill.methods.diffusion2gan import Diffusion2GAN
from cddistill.methods.latent_lpips import LatentMetric, cross_entropy, init_ranker, non_negative, rank, rank_loss
from cddistill.models.init import init_params_numpy, weight_shapes
from cddistill.models.tiny_vae import AutoencoderTiny
from cddistill.net import Autoencoder, Net
from cddistill.perceptual import distort as distortions
from cddistill.perceptual import latent_lpips, lpips

pytestmark = pytest.mark.usefixtures("one_device")

VAE = {f"{half}_block_out_channels": [4, 4] for half in ("encoder", "decoder")}  # 4 channels, downsampled by 2
VAE |= {"num_encoder_blocks": [1, 1], "num_decoder_blocks": [1, 1], "_class_name": "AutoencoderTiny"}
measure = jax.jit(lambda net, a, b: net(a, b))
distorted = jax.jit(distortions.distort)


@pytest.fixture(scope="module", autouse=True)
def cheap():
    """A cheap distance instead of LPIPS-VGG and one convolution per stage of the trunk, to save compile time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lpips, "load", lambda trunk: Net(None, tiny.coarse_l2))
        patch.setattr(latent_lpips, "VGG", tuple(stage[:1] for stage in latent_lpips.VGG))
        patch.setattr(latent_lpips, "CONVS", {s: slice_[:1] for s, slice_ in latent_lpips.CONVS.items()})
        yield


# ---- losses


def test_the_rank_loss_is_symmetric_in_the_two_distortions():
    params, (a, b) = init_ranker(jax.random.key(0)), np.abs(randn(0, 2, 16))
    answer = jnp.float32(b < a)
    loss = jax.jit(lambda a, b, answer: rank_loss(rank(params, a, b), answer))
    np.testing.assert_allclose(loss(b, a, 1 - answer), loss(a, b, answer), rtol=1e-5)
    assert np.ptp(loss(a, b, answer)) > 1e-3
    np.testing.assert_allclose(loss(a, a, answer), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(rank_loss(jnp.array([2.0, 2.0]), jnp.array([1.0, 0.0])), [0.126928, 2.126928], rtol=1e-5)


def test_cross_entropy_skips_the_null_label():
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0], [1.0, 1.0, 1.0], [3.0, 1.0, 1.0]]))
    labels = jnp.array([2, 0, 3])  # the last is the null label: its loss is 0
    np.testing.assert_allclose(cross_entropy(logits, labels), [math.log(8 / 5), math.log(3), 0.0], atol=1e-6)


def test_heads_are_never_negative():
    heads = Net([jnp.array([-1.0, 0.0, 2.0])], non_negative)
    np.testing.assert_array_equal(heads()[0], [1.0, 0.0, 2.0])
    slope = jax.grad(lambda heads: heads()[0].sum())(heads)
    np.testing.assert_array_equal(slope.params[0], [-1.0, 1.0, 1.0])  # not 0 at 0, so no head is stuck there


# ---- distortions


IMAGES, KEYS = jnp.clip(randn(0, 64, 16, 12, 3), -1, 1), per_sample(jax.random.key(0), jnp.arange(64))


def test_a_distortion_depends_only_on_its_key():
    """Not on the position in the batch nor on the other images."""
    whole, order = distorted(IMAGES, KEYS, 1.0), np.random.default_rng(0).permutation(64)
    np.testing.assert_allclose(distorted(IMAGES[order], KEYS[order], 1.0), whole[order], atol=1e-5)
    np.testing.assert_allclose(distorted(IMAGES.at[1:].set(0), KEYS, 1.0)[0], whole[0], atol=1e-5)
    assert np.abs(whole).max() <= 1
    assert len(np.unique(np.abs(distorted(IMAGES[:1].repeat(64, 0), KEYS, 1.0)).mean((1, 2, 3)))) > 50


def test_distortions_grow_with_strength_from_the_identity():
    """Tolerance: that of the filters with which ensemble.py resamples."""
    change = lambda strength: float(np.abs(distorted(IMAGES, KEYS, strength) - IMAGES).mean())
    np.testing.assert_allclose(distorted(IMAGES, KEYS, 0.0), IMAGES, atol=2e-5)
    assert change(0.0) < change(0.1) < change(1.0)


def test_each_kind_of_distortion_has_probability_one_half():
    drawn = jax.jit(jax.vmap(lambda key: distortions._sample_distortion(IMAGES.shape[1:], 1.0, key)))(KEYS)
    colour, warp = drawn.transform["colour"], drawn.transform["geometric"]
    for on in (
        drawn.blur > 0,
        drawn.coarse > 1,
        drawn.noise.any((1, 2, 3)),
        colour.brightness != 0,
        warp.rotation != 0,
    ):
        assert 0.3 < on.mean() < 0.7
    waves = jnp.broadcast_to(jnp.sin(jnp.pi / 2 * jnp.arange(12))[None, None, :, None], IMAGES.shape)
    spread = distorted(waves, KEYS, 1.0).std((1, 2, 3))
    soft, hard = (drawn.blur > 0.025) | (drawn.coarse > 2.5), (drawn.blur == 0) & (drawn.coarse == 1)
    assert spread[soft].mean() < 0.7 * spread[hard].mean()


def test_blur_and_cell_means():
    """Without a blur, means over cells; without cells, a Gaussian blur that preserves constants."""
    x = IMAGES[0]
    cells = x.reshape(8, 2, 6, 2, 3).mean((1, 3)).repeat(2, 0).repeat(2, 1)
    soften = jax.jit(distortions._blur_and_coarsen)
    np.testing.assert_allclose(soften(x, 0.0, 2.0), cells, atol=1e-6)
    np.testing.assert_allclose(soften(jnp.ones_like(x), 0.05, 1.0), 1.0, atol=1e-6)
    impulse = soften(jnp.zeros_like(x).at[8, 6].set(1.0), 0.0625, 1.0)  # sigma: 1 pixel down, 0.75 pixels across
    np.testing.assert_allclose(impulse[9, 6] / impulse[8, 6], np.exp(-0.5), rtol=1e-4)
    np.testing.assert_allclose(impulse[8, 7] / impulse[8, 6], np.exp(-0.5 / 0.75**2), rtol=1e-3)


# ---- the method


METHOD = tiny.VARIANTS["judge"]


@jax.jit
def score(n, batch, sign):
    """The scores with the metric itself (sign 1) or its negative (-1) in place of LPIPS-VGG."""
    n = SimpleNamespace(**n)
    n.lpips = lambda a, b: sign * METHOD.metric(n)(a, b)
    return METHOD.scores(n, batch, jax.random.key(0))


@pytest.fixture(scope="module")
def nets():
    frozen = {"autoencoder": Autoencoder()}
    nets = jax.jit(lambda key: METHOD.init(key, frozen, tiny.make_batch()))(jax.random.key(0))
    return frozen | nets | {"heads": nets["heads"].replace(params=[randn(0, *w.shape) for w in nets["heads"].params])}


def test_a_metric_agrees_with_itself(nets):
    batch = tiny.make_batch()
    assert (score(nets, batch, 1.0)["agreement"] == 1).all()
    assert (score(nets, batch, -1.0)["agreement"] == 0).all()
    heads = nets["heads"]
    alike = score(nets | {"heads": heads.replace(params=jax.tree.map(np.ones_like, heads.params))}, batch, 1.0)
    assert (alike["agreement_equal_heads"] == 1).all()
    assert alike["agreement_l2"].mean() > 0.5


def test_scores_do_not_depend_on_the_position_in_the_batch(nets):
    batch = tiny.make_batch()
    whole, turned = score(nets, batch, 1.0), score(nets, jax.tree.map(lambda x: x[::-1], batch), 1.0)
    for name in whole:
        np.testing.assert_allclose(turned[name][::-1], whole[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"stage": "rank"}, "method.stage='rank' must be one of classify, judge"),
        ({"width": 5}, "method.width=5 must be at least 2 and at most 65536 and a multiple of 2"),
        ({"pools": (3, 6)}, r"method.pools\[1\]=6 must be at least 1 and at most 5"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        config.resolve({"method": {"name": "latent_lpips"} | options})


def test_unsuitable_data_is_refused_before_the_first_step(tmp_path):
    def refused(match, **changes):
        with pytest.raises(ValueError, match=match):
            build.build(config.resolve(settings("emoji", **changes)))

    refused("method.family is empty", family="")
    refused("the family sd15 has 4 channels, but these latents have 3", family="sd15")
    refused("of at least 32 x 32", pools=(1, 2, 3, 4, 5))
    refused("method.classes is 3, and data.num_classes 9: set both alike", stage="classify", classes=3)
    refused(r"x0 is \(8, 4, 4, 4\): use data that is not encoded", source=encoded(tmp_path))
    refused("there are images in data.source=arrays .* that have none", source=encoded(tmp_path), stage="classify")


def encoded(folder):
    """Latents without labels."""
    np.save(folder / "x0.npy", np.zeros((40, 4, 4, 4), np.float16))
    return str(folder)


@pytest.mark.parametrize("variant", ["classify", "judge"])
@pytest.mark.parametrize("file", ["latent_lpips", "latent_lpips_sd15"])
def test_every_config_variant_resolves(file, variant):
    settings = load(f"{file}:{variant}")
    settings.data.num_classes = 77
    method = config.resolve(settings).method
    assert method.classes == 77
    assert method.stage == variant
    assert bool(settings.init_from_run) == (variant == "judge")
    with pytest.raises(ValueError, match="no variant 'rank': known are classify, judge"):
        load(f"{file}:rank")


# ---- from data to a file


def settings(teacher, stage="judge", source="", init_from_run="", eval_every=2, report=True, **method):
    """Tiny runs on emoji of 16 px, or on arrays."""
    c = config.defaults("latent_lpips")
    c.update(teacher=str(teacher), batch_size=8, steps=2, log_every=1, eval_every=eval_every, checkpoint_every=2)
    c.update(eval_images=64)
    c.update(init_from_run=str(init_from_run), report=report)
    c.method.update(**({"stage": stage, "family": "tiny", "width": 4, "pools": (4,)} | method))
    c.data.update(size=16)
    if source:
        c.data.update(source="arrays", path=source)
    return c


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A folder that holds a VAE and nothing else."""
    folder, module = tmp_path_factory.mktemp("pipeline"), AutoencoderTiny.from_config(VAE)
    models.save(folder, "vae", init_params_numpy(weight_shapes(module), 1), module.to_config())
    return folder


@pytest.fixture(scope="module")
def runs(vae, tmp_path_factory):
    """Workdirs of both stages."""
    first, second = tmp_path_factory.mktemp("classify"), tmp_path_factory.mktemp("judge")
    train.train(settings(vae, "classify", eval_every=100, report=False), first)
    train.train(settings(vae, init_from_run=first), second)
    return first, second


@pytest.mark.slow
def test_a_run_writes_scores_and_no_samples(runs):
    first, second = ({k for record in health.read(run / "metrics.jsonl") for k in record} for run in runs)
    assert {"classify/loss", "classify/accuracy"} <= first
    assert {"judge/loss", "judge/agreement", "val/agreement", "val/agreement_l2", "val/rank_loss"} <= second
    scores = json.loads((runs[1] / "scores.json").read_text())["metric"]
    assert scores["n"] == 64
    assert [*scores["metrics"]] == ["agreement", "agreement_equal_heads", "agreement_l2", "rank_loss"]
    for mean, error in scores["metrics"].values():
        assert 0 < error < 0.2 < mean
    assert "agreement_equal_heads" in (runs[1] / "report.html").read_text()
    assert not (runs[1] / "samples").exists()


@pytest.mark.slow
def test_the_second_run_keeps_the_trunk_of_the_first_and_exports_its_metric(runs, vae, tmp_path, capsys):
    first, second = runs
    classified = commands.finished(settings(vae, "classify"), first)[1].nets
    judged = commands.finished(settings(vae, init_from_run=first), second)[1].nets
    jax.tree.map(np.testing.assert_array_equal, judged["trunk"], classified["trunk"])
    assert any((w != 1).any() for w in judged["heads"].params)
    commands.export_run(settings(vae, init_from_run=first), second, str(tmp_path / "tiny.safetensors"))
    assert "the same weights" in capsys.readouterr().out
    net, a, b = latent_lpips.load(tmp_path / "tiny.safetensors"), randn(0, 2, 8, 8, 4), randn(1, 2, 8, 8, 4)
    ours = LatentMetric(stage="judge").metric(SimpleNamespace(**judged))
    np.testing.assert_array_equal(measure(net, a, b), measure(ours, a, b))
    assert net.apply == ours.apply
    method = Diffusion2GAN(metric=str(tmp_path / "tiny.safetensors"), augment="none")
    n, keys = (
        SimpleNamespace(latent_lpips=method.requires().nets["latent_lpips"]()),
        jax.random.split(jax.random.key(0)),
    )
    distance = jax.jit(lambda a, b: method.distance(n, a, b, {}, keys))
    np.testing.assert_allclose(distance(a, b), measure(net, a, b), rtol=1e-5)
    with pytest.raises(ValueError, match="family tiny, not sd15"):
        latent_lpips.load(tmp_path / "tiny.safetensors", "sd15")


@pytest.mark.slow
def test_unsupported_modes_are_refused(runs, vae, tmp_path):
    first, second = runs
    judge = settings(vae, init_from_run=first)
    with pytest.raises(ValueError, match="this method generates no images: use --mode=evaluate"):
        commands.sample(judge, second, None, str(tmp_path / "sheet.png"))
    with pytest.raises(ValueError, match=r"a latent LPIPS is exported as \*.safetensors"):
        commands.export_run(judge, second, str(tmp_path / "folder"))
    with pytest.raises(ValueError, match="has no metric yet: train 'judge'"):
        commands.export_run(settings(vae, "classify"), first, str(tmp_path / "half.safetensors"))
    assert not (tmp_path / "half.safetensors").exists()


def test_tune_trains_the_trunk_with_the_heads():
    assert LatentMetric(stage="judge", tune=True).turns()["judge"].moves == ("heads", "ranker", "trunk")
    assert LatentMetric(tune=True).turns()["classify"].moves == ("trunk", "classifier")
