"""Training, from a config to a report: build, restore, loop, log, checkpoint, evaluate. The file to read first."""

import contextlib
import dataclasses
import errno
import os
import resource
import time
from pathlib import PurePath

import jax

from cddistill import (
    checkpoint,
    clock,
    config,
    data,
    environment,
    generate,
    io,
    lock,
    log,
    memory,
    profiling,
    sharding,
    signals,
)
from cddistill.build import Parts, build, in_frozen_dtype, open_checkpoints
from cddistill.checks import training_splits
from cddistill.data import digests
from cddistill.evals import compare, preview
from cddistill.models.fingerprint import fingerprint
from cddistill.step import active

INPUTS = "inputs.json"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
WRITTEN = ("checkpoints", "metrics.jsonl", "samples", "scores.json", "report.html")  # of what a run writes, in order


def train(settings, workdir: PurePath) -> int:
    """Train to config.steps, resuming from what the workdir holds; then evaluate and write report.html.

    Returns the exit status: 0 or, if a signal stopped it before the last step or the report, 143 for SIGTERM and
    130 for Ctrl-C, so that GKE, Slurm and other schedulers start it again. Raises ValueError for bad input before the
    first step, FloatingPointError for a loss that is not finite, OSError when the disk is full and lock.InUse when
    another process trains in the workdir.
    """
    began, experiment, plain = time.monotonic(), config.resolve(settings), config.plain(settings)
    if not experiment.method.turns():
        raise ValueError("this method trains nothing: use --mode=evaluate or --mode=sample")
    profiling.check(experiment.run.profile, experiment.run.steps)
    log.check(experiment.run.log)
    io.ensure_writable(workdir)
    with naming_checkpoint(workdir), lock.held(workdir, index=jax.process_index()):
        return train_alone(experiment, plain, workdir, began)


def train_alone(experiment: config.Experiment, plain: dict, workdir: PurePath, began: float) -> int:
    """As `train`, in a workdir that no other process writes."""
    run = experiment.run
    parts = prepare(workdir, experiment, plain)
    checkpoints = open_checkpoints(workdir, experiment)
    state = start(parts, checkpoints)
    parts = in_frozen_dtype(parts)
    first = int(state.step)
    environment.record(workdir, first)
    print(overview(parts), flush=True)
    if int(state.step) < run.steps:
        print("compiling the train step: seconds for a small network, minutes for a large one ...", flush=True)
    with signals.Preemption() as stop:
        state, timings = loop(parts, state, workdir, checkpoints, stop, began)
        checkpoints.close()
    if stopped := int(state.step) < run.steps or (stop.asked and run.report):
        print(f"stopped at step {int(state.step)}; the same command resumes from {checkpoints.last_good()}")
    elif run.report:
        timings |= {f"training{f' since step {first}' * (first > 0)}, s": time.monotonic() - began}
        compare.evaluate_and_report(parts, state, workdir, timings, plain)
    if sharding.is_host0():
        written = [name for name in WRITTEN if (workdir / name).exists()]
        print(f"step {int(state.step)} of {run.steps}; in {workdir}: {', '.join(written)}", flush=True)
    return stop.status if stopped else 0


@contextlib.contextmanager
def naming_checkpoint(workdir: PurePath):
    """An error of the disk, such as a full one, says what to resume from."""
    try:
        yield
    except OSError as error:
        good = checkpoint.last_good(workdir / "checkpoints")
        if error.errno not in DISK or good in str(error):
            raise
        said = f"{error.strerror}; the last good checkpoint is {good}"
        raise OSError(error.errno, said, *[error.filename] * bool(error.filename)) from error


def prepare(workdir: PurePath, experiment: config.Experiment, plain: dict) -> Parts:
    """Build the run, and record its config and inputs, once it is known that they are those of the workdir."""
    resumes, paths, old = checkpoint.has_steps(workdir), config.paths(experiment), {}
    if resumes:  # before the first checkpoint, another config may still be tried
        old = read_inputs(workdir) if (workdir / INPUTS).is_file() else {}
        free = config.mutable_on_resume(experiment)
        checkpoint.check_config(workdir, plain, free | paths if old else free)
    cache_programs(workdir)
    parts = build(experiment, training_splits(experiment.run))
    if resumes:
        check_inputs(workdir, parts, plain, paths)
    if experiment.run.report and experiment.run.baseline:
        compare.load_baseline(parts)  # fails now rather than after training
    record_inputs(workdir, parts, plain, old)
    checkpoint.write_config(workdir, plain)
    return parts


def start(parts, checkpoints):
    """The newest checkpoint's state; without one the state at step 0, perhaps with another run's weights."""
    if checkpoints.latest_step() is not None:
        return checkpoints.restore(parts.abstract)
    state = parts.init()
    source = parts.experiment.run.init_from_run
    return init_from_run(parts, state, io.path(source)) if source else state


def loop(parts, state, workdir, checkpoints, stop, began):
    """All remaining steps. The host waits only for the step before the one in flight."""
    run, first = parts.experiment.run, int(state.step)
    turns, driver, look = parts.experiment.method.turns(), parts.driver(), preview.preview(parts)
    rules = parts.experiment.method.health_rules()
    host0, options = sharding.is_host0(), {"run": run, "method": parts.experiment.method, "data": parts.experiment.data}
    options = {name: dataclasses.asdict(group) for name, group in options.items()}
    writer = log.make_writer(workdir, run.steps, run.batch_size, rules, first, host0, run.log, options)
    state, frozen = driver.put_state(state), driver.put_frozen(parts.frozen)
    stream = parts.batches(driver, frozen, first)
    times = clock.Clock(workdir, first, began, run.batch_size, host0)
    recorder = Recorder(run, writer, checkpoints.last_good, began, times)
    play, profile = clock.Programs(driver.step, times, run.accumulate), profiling.Profile(run.profile, workdir)
    try:
        for step in range(first + 1, run.steps + 1):
            with profile.before(step):
                state, metrics = play(state, frozen, times.next(stream), active(turns, step - 1))
                recorder.push(step, metrics)
            profile.after(step, metrics)
            stopping, scores = stop.requested(step), None
            looks = step % run.eval_every == 0 and not stopping
            saves = stopping or step == run.steps or step % run.checkpoint_every == 0
            if looks or saves:
                recorder.flush()
            if looks:
                with times.spending("evaluation"), stop.leaving():
                    scores = look(driver.get_state(state), step, workdir, writer)
                stopping = stop.asked
            if saves or stopping:
                with times.spending("checkpoint"):
                    writer.flush()  # the records up to a checkpoint are never lost
                    checkpoints.save(step, driver.get_state(state), metrics=scores)
                times.write()
            if stopping:
                break
        with times.spending("checkpoint"):
            checkpoints.wait()
    finally:
        profile.close()
        times.close()
        writer.close()
    return driver.get_state(state), recorder.timings | times.facts() | {"peak memory, GB": peak_memory()}


class Recorder:
    """Metrics from the device to the writer: one step late, and averaged over log_every steps."""

    def __init__(self, run, writer, last_good, began: float, times: clock.Clock):
        self.run, self.writer, self.began, self.times = run, writer, began, times
        self.late, self.means, self.timings = log.Delayed(last_good), log.Means(), {}

    def push(self, step: int, metrics) -> None:
        """Take a step's metrics, and record those of the step before."""
        self.record(self.late.push(step, metrics))

    def flush(self) -> None:
        """Record the metrics of the step in flight, waiting for it."""
        self.record(self.late.flush())

    def record(self, known) -> None:
        """Count (step, metrics), if there are any, and write the means when they are due."""
        if known is None:
            return
        step, metrics = known
        self.means.add(metrics)
        if not self.timings:
            self.timings["time to first step, s"] = seconds = time.monotonic() - self.began
            print(f"first step after {seconds:.1f} s, peak memory {peak_memory():.2f} GB", flush=True)
            memory.trim()
        if step % self.run.log_every == 0 or step == self.run.steps:
            self.writer.write_scalars(step, self.means.take() | self.times.take(step))


def init_from_run(parts, state, workdir: PurePath):
    """The state at step 0 with the trained weights of another run, of all nets that both have."""
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(
            f"init_from_run={str(workdir)!r} holds no run: it is the --workdir of one that has been trained"
        )
    with contextlib.closing(checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)) as source:
        common = sorted(source.nets() & {*state.nets})
        if not common:
            raise ValueError(f"the run in {workdir} trained none of {', '.join(state.nets)}")
        nets = state.nets | source.restore_weights(parts.abstract.replace(ema={}), common).nets
    print(f"{' and '.join(common)} from {workdir}", flush=True)
    return state.replace(nets=nets, ema={name: jax.tree.map(jax.numpy.copy, nets[name]) for name in state.ema})


# ---- paths that change


def check_inputs(workdir: PurePath, parts, plain: dict, keys: set[str]) -> None:
    """Raises ValueError if one of the paths `keys` in the config changed, and something else lies there than before.

    The networks that a run starts from must have the same weights (`input_weights`), its data the same files
    (`digests.of_path`). A baseline may be any, and a run that has started reads init_from_run no more. Runs
    that have recorded nothing pass: training then lets no path change.
    """
    moved = {k: v for k, v in checkpoint.changed(workdir, plain).items() if k in keys - {"baseline", "init_from_run"}}
    if not moved or not (workdir / INPUTS).is_file():
        return
    known = read_inputs(workdir)
    data_keys = [key for key in moved if key in known["data"]]
    wrong = [key for key in data_keys if digests.of_path(moved[key][1]) != known["data"][key]]
    if networks := [key for key in moved if key not in data_keys]:
        now = input_weights(parts)  # without what only training loads
        same = now == {role: known["weights"].get(role) for role in now}
        wrong += [key for key in networks if not (same and all(moved[key]))]  # "" is no place
    if wrong:
        said = "; ".join(f"{key}: {moved[key][0]} in the workdir, {moved[key][1]} now" for key in wrong)
        raise ValueError(
            f"{workdir} holds another run ({said}), and what lies there differs: a path may change to that of a copy; "
            "undo it, or use another workdir"
        )


def read_inputs(workdir: PurePath) -> dict[str, dict]:
    """What `record_inputs` wrote. Raises ValueError if it is damaged."""
    found = io.read_json(workdir / INPUTS, "delete it", paths=dict, weights=dict, data=dict)
    for key, value in io.flatten(found).items():
        if not isinstance(value, str):
            raise ValueError(f"{workdir / INPUTS} has {key} = {value!r:.60}, where a text is expected: delete it")
    return found


def input_weights(parts) -> dict[str, str]:
    """Fingerprints of the networks that a run starts from, by role; a teacher's LoRA counts with the teacher."""
    run, method = parts.experiment.run, parts.experiment.method
    own = {} if method.paths else method.requires().nets  # come with the package
    nets = {role: net.params for role, net in parts.frozen.items() if role not in own and jax.tree.leaves(net.params)}
    if run.lora:  # merged sums differ from platform to platform: what is stored counts, and is read again
        nets = {role: params for role, params in nets.items() if not role.startswith("teacher")}
    found = {role: fingerprint(checkpoint.by_name(params)) for role, params in nets.items()}
    return found | ({"teacher": dataclasses.replace(parts.pipeline).weights} if run.lora else {})


def record_inputs(workdir: PurePath, parts, plain: dict, old: dict) -> None:
    """Write inputs.json: where a run's inputs lie and their fingerprints, for `check_inputs`; and one example.

    `old` is what was recorded when the run started, whose fingerprints stay.
    """
    values = {key: value for key, value in io.flatten(plain).items() if key in config.paths(parts.experiment)}
    found = {
        "paths": {key: os.path.realpath(value) for key, value in values.items() if value and os.path.exists(value)},
        "weights": old.get("weights") or input_weights(parts),
        "data": old.get("data") or {k: digests.of_path(values[k]) for k in ("data.path", "data.pairs")},
    }
    if sharding.is_host0():
        io.write_json(workdir / INPUTS, found)
    if not old or not (workdir / "example.npz").is_file():
        some = data.examples(parts.experiment.data, data.shown(parts.experiment.data), 1)
        checkpoint.write_example(workdir, generate.encoded(parts, some))


def overview(parts) -> str:
    """What trains, on what, in one line."""
    moving = sorted({name for turn in parts.experiment.method.turns().values() for name in turn.moves})
    weights = {name: sum(x.size for x in jax.tree.leaves(parts.abstract.nets[name])) / 1e6 for name in moving}
    trained = " + ".join(f"{name} {millions:.1f} M" for name, millions in weights.items())
    said = f"trains {trained} weights on {jax.device_count()} x {jax.devices()[0].device_kind}"
    numbers = data.loader.numbers_of(parts.experiment.data)
    if not numbers:
        return said
    each = ", ".join(f"{data.buckets.named(shape)} {n}" for shape, n in numbers.items())
    return f"{said}\ntraining images in {len(numbers)} buckets, for each of which a program is compiled: {each}"


def cache_programs(folder: PurePath) -> None:
    """Keep compiled programs in JAX_COMPILATION_CACHE_DIR, so that the next start is quick.

    The default is the user's cache or, with several hosts, a place in this folder, which all of them must see: only the
    first host writes programs, and each reads them.
    """
    if jax.config.jax_compilation_cache_dir is None:
        own = os.path.expanduser("~/.cache/cddistill/programs")
        jax.config.update("jax_compilation_cache_dir", str(folder / ".programs") if jax.process_count() > 1 else own)
    io.path(jax.config.jax_compilation_cache_dir)  # which may be on an object store: JAX, too, uses etils for these
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def peak_memory() -> float:
    """Largest amount of memory in use so far, in GB: the device's if it says, else this process's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
