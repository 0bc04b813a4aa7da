"""What goes wrong in distillation, read off the metrics of a run: said in plain words, with the knob to turn.

A rule looks at the last few records of the log, each the mean over `log_every` steps. It asks for metrics by name, so a
method that does not log them is never judged by it. Thresholds are ours; benchmarks/faults.py shows that they name
six injected faults and stay silent on healthy runs.
"""

import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

NEVER_MOVED = 1e-9  # share of their own size by which weights move in an update


class Rule(NamedTuple):
    """A symptom: `sick` takes one array per metric in `needs`, the last `window` records, and says yes or no."""

    needs: tuple[str, ...]
    window: int
    sick: Callable[..., bool]
    words: str


class Alarm(NamedTuple):
    """A rule that holds at a step."""

    step: int
    name: str
    words: str


def contrast(mean, power):
    """Standard deviation over the window from a mean and a mean square."""
    return np.sqrt(max(power.mean() - mean.mean() ** 2, 1e-12))


def still(moved):
    """Whether no update of the window moved anything."""
    return bool((moved < NEVER_MOVED).all())


RULES = {
    "student frozen": Rule(
        ("student/moved",), 3, still,
        "the student's weights do not move: is optim.student.lr 0, or has its warm-up not begun?",
    ),
    "critic frozen": Rule(
        ("critic/moved",), 3, still,
        "the critic's weights do not move, so it cannot follow the student: is optim.critic.lr 0?",
    ),
    "critic too fast": Rule(
        ("critic/moved",), 5, lambda moved: np.median(moved) > 0.01,
        "each update moves the critic by more than 1 % of its weights: lower optim.critic.lr",
    ),
    "critic lost": Rule(
        ("critic/eps_error",), 5, lambda error: np.median(error) > 1.0,
        "the critic predicts noise worse than by saying zero: lower optim.critic.lr, and start anew",
    ),
    "GAN dominates": Rule(
        ("student/gan_share",), 5, lambda share: np.median(share) > 0.5,
        "the GAN's gradient at the sample is larger than the distribution-matching one: lower method.gan_weight",
    ),
    "critic lags": Rule(
        ("critic/eps_error", "student/eps_error"), 20, lambda training, fresh: training.mean() > 1.5 * fresh.mean(),
        "the critic is half as bad again on average as when the student's turn comes, so each of these upsets it: "
        "raise method.ratio, or lower optim.student.lr",
    ),
    "brightness swings": Rule(
        ("critic/sample_mean", "critic/real_mean"), 20,
        lambda drawn, real: np.diff(drawn).std() > 3.0 * np.diff(real).std(),
        "from record to record the brightness of samples changes more than three times as much as that of data: raise "
        "method.ratio (the paper: the smallest that keeps it stable), or lower optim.student.lr",
    ),
    "guidance too high": Rule(
        ("student/target_power", "critic/real_power"), 5, lambda target, real: np.median(target / real) > 2.0,
        "what the guided teacher makes of samples has more than twice the power of data, as no image has: lower "
        "method.real_guidance",
    ),
    "over-saturated": Rule(
        ("critic/sample_mean", "critic/sample_power", "critic/real_mean", "critic/real_power"), 10,
        lambda mean, power, real, real_power: contrast(mean, power) > 1.3 * contrast(real, real_power),
        "samples have more than 1.3 times the contrast of data: lower method.real_guidance",
    ),
    "washed out": Rule(
        ("critic/sample_mean", "critic/sample_power", "critic/real_mean", "critic/real_power"), 20,
        lambda mean, power, real, real_power: contrast(mean, power) < 0.6 * contrast(real, real_power),
        "samples have less than 0.6 times the contrast of data, as when the student collapses to a mean: raise "
        "method.ratio, or lower optim.student.lr",
    ),
    "collapsed": Rule(
        ("val/diversity",), 2, lambda diversity: bool((diversity < 0.15).all()),
        "different noise gives nearly the same image: raise method.ratio or method.dm_weight, or lower "
        "method.gan_weight",
    ),
    "discriminator dead": Rule(
        ("critic/gan", "critic/real_accuracy", "critic/drawn_accuracy"), 50,
        lambda loss, real, drawn: loss.mean() > 1.38 and abs(real.mean() + drawn.mean() - 1.0) < 0.02,
        "the discriminator is no better than chance: raise optim.critic.lr, or for DMD2 method.critic_gan_weight",
    ),
    "discriminator wins": Rule(
        ("critic/real_accuracy", "critic/drawn_accuracy"), 10,
        lambda real, drawn: min(real.mean(), drawn.mean()) > 0.98,
        "the discriminator is right about nearly every image, so it has little to teach: lower optim.critic.lr, or "
        "raise method.gan_weight",
    ),
}  # fmt: skip
LONGEST = max(rule.window for rule in RULES.values())


def read(path) -> list[dict]:
    """The records of a metrics.jsonl, oldest first; lines that a kill tore are left out, of no file there are none."""
    path, records = pathlib.Path(path), []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
            records.append(record | {"step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            continue
    return records


def diagnose(records: Iterable[Mapping[str, float]]) -> list[Alarm]:
    """The first alarm of every rule over a run's records, {"step": 100, "critic/moved": 0.001, ...}, oldest first.

    None stands for a number that was not finite, as in metrics.jsonl.
    """
    seen, alarms = Patient(), []
    for record in records:
        alarms += seen.examine(record)
    return alarms


class Patient:
    """What the rules need of the records so far. Each rule rings once."""

    def __init__(self):
        self.history, self.rung = {}, set()

    def examine(self, record: Mapping[str, float]) -> list[Alarm]:
        """The alarms that this record raises."""
        for name, value in record.items():
            self.history.setdefault(name, []).append(np.nan if value is None else value)
            del self.history[name][:-LONGEST]
        new = []
        for name, rule in RULES.items():
            if name not in self.rung and {*rule.needs} & {*record} and self.holds(rule):
                self.rung.add(name)
                new.append(Alarm(int(record["step"]), name, rule.words))
        return new

    def holds(self, rule: Rule) -> bool:
        """Whether the window is full, finite and sick."""
        windows = [np.array(self.history.get(name, ())[-rule.window :], float) for name in rule.needs]
        whole = all(len(w) == rule.window and np.isfinite(w).all() for w in windows)
        return whole and bool(rule.sick(*windows))
