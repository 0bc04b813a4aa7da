"""A run from its config to its report: build, restore, loop, log, checkpoint, evaluate. The file to read first."""

import contextlib
import json
import pathlib
import resource
import time

import jax

from cddistill import build, checkpoint, config, data, encode, evaluate, export, metrics, pairs, sharding
from cddistill.method import Generator
from cddistill.step import active


def train(settings, workdir: pathlib.Path) -> None:
    """Train to config.steps, continuing what the workdir holds; then evaluate and write report.html.

    Returns early, with a checkpoint, on SIGTERM. Raises ValueError for bad input before the first step,
    FloatingPointError for a loss that is not finite, OSError when the disk is full.
    """
    began = time.monotonic()
    experiment = config.resolve(settings)
    if not experiment.method.turns():
        raise ValueError("this method trains nothing: use --mode=evaluate or --mode=sample")
    free = (
        config.FREE if all(o.decay == "constant" for o in experiment.optim.values()) else set(config.FREE) - {"steps"}
    )
    claim(workdir)
    plain = config.plain(settings)
    checkpoint.check_config(workdir, plain, free)
    cache_programs()
    parts = build.build(experiment)
    if experiment.run.report and experiment.run.baseline:
        evaluate.load_baseline(parts)  # a folder that cannot be loaded is better known now
    checkpoint.write_config(workdir, plain)
    checkpoints = open_checkpoints(workdir, experiment)
    if checkpoints.latest_step() is not None:
        state = checkpoints.restore(parts.abstract)
    else:
        state = parts.init()
        state = borrow(parts, state, pathlib.Path(experiment.run.start_from)) if experiment.run.start_from else state
    print(overview(parts), flush=True)
    with checkpoint.Preemption() as stop:
        state, timings = loop(parts, state, workdir, checkpoints, stop, began)
    checkpoints.close()
    if int(state.step) < experiment.run.steps:
        print(f"stopped at step {int(state.step)}; the same command goes on from {checkpoints.last_good()}")
    elif experiment.run.report:
        evaluate.report(parts, state, workdir, timings | {"training, s": time.monotonic() - began}, plain)


def loop(parts, state, workdir, checkpoints, stop, began):
    """All remaining steps. The host only ever waits for the step before the one in flight."""
    run, first = parts.experiment.run, int(state.step)
    turns, driver = parts.experiment.method.turns(), parts.driver()
    preview = evaluate.preview(parts)
    writer = metrics.make_writer(workdir, run.steps, run.batch_size, first, sharding.is_host0())
    late, means, timings = metrics.Delayed(checkpoints.last_good), metrics.Means(), {}
    state, frozen = driver.put_state(state), driver.put_frozen(parts.frozen)
    stream = data.batches(parts.experiment.data, batch_size=run.batch_size, seed=run.seed, start=first, rows=parts.rows)

    def log(known):
        step, values = known
        means.add(values)
        if not timings:
            timings["time to first step, s"] = time.monotonic() - began
            print(
                f"first step after {timings['time to first step, s']:.1f} s, peak memory {peak_memory():.2f} GB",
                flush=True,
            )
        if step % run.log_every == 0 or step == run.steps:
            writer.write_scalars(step, means.take())

    try:
        for step in range(first + 1, run.steps + 1):
            batch = driver.put_batch(next(stream))
            state, values = driver.step(state, frozen, batch, active(turns, step - 1))
            if (known := late.push(step, values)) is not None:
                log(known)
            stopping = stop.requested(step)
            last = step == run.steps or stopping
            if not (last or step % run.eval_every == 0 or step % run.checkpoint_every == 0):
                continue
            if (known := late.flush()) is not None:
                log(known)
            scores = None
            if step % run.eval_every == 0:
                scores = preview(driver.get_state(state), step, workdir, writer)
            if last or step % run.checkpoint_every == 0:
                checkpoints.save(step, driver.get_state(state), metrics=scores)
            if stopping:
                break
        checkpoints.wait()
    finally:
        writer.close()
    return driver.get_state(state), timings | {"peak memory, GB": peak_memory()}


def overview(parts) -> str:
    """What trains, on what, in one line."""
    moving = sorted({name for turn in parts.experiment.method.turns().values() for name in turn.moves})
    weights = {name: sum(x.size for x in jax.tree.leaves(parts.abstract.nets[name])) / 1e6 for name in moving}
    trained = " + ".join(f"{name} {millions:.1f} M" for name, millions in weights.items())
    return f"trains {trained} weights on {jax.device_count()} x {jax.devices()[0].device_kind}; the first step compiles"


def open_checkpoints(workdir, experiment, read_only=False) -> checkpoint.Checkpoints:
    """The run's checkpoints; runs with a target to compare with also keep the one of the best validation PSNR."""
    paired = experiment.data.task != "none" and isinstance(experiment.method, Generator)
    best = "val/psnr" if paired else None
    return checkpoint.Checkpoints(workdir / "checkpoints", experiment.run.keep, best, "max", read_only)


def finished(settings, workdir):
    """(parts, trained weights) of a run, for the modes that only look."""
    experiment = config.resolve(settings)
    if not experiment.method.turns():  # nothing to train: the student came with config.teacher
        claim(workdir)
        parts = build.build(experiment)
        return parts, parts.init()
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"{workdir} holds no run: train first, with --mode=train --workdir={workdir}")
    checkpoint.check_config(workdir, config.plain(settings), config.FREE)
    cache_programs()
    parts = build.build(experiment)
    return parts, open_checkpoints(workdir, experiment, read_only=True).restore_weights(parts.abstract)


def evaluate_run(settings, workdir: pathlib.Path) -> None:
    """Score the newest checkpoint on the test split and write the report anew."""
    parts, state = finished(settings, workdir)
    evaluate.report(parts, state, workdir, {}, config.plain(settings))


def sample(settings, workdir: pathlib.Path, source: str | None, output: str) -> None:
    """Draw with the newest checkpoint: see `evaluate.sample`."""
    parts, state = finished(settings, workdir)
    evaluate.sample(parts, state, source, output)


def export_run(settings, workdir: pathlib.Path, output: str) -> None:
    """Write the newest checkpoint in a form for other programs: see `export.export`."""
    target = pathlib.Path(output)
    file = target.suffix in export.FILES
    if not file and target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{output} is not empty: choose another --output, or remove what is in it")
    parts, state = finished(settings, workdir)
    claim(target.parent if file else target, "--output")
    scores = workdir / "scores.json"
    scores = json.loads(scores.read_text()) if scores.is_file() else {}
    said = export.export(parts, state, output, config.plain(settings), scores)
    print(f"exported to {output}; {said}")


def encode_data(settings, output: pathlib.Path) -> None:
    """Write a data set as latents and text embeddings: see `encode.encode`."""
    prepare(encode.encode, settings, output)
    print(f"encoded to {output}: train with --config.data.source=arrays --config.data.path={output}")


def make_pairs(settings, output: pathlib.Path) -> None:
    """Write noise and what the teacher makes of it: see `pairs.make_pairs`."""
    prepare(pairs.make_pairs, settings, output)
    print(f"pairs in {output}: use them with --config.data.pairs={output}")


def prepare(write, settings, output: pathlib.Path) -> None:
    """write(experiment, output, config), once it is known that there is something to write and a place for it."""
    experiment = config.resolve(settings)
    claim(output, "--output")
    cache_programs()
    write(experiment, output, config.plain(settings))


def borrow(parts, state, workdir: pathlib.Path):
    """The state at step 0 with the trained weights of another run, of all nets that both have."""
    if not (workdir / "checkpoints").is_dir():
        raise ValueError(f"start_from={str(workdir)!r} holds no run: it is the --workdir of one that has been trained")
    with contextlib.closing(checkpoint.Checkpoints(workdir / "checkpoints", read_only=True)) as source:
        common = sorted(source.nets() & {*state.nets})
        if not common:
            raise ValueError(f"the run in {workdir} trained none of {', '.join(state.nets)}")
        nets = state.nets | source.restore_weights(parts.abstract.replace(ema={}), common).nets
    print(f"{' and '.join(common)} from {workdir}", flush=True)
    return state.replace(nets=nets, ema={name: jax.tree.map(jax.numpy.copy, nets[name]) for name in state.ema})


def claim(folder: pathlib.Path, flag: str = "--workdir") -> None:
    """Make the folder that a flag names, and find out now whether it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"folder {folder} cannot be written ({error.strerror}); choose another with {flag}") from error


def cache_programs() -> None:
    """Keep compiled programs in the user's cache, so that the next start is quick."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "cddistill" / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def peak_memory() -> float:
    """Largest amount of memory in use so far, in GB: the device's if it says, else this process's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9
