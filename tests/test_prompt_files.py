"""Prompts from a text file: without images, and drawn apart from the images."""

import json

import jax
import numpy as np
import pytest
from test_latent import letters, pictures, teacher  # noqa: F401  (fixtures)

from cddistill import commands, config, data, train
from cddistill.data import configure, lines, splits

pytestmark = pytest.mark.usefixtures("one_device")
TEXTS = [f"prompt {i} with {'many ' * (i % 5)}words" for i in range(60)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS))
    return path


@pytest.mark.parametrize("piece", [1, 7, 2**20])
def test_lines_are_those_of_the_file_that_are_not_blank(tmp_path, monkeypatch, piece):
    """Whatever ends them, and wherever the file is cut while it is searched."""
    monkeypatch.setattr(lines, "PIECE", piece)
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\n\n \t\r\n  zwei Bären \nthe last".encode())
    found = lines.Lines(tmp_path / "a.txt")
    assert [found[i] for i in range(len(found))] == ["a cat", "zwei Bären", "the last"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "data.path '.*a.txt' is no file: set it to a text file with a prompt on each line"),
        (b"", "data.path .*a.txt has no line"),
        (b"\n \n", "data.path .*a.txt has no line"),
        ("a\nBär".encode("latin-1"), "a.txt is not text in UTF-8 from byte 2 on, in line 2"),
        ("a\nb".encode("utf-16"), "a.txt is not text in UTF-8 from byte 0 on, in line 1"),
    ],
)
def test_files_that_hold_no_prompts_are_refused(tmp_path, content, said):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        data.load(configure(source="prompts", path=str(tmp_path / "a.txt")))


def test_each_number_is_in_one_split_and_further_ones_move_none():
    few, many = splits.of_numbers(5_000), splits.of_numbers(6_000)
    assert sorted(np.concatenate([*few.values()])) == [*range(5_000)]
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert len(few[split]) / 5_000 == pytest.approx(share, abs=0.02)
        assert [i for i in many[split] if i < 5_000] == few[split].tolist()


def test_prompts_are_examples_without_images(file):
    c = configure(source="prompts", path=str(file), size=8)
    batch = next(data.batches(c, batch_size=4, seed=0, prepare=dict))
    assert batch["imageless"].all()
    assert batch["x0"].shape == (4, 8, 8, 3)
    loaded = {split: data.load(c, split) for split in data.loader.SPLITS}
    captions = [x.item(i, np.random.default_rng(0))["caption"] for x in loaded.values() for i in range(len(x))]
    assert sorted(captions) == sorted(TEXTS)
    with pytest.raises(ValueError, match="data.task sr makes conditions from images, and prompts have none"):
        data.load(configure(source="prompts", path=str(file), size=8, task="sr"))


def test_prompts_are_drawn_apart_from_the_images_in_training(file):
    """The images are the same, in the same order; held-out images keep their captions."""
    own, drawn = configure(size=8), configure(size=8, prompts=str(file))
    load = lambda c, **kw: next(data.batches(c, batch_size=32, seed=3, prepare=dict, **kw))
    first, second = load(own), load(drawn)
    np.testing.assert_array_equal(first["x0"], second["x0"])
    assert {*second["caption"]} <= {*TEXTS}
    assert 15 < len({*second["caption"]}) < 32
    assert load(drawn, rows=slice(8, 16))["caption"] == second["caption"][8:16]
    assert load(drawn, start=1)["caption"] != second["caption"]
    captions = [data.examples(c, "test", 4)["caption"] for c in (own, drawn)]
    assert captions[0] == captions[1]
    assert {*data.fingerprint(drawn)} - {*data.fingerprint(own)} == {"drawn prompts"}
    np.save(file.parent / "x0.npy", np.random.default_rng(0).normal(size=(40, 8, 8, 3)).astype("f4"))
    with pytest.raises(ValueError, match="whose text is encoded already: set data.prompts when --mode=encode"):
        data.load(configure(source="arrays", path=str(file.parent), prompts=str(file)))


def settings(teacher, file):  # noqa: F811
    c = config.defaults("dmd2")
    c.update(teacher=str(teacher), steps=1, batch_size=8, log_every=1, checkpoint_every=1, eval_every=1, eval_images=4)
    c.update(sample_steps=(1,), teacher_steps=(2,), teacher_guidance=1.5)
    c.method.update(student_timesteps=(999,), ratio=1, gan_weight=0.0, real_guidance=1.5)
    c.data.update(source="prompts", path=str(file), size=16)
    return c


@pytest.fixture
def short(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\nc\na b\nb c\nab\n" * 8)
    return path


@pytest.mark.slow
def test_training_on_prompts_needs_no_images_and_is_compared_with_the_teacher(teacher, short, tmp_path):  # noqa: F811
    c = settings(teacher, short)
    train.train(c, tmp_path / "run")
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert [*scores] == ["teacher, 2 steps", "student, 1 step"]
    metrics = scores["student, 1 step"]["metrics"]
    assert metrics
    assert all(name.endswith(" to the teacher") for name in metrics)
    c.method.gan_weight = 0.1
    with pytest.raises(ValueError, match=r"needs real images, and the data are prompts only.*gan_weight=0"):
        train.train(c, tmp_path / "gan")


@pytest.mark.slow
def test_prompts_are_encoded_without_images(teacher, short, tmp_path):  # noqa: F811
    """What is read has the text of the prompts, and no x0 takes room."""
    c = settings(teacher, short)
    commands.encode_data(c, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert {*manifest["row"]} == {"encoder_hidden_states"}
    stored = data.load(configure(source="arrays", path=str(tmp_path / "out")))
    prompts = data.load(config.resolve(c).data)
    assert len(stored) == len(prompts)
    item = stored.item(1, None)
    assert item["imageless"]
    assert item["x0"].shape == (8, 8, 4)
    assert item["caption"] == prompts.item(1, np.random.default_rng(0))["caption"]
    assert jax.tree.map(np.shape, item["text"]) == jax.tree.map(np.shape, item["null"])
    commands.encode_data(c, tmp_path / "out")  # keeps what is there
