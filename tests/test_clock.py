"""Where a run's time goes: device times by a clock that the test sets, goodput over restarts, the programs' FLOPs."""

import json
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cddistill import clock, config, devices, profiling, train


class Step:
    """Metrics of a step that is done when the test says so."""

    def __init__(self):
        self.done, self.noted = threading.Event(), threading.Event()

    def block_until_ready(self):
        self.done.wait(10)
        return self


class Days(SimpleNamespace):
    """A clock that the test moves."""

    now: float = 100.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1e9 + self.now


@pytest.fixture
def days(monkeypatch):
    """Time stands still until the test says what time it is."""
    days = Days()
    monkeypatch.setattr(clock, "time", days)
    return days


def session(days, workdir, steps, first=0, wait=0.0, busy=2.0):
    """After steps of `busy` s, the batch of each `wait` s too late. A step ends before the next is asked for."""
    times = clock.Clock(workdir, first, days.now - 5.0, batch_size=8)
    for _ in range(steps):
        play(days, times, busy, wait)
    return times


def play(days, times, busy, wait=0.0, flops=3.0):
    """One step."""
    step = Step()

    def batches():
        days.now += wait
        yield {}

    times.next(batches())
    times.watch(step, flops)
    days.now += busy
    before = times.noted
    step.done.set()
    with times.news:
        assert times.news.wait_for(lambda: times.noted > before, timeout=10)


def test_step_time_waits_and_speed_of_the_steps_since_the_last_log(days, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "peak_of", lambda kind: SimpleNamespace(flops=6.0))
    times = session(days, tmp_path, 3, wait=0.5)
    found = times.take(3)
    assert found["time/step_ms"] == 2000.0
    assert found["time/data_wait"] == pytest.approx(1.5 / 7.5)
    assert found["time/images_per_s"] == pytest.approx(3 * 8 / 7.5)
    assert found["time/mfu"] == pytest.approx(3.0 / 2.0 / 6.0)
    assert found["time/goodput"] == pytest.approx(6.0 / (5.0 + 7.5))
    with times.spending("evaluation"):
        days.now += 100.0  # between logs: no step was slower for it
    play(days, times, 4.0)
    again = times.take(4)
    assert (again["time/step_ms"], again["time/data_wait"], again["time/images_per_s"]) == (4000.0, 0.0, 2.0)
    times.close()


def test_a_wait_for_data_costs_nothing_while_the_step_before_is_running(days, tmp_path):
    times, (one, two) = clock.Clock(tmp_path, 0, days.now, 8), (Step(), Step())
    times.next(iter([{}]))
    times.watch(one)

    def late():
        days.now += 3.0
        yield {}

    times.next(late())  # the step takes 10 s
    times.watch(two)
    for step, seconds in ((one, 7.0), (two, 10.0)):
        days.now += seconds
        before = times.noted
        step.done.set()
        with times.news:
            assert times.news.wait_for(lambda before=before: times.noted > before, timeout=10)
    found = times.take(2)
    assert (found["time/step_ms"], found["time/data_wait"]) == (10_000.0, 0.0)
    times.close()


def test_an_unknown_device_has_no_mfu(days, tmp_path):
    times = session(days, tmp_path, 1)
    assert "time/mfu" not in times.take(1)  # a CPU
    times.close()


def test_goodput_counts_steps_that_were_lost_all_starts_and_the_time_between(days, tmp_path):
    """Ten steps, of which four are lost by a crash; an hour later they are done again, and ten more."""
    times = session(days, tmp_path, 10)
    times.take(10)
    times.write()  # killed here: close is not called
    days.now += 3600.0
    times = session(days, tmp_path, 14, first=6)
    with times.spending("checkpoint"):
        days.now += 1.0
    times.take(20)
    times.close()
    rows = {what: seconds for what, seconds, _ in clock.table(tmp_path)}
    wall = 5.0 + 20.0 + 3600.0 + 28.0 + 1.0  # the second start is in the hour
    assert sum(rows.values()) == pytest.approx(wall)
    assert rows["steps that were kept (goodput)"] == pytest.approx(48.0 * 20 / 24)
    assert rows["steps that were done again"] == pytest.approx(48.0 * 4 / 24)
    assert rows[clock.LOSSES["start"]] == 10.0
    assert rows[clock.LOSSES["checkpoint"]] == 1.0
    assert clock.goodput(clock.read(tmp_path)) == pytest.approx(40.0 / wall)


def test_a_run_of_an_older_version_counts_from_its_next_start(days, tmp_path):
    times = session(days, tmp_path, 4, first=100)
    times.take(104)
    assert times.times()["from_step"] == 100
    assert clock.kept(times.times()) == pytest.approx(8.0)
    times.close()
    assert clock.table(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("change", [{"seconds": {"step": "x"}}, {"steps": None}, {"seconds": {"data": -1.0}}])
def test_damaged_times_are_named(days, tmp_path, change):
    session(days, tmp_path, 1).close()
    path = tmp_path / clock.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"goodput\.json .*delete it"):
        clock.Clock(tmp_path, 0, 0.0, 8)


def test_a_start_after_the_last_step_changes_nothing(days, tmp_path):
    session(days, tmp_path, 2).close()
    before = clock.table(tmp_path)
    days.now += 3600.0
    session(days, tmp_path, 0, first=2).close()
    assert clock.table(tmp_path) == before


def test_only_one_host_writes(days, tmp_path):
    clock.Clock(tmp_path, 0, days.now, 8, writes=False).close()
    assert list(tmp_path.iterdir()) == []


def test_programs_are_compiled_once_and_their_flops_are_xlas(tmp_path):
    times = clock.Clock(tmp_path, 0, time.monotonic(), 8)
    step = jax.jit(lambda state, frozen, batch, play: (state, {"loss": (batch @ batch).sum()}), static_argnums=3)
    programs, x = clock.Programs(step, times, accumulate=3), jnp.ones((64, 64))
    for _ in range(2):
        _, metrics = programs(x, x, x, ("critic",))
        np.testing.assert_allclose(metrics["loss"], 64.0**3)
    (flops,) = {flops for _, flops in programs.known.values()}
    assert 2 * 64**3 <= flops / 3 < 2.1 * 64**3
    assert step._cache_size() == 0  # not compiled a second time
    assert times.seconds["compile"] > 0.0
    times.close()
    assert times.times()["steps"] == 2


def test_each_shape_of_a_batch_has_its_program(tmp_path):
    times = clock.Clock(tmp_path, 0, time.monotonic(), 8)
    step = jax.jit(lambda state, frozen, batch, play: (state, {"loss": batch["x0"].sum()}), static_argnums=3)
    programs = clock.Programs(step, times, accumulate=1)
    for shape in ((4, 8), (4, 4), (4, 8)):
        assert programs(0.0, 0.0, {"x0": jnp.ones(shape)}, ())[1]["loss"] == shape[0] * shape[1]
    assert len(programs.known) == 2
    times.close()


def test_a_step_that_compiles_itself_as_pmaps_does_is_timed_without_flops(tmp_path):
    times, played = clock.Clock(tmp_path, 0, time.monotonic(), 8), []

    def step(state, frozen, batch, play):
        played.append(play)
        return state + 1, {"loss": jnp.ones(())}

    programs = clock.Programs(step, times, accumulate=1)
    for play in (("critic",), ("critic", "student"), ("critic",)):
        assert programs(1, None, None, play)[0] == 2
    assert played == [("critic",), ("critic", "student"), ("critic",)]
    assert times.seconds["compile"] > 0.0
    times.close()
    assert times.times()["steps"] == 3
    assert all(done.flops is None for done in times.interval)


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((5, 4), "profile=5,4 must be the first and the last step to trace, at most 10"),
        ((3, 11), "profile=3,11 must be the first and the last step to trace, at most 10"),
        ((3,), r"profile=\(3,\) must be two numbers, or none"),
        ((0, 3), r"profile\[0\]=0 must be at least 1"),
    ],
)
def test_a_profile_of_steps_that_a_run_does_not_have_is_refused(steps, said, tmp_path):
    settings = config.defaults("codi")
    settings.update(steps=10, profile=steps)
    with pytest.raises(ValueError, match=said):
        train.train(settings, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_profile_is_of_the_steps_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, **_: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    profile = profiling.Profile((3, 4), tmp_path)
    for step in range(1, 7):
        with profile.before(step):
            calls.append(step)
        profile.after(step, {})
    profile.close()
    assert calls == [1, 2, ("start", str(tmp_path / "profile")), 3, 4, "stop", 5, 6]
