"""What may happen to a run from outside: names of any kind, full disks, folders that vanish, Ctrl-C."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import test_checkpoint as state

from cddistill import checkpoint, commands, config, io, lock, log, main, train

pytestmark = pytest.mark.usefixtures("one_device")

ROOT = pathlib.Path(__file__).parents[1]


def settings(teacher, **changes):
    """A fine-tuning of 8 px emoji."""
    c = config.defaults("diffusion")
    c.update(teacher=str(teacher), steps=2, batch_size=8, log_every=1, checkpoint_every=1, eval_every=2, eval_images=8)
    c.update({"report": False} | changes)
    c.data.update(size=8)
    return c


def steps_of(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


NAMES = ["a[b]", "[!x]*?{y}", "back\\slash", "a b\n'\"%41#&$HOME", "-größe", os.fsdecode(b"caf\xe9"), "x:/~y"]
NAMES += ["n" * 255]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_found_in_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    for steps in ((1, 2), (3,)):
        checkpoints = checkpoint.Checkpoints(folder, keep=2)
        state.saved(checkpoints, *steps)
        checkpoints.close()
    reader = checkpoint.Checkpoints(folder, read_only=True)
    assert reader.last_good() == str(folder / "3")
    state.assert_same(reader.restore(state.abstract(state.initial())), state.run(3))
    reader.close()
    assert state.steps_on_disk(reader) == [2, 3]


@pytest.mark.slow
def test_a_run_is_trained_resumed_evaluated_and_exported_in_a_folder_of_any_name(teacher, tmp_path):
    workdir = tmp_path / (NAMES[0] + NAMES[1] + NAMES[2] + NAMES[3])
    train.train(settings(teacher, steps=1), workdir)
    train.train(settings(teacher), workdir)
    assert {*steps_of(workdir)} == {1, 2}
    commands.evaluate_run(settings(teacher), workdir)
    assert (workdir / "report.html").is_file()
    commands.export_run(settings(teacher), workdir, str(workdir / "out[1]"))
    assert (workdir / "out[1]" / "unet" / "config.json").is_file()


# ---- full disks


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_named_with_the_file_and_the_last_good_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()
    writer = log.JsonlWriter(tmp_path)
    writer.file = open("/dev/full", "a", buffering=1)  # noqa: SIM115  (as it is opened)
    with pytest.raises(OSError, match="the last good checkpoint is") as raised, train.naming_checkpoint(tmp_path):
        writer.write_scalars(1, {"student/loss": 1.0})
    good = f"the last good checkpoint is {tmp_path}/checkpoints/7"
    assert main.sentence(raised.value).startswith(f"/dev/full: No space left on device; {good}; free some space, or ")


def test_other_errors_than_the_disks_stay_as_they_are(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "No such file", "x.png"), lock.InUse("in use")):
        with pytest.raises(OSError, match=r"No such file|in use") as raised, train.naming_checkpoint(tmp_path):
            raise error
        assert raised.value is error


def test_a_failed_write_names_the_file_and_leaves_no_draft(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space") as raised:
        io.write_json(tmp_path / "config.json", {})
    assert raised.value.filename == str(tmp_path / "config.json")
    monkeypatch.setattr(lock, "content", full)
    with pytest.raises(OSError, match="No space"), lock.held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_run_on_a_full_disk_ends_in_one_line_without_tracebacks(teacher, small_disk):
    (small_disk.parent / "config.py").write_text(f"""
from cddistill.config import defaults
def get_config():
    c = defaults("diffusion")
    c.update(teacher={str(teacher)!r}, steps=2000, batch_size=8, checkpoint_every=20, eval_every=10_000, report=False)
    c.data.update(size=8)
    return c
""")
    args = [sys.executable, "-m", "cddistill.main", "--config=../config.py", f"--workdir={small_disk}/run"]
    done = subprocess.run(
        args, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, cwd=small_disk
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert f"cannot write a checkpoint to {small_disk}/run/checkpoints: the disk is full; the last good" in line
    assert not (small_disk / "run" / ".lock").exists()


# ---- Ctrl-C

WAITING = "import time\nprint('ready', flush=True)\ntime.sleep(600)\n"


@pytest.mark.parametrize("where", ["ml_collections.py", "config.py"])
def test_ctrl_c_ends_quietly_while_modules_or_the_config_are_loaded(tmp_path, where):
    (tmp_path / where).write_text(WAITING)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    args = [sys.executable, "-m", "cddistill.main", f"--config={tmp_path}/config.py"]
    child = subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate() == ("", "")
    assert child.returncode == 130


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_quietly_anywhere_else_and_tidy_up(number, status, monkeypatch, capfd, tmp_path):
    before, ended, timers = {x: signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)}, [], []

    def run(*args, **kwargs):
        with lock.held(tmp_path):
            os.kill(os.getpid(), number)
            raise AssertionError("not reached")

    monkeypatch.setattr(main.app, "run", run)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(threading, "Timer", lambda *args: timers.append(args) or SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    try:
        main.run()
        assert ended == [status]
        assert timers == [(2.0, os._exit, [status])]  # if the exception is lost
        os.kill(os.getpid(), number)  # while the interpreter shuts down
        assert ended == [status, status]
    finally:
        signal.set_wakeup_fd(-1)
        [signal.signal(*old) for old in before.items()]
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
