"""The report: one self-contained file, everything escaped, and sentences that follow from the numbers."""

import dataclasses
import json
import re

import numpy as np
import pytest

from cddistill.evals import grids, report
from cddistill.evals.report import write_report
from cddistill.evals.scores import Row


def row(name, lpips, nfe=None, error=0.01):
    return Row(name, {"PSNR": (20.0 + (nfe or 0), 0.1), "LPIPS-VGG": lpips and (lpips, error)}, 100, nfe)


ROWS = [
    row("bicubic", 0.35),
    row("undistilled, 50 steps", 0.12, 50),
    row("student, 1 step", 0.2, 1),
    row("student, 4 steps", 0.125, 4),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with everything in it."""
    folder = tmp_path_factory.mktemp("report")
    records = [
        {"step": s, "time": 1.7e9, "student/loss": 1.0 / s, "critic/<dsm>": 0.5, "lr": 1.0} for s in range(1, 41)
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records) + '{"step": 41, "stu')
    path = write_report(
        folder / "report.html",
        title="A <run> & its $1 title",
        grids=[
            ('four "pictures" <here>', grids.grid(np.zeros((4, 8, 8, 3)))),
            ("bytes", grids.encoded(np.zeros((2, 2, 3), np.uint8))),
        ],
        rows=[
            *ROWS,
            Row(
                "LPIPS-less", {"PSNR": (1.0, np.nan), "LPIPS-VGG": None}, 9, missing=("LPIPS-VGG: not computed (why)",)
            ),
        ],
        metrics_path=folder / "metrics.jsonl",
        config={"method": {"name": "codi", "betas": (0.9, 0.99)}, "steps": 100},
        timings={"training": 3725.0, "peak memory, GB": 1.5},
        versions={"jax": "0.10.2"},
        notes=["<script>alert(1)</script>"],
    )
    assert [p.name for p in folder.iterdir() if p.suffix != ".jsonl"] == ["report.html"]
    return path.read_text()


def test_report_is_self_contained_and_escaped(page):
    links = re.findall(r"""(?:src|href|url|@import)\s*[=(]\s*["']?([^"'\s)>]+)""", page)
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links), links
    assert len([link for link in links if link.startswith("data:")]) == 2
    assert "<script" not in page
    assert "<metadata" not in page
    for text in (
        "A &lt;run&gt; &amp; its $1 title",
        "&lt;script&gt;",
        "&lt;dsm&gt;",
        "four &#34;pictures&#34; &lt;here&gt;",
    ):
        assert text in page


def test_report_shows_scores_config_timings_and_versions(page):
    assert "on 100 images" in page.lower()
    for text in (
        "student, 4 steps",
        "method.betas",
        "(0.9, 0.99)",
        "1 h 02 min",
        "1.5 GB",
        "0.10.2",
        "not computed (why)",
    ):
        assert text in page
    assert page.count("<svg") == 2 + 1  # two metrics, and quality against speed; not lr or time
    assert "0.025" in page  # the last loss; the incomplete line is skipped
    assert "currentColor" in page
    assert report.FOREGROUND not in page
    assert "LPIPS v0.1 on VGG16" in page
    assert "FID" not in re.sub(r"[Nn]ot comparable with[^.]*\.", "", page)


def test_best_of_each_column_is_marked():
    lines = report.table(ROWS)["lines"]
    marked = [(r.name, [best for *_, best in cells]) for r, cells in lines]
    assert marked[1] == ("undistilled, 50 steps", [True, True])
    assert not any(any(best) for name, best in marked if name != "undistilled, 50 steps")
    assert report.table(ROWS)["columns"] == [("PSNR", "↑"), ("LPIPS-VGG", "↓")]
    assert not any(best for _, cells in report.table(ROWS[:1])["lines"] for *_, best in cells)


def test_headline_compares_the_student_with_the_same_network_undistilled():
    undistilled = [row(f"undistilled, {k} steps", x, k) for k, x in ((2, 0.3), (4, 0.19), (8, 0.05))]
    first, second = report.headline([*ROWS, *undistilled])
    assert first == (
        "student, 4 steps: perceptual distance (LPIPS-VGG) 0.125, against 0.19 for undistilled, 4 steps and 0.12 for "
        "undistilled, 50 steps, which calls the network 12.5 times as often (lower is better)."
    )
    assert second == (
        "On 100 images that is clearly better than undistilled, 4 steps and too close to call against undistilled, 50 "
        "steps."
    )
    assert report.headline(undistilled) == []  # two baselines


def test_headline_compares_a_student_alone_with_what_needs_no_network():
    worse = report.headline([row("bicubic", 0.1), row("student, 4 steps", 0.5, 4)])
    assert "clearly worse than bicubic" in worse[1]
    unsure = report.headline([row("bicubic", 0.1), row("student, 4 steps", 0.5, 4, error=np.nan)])
    assert "too close to call" in unsure[1]
    psnr = report.headline([row("bicubic", None), row("student", None, 4)])
    assert psnr[0] == "student: pixel accuracy (PSNR, dB) 24, against 20 for bicubic (higher is better)."
    assert report.headline(ROWS[:1]) == report.headline([]) == report.headline(ROWS[2:]) == []


def test_what_is_better_on_every_image_is_better_however_much_images_differ():
    """The means alone, 0.5 and 0.49 with errors of 0.01, would be too close to call."""
    each = np.linspace(0.3, 0.7, 100)
    ours, theirs = row("student, 4 steps", 0.49, 4), row("bicubic", 0.5)
    paired = [dataclasses.replace(x, each={"LPIPS-VGG": v}) for x, v in ((ours, each - 0.01), (theirs, each))]
    assert "clearly better than bicubic" in report.headline(paired)[1]
    assert "too close to call" in report.headline([ours, theirs])[1]


def test_reading_metrics_skips_bad_lines_and_handles_restarts(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 2, "a/x": 2.0}',
        '{"step": 1, "a/x": 9}',
        '{"step": 1, "a/x": 1}',
        '{"step": 3, "a/x": null}',
        "[]",
        "{",
    ]
    path.write_text("\n".join([*lines, '{"step": 4, "a/x": NaN, "b/y": 5, "time": 1, "a/name": "z"}']))
    series = report.read_metrics(path)
    assert sorted(series) == ["a/x", "b/y"]
    np.testing.assert_array_equal(series["a/x"], [[1, 2], [1.0, 2.0]])
    assert report.read_metrics(tmp_path / "none") == {}


def test_curves_have_a_running_mean_or_a_log_scale():
    drawn = []

    class Axes:
        def plot(self, x, y, *_, **__):
            drawn.append(np.asarray(y))

        def set_yscale(self, scale):
            drawn.append(scale)

    values = np.random.default_rng(0).random(90) + 1.0
    report.draw_curve(np.arange(90), values, Axes())
    np.testing.assert_allclose(drawn[1][5:], np.convolve(values, np.ones(3) / 3, "valid")[3:])
    report.draw_curve(np.arange(3), np.array([0.1, 1.0, 100.0]), Axes())
    assert drawn[-1] == "log"


def test_units_of_timings():
    assert report.quantity("training, s", 200) == ("training", "3 min 20 s")
    assert report.quantity("sampling", 0.12345) == ("sampling", "0.123 s")
    assert report.quantity("speed, images/s", 1234.5) == ("speed", "1,234 images/s")


def test_a_report_can_be_empty(tmp_path):
    text = write_report(
        tmp_path / "deep" / "report.html", title="Nothing yet", metrics_path=tmp_path / "none"
    ).read_text()
    assert "Nothing was logged." in text
    assert "Scores" not in text
