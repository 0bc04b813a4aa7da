"""A published evaluation from one command to its numbers, on a tiny protocol: streamed, interrupted, resumed."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hosts import together
from PIL import Image

from cddistill import build, commands, config, generate
from cddistill.data import examples as load_examples
from cddistill.evals import fidelity, frechet, inception, inputs, looks, published, scores, stream
from cddistill.evals.protocols import PROTOCOLS, Protocol
from cddistill.models import tokenizer
from cddistill.net import Net
from cddistill.perceptual.lpips import WeightsMissing

pytestmark = pytest.mark.usefixtures("two_devices")
N = 10
WIDTH = 5  # of the features of the network that stands for Inception-v3


def view(image):
    """An image of 8 px as it is."""
    return image.astype(np.float32)


def shrunk(path):
    """A network of a few random weights, which are in the file."""
    if not path.is_file():
        raise WeightsMissing(f"{path} is not there")
    weights = jnp.asarray(safetensors.numpy.load_file(path)["weights"])
    return Net(weights, lambda w, x: jnp.tanh(jnp.reshape(x, (len(x), -1)) @ w / 2000))


def register(patch):
    """Add a protocol of ten images of 8 px, with files of four rows."""
    seen = {"FID": view, "Patch FID": lambda x: view(x)[::-1]}
    tiny = Protocol("This test", N, "labels", seen, references=6, size=8)
    patch.setitem(PROTOCOLS, "tiny", tiny)
    patch.setattr(inception, "load", shrunk)
    patch.setattr(stream, "SHARD", 4)
    return tiny


@pytest.fixture(scope="module", autouse=True)
def protocol():
    """The tiny protocol."""
    with pytest.MonkeyPatch.context() as patch:
        yield register(patch)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The protocol's folder: weights, and six pictures."""
    folder, rng = tmp_path_factory.mktemp("protocol"), np.random.default_rng(0)
    weights = rng.standard_normal((8 * 8 * 3, WIDTH)).astype(np.float32)
    safetensors.numpy.save_file({"weights": weights}, folder / inception.FILE)
    (folder / "reference" / "more").mkdir(parents=True)
    for i in range(6):
        picture = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        picture.save(folder / "reference" / ("more" if i % 2 else "") / f"{i}.png")
    return folder


def settings_of(teacher, data, **changes):
    """Those of a teacher that is sampled in one step."""
    c = config.defaults("pretrained")
    c.update(teacher=str(teacher), batch_size=8, sample_steps=(1,), protocol="tiny", protocol_data=str(data))
    c.update(protocol_batch=3)  # of two devices: four at a time
    c.data.update(size=8)
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def settings(teacher, data):
    """settings(**changes)."""
    return functools.partial(settings_of, teacher, data)


@pytest.fixture(scope="module")
def evaluate(settings, tmp_path_factory):
    """evaluate(workdir, **changes) as the command does, of a run that is built once."""
    parts, state = commands.finished(settings(), tmp_path_factory.mktemp("run"), split=None)

    def changed(workdir, **changes):
        run = dataclasses.replace(parts.experiment.run, **changes)
        published.of_run(run)
        return published.evaluate(parts._replace(experiment=parts.experiment._replace(run=run)), state, workdir)

    changed.parts = parts
    return changed


def metrics(workdir) -> dict:
    """The numbers that a run wrote."""
    (row,) = json.loads((workdir / "protocols/tiny/step-0/scores.json").read_text())["rows"]
    return row["metrics"]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The workdir of an evaluation without interruption, which also wrote its images."""
    workdir = tmp_path_factory.mktemp("whole")
    commands.evaluate_run(settings(protocol_png=True), workdir)
    return workdir


def test_numbers_are_those_of_all_images_at_once(whole, data):
    pngs = sorted((whole / "protocols/tiny/step-0").glob("*/png/*.png"))
    assert [p.name for p in pngs] == [f"{i:08}.png" for i in range(N)]
    reference = sorted((data / "reference").rglob("*.png"))
    net = shrunk(data / inception.FILE)
    sets = [np.array(net(np.stack([view(np.asarray(Image.open(p))) for p in paths]))) for paths in (pngs, reference)]
    fid = frechet.distance(*(frechet.gaussian(frechet.moments(x)) for x in sets))
    found = metrics(whole)
    np.testing.assert_allclose(found["FID"][0], fid, rtol=1e-5)
    assert {*found} == {"FID", "Patch FID", "Precision", "Recall"}
    assert abs(found["FID"][0] - found["Patch FID"][0]) > 1e-6


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_numbers(whole, evaluate, tmp_path, monkeypatch):
    rows, sampled = published.own_rows, []

    def stop_at_the_third(x):
        if len(sampled) == 2:
            raise KeyboardInterrupt
        sampled.append(len(x))
        return rows(x)

    monkeypatch.setattr(published, "own_rows", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path)
    sampled.clear()
    monkeypatch.setattr(published, "own_rows", lambda x: sampled.append(len(x)) or rows(x))
    evaluate(tmp_path)
    assert len(sampled) == 1  # of three files
    assert metrics(tmp_path) == metrics(whole)
    evaluate(tmp_path)
    assert len(sampled) == 1
    (file,) = tmp_path.glob("protocols/tiny/step-0/*/00000004.safetensors")
    file.write_bytes(file.read_bytes()[:-9])  # as a full disk leaves it
    evaluate(tmp_path)
    assert len(sampled) == 2
    assert metrics(tmp_path) == metrics(whole)


def test_numbers_depend_neither_on_files_nor_on_batches(whole, evaluate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stream, "SHARD", 512)
    evaluate(tmp_path, protocol_batch=8)
    assert len([*tmp_path.glob("protocols/tiny/step-0/*/*.safetensors")]) == 1
    for column, (value, _) in metrics(whole).items():
        np.testing.assert_allclose(metrics(tmp_path)[column][0], value, rtol=1e-5)
    printed = capsys.readouterr().out
    label = "student, 1 step (tiny protocol, N = 10: not comparable (pt_inception-2015-12-05-6726825d.pth is not the "
    assert label in printed


def test_fewer_images_are_named_and_continued_by_more(whole, evaluate, tmp_path, capsys):
    evaluate(tmp_path, protocol_images=6)
    assert "(tiny protocol, N = 6 of 10: not comparable" in capsys.readouterr().out
    evaluate(tmp_path)
    assert metrics(tmp_path) == metrics(whole)


def test_files_of_other_weights_are_refused(whole, evaluate, data, tmp_path):
    other = tmp_path / "data"
    shutil.copytree(data, other)
    safetensors.numpy.save_file({"weights": np.zeros((192, WIDTH), np.float32)}, other / inception.FILE)
    with pytest.raises(ValueError, match=r"reference is of something else \(inception: \w+ there, \w+ now.*delete the"):
        evaluate(whole, protocol_data=str(other))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"protocol": "imagenet_50k"}, "unknown protocol 'imagenet_50k': did you mean 'imagenet64_50k'"),
        ({"protocol_data": ""}, "config.protocol_data='' is no folder: name that of the protocol's files"),
        ({"protocol": "imagenet64_50k"}, r"imagenet-64x64.npz is not there: download the reference statistics"),
        ({"protocol": "coco2014_30k"}, r"prompts.txt is not there: write a text file with a prompt in each line to it"),
        ({"protocol": "real_sr_3k"}, "this protocol restores degraded images: set data.task"),
    ],
)
def test_what_is_missing_is_said_before_the_first_image(evaluate, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        evaluate(tmp_path, **changes)
    assert not [*tmp_path.rglob("*.safetensors")]


def test_labels_follow_in_turn(evaluate, protocol, tmp_path):
    rows = inputs.labels(evaluate.parts, protocol, tmp_path, N)(np.arange(8, 12))
    assert rows.batch["text"]["class_labels"].tolist() == [8, 0, 1, 2]  # emoji has nine
    assert rows.batch["null"]["class_labels"].tolist() == [9] * 4
    assert rows.batch["index"].tolist() == [8, 9, 10, 11]


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(whole, data, teacher, tmp_path):
    """Each samples and measures its half of every batch, and reads its half of the files."""
    together(pathlib.Path(__file__).with_name("two_hosts_protocol.py"), tmp_path, data, teacher, hosts=2, devices=2)
    for column, (value, _) in metrics(whole).items():
        np.testing.assert_allclose(metrics(tmp_path)[column][0], value, rtol=1e-5)


@pytest.fixture(scope="module")
def latent(data, tmp_path_factory):
    """latent(workdir, protocol, **changes): numbers of an untrained student with a VAE and a text encoder."""
    import test_latent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load", lambda path: test_latent.Letters())
        teacher = test_latent.teacher.__wrapped__(tmp_path_factory)
        c = test_latent.pictures(teacher, tmp_path_factory.mktemp("pictures") / "x")
        c.update(protocol_data=str(data), protocol="latent", protocol_batch=2)
        parts = build.build(config.resolve(c))

        def evaluate(workdir, protocol):
            patch.setitem(PROTOCOLS, "latent", protocol)
            published.evaluate(parts, parts.init(), workdir)
            (row,) = json.loads((workdir / "protocols/latent/step-0/scores.json").read_text())["rows"]
            return row["metrics"]

        evaluate.parts = parts
        yield evaluate


@pytest.mark.slow
def test_pairs_are_compared_with_their_targets(latent, tmp_path):
    """Of one reference without files of its own: the test split."""
    half = {"FID": lambda image: view(image)[::2, ::2]}
    found = latent(tmp_path, Protocol("This test", 4, "pairs", half, pairs=("PSNR", "SSIM")))
    assert {*found} == {"FID", "Precision", "Recall", "PSNR", "SSIM"}
    parts = latent.parts
    examples = load_examples(parts.experiment.data, "test")
    batch = generate.batch_of(parts, examples)
    student = generate.student_of(parts, parts.init())
    images = generate.sample(student, batch, 2, parts.experiment.run.seed, task=parts.experiment.data.task)
    stored = np.float32(np.rint(images * 255) / 255)
    psnr = np.asarray(fidelity.psnr(stored, generate.targets(parts, examples)))
    np.testing.assert_allclose(found["PSNR"], scores.mean_and_error(psnr.astype(np.float64)), rtol=1e-3)


@pytest.mark.slow
def test_prompts_are_embedded_and_scored(latent, data, tmp_path, monkeypatch):
    """Row i is of line i; without CLIP's weights the table says what is missing."""
    (data / "prompts.txt").write_text("ab c\nb\na cat\n")
    parts = latent.parts
    make = inputs.prompts(parts, PROTOCOLS["tiny"], data, 3)
    rows = make(np.array([1, 2]))
    assert rows.texts == ["b", "a cat"]
    prompts = parts.pipeline.prompts
    embedded = prompts(["b", "a cat"])["encoder_hidden_states"]
    np.testing.assert_allclose(rows.batch["text"]["encoder_hidden_states"], embedded, atol=1e-5)
    np.testing.assert_allclose(
        rows.batch["null"]["encoder_hidden_states"], prompts.null(2)["encoder_hidden_states"], atol=1e-5
    )
    with pytest.raises(
        ValueError, match="prompts.txt has 3 prompts, and 4 are asked for: add some, or set protocol_im"
    ):
        inputs.prompts(parts, PROTOCOLS["tiny"], data, 4)
    protocol = Protocol("This test", 3, "prompts", {"FID": view}, references=6, clip="a ")
    columns, missing = looks.columns(protocol, data, looks.Inception(data))
    assert [*columns] == ["FID"]
    assert missing[0].startswith(f"CLIP score: not computed ({data}/clip/ is not there: download a CLIPModel")
    seen = []
    monkeypatch.setattr(looks.clip_score, "load", lambda folder: None)
    monkeypatch.setattr(looks.clip_score, "score", lambda model, texts, images: seen.append(texts))
    looks.columns(protocol, data, looks.Inception(data))[0]["CLIP score"]([], rows)
    assert seen == [["a b", "a a cat"]]
