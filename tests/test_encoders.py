"""Images and captions for a latent teacher are encoded before every step, as --mode=encode would have encoded them."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest
from golden import make_clip as golden
from test_latent import letters, pictures, teacher  # noqa: F401  (fixtures)
from test_prompt import recorded_prompts

from cddistill import build, commands, config, data, encoders, generate, models, train
from cddistill.data import loader
from cddistill.data.ode_pairs import OdePairs
from cddistill.evals import report
from cddistill.evals.scores import RECONSTRUCTION, Row
from cddistill.models.prompt import Prompts, load_prompts
from cddistill.net import Autoencoder
from cddistill.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("two_devices")
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):  # noqa: F811
    """A folder of pictures with captions."""
    path = tmp_path_factory.mktemp("pictures") / "x"
    pictures(teacher, path)
    return path


@pytest.fixture(scope="module")
def settings(teacher, folder):  # noqa: F811
    """settings(**changes) of CoDi super-resolution on the pictures themselves; "data__task" is data.task."""

    def make(**changes):
        c = pictures(teacher, folder, write=False)
        if method := changes.pop("method", None):
            own = config.defaults(method)
            own.update(teacher=str(teacher), batch_size=8)
            own.data.update(c.data)
            c = own
        for name, value in changes.items():
            group, _, field = name.rpartition("__")
            setattr(getattr(c, group) if group else c, field, value)
        return c

    return make


@pytest.fixture(scope="module")
def built(settings):
    """built(**changes): a run that is ready to start."""
    return functools.cache(lambda **changes: build.build(config.resolve(settings(**changes))))


def batches(parts, n, start=0):
    """(n batches as steps get them, numpy, rows first; the same as they are loaded, with captions)."""
    driver, run = parts.driver(), parts.experiment.run
    stream = parts.batches(driver, driver.put_frozen(parts.frozen), start)
    got = [jax.tree.map(np.asarray, next(stream)) for _ in range(n)]
    if run.parallel == "pmap":
        got = [jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch) for batch in got]
    raw = data.batches(parts.experiment.data, batch_size=run.batch_size, seed=run.seed, start=start, prepare=dict)
    return got, [next(raw) for _ in range(n)]


def by_pixels(raw, batch):
    """The arrays of a batch, in an order that depends on its images alone."""
    order = np.argsort([x.tobytes() for x in raw["x0"]])
    return {name: batch[name][order] for name in ("x0", "cond", "cond_latent") if name in batch}


VARIANTS = {
    "embeddings": {},
    "a latent condition": {"method__adapter": "concat", "data__task": "inpaint"},
    "token ids": {"method": "diffusion", "method__train_text_encoder": True},
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow if x != "a latent condition" else ()) for x in VARIANTS]
)
def test_rows_are_those_of_encoded_data(settings, built, tmp_path, name):
    """Latents, text, null text and conditions of evaluation, and their shapes in training."""
    ours, theirs = (settings(**VARIANTS[name], encode_dtype="float32") for _ in range(2))
    commands.encode_data(ours, tmp_path)
    theirs.data.update(source="arrays", path=str(tmp_path))
    parts, stored = built(**VARIANTS[name]), build.build(config.resolve(theirs))
    assert (parts.encoders is None, stored.encoders is None) == (False, True)
    given, wanted = (generate.batch_of(p, data.examples(p.experiment.data, "test")) for p in (parts, stored))
    assert given["x0"].shape == (4, 8, 8, 4)
    jax.tree.map(close, given, wanted)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.tree.all(jax.tree.map(same, parts.batch, stored.batch))


def test_training_batches_are_the_encoders_of_what_is_loaded(built, teacher):  # noqa: F811
    """Each row with its own caption; a mean takes no randomness."""
    (batch,), (raw,) = batches(built(), 1)
    vae, prompts = models.load(teacher, "vae"), load_prompts(teacher)
    assert {*batch} == {"x0", "cond", "text", "null", "index"}
    close(batch["x0"], vae.encode(raw["x0"]))
    np.testing.assert_array_equal(batch["cond"], raw["cond"])
    assert len({*raw["caption"]}) == 2
    jax.tree.map(close, batch["text"], prompts(raw["caption"]))
    jax.tree.map(close, batch["null"], prompts.null(8))


def test_conditions_are_drawn_anew_in_every_epoch(built):
    """Two epochs of eight pictures: the same latents, other holes, in pixels and in latent space."""
    found, raw = batches(built(method__adapter="concat", data__task="inpaint", data__flip=False), 2)
    first, second = map(by_pixels, raw, found)
    close(first["x0"], second["x0"])
    for name in ("cond", "cond_latent"):
        assert (np.abs(first[name] - second[name]).max((1, 2, 3)) > 0.01).all(), name


def test_a_sample_of_the_posterior_depends_on_seed_step_and_row(built, teacher):  # noqa: F811
    """It has the posterior's spread; a run that starts in the middle draws what the whole run drew."""
    parts = built(encode_sample=True, data__flip=False)
    (*_, third, fourth), (*_, raw, last) = batches(parts, 4)
    (resumed,), _ = batches(parts, 1, start=2)
    jax.tree.map(np.testing.assert_array_equal, resumed, third)
    vae = models.load(teacher, "vae")
    mean, logvar = vae.encoder.posterior(vae.params, raw["x0"])
    noise = (third["x0"] / vae.encoder.module.scaling_factor - mean) / np.exp(0.5 * logvar)
    assert np.std(noise) == pytest.approx(1.0, abs=0.1)
    assert np.std(noise.mean(0)) == pytest.approx(8**-0.5, abs=0.1)  # rows are independent
    samples = by_pixels(raw, third)["x0"], by_pixels(last, fourth)["x0"]
    assert np.abs(samples[0] - samples[1]).mean() > 0.1
    frozen, rows = jax.tree.map(np.asarray, parts.frozen), encoders.inputs(parts.encoders.tokenized(raw))
    for seed, step in ((1, 2), (0, 3)):
        encode = jax.jit(dataclasses.replace(parts.encoders, seed=seed).at_step)
        other = encode(parts.encoders.networks(frozen), rows, step)
        assert np.abs(other["x0"] - third["x0"]).mean() > 0.1


@pytest.mark.slow
def test_batches_do_not_depend_on_how_they_are_computed(built):
    """By pmap on eight devices in two parts, and by jit on two devices in one."""
    same = {"encode_sample": True, "batch_size": 32}
    (expected,), _ = batches(built(**same), 1)
    (found,), _ = batches(built(**same, parallel="pmap", accumulate=2), 1)
    jax.tree.map(close, found, expected)


def test_captions_are_tokenised_once_and_no_weights_are_held(built, monkeypatch):
    calls, tokenize = [], Prompts.tokenize
    monkeypatch.setattr(Prompts, "tokenize", lambda *given: calls.append(given) or tokenize(*given))
    batch = built().encoders.tokenized({"caption": ["xy", "z", "xy"], "index": np.arange(3)})
    assert [texts for _, texts in calls] == [["xy"], ["z"]]
    assert {*batch} == {"tokens", "index"}
    assert not any(isinstance(x, jax.Array) for x in jax.tree.leaves(calls[0][0].nets))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_text_is_that_of_the_prompts_of_every_family(settings, name):
    """SDXL's with sizes; teachers on pixels keep them."""
    teacher = Pipeline("not read")  # noqa: F811
    vars(teacher).update(autoencoder=Autoencoder(), prompts=recorded_prompts(name))
    encode = encoders.make(config.resolve(settings()), teacher)
    rows = encode.tokenized({"x0": np.ones((2, 16, 16, 3), np.float32), "caption": golden.PROMPTS[:2]})
    made = jax.jit(encode)(encoders.networks(teacher), rows)
    jax.tree.map(close, made["text"], teacher.prompts(golden.PROMPTS[:2], target_size=(16, 16)))
    jax.tree.map(close, made["null"], teacher.prompts.null(2, target_size=(16, 16)))
    np.testing.assert_array_equal(made["x0"], rows["x0"])


def test_the_vaes_reconstruction_is_a_row_that_is_not_ranked():
    rows = [Row(name, {"PSNR": (value, 0.1)}, 4) for name, value in ((RECONSTRUCTION, 40.0), ("bicubic", 20.0))]
    assert report.best(rows, "PSNR").name == "bicubic"
    student = Row("student, 4 steps", {"PSNR": (25.0, 0.1)}, 4, nfe=4)
    assert "VAE" not in " ".join(report.headline([*rows, student]))


def test_only_images_and_captions_are_replaced():
    """Pairs are of latents already."""
    batch = {name: np.zeros(1) for name in ("x0", "tokens", "pairs", "others", "index")}
    joined = encoders.joined(batch, {"x0": np.ones(1)})
    assert {name: float(x[0]) for name, x in joined.items()} == {"x0": 1, "pairs": 0, "others": 0, "index": 0}
    assert {*encoders.inputs(batch)} == {"x0", "tokens", "index"}


@pytest.mark.slow
def test_pairs_are_made_of_captions_and_go_with_images(settings, built, teacher, tmp_path):  # noqa: F811
    c = settings(teacher_steps=(1,), num_pairs=4, pairs_shard=4, data__task="none")
    commands.make_pairs(c, tmp_path)
    row, prompts = OdePairs(tmp_path).item(3), load_prompts(teacher)
    captions = data.examples(config.resolve(c).data, "train")["caption"]
    near = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-3)  # they are float16
    jax.tree.map(near, row["text"], jax.tree.map(lambda x: x[0], prompts(captions[3:4])))
    jax.tree.map(near, row["null"], jax.tree.map(lambda x: x[0], prompts.null(1)))
    (batch,), _ = batches(built(data__pairs=str(tmp_path)), 1)
    assert batch["pairs"]["x0"].shape == batch["x0"].shape
    assert jax.tree.map(np.shape, batch["pairs"]["text"]) == jax.tree.map(np.shape, batch["text"])


# ---- bad input


def test_the_vaes_factor_must_divide_the_size(settings, tmp_path):
    said = "data.size=15 is not divisible by 2, the factor by which the VAE of .*pipeline0 reduces images: set it to 14"
    for mode in (train.train, commands.encode_data):
        with pytest.raises(ValueError, match=said):
            mode(settings(data__size=15, data__scale=3), tmp_path / "out")


def test_captions_need_a_text_encoder(settings, teacher, tmp_path):  # noqa: F811
    bare = shutil.copytree(teacher, tmp_path / "bare")
    shutil.rmtree(bare / "text_encoder")
    (bare / "model_index.json").unlink()
    with pytest.raises(
        ValueError, match=r"bare generates from text, .* a folder that also has text_encoder/ and tokenizer/"
    ):
        train.train(settings(teacher=str(bare)), tmp_path / "run")


def test_what_is_encoded_needs_no_encoders(settings):
    experiment = config.resolve(settings())
    assert "encode_sample" not in config.mutable_on_resume(experiment)
    arrays = dataclasses.replace(experiment.data, source=loader.SOURCES["arrays"]())
    assert "encode_sample" in config.mutable_on_resume(experiment._replace(data=arrays))


@pytest.mark.parametrize("method", ["dmd2", "pretrained"])
def test_every_method_takes_images(settings, method):
    """Also those without a condition, and networks that are only evaluated."""
    parts = build.build(config.resolve(settings(method=method, data__task="none", sample_steps=(1,))))
    assert parts.batch["x0"].shape == (8, 8, 8, 4)
    assert parts.batch["text"]["encoder_hidden_states"].shape == (8, 16, 8)
