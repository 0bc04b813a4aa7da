"""Signs of a failing run, found in its metrics: what is wrong in plain words, and which option to change.

A rule looks at the last records of the log, each the mean over `log_every` steps, and reads metrics by name. A method
says which rules apply to it (`Method.health_rules`). Thresholds are ours; benchmarks/faults.py shows that they detect
six injected faults and stay silent on healthy runs.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

NEVER_MOVED = 1e-9  # relative size of an update, |update| / |weights|, below which nothing is trained


class Rule(NamedTuple):
    """A symptom: `sick` takes the last `window` records of each metric in `needs`, one array each; True is an alarm."""

    needs: tuple[str, ...]
    window: int  # records
    sick: Callable[..., bool]
    words: str


class Alarm(NamedTuple):
    """A rule that holds at a step."""

    step: int
    name: str
    words: str


Rules = Mapping[str, Rule]


def statistics(name: str, x) -> dict:
    """Metrics <name>_mean (brightness) and <name>_power, the mean square (contrast), of samples x [b, ...]."""
    return {f"{name}_mean": x.mean(), f"{name}_power": (x**2).mean()}


def contrast(mean, power):
    """Standard deviation over the window from means and mean squares."""
    return np.sqrt(max(power.mean() - mean.mean() ** 2, 1e-12))


def frozen(*turns: str) -> dict[str, Rule]:
    """One rule for each turn: its weights do not move."""
    return {
        f"{turn} frozen": Rule(
            (f"{turn}/moved",), 3, lambda moved: bool((moved < NEVER_MOVED).all()),
            f"the weights that the turn {turn!r} trains do not move: is optim.{turn}.lr 0, or is it still warming up?",
        )
        for turn in turns
    }  # fmt: skip


COLLAPSE = {
    "collapsed": Rule(
        ("val/diversity",), 2, lambda diversity: bool((diversity < 0.15).all()),
        "different noise gives nearly the same image (mode collapse): lower method.gan_weight, or raise the weight of "
        "the distribution-matching or regression loss",
    ),
}  # fmt: skip
CRITIC = {
    "critic too fast": Rule(
        ("critic/moved",), 5, lambda moved: np.median(moved) > 0.01,
        "each update moves the critic by more than 1 % of its weights: lower optim.critic.lr",
    ),
}  # fmt: skip
DISCRIMINATOR = {
    "discriminator dead": Rule(
        ("critic/gan", "critic/real_accuracy", "critic/generated_accuracy"), 50,
        lambda loss, real, generated: loss.mean() > 1.38 and abs(real.mean() + generated.mean() - 1.0) < 0.02,
        "the discriminator is no better than chance: raise optim.critic.lr, or the GAN's weight in the critic's loss",
    ),
    "discriminator wins": Rule(
        ("critic/real_accuracy", "critic/generated_accuracy"), 10,
        lambda real, generated: min(real.mean(), generated.mean()) > 0.98,
        "the discriminator classifies nearly every image correctly, so its gradient teaches little: lower "
        "optim.critic.lr, or raise method.gan_weight",
    ),
}  # fmt: skip
DISTRIBUTION_MATCHING = {
    "critic lost": Rule(
        ("critic/eps_error",), 5, lambda error: np.median(error) > 1.0,
        "the fake score's noise prediction is worse than predicting zero: lower optim.critic.lr and start again",
    ),
    "GAN dominates": Rule(
        ("student/gan_share",), 5, lambda share: np.median(share) > 0.5,
        "the GAN's gradient at the sample is larger than the distribution-matching one: lower method.gan_weight",
    ),
    "critic lags": Rule(
        ("critic/eps_error", "student/eps_error"), 20,
        lambda training, at_student: training.mean() > 1.5 * at_student.mean(),
        "the fake score's error is 1.5 times what it is when the student's turn comes, so each student update sets it "
        "back: raise method.ratio, or lower optim.student.lr",
    ),
    "brightness swings": Rule(
        ("critic/sample_mean", "critic/real_mean"), 20,
        lambda generated, real: np.diff(generated).std() > 3.0 * np.diff(real).std(),
        "from record to record the mean brightness of samples changes more than three times as much as that of data: "
        "raise method.ratio (the paper: the smallest that keeps it stable), or lower optim.student.lr",
    ),
    "guidance too high": Rule(
        ("student/target_power", "critic/real_power"), 5, lambda target, real: np.median(target / real) > 2.0,
        "the guided teacher's x0 prediction has more than twice the power of data: lower method.real_guidance",
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
}  # fmt: skip


def read(path) -> list[dict]:
    """The records of a metrics.jsonl, oldest first; [] if there is no file. Lines that are none, as a kill leaves them,
    are skipped."""
    path = pathlib.Path(path)
    lines = path.read_bytes().split(b"\n") if path.is_file() else ()
    return [found for line in lines if (found := record(line))]


def record(line: bytes) -> dict[str, int | float | None] | None:
    """A line of metrics.jsonl: numbers by name, None for one that is not finite or no number. None for another line."""
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or type(found.get("step")) is not int or not 0 <= found["step"] < 2**63:
        return None
    return {name: x if type(x) in (int, float) and abs(x) <= sys.float_info.max else None for name, x in found.items()}


def diagnose(records: Iterable[Mapping[str, float]], rules: Rules) -> list[Alarm]:
    """The first alarm of every rule over a run's records, {"step": 100, "critic/moved": 0.001, ...}, oldest first.

    None stands for a number that was not finite, as in metrics.jsonl.
    """
    monitor, alarms = Monitor(rules), []
    for record in records:
        alarms += monitor.examine(record)
    return alarms


class Monitor:
    """The history that the rules need. Each rule raises at most one alarm."""

    def __init__(self, rules: Rules):
        self.rules, self.history, self.raised = rules, {}, set()
        self.longest = max((rule.window for rule in rules.values()), default=1)

    def examine(self, record: Mapping[str, float]) -> list[Alarm]:
        """The alarms that this record raises."""
        for name, value in record.items():
            self.history.setdefault(name, []).append(np.nan if value is None else value)
            del self.history[name][: -self.longest]
        new = []
        for name, rule in self.rules.items():
            if name not in self.raised and {*rule.needs} & {*record} and self.holds(rule):
                self.raised.add(name)
                new.append(Alarm(int(record["step"]), name, rule.words))
        return new

    def holds(self, rule: Rule) -> bool:
        """Whether the window is full and finite and shows the symptom."""
        windows = [np.array(self.history.get(name, ())[-rule.window :], float) for name in rule.needs]
        complete = all(len(w) == rule.window and np.isfinite(w).all() for w in windows)
        return complete and bool(rule.sick(*windows))
