"""The report of a run as one self-contained HTML page: images, scores, training curves, timings and settings."""

import base64
import functools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from io import StringIO

import numpy as np

from cddistill import health, io
from cddistill.evals.grids import encoded
from cddistill.evals.scores import METRICS, STUDENT, Metric, Row, arrow, cell, columns_of, mean_and_error

HEADLINES = {  # the headline uses the first of these metrics that was computed
    "LPIPS-VGG": "perceptual distance (LPIPS-VGG)",
    "LPIPS-Alex": "perceptual distance (LPIPS-Alex)",
    "KID-EffLite0@64": "distance from real images (KID-EffLite0@64)",
    "KID-EffLite0@224": "distance from real images (KID-EffLite0@224)",
    "SSIM": "structural similarity (SSIM)",
    "PSNR": "pixel accuracy (PSNR, dB)",
}
FEW = 8  # network calls that count as few: up to four steps with guidance
MOST_CURVES = 24
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308")  # readable on white and on black
FOREGROUND = "#010203"  # placeholder for the text colour of the page in figures


def write_report(
    path,
    *,
    title: str,
    grids: Sequence[tuple[str, bytes | np.ndarray]] = (),
    rows: Sequence[Row] = (),
    metrics_path=None,
    config: Mapping | None = None,
    timings: Mapping[str, float | int] | None = None,
    times: Sequence[tuple[str, float, float]] = (),
    versions: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> pathlib.PurePath:
    """Write a self-contained HTML file atomically and return its path.

    `grids` are (caption, bytes of a PNG file or uint8 [h,w,3]). `metrics_path` is a metrics.jsonl: each line has "step"
    and "<turn>/<metric>" numbers. `timings` are in seconds unless the name ends in a unit ("peak memory, GB"). `times`
    are (what, seconds, share of all time) of training: see `clock.table`.
    """
    import jinja2

    environment = jinja2.Environment(loader=jinja2.PackageLoader("cddistill.evals", "."), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        title=title,
        headline=headline(rows),
        figures=[(caption, data_url(image)) for caption, image in grids],
        table=table(rows),
        speed=speed_figures(rows),
        curves=curves(metrics_path) if metrics_path else None,
        timings=[quantity(name, value) for name, value in (timings or {}).items()],
        times=[(what, quantity(what, seconds)[1], f"{share:.1%}") for what, seconds, share in times],
        config=io.flatten(config or {}),
        versions=dict(versions or {}),
        notes=list(notes),
    )
    io.write_atomic(path, page)
    return io.path(path)


def headline(rows: Sequence[Row]) -> list[str]:
    """The main result in two sentences, or []: the best student in few steps against the same network, not distilled,
    in as few network calls and in many, or, without such rows, against the best row that needs no network."""
    for metric in HEADLINES:
        scored = [row for row in rows if row.metrics.get(metric)]
        few = best([row for row in scored if row.nfe and row.nfe <= FEW and row.name.startswith(STUDENT)], metric)
        if few and (others := compared(scored, few, metric)):
            break
    else:
        return []
    against = [f"{row.metrics[metric][0]:.3g} for {row.name}" for row in others]
    if (others[-1].nfe or 0) > few.nfe:
        against[-1] += f", which calls the network {others[-1].nfe / few.nfe:.3g} times as often"
    value, better = few.metrics[metric][0], "higher" if METRICS[metric].higher else "lower"
    return [
        f"{few.name}: {HEADLINES[metric]} {value:.3g}, against {' and '.join(against)} ({better} is better).",
        f"On {few.n} images that is {' and '.join(f'{verdict(metric, few, row)} {row.name}' for row in others)}.",
    ]


def compared(rows: Sequence[Row], student: Row, metric: str) -> list[Row]:
    """What a student's row is compared with in the headline: at most one row of each kind."""
    networks = sorted((r for r in rows if r.nfe and not r.name.startswith(STUDENT)), key=lambda row: row.nfe)
    as_few = [row for row in networks if row.nfe <= student.nfe][-1:]
    many = [row for row in networks if row.nfe > FEW][-1:]
    return as_few + many or [row for row in [best([row for row in rows if not row.nfe], metric)] if row]


def best(rows: Sequence[Row], metric: str) -> Row | None:
    """The row with the best value, or None if the metric has no better direction or no value."""
    higher = METRICS.get(metric, Metric(None)).higher
    rows = [row for row in rows if row.metrics.get(metric) and row.competes]
    if higher is None or not rows:
        return None
    return max(rows, key=lambda row: row.metrics[metric][0] * (1 if higher else -1))


def verdict(metric: str, a: Row, b: Row) -> str:
    """Whether a and b differ by more than twice the standard error of the difference, image by image if they can be."""
    if metric in a.each and metric in b.each:
        difference, error = mean_and_error(a.each[metric] - b.each[metric])
    else:
        (x, x_error), (y, y_error) = a.metrics[metric], b.metrics[metric]
        difference, error = x - y, math.hypot(x_error, y_error)
    gain = difference * (1 if METRICS[metric].higher else -1)
    if not abs(gain) > 2.0 * error:  # also if a standard error is unknown
        return "too close to call against"
    return "clearly better than" if gain > 0 else "clearly worse than"


def table(rows: Sequence[Row]) -> dict:
    """The table of scores: cells, the best value of each column, missing metrics, and how each column is measured."""
    names = columns_of(rows)
    winners = {metric: best(rows, metric) for metric in names}
    cell_of = lambda row, m: (*cell(m, row.metrics.get(m)).partition(" ± ")[::2], winners[m] is row and len(rows) > 1)
    lines = [(row, [cell_of(row, metric) for metric in names]) for row in rows]
    return {
        "columns": [(metric, arrow(metric)) for metric in names],
        "lines": lines,
        "missing": list(dict.fromkeys(reason for row in rows for reason in row.missing)),
        "how": [(m, METRICS[m].how, METRICS[m].higher) for m in names if m in METRICS],
    }


def quantity(name: str, value: float | int) -> tuple[str, str]:
    """('training', '3 min 20 s') for ('training', 200.0); ('memory', '1.5 GB') for ('memory, GB', 1.5)."""
    label, _, unit = name.rpartition(", ")
    if label and unit != "s":
        return label, f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    minutes, seconds = divmod(round(value), 60)
    if value < 60:
        text = f"{value:.3g} s"
    elif value < 3600:
        text = f"{minutes} min {seconds:02d} s"
    else:
        text = f"{minutes // 60} h {minutes % 60:02d} min"
    return label or name, text


def data_url(image: bytes | np.ndarray) -> str:
    """An image as a data URL, embedded in the page."""
    image = image if isinstance(image, bytes) else encoded(np.asarray(image))
    return "data:image/png;base64," + base64.b64encode(image).decode()


def curves(path) -> dict:
    """Figures of logged metrics: {"turns": {turn: [(metric, last value, svg), ...]}, "more": number not shown}."""
    series = dict(sorted(read_metrics(path).items(), key=lambda item: item[0].startswith("time/")))  # these last
    turns = {}
    for name in list(series)[:MOST_CURVES]:
        steps, values = series[name]
        turn, _, metric = name.partition("/")
        figure = svg(functools.partial(draw_curve, steps, values))
        turns.setdefault(turn, []).append((metric, f"{values[-1]:.4g}", figure))
    return {"turns": turns, "more": max(0, len(series) - MOST_CURVES)}


def read_metrics(path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"<turn>/<metric>": (steps, values)} of a metrics.jsonl, without missing and non-finite values.

    If a step was logged again after a restart, the last record counts.
    """
    points = {}
    for record in health.read(path):
        for name, value in record.items():
            if "/" in name and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(name, {})[record["step"]] = float(value)
    return {name: tuple(map(np.array, zip(*sorted(series.items()), strict=True))) for name, series in points.items()}


def draw_curve(steps, values, axes):
    """Plot raw values, faint, and their running mean."""
    window = max(1, len(values) // 30)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    low = np.maximum(np.arange(1, len(values) + 1) - window, 0)
    smooth = (sums[1:] - sums[low]) / (np.arange(1, len(values) + 1) - low)
    few = len(values) < 30
    axes.plot(steps, values, color=COLOURS[0], alpha=1.0 if few else 0.3, linewidth=1.6 if few else 0.8)
    if not few:
        axes.plot(steps, smooth, color=COLOURS[0], linewidth=1.8)
    if len(values) < 8:
        axes.plot(steps, values, "o", color=COLOURS[0], markersize=4)
    if values.min() > 0 and values.max() > 50 * values.min():
        axes.set_yscale("log")


def speed_figures(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(metric, svg) of quality against network calls, for LPIPS and KID if computed; [] for one number of calls."""
    if len({row.nfe for row in rows if row.nfe}) < 2:
        return []
    has = [m for m in HEADLINES if any(row.nfe and row.metrics.get(m) for row in rows)]
    chosen = [m for m in has if m.startswith("LPIPS")][:1] + [m for m in has if m.startswith("KID")][:1] or has[:1]
    return [(f"{m} {arrow(m)}", svg(functools.partial(draw_speed, rows, m), 5.4, 3.2)) for m in chosen]


def draw_speed(rows, metric, axes):
    """Plot a line for each family of rows (same name except the steps), dashed for rows without a network."""
    rows = [row for row in rows if row.metrics.get(metric)]
    families = {}
    for row in rows:
        family = re.sub(r"[\s,:(]*\b\d+[\s-]*(steps?|NFE)\b[\s)]*", "", row.name).strip() or "student"
        families.setdefault(family, []).append(row)
    for colour, (family, members) in zip(COLOURS * len(rows), families.items(), strict=False):
        style = {"color": colour, "label": family.replace("$", r"\$"), "linewidth": 1.8}
        members = sorted(members, key=lambda row: row.nfe or 0)
        if not members[0].nfe:
            axes.axhline(members[0].metrics[metric][0], linestyle="--", **style)
            continue
        means, errors = zip(*(row.metrics[metric] for row in members), strict=True)
        axes.errorbar([row.nfe for row in members], means, np.nan_to_num(errors), marker="o", capsize=3, **style)
    ticks = sorted({row.nfe for row in rows if row.nfe})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("network calls per image")
    axes.legend(frameon=False, fontsize=8, labelcolor=FOREGROUND)


def svg(draw, width=3.6, height=2.0) -> str:
    """Draw a figure as inline SVG in the text colour of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    style = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), FOREGROUND)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "cddistill", "font.size": 9, "axes.formatter.useoffset": False}
    with matplotlib.rc_context(style):
        figure = Figure((width, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=FOREGROUND, alpha=0.12, linewidth=0.6)
        file = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    return text[text.index("<svg") :].replace(FOREGROUND, "currentColor")
