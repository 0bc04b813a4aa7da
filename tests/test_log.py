"""Metrics: the writers, reading one step late, means between logs."""

import importlib.machinery
import importlib.util
import json
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from tensorboardX.proto.event_pb2 import Event

from cddistill import log
from cddistill.log import Delayed, JsonlWriter, Means, MultiWriter, TensorBoardWriter, Terminal, make_writer


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder):
    """The (tag, step, value) of a TensorBoard folder: TFRecord is length u64, crc u32, data, crc u32."""
    for path in sorted(folder.glob("**/events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + size])
            yield from ((v.tag, event.step, v) for v in event.summary.value)
            data = data[16 + size :]


def test_resuming_drops_incomplete_lines_and_records_after_the_checkpoint(tmp_path):
    first = JsonlWriter(tmp_path)
    for step in (10, 20, 30):
        first.write_scalars(step, {"student/loss": np.float32(step)})
    assert [r["step"] for r in records(tmp_path)] == [10, 20, 30]  # flushed although the file is open
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 31, "tim')

    again = JsonlWriter(tmp_path, first_step=20)
    again.write_scalars(30, {"student/loss": jnp.float32(3.0), "critic/r1": float("inf")})
    again.close()
    assert [(r["step"], r["student/loss"]) for r in records(tmp_path)] == [(10, 10.0), (20, 20.0), (30, 3.0)]
    assert records(tmp_path)[-1]["critic/r1"] is None  # JSON has no inf
    assert abs(records(tmp_path)[-1]["time"] - records(tmp_path)[0]["time"]) < 60


def test_a_run_from_step_zero_drops_old_records(tmp_path):
    JsonlWriter(tmp_path).write_scalars(10, {"student/loss": 1.0})
    JsonlWriter(tmp_path).close()
    assert records(tmp_path) == []


def test_tensorboard_files_have_scalars_and_images(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write_scalars(5, {"student/loss": 0.25})
    writer.write_images(5, {"grid": np.zeros((2, 8, 8, 3), np.uint8), "floats": np.ones((1, 8, 8, 3), np.float32)})
    writer.flush()
    writer.close()
    written = {tag: (step, value) for tag, step, value in events(tmp_path / "tensorboard")}
    assert written["student/loss"][0] == 5
    assert written["student/loss"][1].simple_value == 0.25
    assert {"grid", "floats"} <= written.keys()


def test_without_a_terminal_plain_lines_are_printed(capsys):
    writer = Terminal(total_steps=300, batch_size=8, console=rich.console.Console(width=40), seconds=0.0)
    writer.write_scalars(100, {"student/loss": 0.5, "student/grad_norm": 1.0})
    writer.write_scalars(200, {"student/loss": 0.25, "critic/loss": 2.0})
    writer.write_scalars(200, {"eval/kid": 1.5})
    writer.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "100/300  student/loss 0.5"
    assert lines[1].startswith("200/300  student/loss 0.25  critic/loss 2  ")
    assert "images/s" in lines[1]
    assert lines[1].endswith("left")
    assert lines[2] == "200/300  eval/kid 1.5"


def test_plain_lines_are_rare_but_include_the_last_step(capsys):
    writer = Terminal(total_steps=30, batch_size=8, console=rich.console.Console(width=40))
    for step in range(1, 31):
        writer.write_scalars(step, {"student/loss": 1.0})
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines()] == ["1", "30"]


def test_a_terminal_shows_a_progress_bar(capsys):
    writer = Terminal(10, 8, console=rich.console.Console(force_terminal=True, width=100))
    writer.write_scalars(10, {"student/loss": 0.5})
    writer.close()
    out = capsys.readouterr().out
    assert "10/10" in out
    assert "student/loss 0.5" in out


class Duck:
    """A writer with clu's method names, not derived from ours."""

    def __init__(self):
        self.calls = []

    def write_scalars(self, step, scalars):
        self.calls.append((step, scalars))

    def ignore(self, *args):
        pass

    def flush(self):
        self.calls.append("flush")

    write_images = close = ignore


def test_a_writer_with_clus_methods_can_be_used(tmp_path):
    duck = Duck()
    writer = MultiWriter(JsonlWriter(tmp_path), duck)
    writer.write_scalars(1, {"a": 1.0})
    writer.flush()
    assert duck.calls == [(1, {"a": 1.0}), "flush"]
    assert records(tmp_path)[0]["a"] == 1.0


def test_only_host_0_writes(tmp_path):
    other = make_writer(tmp_path / "other", 10, 8, {}, is_host0=False)
    other.write_scalars(1, {"student/loss": 1.0})
    other.close()
    assert not (tmp_path / "other").exists()
    mine = make_writer(tmp_path / "mine", 10, 8, {})
    mine.write_scalars(1, {"student/loss": 1.0})
    mine.close()
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_delayed_returns_the_previous_step_without_waiting_for_this_one(monkeypatch):
    asked = []
    device_get = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: asked.append(tree) or device_get(tree))
    delayed = Delayed(lambda: "none yet")
    one, two = {"student/loss": jnp.float32(0.5)}, {"student/loss": jnp.float32(0.25)}
    assert delayed.push(1, one) is None
    assert asked == []
    assert delayed.push(2, two) == (1, {"student/loss": 0.5})
    assert len(asked) == 1
    assert asked[0] is one
    assert delayed.flush() == (2, {"student/loss": 0.25})
    assert delayed.flush() is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_metric_raises_with_step_and_checkpoint(bad):
    delayed = Delayed(lambda: "/runs/a/checkpoints/400")
    delayed.push(
        412, {"student/loss": jnp.float32(1.0), "student/dmd": jnp.float32(bad), "critic/dsm": jnp.float32(bad)}
    )
    with pytest.raises(FloatingPointError, match=r"critic/dsm is .* at step 412; .*/runs/a/checkpoints/400"):
        delayed.push(413, {"student/loss": jnp.float32(1.0)})


def test_means_are_over_the_steps_that_logged_the_metric():
    means = Means()
    for step in range(10):
        means.add({"critic/loss": float(step)} | ({"student/loss": 1.0 + step} if step % 5 == 0 else {}))
    assert means.take() == {"critic/loss": 4.5, "student/loss": 3.5}
    assert means.take() == {}


# ---- Weights & Biases


class FakeRun:
    """What `wandb.init` gives, as far as it is used."""

    def __init__(self):
        self.records, self.metrics, self.finished = [], [], False

    def log(self, record):
        self.records.append(record)

    def define_metric(self, *names, **options):
        self.metrics.append((names, options))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: .calls are the arguments of init, .run what it gave."""
    fake = types.ModuleType("wandb", "")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.calls, fake.run, fake.api = [], FakeRun(), types.SimpleNamespace(api_key=None)
    fake.init = lambda **options: fake.calls.append(options) or fake.run
    fake.Image = lambda x: ("image", x.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return fake


def test_wandb_takes_scalars_images_and_options_beside_tensorboard(tmp_path, wandb):
    writer = make_writer(tmp_path, 10, 8, {}, kind="wandb", options={"run": {"steps": 10}})
    writer.write_scalars(5, {"student/loss": 0.25})
    writer.write_images(5, {"grid": np.zeros((2, 8, 8, 3), np.uint8)})
    writer.close()
    assert wandb.calls[0]["config"] == {"run": {"steps": 10}}
    assert wandb.calls[0]["name"] == tmp_path.name
    assert wandb.run.records == [{"step": 5, "student/loss": 0.25}, {"step": 5, "grid": [("image", (8, 8, 3))] * 2}]
    assert wandb.run.metrics == [(("*",), {"step_metric": "step"})]
    assert wandb.run.finished
    assert (tmp_path / "tensorboard").is_dir()


def test_a_resumed_workdir_has_one_run_of_wandb_and_one_that_starts_anew_another(tmp_path, wandb):
    for first in (0, 20, 0):
        make_writer(tmp_path, 30, 8, {}, first, kind="wandb").close()
    first, resumed, anew = (call["id"] for call in wandb.calls)
    assert first == resumed != anew


def test_without_a_log_only_the_metrics_are_written(tmp_path):
    make_writer(tmp_path, 10, 8, {}, kind="none").close()
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_wandb_asks_for_a_key_unless_it_is_offline(wandb, monkeypatch):
    with pytest.raises(ValueError, match=r"log=wandb needs a key: set WANDB_API_KEY"):
        log.check("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log.check("wandb")


def test_wandb_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    log.check("tensorboard")
    with pytest.raises(ValueError, match=r"pip install 'cddistill\[wandb\]', or set log=tensorboard"):
        log.check("wandb")


@pytest.mark.slow
def test_wandb_writes_offline_files(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log.check("wandb")
    writer = make_writer(tmp_path, 10, 8, {}, kind="wandb", options={"run": {"steps": 10}})
    writer.write_scalars(5, {"student/loss": 0.25})
    writer.write_images(5, {"grid": np.zeros((2, 8, 8, 3), np.uint8)})
    writer.close()
    (file,) = (tmp_path / "wandb").rglob("*.wandb")
    assert b"student/loss" in file.read_bytes()
    assert list((tmp_path / "wandb").rglob("*.png"))
