"""The Python interface: load a folder, sample, and errors in one sentence."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import cddistill
from cddistill import api, checkpoint, commands, config, generate, models, train
from cddistill.data import TASKS
from cddistill.data.tasks.sr import upsample
from cddistill.models.schedulers import write_scheduler

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def model(teacher):
    return cddistill.load(teacher)


def test_importing_the_package_does_not_import_jax():
    """The command line parses its flags before JAX is imported."""
    script = "import sys, cddistill; print(cddistill.__version__, 'jax' in sys.modules, dir(cddistill)[0])"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.split() == [cddistill.__version__, "False", "METHODS"]


def test_samples_are_reproducible_and_follow_the_folders_scheduler(model, teacher):
    images = cddistill.sample(model, label=[0, 3], steps=2, seed=1)
    assert (images.shape, images.dtype) == ((2, 8, 8, 3), np.float32)
    assert images.min() >= 0
    assert images.max() <= 1
    np.testing.assert_array_equal(images, cddistill.sample(model, label=(0, 3), steps=2, seed=1))
    assert np.abs(images - cddistill.sample(model, label=[0, 3], steps=2, seed=2)).max() > 1e-3
    assert np.abs(images - cddistill.sample(model, label=[0, 3], steps=2, seed=1, guidance=3.0)).max() > 1e-3
    np.testing.assert_allclose(cddistill.sample(model, n=2, steps=2)[0], cddistill.sample(model, steps=2)[0], atol=1e-5)
    net = models.load(teacher)
    noise = generate.noises(1, np.arange(2), (8, 8, 3), 1)[:, 0]
    t = net.schedule.grid(1)
    expected = jax.jit(lambda net, z: net(z, t, {"class_labels": np.array([0, 3])}).x0)(net, noise) * 0.5 + 0.5
    once = cddistill.sample(model, label=[0, 3], steps=1, seed=1)
    np.testing.assert_allclose(once, np.clip(expected, 0, 1), atol=1e-5)


def test_a_model_prints_on_one_line(model):
    assert repr(model).endswith("Pretrained, 8x8x3, 50 steps)")
    assert "\n" not in repr(model)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "a cat"}, "has no text encoder, so it takes no prompt"),
        ({"label": 10}, "labels of .* are 0 to 8, not"),
        ({"label": [1, 2], "n": 3}, "label has 2 entries for 3 images: give one, or as many"),
    ],
)
def test_unsupported_inputs_are_refused(model, given, said):
    with pytest.raises(ValueError, match=said):
        cddistill.sample(model, steps=1, **given)


def test_loading_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is neither a folder nor an embedded model"):
        cddistill.load("nothing")
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        cddistill.load(tmp_path)
    with pytest.raises(AttributeError, match="has no attribute 'train_all'"):
        _ = cddistill.train_all
    with pytest.raises(ValueError, match="teacher= is for the workdir of a run, and .* has no checkpoints/"):
        cddistill.load("emoji", teacher="emoji")


# ---- --mode=sample


def pretrained(teacher, **changes):
    """Settings for the two-step samples of a folder."""
    c = config.defaults("pretrained")
    c.update(teacher=str(teacher), sample_steps=(2,), seed=3)
    c.method.scheduler = str(teacher)
    c.update(changes)
    return c


def pixels(images):
    """Images as they are stored."""
    return np.rint(images * 255).astype(np.uint8)


def test_labels_are_sampled_several_times_each_in_a_row(teacher, model, tmp_path, capsys):
    api.sample_run(pretrained(teacher), tmp_path / "run", str(tmp_path / "out.png"), labels=(0, 3), n=3)
    assert f"6 generated in 2 steps (2 network evaluations each): {tmp_path}/out.png" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "out.png"))
    assert sheet.shape == (2 * 12 + 4, 3 * 12 + 4, 3)
    expected = pixels(cddistill.sample(model, label=[0, 0, 0, 3, 3, 3], steps=2, seed=3))
    for i, image in enumerate(expected):
        y, x = 4 + 12 * (i // 3), 4 + 12 * (i % 3)
        np.testing.assert_array_equal(sheet[y : y + 8, x : x + 8], image)


def test_one_label_is_one_image(teacher, model, tmp_path):
    api.sample_run(pretrained(teacher), tmp_path / "run", str(tmp_path / "out.png"), labels=(2,))
    expected = pixels(cddistill.sample(model, label=2, steps=2, seed=3))[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"labels": (10,)}, "labels of .* are 0 to 8, not"),
        ({"labels": (1, 2), "prompts": ["a", "b", "c"]}, "label has 2 entries for 3 images"),
        ({"prompts": ["a"]}, "has no text encoder, so it takes no prompt"),
        ({"labels": (1,), "negative_prompt": "b"}, "a negative prompt has no effect at guidance scale 1"),
        ({"labels": (1,), "n": 0}, "--n must be at least 1, not 0"),
        ({"labels": (1,), "source": "nothing.png"}, "--input=nothing.png does not exist"),
        ({"source": "nothing.png"}, "--input=nothing.png does not exist"),
    ],
)
def test_options_that_do_not_fit_are_refused(teacher, tmp_path, given, said):
    with pytest.raises(ValueError, match=said):
        api.sample_run(pretrained(teacher), tmp_path / "run", str(tmp_path / "out.png"), **given)
    assert not (tmp_path / "out.png").exists()


def test_a_picture_for_a_model_that_takes_none_is_refused(teacher, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "in.png")
    with pytest.raises(ValueError, match="takes no image: leave it out"):
        api.sample_run(pretrained(teacher), tmp_path, str(tmp_path / "out.png"), source=str(tmp_path / "in.png"))


@pytest.fixture(scope="module")
def controlnet(teacher, tmp_path_factory):
    """The folder of a ControlNet for the teacher, whose effect is not zero."""
    branch = models.make_branch(models.load(teacher), jax.random.key(0))
    params = jax.tree.map(lambda x: np.asarray(x) + 0.1, branch.params)
    return models.save(tmp_path_factory.mktemp("branch"), "controlnet", params, branch.apply.module.to_config())


def test_a_controlnet_asks_for_an_input_and_uses_it(teacher, controlnet, tmp_path):
    settings = pretrained(teacher, controlnet=str(controlnet))
    sample = lambda name, **given: api.sample_run(settings, tmp_path / "run", str(tmp_path / name), **given)
    for given in ({"labels": (1,)}, {"labels": (1,), "n": 2}, {"prompts": ["a"]}):
        with pytest.raises(ValueError, match="generates from an image: pass --input"):
            sample("none.png", **given)
    (tmp_path / "in").mkdir()
    for name, colour in {"a.png": "white", "b.jpg": "black"}.items():
        Image.new("RGB", (20, 16), colour).save(tmp_path / "in" / name)
    sample("out", source=str(tmp_path / "in"), labels=(1,))
    drawn = {p.name: np.asarray(Image.open(p)) for p in (tmp_path / "out").iterdir()}
    assert {name: x.shape for name, x in drawn.items()} == dict.fromkeys(("a.png", "b.png"), (8, 8, 3))
    assert (drawn["a.png"] != drawn["b.png"]).any()
    sample("row.png", source=str(tmp_path / "in" / "a.png"), n=2)  # without a label, of two noises
    assert Image.open(tmp_path / "row.png").size == (2 * 12 + 4, 12 + 4)


def test_inputs_of_what_is_not_trained_are_those_of_the_task(teacher, controlnet, tmp_path):
    """An edit's picture has its own latents, and edges are taken of a photograph: also beside a prompt or a label."""
    settings, picture = pretrained(teacher, controlnet=str(controlnet)), Image.new("RGB", (8, 8))
    picture.paste((220, 200, 90), (3, 2, 8, 6))
    settings.data.task = "canny"
    model = api.open_model(settings, tmp_path / "run", "latest")
    np.testing.assert_array_equal(api.condition(model, picture), TASKS["canny"]().read(picture, 8))
    settings.data.task = "edit"
    picture.save(tmp_path / "in.png")
    with pytest.raises(ValueError, match="the instruction is empty"):
        api.sample_run(settings, tmp_path, str(tmp_path / "out.png"), prompts=[" "], source=str(tmp_path / "in.png"))
    settings.data.task = "none"
    assert api.open_model(settings, tmp_path / "run", "latest").task is None
    settings.update(controlnet="")
    settings.data.task = "canny"
    assert api.open_model(settings, tmp_path / "run", "latest").task is None


def test_a_folder_is_loaded_for_a_task(teacher, tmp_path):
    """Its network tells that it takes an image, not what is made of one: here edges, which a photograph is not."""
    net = models.init(tiny.UNET | {"in_channels": 6, "sample_size": 8}, 0, tiny.teacher().schedule, "v", False)
    models.save(tmp_path, "unet", net.params, net.module.to_config())
    write_scheduler(tmp_path, net.schedule, net.predicts)
    picture = Image.new("RGB", (8, 8))
    picture.paste((220, 200, 90), (3, 2, 8, 6))
    made = lambda **task: api.condition(cddistill.load(tmp_path, **task), picture)
    np.testing.assert_array_equal(made(task="canny"), TASKS["canny"]().read(picture, 8))
    np.testing.assert_array_equal(made(), np.float32(picture) / 255)
    with pytest.raises(ValueError, match="task='edit', and the network of .* takes no image: leave it out"):
        cddistill.load(teacher, task="edit")
    with pytest.raises(ValueError, match="task='none' must be one of .*edit"):
        cddistill.load(teacher, task="none")


# ---- a run that was moved


def settings_in(root, **changes):
    """Settings for CoDi super-resolution of the pictures in a folder, with the teacher beside them."""
    c = config.defaults("codi")
    c.update(teacher=str(root / "teacher"), steps=2, batch_size=8, checkpoint_every=2, eval_every=10, report=False)
    c.update(sample_steps=(1,))
    c.data.update(source="folder", path=str(root / "data"), task="sr", size=8, scale=2)
    c.update(changes)
    return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a teacher, pictures and the run of two steps that was trained with them."""
    root, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    tiny.save_teacher(root / "teacher")
    for split, count in {"train": 3, "validation": 2, "test": 2}.items():
        (root / "data" / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / "data" / split / f"{i}.png")
    train.train(settings_in(root), root / "run")
    Image.new("RGB", (9, 9), (200, 30, 30)).save(root / "in.png")
    return root


@pytest.fixture
def moved(trained, tmp_path):
    """A copy of that folder elsewhere, whose config.json names places that are no more."""
    root = shutil.copytree(trained, tmp_path / "new")
    for file in ("config.json", "inputs.json"):
        text = (root / "run" / file).read_text()
        assert str(trained) in text
        (root / "run" / file).write_text(text.replace(str(trained), str(tmp_path / "old")))
    return root


def sampled(model):
    return cddistill.sample(model, image=Image.new("RGB", (8, 8), (20, 200, 90)), seed=1)


@pytest.mark.slow
def test_a_moved_run_is_loaded_without_its_data_and_with_its_teachers_new_place(trained, moved):
    expected = sampled(cddistill.load(trained / "run"))
    shutil.rmtree(moved / "data")
    with pytest.raises(ValueError, match=r"old/teacher' is neither .*; if the teacher of .* was moved, pass teacher="):
        cddistill.load(moved / "run")
    np.testing.assert_array_equal(sampled(cddistill.load(moved / "run", teacher=moved / "teacher")), expected)
    (moved.parent / "old").symlink_to(moved)  # the teacher is where it was
    np.testing.assert_array_equal(sampled(cddistill.load(moved / "run")), expected)


def test_a_relative_path_is_the_absolute_one_and_found_from_another_working_folder(trained, tmp_path, monkeypatch):
    root = shutil.copytree(trained, tmp_path / "here")
    for file, there in {"config.json": "", "inputs.json": f"{root}/"}.items():
        text = (root / "run" / file).read_text()
        (root / "run" / file).write_text(text.replace(f"{trained}/", there))
    monkeypatch.chdir(root)
    assert json.loads((root / "run" / "config.json").read_text())["teacher"] == "teacher"
    checkpoint.check_config(root / "run", config.plain(settings_in(root)))
    monkeypatch.chdir("/")
    assert sampled(cddistill.load(root / "run")).shape == (1, 8, 8, 3)


def test_a_home_folder_is_understood(trained, monkeypatch):
    monkeypatch.setenv("HOME", str(trained))
    assert cddistill.load("~/run", teacher="~/teacher").name == str(trained / "run")
    assert cddistill.load("~/teacher").name == str(trained / "teacher")
    image = cddistill.sample(cddistill.load("~/run"), image="~/in.png")
    np.testing.assert_array_equal(image, cddistill.sample(cddistill.load("~/run"), image=str(trained / "in.png")))
    with pytest.raises(ValueError, match=r"the image .*/gone\.png does not exist"):
        cddistill.sample(cddistill.load("~/run"), image="~/gone.png")


@pytest.mark.slow
def test_a_moved_run_is_evaluated_sampled_exported_and_trained_on(moved, capsys):
    settings = settings_in(moved)
    commands.evaluate_run(settings, moved / "run")
    assert (moved / "run" / "report.html").is_file()
    commands.sample(settings, moved / "run", str(moved / "in.png"), str(moved / "out.png"))
    without = settings_in(moved)
    without.data.path = str(moved / "gone")
    commands.sample(without, moved / "run", str(moved / "in.png"), str(moved / "again.png"), n=2)
    assert Image.open(moved / "again.png").size == (2 * 12 + 4, 12 + 4)
    first = np.asarray(Image.open(moved / "again.png"))[4:12, 4:12]
    np.testing.assert_array_equal(first, np.asarray(Image.open(moved / "out.png")))
    commands.export_run(without, moved / "run", str(moved / "student"))
    assert "read back" in capsys.readouterr().out
    train.train(settings_in(moved, steps=3), moved / "run")
    assert f"step 3 of 3; in {moved / 'run'}: checkpoints, metrics.jsonl" in capsys.readouterr().out
    assert json.loads((moved / "run" / "config.json").read_text())["teacher"] == str(moved / "teacher")
    with pytest.raises(ValueError, match="gone' does not exist; set it to a folder of images"):
        commands.evaluate_run(without, moved / "run")


# ---- tiles


@pytest.fixture
def copies(monkeypatch):
    """Images are the conditions, as if from a student that copies them. Returns the batches that were sampled."""
    batches = []

    def sample(student, batch, steps, seed=0, task=None):
        batches.append(batch)
        return batch["cond"]

    monkeypatch.setattr(generate, "sample", sample)
    return batches


def test_inputs_keep_their_own_size_in_tiles(trained, tmp_path, copies, capsys):
    """A copy of the condition is the bicubic image, without seams."""
    (tmp_path / "in").mkdir()
    small = {name: tiny.randn(0, *size, 3) for name, size in {"a.png": (6, 11), "b.png": (4, 4)}.items()}
    small = {name: pixels(np.clip(x + 0.5, 0, 1)) for name, x in small.items()}
    for name, x in small.items():
        Image.fromarray(x).save(tmp_path / "in" / name)
    large = {name: pixels(upsample(x, [2 * side for side in x.shape[:2]])) for name, x in small.items()}
    drawn = lambda name: np.asarray(Image.open(tmp_path / "out" / name)).astype(int)
    for given in ({}, {"labels": (3,)}):
        where = trained / "run", str(tmp_path / "out")
        api.sample_run(settings_in(trained), *where, source=str(tmp_path / "in"), tiles=True, **given)
        said = capsys.readouterr().out
        assert "inputs keep their own size: they are generated in overlapping tiles of 8 x 8 px" in said
        assert "2 generated in 1 steps" in said
        for name, image in large.items():
            assert np.abs(drawn(name) - image).max() <= 1  # rounding of sums of tiles
    assert [batch["cond"].shape for batch in copies] == [(9, 8, 8, 3)] * 2
    images = cddistill.sample(cddistill.load(trained / "run"), image=[small["a.png"]] * 2, label=[1, 3], tiles=True)
    np.testing.assert_allclose(images, np.stack([large["a.png"]] * 2) / 255, atol=1 / 255)
    assert copies[-1]["text"]["class_labels"].tolist() == 8 * [1] + 8 * [3]
    assert copies[-1]["index"].tolist() == list(range(16))  # noise of its own for each tile


def test_tiles_that_do_not_fit_are_refused(trained, tmp_path, copies):
    model, images = cddistill.load(trained / "run"), [np.zeros((5, 8, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]
    with pytest.raises(ValueError, match="images of different sizes make no array"):
        cddistill.sample(model, image=images, tiles=True)
    with pytest.raises(ValueError, match="tiles=True is for image=: leave it out"):
        cddistill.sample(model, tiles=True)
    with pytest.raises(ValueError, match="--tiles is for --input"):
        api.sample_run(settings_in(trained), trained / "run", str(tmp_path / "out.png"), tiles=True)


# ---- another content


def other_teacher(root):
    shutil.rmtree(root / "teacher")
    tiny.save_teacher(root / "teacher", seed=1)


def other_pictures(root):
    Image.new("RGB", (8, 8)).save(root / "data" / "train" / "0.png")


def fewer_pictures(root):
    (root / "data" / "train" / "1.png").unlink()


@pytest.mark.parametrize(
    ("change", "key"), [(other_teacher, "teacher"), (other_pictures, "data.path"), (fewer_pictures, "data.path")]
)
def test_a_path_with_another_content_does_not_resume_a_run(moved, change, key):
    change(moved)
    said = f"holds another run .{key}: .*/old/.* in the workdir, .*/new/.* now., and what lies there differs"
    with pytest.raises(ValueError, match=said):
        train.train(settings_in(moved, steps=3), moved / "run")


def test_another_teacher_is_refused_by_every_mode_and_other_data_by_training_alone(moved):
    other_pictures(moved)
    commands.finished(settings_in(moved), moved / "run")
    other_teacher(moved)
    for run in (
        lambda: commands.evaluate_run(settings_in(moved), moved / "run"),
        lambda: commands.sample(settings_in(moved), moved / "run", str(moved / "in.png"), str(moved / "out.png")),
        lambda: cddistill.load(moved / "run", teacher=moved / "teacher"),
    ):
        with pytest.raises(ValueError, match="holds another run .teacher: .*what lies there differs"):
            run()


def test_a_run_without_a_checkpoint_may_be_started_with_another_config(trained, tmp_path, monkeypatch):
    """What failed in its first steps, for lack of memory say."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(trained / "run" / "config.json", tmp_path)
    monkeypatch.setattr(train, "build", lambda experiment, *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(settings_in(trained, batch_size=16), tmp_path)
    (tmp_path / "checkpoints" / "1").mkdir()
    with pytest.raises(ValueError, match="holds another run .batch_size: 8 in the workdir, 16 now"):
        train.train(settings_in(trained, batch_size=16), tmp_path)


def test_a_run_that_recorded_no_inputs_resumes_with_its_own_paths_only(moved):
    (moved / "run" / "inputs.json").unlink()
    with pytest.raises(ValueError, match="holds another run .data.path: .*; teacher: "):
        train.train(settings_in(moved, steps=3), moved / "run")
    commands.sample(settings_in(moved), moved / "run", str(moved / "in.png"), str(moved / "out.png"))
