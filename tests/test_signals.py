"""SIGTERM in every mode: it ends in good order, nothing is half written, and the same command does what is left."""

import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import hosts
import pytest
import test_kills as kills
import test_trust

from cddistill import checkpoint, commands, signals, train
from cddistill.data import ode_pairs
from cddistill.evals import preview
from cddistill.precompute import pairs

ROOT = pathlib.Path(__file__).parents[1]
IN_TIME = 30.0  # s from the notice, after which clusters kill


@pytest.fixture
def sigterm(monkeypatch):
    """Sends SIGTERM to this process, which takes it as the program does; nothing ends the process by force."""
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}
    monkeypatch.setattr(signals.threading, "Timer", lambda *_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    signal.signal(signal.SIGTERM, signals.interrupt)
    yield lambda: os.kill(os.getpid(), signal.SIGTERM)
    for number, handler in before.items():
        signal.signal(number, handler)
    signals.handled.clear()


def test_the_first_signal_ends_a_block_that_may_be_left_and_is_only_noted_elsewhere():
    with signals.Preemption() as stop:
        with stop.leaving():
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the block went on")
        assert stop.requested(1)
        assert stop.status == 143
    with signals.Preemption() as stop:
        with stop.leaving():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(1)
    signals.handled.clear()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("steps", [3, 1])  # 1: only the report is left
def test_a_preview_is_left_for_the_checkpoint_of_its_step(steps, teacher, tmp_path, monkeypatch, sigterm, capsys):
    def look(self, *_):
        sigterm()
        raise AssertionError("the preview went on")

    monkeypatch.setattr(preview.Preview, "__call__", look)
    settings = test_trust.settings(teacher, steps=steps, eval_every=1, checkpoint_every=100, report=True)
    assert train.train(settings, tmp_path) == 143
    assert checkpoint.last_good(tmp_path / "checkpoints") == str(tmp_path / "checkpoints" / "1")
    assert "stopped at step 1; the same command resumes" in capsys.readouterr().out
    assert not (tmp_path / ".lock").exists()
    assert not (tmp_path / "report.html").exists()


@pytest.mark.usefixtures("one_device")
def test_pairs_keep_complete_shards_and_go_on_from_there(teacher, tmp_path, monkeypatch, sigterm):
    settings = kills.settings(teacher, None, "pairs")
    settings.update(num_pairs=24, teacher_steps=(2,))
    sample, calls = pairs.make_shard, []

    def interrupted(*args):
        calls.append(args[2])
        sample(*args)
        if len(calls) == 2:
            sigterm()

    monkeypatch.setattr(pairs, "make_shard", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        commands.make_pairs(settings, tmp_path)
    assert stopped.value.args == (143,)
    assert not list(tmp_path.glob(".*"))  # no lock, no draft
    commands.make_pairs(settings, tmp_path)
    assert calls == [0, 1, 2]
    assert len(ode_pairs.OdePairs(tmp_path)) == 24


def test_a_lock_is_given_back_even_if_the_process_has_to_be_ended_by_force(tmp_path):
    """In what cannot be interrupted, as XLA's compiler."""
    stuck = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    script = (
        "import pathlib, threading\nfrom cddistill import lock, signals\nsignals.catch()\nwith lock.held(pathlib.Path("
    )
    script += f"{str(tmp_path)!r})):\n    threading.Timer(0.5, print, [1], {{'flush': True}}).start()\n    {stuck}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "CDDISTILL_GRACE": "0.1"}
    process = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=-1, text=True)
    process.stdout.readline()
    assert (tmp_path / ".lock").exists()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143
    assert not list(tmp_path.iterdir())


def test_a_signal_after_the_work_is_done_does_not_say_that_it_was_not():
    """While Python ends, a handler of its own is no more there."""
    script = "import os, signal\nfrom cddistill import signals\nsignals.catch()\n"
    script += "class Last:\n    def __del__(self, kill=os.kill, me=os.getpid()):\n        kill(me, 15)\n"
    script += "signals.last = Last()  # which lives as long as the module"
    ended = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 0


# ---- each mode as a process of its own


pictures, run = kills.pictures, kills.run  # fixtures


def program(*arguments):
    """As `kills.child`, but under the program's own handlers."""
    script = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import test_kills; from cddistill import main"
    )
    script += f"\nmain.app.run = lambda *_, **__: test_kills.work(*{[str(x) for x in arguments]!r})\nmain.run()"
    return kills.started(script, arguments[3])


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.0, 2.0, 6.0])  # s after the start: loading, compiling, at work
@pytest.mark.parametrize("mode", ["train", "encode", "pairs", "evaluate", "export"])
def test_every_mode_ends_in_time_and_is_completed_by_the_same_command(mode, after, teacher, pictures, run, tmp_path):
    folder = tmp_path / "out"
    process = program(mode, teacher, pictures, folder, run)
    time.sleep(after)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=2 * IN_TIME) in (143, 0), kills.said_in(folder)  # 0: it had finished
    assert time.monotonic() - sent < IN_TIME
    assert "Traceback" not in kills.said_in(folder)
    assert not folder.exists() or not list(folder.glob(".lock*"))
    kills.done(folder, kills.child(mode, teacher, pictures, folder, run))
    whole = tmp_path / "whole"
    kills.done(whole, kills.child(mode, teacher, pictures, whole, run))
    c = kills.settings(teacher, pictures, mode)
    assert kills.result(mode, c, folder, run) == kills.result(mode, c, whole, run)


# ---- several hosts

HOST = """
import hashlib, os, signal, sys, time
from cddistill import sharding, signals
signals.catch()
sharding.initialize()
signals.stand_before()
with signals.Preemption() as stop:
    if sys.argv[1] == "stuck":  # as in XLA's compiler
        print("began", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    for step in range(1, 500):
        if stop.requested(step):
            break
        if step == 5:
            print("began", flush=True)
        time.sleep(0.05)
        if sys.argv[1] == "report" and step == 6:
            break
    print("stopped at", step, flush=True)
try:
    time.sleep(60 * (sys.argv[1] == "report"))
except KeyboardInterrupt as error:
    os._exit(error.args[0])
sharding.wait_for_others()
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["at work", "stuck", "report"])
def test_of_several_hosts_all_stop_after_one_step_and_one_that_compiles_ends(where):
    """JAX's own handler tells the others; it alone would let a host compile until it is killed."""
    two = hosts.start("-c", HOST, where, hosts=2, devices=2, CDDISTILL_GRACE="1")
    try:
        assert [host.stdout.readline() for host in two] == ["began\n"] * 2
        if where == "report":
            assert [host.stdout.readline() for host in two] == ["stopped at 6\n"] * 2
        two[0].send_signal(signal.SIGTERM)
        if where != "at work":
            assert two[0].wait(timeout=IN_TIME) == 143
            assert two[1].poll() is None  # it has no notice of its own
            return
        said = [host.communicate(timeout=IN_TIME) for host in two]
        assert said[0][0] == said[1][0] != "stopped at 499\n", said
        assert [host.returncode for host in two] == [0, 0]
    finally:
        [host.kill() for host in two]
