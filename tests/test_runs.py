"""Runs in Python: configs with changes, training, pairs and what is shown of them, as notebooks use them."""

import json

import numpy as np
import pytest
import tiny
from PIL import Image

import cddistill
from cddistill import models

pytestmark = pytest.mark.usefixtures("one_device")


def tiny_run(root, **changes):
    """Super-resolution for a tiny teacher and pictures in a folder: a program that test_api.py compiles, too."""
    here = {"source": "folder", "path": str(root / "data"), "task": "sr", "size": 8, "scale": 2}
    small = {
        "steps": 2,
        "batch_size": 8,
        "checkpoint_every": 2,
        "eval_every": 10,
        "sample_steps": (1,),
        "report": False,
    }
    return cddistill.configure(root / "codi.py", teacher=str(root / "teacher"), data=here, **(small | changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a teacher and pictures."""
    root, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    tiny.save_teacher(root / "teacher")
    (root / "codi.py").write_text("from cddistill.config import defaults\nget_config = lambda: defaults('codi')\n")
    for split, count in {"train": 3, "validation": 2, "test": 2}.items():
        (root / "data" / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / "data" / split / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def fitted(root):
    """(its config, workdir, what `fit` returned)."""
    settings = tiny_run(root, log_every=1)
    return settings, root / "run", cddistill.fit(settings, root / "run")


def test_a_config_is_found_by_name_and_file_and_takes_changes(tmp_path):
    settings = cddistill.configure("dmd2_emoji:four", steps=7, method={"ratio": 2}, teacher_steps=(), report=False)
    assert (settings.steps, settings.method.ratio, settings.teacher_steps, settings.report) == (7, 2, (), False)
    assert settings.sample_steps == (1, 2, 4)
    assert cddistill.configure("cddistill:ccd_sr", optim={"lr": 1e-4}).optim.lr == 1e-4
    (tmp_path / "my.py").write_text("from cddistill.config import defaults\nget_config = lambda: defaults('codi')\n")
    assert cddistill.configure(tmp_path / "my.py", sample_steps=(3,)).sample_steps == (3,)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("ccd_sr", {"stepz": 3}, "unknown config key 'stepz': did you mean 'steps'"),
        ("ccd_sr", {"steps": "many"}, r"config\.steps must be a whole number, not 'many'"),
        ("ccd_sr", {"steps": 0}, "steps=0 must be at least 1"),
        ("ccd_sr", {"method": {"ratio": 3}}, "ratio is an option of dmd2"),
        ("ccd_sr", {"method": {"name": "dmd2"}}, "for dmd2 pass a config file of it, such as"),
        ("ccd_srr", {}, "does not exist; did you mean .*ccd_sr.py"),
        ("ccd_sr:huge", {}, "has no variant 'huge'"),
    ],
)
def test_a_wrong_name_or_change_is_refused(name, changes, said):
    with pytest.raises(ValueError, match=said):
        cddistill.configure(name, **changes)


def test_fitting_returns_the_model_that_loading_gives(fitted):
    _, workdir, student = fitted
    image = Image.new("RGB", (4, 4), "red")
    found = cddistill.sample(student, image=image, steps=1)
    assert found.shape == (1, 8, 8, 3)
    np.testing.assert_array_equal(found, cddistill.sample(cddistill.load(workdir), image=image, steps=1))


def test_fitting_again_loads_what_is_complete(fitted):
    settings, workdir, _ = fitted
    before = (workdir / "metrics.jsonl").read_bytes()
    assert isinstance(cddistill.fit(settings, workdir), type(fitted[2]))
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_records_scores_and_alarms_are_those_in_the_workdir(fitted, tmp_path):
    settings, workdir, _ = fitted
    assert [r["step"] for r in cddistill.records(workdir) if "student/loss" in r] == [1, 2]
    scores = cddistill.evaluate(settings, workdir)
    assert [*scores] == ["bicubic", "student, 1 step"]
    assert len(scores["student, 1 step"]["PSNR"]) == 2
    assert scores == cddistill.scores(workdir)
    assert cddistill.alarms(workdir) == []
    still = [{"step": i, "student/moved": 0.0} for i in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in still))
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    assert [(x.step, x.name) for x in cddistill.alarms(tmp_path)] == [(3, "student frozen")]
    assert (cddistill.records(tmp_path / "no"), cddistill.scores(tmp_path / "no")) == ([], {})


def test_examples_are_conditions_that_the_student_takes(fitted, root):
    settings, _, student = fitted
    found = cddistill.examples(settings, n=2)
    assert {k: np.shape(x) for k, x in found.items() if k != "caption"} == {
        "image": (2, 8, 8, 3), "condition": (2, 8, 8, 3), "label": (2,)
    }  # fmt: skip
    picture = np.asarray(Image.open(root / "data" / "test" / "1.png"))
    np.testing.assert_allclose(found["image"][1], picture / 255, atol=1e-6)
    both = cddistill.sample(student, image=found["condition"], steps=1)
    assert both.shape == (2, 8, 8, 3)
    small = Image.fromarray(picture).resize((4, 4), Image.Resampling.BICUBIC)
    alone = cddistill.sample(student, image=[found["condition"][0], small], steps=1)
    np.testing.assert_allclose(alone[0], both[0], atol=1e-5)
    np.testing.assert_allclose(alone[1], both[1], atol=0.1)  # Pillow rounds after each axis


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((8, 8, 4), np.float32), r"takes floats of shape \(8, 8, 3\), or uint8"),
        (np.full((8, 8, 3), 200.0), "floats outside of .0, 1.: divide 8-bit values by 255"),
        (np.full((8, 8, 3), np.nan), "floats outside of .0, 1."),
    ],
)
def test_conditions_of_another_kind_are_refused(fitted, image, said):
    with pytest.raises(ValueError, match=said):
        cddistill.sample(fitted[2], image=image, steps=1)


def test_saving_writes_a_diffusers_folder(fitted, tmp_path):
    cddistill.save(fitted[1], tmp_path / "student")
    assert models.load(tmp_path / "student").predicts == "v"
    with pytest.raises(ValueError, match=r"no holds no run: train it first, with cddistill\.fit"):
        cddistill.save(tmp_path / "no", tmp_path / "other")


def test_pairs_are_written_where_the_config_says(root, tmp_path):
    settings = cddistill.configure(
        "d2g_emoji",
        teacher=str(root / "teacher"),
        teacher_steps=(2,),
        num_pairs=4,
        pairs_batch=4,
        data={"pairs": str(tmp_path / "pairs")},
    )
    cddistill.make_pairs(settings)
    assert any((tmp_path / "pairs").iterdir())
    settings.data.pairs = ""
    with pytest.raises(ValueError, match=r"needs a folder: pass output="):
        cddistill.make_pairs(settings)


def test_a_grid_is_a_picture():
    images = np.zeros((3, 32, 32, 3))
    images[1] = 1
    picture = cddistill.grid(images, columns=3)
    assert picture.size == (3 * 100 + 4, 100 + 4)
    assert picture.getpixel((150, 50)) == (255, 255, 255)
    assert cddistill.grid(images, columns=1, scale=1).size == (36 + 4, 3 * 36 + 4)
    assert cddistill.grid({"a": images, "b": images}).height == 2 * 100 + 4
    with pytest.raises(ValueError, match="a grid takes images"):
        cddistill.grid(images[0])
