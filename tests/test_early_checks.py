"""What would fail late, or draw nonsense, is refused before the first step: splits, classes, token ids, the export."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from cddistill import build, checks, commands, config, models, train
from cddistill.diffusion import DDPM
from cddistill.models.schedulers import write_scheduler

pytestmark = pytest.mark.usefixtures("one_device")


def pictures(root, **splits):
    """A folder with so many pictures in each split."""
    for split, n in splits.items():
        (root / split).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (255, 20 * i, 0)).save(root / split / f"{i}.png")
    return root


def settings(teacher, path, **changes):
    c = config.defaults("diffusion")
    c.update(teacher=str(teacher), steps=4, batch_size=8, eval_every=2, eval_images=4, sample_steps=(2,))
    c.data.update(source="folder", path=str(path), size=8)
    c.update(changes)
    return c


# --- splits


@pytest.mark.parametrize(
    ("splits", "changes", "sentence"),
    [
        ({"train": 8, "validation": 4}, {}, r"test split of folder .* is empty.*report at the end.*report=False"),
        ({"train": 8, "test": 4}, {}, r"validation split of folder .* is empty.*previews.*eval_every=2"),
        ({"train": 8}, {"report": False}, r"validation split of folder .* is empty"),
        ({"train": 8}, {"eval_every": 5}, r"test split of folder .* is empty"),
    ],
)
def test_splits_are_needed_before_the_first_step(teacher, tmp_path, splits, changes, sentence):
    c = settings(teacher, pictures(tmp_path / "x", **splits), **changes)
    with pytest.raises(ValueError, match=sentence):
        train.train(c, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_splits_that_are_not_read_may_be_missing(teacher, tmp_path):
    c = settings(teacher, pictures(tmp_path / "x", train=8), eval_every=5, report=False)
    run = config.resolve(c)
    assert checks.training_splits(run.run) == {}
    build.build(run, {})


@pytest.mark.parametrize(
    ("mode", "missing"), [("evaluate", "test"), ("sample", "validation"), ("export", "validation")]
)
def test_other_modes_say_it_before_they_begin(teacher, tmp_path, mode, missing):
    c = config.defaults("pretrained")
    c.update(teacher=str(teacher), sample_steps=(2,), batch_size=8)
    folder = pictures(tmp_path / "x", **{split: 4 for split in ("train", "validation", "test") if split != missing})
    c.data.update(source="folder", path=str(folder), size=8)
    calls = {
        "evaluate": lambda: commands.evaluate_run(c, tmp_path / "run"),
        "sample": lambda: commands.sample(c, tmp_path / "run", None, str(tmp_path / "sheet.png")),
        "export": lambda: commands.export_run(c, tmp_path / "run", str(tmp_path / "out")),
    }
    with pytest.raises(ValueError, match=rf"{missing} split of folder .* is empty"):
        calls[mode]()


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("x0", (4, 16, 16, 3), r"x0 in the test split of arrays .* is \(16, 16, 3\), and \(8, 8, 3\) in the training"),
        ("x0", (0, 8, 8, 3), "the test split of arrays .* is empty"),
        (
            "text",
            (4, 5, 6),
            r"text.class_labels in the test split of arrays .* is None, and \(\) in the training split",
        ),
    ],
)
def test_splits_have_the_same_arrays(teacher, tmp_path, name, shape, sentence):
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        (tmp_path / "x" / split).mkdir(parents=True)
        np.save(tmp_path / "x" / split / "x0.npy", rng.normal(size=(4, 8, 8, 3)).astype("f4"))
    np.save(tmp_path / "x" / "test" / f"{name}.npy", rng.normal(size=shape).astype("f4"))
    np.save(tmp_path / "x" / "test" / "null.npy", np.zeros(shape[1:], "f4"))
    c = settings(teacher, tmp_path / "x")
    c.data.source = "arrays"
    with pytest.raises(ValueError, match=sentence):
        train.train(c, tmp_path / "run")


# --- classes


def labelled(root, largest):
    """A folder in which every picture has a label up to the largest."""
    pictures(root, train=8, validation=8, test=8)
    rows = [
        {"file_name": f"{s}/{i}.png", "label": largest - i} for s in ("train", "validation", "test") for i in range(8)
    ]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def sheet(c, tmp_path):
    commands.sample(c, tmp_path / "run", None, str(tmp_path / "sheet.png"))


@pytest.mark.parametrize("mode", ["train", "sample", "evaluate", "pairs"])
@pytest.mark.parametrize("num_classes", [10, *(pytest.param(n, marks=pytest.mark.slow) for n in (11, 30))])
def test_labels_lie_in_the_networks_table(teacher, tmp_path, mode, num_classes):
    """The tiny teacher's table has 10 rows, the last for the null label, which these pictures have."""
    c = settings(teacher, pictures(tmp_path / "x", train=8, validation=8, test=8))
    if mode in ("sample", "evaluate"):
        c.method = config.defaults("pretrained").method
    c.data.num_classes = num_classes
    c.teacher_steps = (2,)
    calls = {
        "train": lambda: train.train(c, tmp_path / "run"),
        "sample": lambda: sheet(c, tmp_path),
        "evaluate": lambda: commands.evaluate_run(c, tmp_path / "run"),
        "pairs": lambda: commands.make_pairs(c, tmp_path / "pairs"),
    }
    with pytest.raises(
        ValueError, match=rf"data.num_classes={num_classes} makes .* knows 0 to 9: set data.num_classes=9"
    ):
        calls[mode]()
    assert not (tmp_path / "sheet.png").exists()


def test_a_table_without_a_row_for_no_class_is_used_with_labels(teacher, tmp_path):
    """As long as guidance does not need the null label."""
    c = settings(teacher, labelled(tmp_path / "x", 9))
    c.data.num_classes = 10
    c.method = config.defaults("pretrained").method
    sheet(c, tmp_path)
    assert Image.open(tmp_path / "sheet.png").size[0] > 16
    c.update(teacher_steps=(2,), teacher_guidance=3.0)
    with pytest.raises(ValueError, match="data.num_classes=10 makes labels 0 to 9 and the null label 10"):
        sheet(c, tmp_path)


def test_labels_of_arrays_lie_in_the_networks_table(teacher, tmp_path):
    rng, c = np.random.default_rng(0), settings(teacher, tmp_path / "x", eval_every=9, report=False)
    (tmp_path / "x" / "train").mkdir(parents=True)
    np.save(tmp_path / "x" / "train" / "x0.npy", rng.normal(size=(100, 8, 8, 3)).astype("f4"))
    np.save(tmp_path / "x" / "train" / "class_labels.npy", np.arange(100) % 21)
    c.data.update(source="arrays", num_classes=20)
    with pytest.raises(ValueError, match="data.num_classes=20 makes labels 0 to 19 and the null label 20"):
        train.train(c, tmp_path / "run")
    c.data.num_classes = 9
    with pytest.raises(ValueError, match="class_labels.npy in .* must be in 0 .. 9"):
        train.train(c, tmp_path / "run")


def test_edm_takes_labels_below_its_own_number_only(tmp_path):
    """It would take any other label for none."""
    net = {"_class_name": "DhariwalUNet", "img_resolution": 8, "label_dim": 4, "model_channels": 8, "num_blocks": 1,
           "channel_mult": [1, 2], "attn_resolutions": [], "channels_per_head": 8}  # fmt: skip
    made = models.init(net, 0)
    models.save(tmp_path / "edm", "unet", made.params, made.module.to_config())
    c = settings(tmp_path / "edm", labelled(tmp_path / "x", 7), eval_every=9, report=False)
    c.data.num_classes = 8
    with pytest.raises(ValueError, match=r"data.num_classes=8 .*edm knows 0 to 4: set data.num_classes=4"):
        build.build(config.resolve(c))


def test_a_null_label_that_is_a_class_of_the_teacher_is_said(teacher, tmp_path, caplog):
    c = settings(teacher, labelled(tmp_path / "x", 7), eval_every=9, report=False)
    c.data.num_classes = 8
    build.build(config.resolve(c))
    assert "data.num_classes=8 makes 8 the null label, and that of" in caplog.text
    caplog.clear()
    c.data.num_classes = 9
    build.build(config.resolve(c))
    assert not caplog.text


def test_token_ids_lie_in_the_vocabulary(tmp_path):
    (tmp_path / "train").mkdir()
    np.save(tmp_path / "train" / "x0.npy", np.random.default_rng(0).normal(size=(4, 8, 8, 4)).astype("f4"))
    np.save(tmp_path / "train" / "input_ids.npy", np.tile(np.array([0, 3, 30]), (4, 1)))
    np.save(tmp_path / "train" / "null_input_ids.npy", np.zeros(3, int))
    c = settings("", tmp_path)
    c.data.source = "arrays"
    with pytest.raises(ValueError, match=r"token ids of arrays .* and the text encoder has a vocabulary of 30"):
        checks.check_ids(config.resolve(c).data, 30)


# --- the export


def broken_index(folder):
    (folder / "model_index.json").write_text("{")


def lost_shard(folder):
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}')
    (folder / "vae" / "diffusion_pytorch_model.safetensors").symlink_to(folder / "gone")


def lost_licence(folder):
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").symlink_to(folder / "gone")
    (folder / "model_index.json").write_text('{"_class_name": "X", "feature_extractor": ["a", "B"]}')


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (broken_index, "model_index.json is not valid JSON"),
        (lost_shard, "vae"),
        (lost_licence, "the student could not be exported: .*preprocessor_config.json cannot be read"),
    ],
)
def test_a_teacher_that_cannot_be_exported_is_refused_at_once(teacher, tmp_path, harm, sentence):
    harm(shutil.copytree(teacher, tmp_path / "teacher"))
    c = settings(tmp_path / "teacher", pictures(tmp_path / "x", train=8, validation=4, test=4))
    with pytest.raises(ValueError, match=sentence):
        train.train(c, tmp_path / "run")


def test_timesteps_that_no_scheduler_holds_are_refused_at_once(teacher, tmp_path):
    c = settings(teacher, pictures(tmp_path / "x", train=8), eval_every=9, report=False)
    c.method = config.defaults("dmd2").method
    c.optim = config.defaults("dmd2").optim
    c.method.update(student_timesteps=(499, 999), gan_weight=0.0)
    c.sample_steps = (2,)
    with pytest.raises(ValueError, match="not strictly decreasing|student_timesteps"):
        build.build(config.resolve(c))


def test_any_schedule_of_a_teacher_can_be_exported(tmp_path):
    net = tiny.save_teacher(tmp_path / "teacher")[1]
    betas = tuple(float(x) for x in jnp.linspace(1e-4, 2e-2, 1000))
    write_scheduler(tmp_path / "teacher", DDPM(trained_betas=betas), net.predicts)
    c = settings(tmp_path / "teacher", pictures(tmp_path / "x", train=8), eval_every=9, report=False)
    build.build(config.resolve(c))
