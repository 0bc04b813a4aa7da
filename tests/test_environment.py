"""environment.json: what a run ran on, again when that changes."""

import json
import socket

import jax
import pytest

from cddistill import environment


def read(folder):
    return json.loads((folder / environment.FILE).read_text())["environments"]


def test_versions_devices_hosts_and_variables_are_kept_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--x=1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    environment.record(tmp_path, 3)
    (found,) = read(tmp_path)
    assert found["from_step"] == 3
    assert found["hosts"] == [socket.gethostname()]
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["devices"] == "8 x cpu"
    assert found["variables"]["LIBTPU_INIT_ARGS"] == "--x=1"
    assert "device_count=8" in found["variables"]["XLA_FLAGS"]
    assert "secret" not in (tmp_path / environment.FILE).read_text()


def test_another_environment_is_added_and_the_same_is_not(tmp_path, monkeypatch):
    for step, flags in ((0, "a"), (10, "a"), (20, "b"), (30, "b")):
        monkeypatch.setenv("CDDISTILL_IMAGE", flags)
        environment.record(tmp_path, step)
    assert [x["from_step"] for x in read(tmp_path)] == [0, 20]
    (tmp_path / environment.FILE).write_text("{")
    with pytest.raises(ValueError, match=r"environment\.json is not valid JSON .*: delete it"):
        environment.record(tmp_path, 40)
