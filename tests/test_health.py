"""Health rules on a run's metrics: each raises one alarm on its symptom, when its window is full."""

import json

import numpy as np
import pytest
import rich.console

from cddistill import health, log

RULES = (
    health.frozen("student", "critic")
    | health.COLLAPSE
    | health.CRITIC
    | health.DISCRIMINATOR
    | health.DISTRIBUTION_MATCHING
)

WELL = {
    "student/moved": 1e-3, "critic/moved": 1e-3, "critic/eps_error": 0.2, "student/eps_error": 0.19,
    "student/gan_share": 0.2, "student/target_power": 0.25, "critic/sample_mean": 0.1, "critic/sample_power": 0.26,
    "critic/real_mean": 0.1, "critic/real_power": 0.26, "val/diversity": 0.5, "critic/gan": 1.2,
    "critic/real_accuracy": 0.7, "critic/generated_accuracy": 0.7,
}  # fmt: skip
ILL = {
    "student frozen": {"student/moved": 0.0},
    "critic frozen": {"critic/moved": 0.0},
    "critic too fast": {"critic/moved": 0.015},
    "critic lost": {"critic/eps_error": 1.5, "student/eps_error": 1.5},
    "GAN dominates": {"student/gan_share": 0.95},
    "critic lags": {"critic/eps_error": 0.35},
    "guidance too high": {"student/target_power": 0.8},
    "over-saturated": {"critic/sample_power": 0.6},
    "washed out": {"critic/sample_power": 0.05},
    "collapsed": {"val/diversity": 0.02},
    "discriminator dead": {"critic/gan": 1.386, "critic/real_accuracy": 0.5, "critic/generated_accuracy": 0.5},
    "discriminator wins": {"critic/real_accuracy": 1.0, "critic/generated_accuracy": 0.99},
}


def records(changes, n=60):
    """A run's log with 2 % noise."""
    rng = np.random.default_rng(0)
    noisy = lambda: {k: v * (1 + 0.02 * rng.normal()) for k, v in (WELL | changes).items()}
    return [{"step": 10 * (i + 1), **noisy()} for i in range(n)]


def names(rows):
    return {alarm.name for alarm in health.diagnose(rows, RULES)}


def test_a_healthy_run_raises_no_alarm():
    assert not names(records({}))


@pytest.mark.parametrize("name", ILL)
def test_each_symptom_raises_its_alarm_when_the_window_is_full(name):
    rows, window = records(ILL[name]), RULES[name].window
    assert names(rows) == {name}
    assert not names(rows[: window - 1])
    (alarm,) = health.diagnose(rows, RULES)
    assert alarm.step == 10 * window


def test_oscillating_brightness_raises_only_its_alarm():
    rows = records({})
    for i, row in enumerate(rows):
        row["critic/sample_mean"] = 0.1 + 0.2 * np.sin(i)
        row["critic/sample_power"] = 0.3
    assert names(rows) == {"brightness swings"}


def test_every_rule_has_a_test():
    assert {*ILL, "brightness swings"} == {*RULES}


def test_missing_and_non_finite_metrics_raise_no_alarm():
    assert not names([{"step": i, "student/moved": None} for i in range(30)])
    assert not names([{"step": i, "student/loss": 1.0} for i in range(30)])


def test_rules_without_their_metrics_are_skipped():
    assert names([{"step": i, "student/moved": 0.0, "student/loss": 1.0} for i in range(5)]) == {"student frozen"}


def test_an_alarm_is_printed_once_and_counts_records_before_a_restart(tmp_path):
    rows = records(ILL["critic frozen"])
    writer = log.JsonlWriter(tmp_path)
    with (tmp_path / "out.txt").open("w") as out:
        console = rich.console.Console(file=out, width=200)
        for row in rows[:2]:
            writer.write_scalars(row["step"], {k: v for k, v in row.items() if k != "step"})
        again = log.HealthWriter(tmp_path, console, RULES, first_step=20)  # the first two records come from the file
        for row in rows[2:]:
            again.write_scalars(row["step"], row)
    said = (tmp_path / "out.txt").read_text()
    assert said.count("critic frozen at step 30") == 1
    assert "optim.critic.lr" in said
    assert [r["step"] for r in health.read(tmp_path / "metrics.jsonl")] == [10, 20]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["critic/moved"] == 0.0


def test_incomplete_lines_are_skipped(tmp_path):
    """A killed run leaves them; it can still be evaluated."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "student/moved": 0.0}\n[1]\n{"student/moved": 0.0}\n{"step": 20, "stu')
    assert health.read(path) == [{"step": 10, "student/moved": 0.0}]
    assert health.read(tmp_path / "nothing.jsonl") == []
