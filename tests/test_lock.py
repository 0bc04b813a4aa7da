"""The lock of a folder: one living owner at a time; those that are gone are told from those that run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cddistill import commands, config, lock, main, train


def settings(teacher):
    c = config.defaults("diffusion")
    c.update(teacher=str(teacher), steps=1, batch_size=8, report=False)
    c.data.update(size=8)
    return c


def owner(folder) -> dict:
    return json.loads((folder / ".lock").read_text())


def leave(folder, **changes) -> str:
    """A lock file like that of this process, but for some keys."""
    text = json.dumps(json.loads(lock.content("another")) | changes)
    (folder / ".lock").write_text(text)
    return text


HOLDER = """
import sys, time
from cddistill import lock
with lock.held(sys.argv[1]):
    print(1, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def quick(monkeypatch):
    """A sign of life every 0.02 s; 0.3 s of silence are enough."""
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "SILENT", 0.3)


def test_a_lock_is_held_once_and_removed(tmp_path):
    with lock.held(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
        said = (
            rf"{tmp_path} is in use by process {os.getpid()} on .* or choose another --output \(if it does not run, re"
        )
        with pytest.raises(lock.InUse, match=said), lock.held(tmp_path, "--output"):
            pass
        assert owner(tmp_path)["pid"] == os.getpid()
        with lock.held(tmp_path, index=1):  # another host of the same run
            pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_process_that_was_killed_is_taken_over_at_once(tmp_path):
    args = [sys.executable, "-c", HOLDER, str(tmp_path)]
    child = subprocess.Popen(args, stdout=subprocess.PIPE, cwd=os.path.dirname(os.path.dirname(__file__)))
    child.stdout.readline()
    with pytest.raises(lock.InUse, match=f"process {child.pid} on"), lock.held(tmp_path):
        pass
    child.send_signal(signal.SIGSTOP)
    with pytest.raises(lock.InUse), lock.held(tmp_path):
        pass
    child.kill()
    while lock.born(child.pid):  # a zombie: nobody has waited for it
        time.sleep(0.01)
    began = time.monotonic()
    with lock.held(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert time.monotonic() - began < 5
    child.communicate()


@pytest.mark.parametrize("changes", [{"born": "1"}, {"pid": 2**22 + 1, "born": None}, {"pid": "x"}])
def test_another_process_of_the_same_number_is_not_the_owner(tmp_path, changes):
    leave(tmp_path, **changes)
    with lock.held(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()


@pytest.mark.parametrize("text", [None, "", "{", "[1]", "\xff"])
def test_an_owner_elsewhere_is_gone_if_it_is_silent(tmp_path, quick, capsys, text):
    text is None and leave(tmp_path, place="another machine", host="far", pid=7)
    text is None or (tmp_path / ".lock").write_bytes(text.encode("latin1"))
    with lock.held(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert f"{tmp_path}/.lock is of process {7 if text is None else '?'} on" in capsys.readouterr().err


def test_an_owner_elsewhere_that_gives_signs_of_life_keeps_its_lock(tmp_path, quick, monkeypatch):
    with lock.held(tmp_path):
        elsewhere = lock.place()[::-1]
        monkeypatch.setattr(lock, "place", lambda: elsewhere)
        with pytest.raises(lock.InUse), lock.held(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_stale_lock_that_another_has_replaced_is_left_alone(tmp_path, quick):
    path = tmp_path / ".lock"
    leave(tmp_path, born="1")
    stale = lock.read(path)[1]
    text = leave(tmp_path, pid=5)
    assert not lock.replace(path, b"mine", stale)
    assert path.read_text() == text
    (tmp_path / ".lock.takeover").write_text("")  # of a process that was killed while it did the same
    assert lock.replace(path, b"mine", lock.read(path)[1])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(".lock", "mine")]


def test_of_several_that_find_a_stale_lock_one_takes_it(tmp_path):
    leave(tmp_path, born="1")
    inside, refused, gate = [], [], threading.Barrier(8)

    def attempt():
        gate.wait()
        try:
            with lock.held(tmp_path):
                inside.append(1)
                gate.wait()
        except lock.InUse:
            refused.append(1)
            gate.wait()

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert (len(inside), len(refused)) == (1, 7)


def test_an_owner_whose_lock_was_taken_over_stops(tmp_path, quick, monkeypatch, capsys):
    ended, path = [], tmp_path / ".lock"
    monkeypatch.setattr(os, "_exit", lambda code: (ended.append(code), stop.set()))
    leave(tmp_path)
    stop = threading.Event()
    lock.beat(path, "mine", stop)
    assert ended == [1]
    assert "was taken over by process" in capsys.readouterr().err
    lock.release(path, "mine")
    assert path.exists()


def test_a_second_command_ends_in_a_sentence_with_status_1_and_changes_nothing(teacher, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setattr(main, "main", lambda settings: train.train(settings, tmp_path))
    with lock.held(tmp_path):
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        for command in (
            lambda: train.train(settings(teacher), tmp_path),
            lambda: commands.encode_data(settings(teacher), tmp_path),
            lambda: commands.make_pairs(settings(teacher), tmp_path),
        ):
            with pytest.raises(lock.InUse):
                command()
        with pytest.raises(SystemExit) as ended:
            main.guarded(settings(teacher))
        assert ended.value.code == 1
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"cddistill: {tmp_path} is in use by process")
