"""Files: atomic writes, JSON errors in one sentence, dotted names, and folders that cannot be written."""

import concurrent.futures
import os

import pytest

from cddistill import io


@pytest.mark.parametrize(("content", "stored"), [(b"\x00\xff", b"\x00\xff"), ("größer", "größer".encode())])
def test_writing_takes_bytes_or_text_and_creates_the_folder(tmp_path, content, stored):
    path = tmp_path / "a" / "b" / "file"
    io.write_atomic(path, content)
    assert path.read_bytes() == stored
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    io.write_atomic(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        io.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_json_round_trips(tmp_path):
    content = {"a": [1, 2.5], "b": {"c": "ä", "d": None}}
    io.write_json(tmp_path / "x.json", content)
    assert io.read_json(tmp_path / "x.json") == content
    assert (tmp_path / "x.json").read_text().endswith("}\n")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"x\.json is missing"),
        (b"{", r"x\.json is not valid JSON \(.*\): download it again"),
        (b'"\xff"', r"x\.json is not valid JSON"),
        (b"[1]", r"x\.json holds a list, not an object"),
    ],
)
def test_errors_for_bad_json_name_the_file(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        io.read_json(tmp_path / "x.json")


def test_flatten_joins_names_and_keeps_values():
    tree = {"optim": {"lr": 1, "betas": (0.9, 0.99), "student": {"lr": 2}}, "steps": [1, {"a": 1}], "empty": {}}
    assert io.flatten(tree) == {
        "optim.lr": 1, "optim.betas": (0.9, 0.99), "optim.student.lr": 2, "steps": [1, {"a": 1}],
    }  # fmt: skip


def test_ensure_writable_creates_an_empty_folder(tmp_path):
    io.ensure_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_several_processes_may_look_whether_a_folder_is_writable_at_once(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [*pool.map(io.ensure_writable, [tmp_path] * 400)] == [None] * 400
    assert list(tmp_path.iterdir()) == []


def test_drafts_of_two_processes_of_the_same_number_differ(tmp_path, monkeypatch):
    """On two hosts, that is."""
    drafts = []
    monkeypatch.setattr(os, "replace", lambda draft, path: drafts.append(draft))
    [io.write_atomic(tmp_path / "file", "x") for _ in range(2)]
    assert len({*drafts}) == 2


def test_the_error_for_an_unwritable_folder_names_its_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"folder .*file/run cannot be written \(.*\); choose another with --output"):
        io.ensure_writable(tmp_path / "file" / "run", "--output")
