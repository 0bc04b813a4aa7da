"""Progress of long work: what is printed, and when."""

import io
import threading

import pytest
import rich.console

from cddistill import progress
from cddistill.progress import Work


def at(work, seconds):
    """Show it so many seconds after its start."""
    work.show(work.start + seconds)
    return work.console.file.getvalue()


def plain(what, *counts):
    return Work(what, *counts, console=rich.console.Console(file=io.StringIO(), width=40))


def test_without_a_terminal_a_line_every_half_minute():
    work = plain("encoding train", 100)
    work.advance(20)
    assert at(work, 29.0) == ""
    assert at(work, 40.0) == "encoding train 20/100  0:02:40 left\n"
    work.advance()
    assert at(work, 69.0).count("\n") == 1
    assert at(work, 70.0).endswith("encoding train 21/100  0:04:23 left\n")  # 79 more at 21 in 70 s


def test_the_time_left_follows_what_this_process_did():
    work = plain("pairs", 100, 50)
    work.advance(10)
    assert at(work, 40.0) == "pairs 60/100  0:02:40 left\n"


def test_nothing_is_promised_before_a_part_is_done_or_where_the_end_is_unknown():
    assert at(plain("[sampling]", 8), 31.0) == "[sampling] 0/8\n"
    assert at(plain("reading checkpoint 5"), 31.0) == "reading checkpoint 5  0:00:31 so far\n"


@pytest.mark.parametrize("total", [3, None])
def test_a_terminal_shows_a_bar_and_removes_it(total, monkeypatch):
    monkeypatch.setattr(progress, "TICK", 0.0)
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100)
    work = Work("sampling", total, console=console)
    assert at(work, 0.9) == ""
    work.advance(2)
    assert "sampling" in at(work, 1.1)
    work.bar.refresh()
    assert ("2/3" in console.file.getvalue()) == (total == 3)
    stop = threading.Event()
    stop.set()
    work.watch(stop)
    assert work.bar.finished or not work.bar.live.is_started


@pytest.mark.parametrize(("module", "bars"), [("ipykernel.iostream", False), ("builtins", True)])
def test_a_notebook_which_would_keep_each_drawing_gets_lines(module, bars, monkeypatch):
    """Its streams say that they are a terminal."""
    monkeypatch.delenv("TERM", raising=False)
    stream = type("OutStream", (io.StringIO,), {"__module__": module, "isatty": lambda self: True})()
    assert progress.terminal(stream).is_terminal is bars


def test_the_items_of_a_loop_count_when_they_are_done(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    monkeypatch.setattr(progress, "TICK", 0.01)
    seen = threading.Event()
    show = Work.show
    monkeypatch.setattr(Work, "show", lambda self, now: (show(self, now), self.done == 1 and seen.set()))
    for i in progress.each("scoring", range(3)):
        assert i == 0 or seen.wait(10) or i == 2
        if i == 1:
            break
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "scoring 0/3" in captured.err or "scoring 1/3" in captured.err


def test_hidden_work_starts_no_thread(capsys):
    before = threading.active_count()
    with progress.counting("pairs", 3, shown=False) as advance:
        advance()
        assert threading.active_count() == before
    with pytest.raises(KeyError), progress.counting("pairs", 3):
        raise KeyError
    assert threading.active_count() == before
    assert capsys.readouterr().err == ""


def test_bytes_of_several_files_are_one_sum(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fs, parts = fsspec.filesystem("memory"), []
    for name, size in (("a", 3_000_000), ("b", 500_000)):
        fs.pipe_file(f"/progress/{name}", bytes(size))
    targets = [str(tmp_path / name) for name in "ab"]
    fs.get(["/progress/a", "/progress/b"], targets, callback=progress.transfer(parts.append))
    assert sum(parts) == pytest.approx(3.5)
    assert (tmp_path / "a").stat().st_size == 3_000_000
