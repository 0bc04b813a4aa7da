"""--mode=plan: what a run takes of its devices, before it starts: memory, FLOPs, communication, hours.

The run's own programs are traced and compiled from shapes: no weights, no data and no device of that kind are needed.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from cddistill import config, encoders, flops, generate, io, sharding
from cddistill.collectives import collectives
from cddistill.config import Experiment
from cddistill.data import buckets
from cddistill.method import Generator
from cddistill.outline import Outline, outline
from cddistill.step import active, select
from cddistill.targets import Target

Depth = Literal["bytes", "flops", "compiled"]
UTILISATION = 0.4  # ours: the share of a device's peak FLOP/s that hours are computed with
USABLE = 0.9  # ours: the share of a device's memory that a program can have; the runtime and fragments take the rest
SAMPLED = 64  # images that are sampled at a time, see `generate.sample`
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # of a CPU program that does
# not run: the buffers are the same


class Program(NamedTuple):
    """One of a run's programs, traced."""

    name: str  # "train: critic + student", "encode", "sample"
    runs: int  # in the whole training; 0: not a part of it
    traced: Any  # jax.stages.Traced
    gradients: int  # bytes on a device
    batch: int  # bytes on a device of what it is given besides weights and optimiser


def plan(experiment: Experiment, target: Target, depth: Depth = "compiled") -> dict[str, Any]:
    """What the run takes, as plain values for plan.json; bytes and FLOPs are those of one device.

    depth is how far it goes: the "bytes" of weights and optimiser, from shapes; "flops", from traced programs, too;
    temporaries, peak and collectives only of "compiled" ones. What is missing is None. Raises ValueError as
    `outline.outline`.
    """
    mesh = sharding.make_mesh(experiment.run.fsdp, target.devices)
    run = outline(experiment, mesh)
    held = resident(run, mesh)
    compile = depth == "compiled"
    traced = () if depth == "bytes" else programs(run, sampled=compile)
    rows = [measure(program, mesh, target, compile) for program in traced]
    total = sum(held.values())
    for row in rows:
        row["peak"] = None if row["temporaries"] is None else total + row["batch"] + row["temporaries"] + row["new"]
    peak = max(row["peak"] for row in rows) if compile else None
    limit = target.memory and USABLE * target.memory
    found = {
        "device": {"kind": target.kind, "number": mesh.size, "data": mesh.shape["data"], "fsdp": mesh.shape["fsdp"],
                   "memory": target.memory, "compiler": target.compiler if compile else None},
        "steps": experiment.run.steps, "batch_size": experiment.run.batch_size,
        "weights": numbers(run), "held": held, "gradients": gradients(run, experiment.method.turns()),
        "programs": rows, "peak": peak,
        "fits": fits(sum(held.values()), peak, limit),
        "utilisation": UTILISATION, **hours(rows, mesh.size, target),
        "notes": notes(rows, target, depth) + of_buckets(experiment.data.size, experiment.data.buckets),
    }  # fmt: skip
    found["changes"] = changes(experiment, target, run, found, limit) if found["fits"] is False else []
    return found


def fits(held: int, peak: int | None, limit: float | None) -> bool | None:
    """Whether a device has enough memory; None if that is not known: what stays in it alone may already be too much."""
    if limit is None or (peak is None and held <= limit):
        return None
    return bool((peak or held) <= limit)


# ---- what stays in memory


def local(tree) -> int:
    """Bytes of a tree on one device."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def on(mesh, tree) -> int:
    """Bytes of a tree of weights on one device of a mesh."""
    return local(sharding.laid_out(tree, sharding.by_shape(mesh, tree)))


def resident(run: Outline, mesh) -> dict[str, int]:
    """Bytes on one device of a mesh that are there from the first step to the last, by kind."""
    state, frozen = run.parts.abstract, run.parts.frozen
    return {
        "trained weights": on(mesh, state.nets),
        "EMA": on(mesh, state.ema),
        "optimiser": on(mesh, state.opt),
        **{f"frozen {role}": size for role, net in frozen.items() if (size := on(mesh, net))},
    }


def gradients(run: Outline, turns) -> int:
    """Bytes on one device of the gradients of these turns: one turn's at a time."""
    return max(local(select(run.parts.abstract.nets, turn.moves)) for turn in turns.values())


def numbers(run: Outline) -> dict[str, int]:
    """How many weights each network has, over all devices."""
    nets = run.parts.abstract.nets | run.parts.frozen
    counts = {role: sum(x.size for x in jax.tree.leaves(net)) for role, net in nets.items()}
    return {role: n for role, n in counts.items() if n}


# ---- programs


def programs(run: Outline, sampled: bool = True) -> Iterator[Program]:
    """The programs of a run: one for each set of turns that some step plays; that which encodes; the sampler's."""
    parts, (experiment, mesh) = run.parts, run.parts[:2]
    turns, driver = experiment.method.turns(), parts.driver()
    plays = Counter(active(turns, step) for step in range(experiment.run.steps))
    state, batch = parts.abstract, local(parts.batch)
    for play, times in plays.most_common():
        if not play:
            continue
        traced = driver.step.trace(state, parts.frozen, parts.batch, play)
        played = {name: turn for name, turn in turns.items() if name in play}
        yield Program(f"train: {' + '.join(play)}", times, traced, gradients(run, played), batch)
    if encode := parts.encoders:
        given = encoders.inputs(run.loaded)
        traced = driver.by_row(encode.at_step).trace(encode.networks(parts.frozen), given, np.int32(0))
        yield Program("encode", experiment.run.steps, traced, 0, local(given))
    if sampled and isinstance(experiment.method, Generator):
        yield sampler(run, mesh)


def sampler(run: Outline, mesh) -> Program:
    """The program that generates images in the most of run.sample_steps."""
    parts, steps = run.parts, max(run.parts.experiment.run.sample_steps)
    student = generate.student_of(parts, parts.abstract)
    n = -(-SAMPLED // mesh.size) * mesh.size
    given = {name: x for name, x in parts.batch.items() if name in (*generate.INPUTS, "index")}
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype, sharding=x.sharding), given)
    program = generate.sampling_program(student.method, mesh, True)
    traced = program.trace(student[2:], given, steps, 0)
    return Program(f"sample: {n} images in {steps} steps", 0, traced, 0, local(given))


def measure(program: Program, mesh, target: Target, compile: bool) -> dict[str, Any]:
    """A program's numbers for one device."""
    counted = flops.count(program.traced.jaxpr)
    row = {"name": program.name, "runs": program.runs, "batch": program.batch, "gradients": program.gradients,
           "flops": counted.flops / mesh.size, "unknown_loops": counted.unknown_loops}  # fmt: skip
    row |= compiled(program.traced, target) if compile else dict.fromkeys(COMPILED)
    return row | {"bounds": bounds(row, target)}


UNKNOWN = {"peak": None, "temporaries": None}  # of a program that was not traced
COMPILED = ("temporaries", "new", "arguments", "flops_compiler", "bytes_accessed", "collectives")


def compiled(traced, target: Target) -> dict[str, Any]:
    """What the compiler says of a program: "new" are outputs that do not take the place of an argument."""
    order = {} if target.kind == "cpu" else sharding.IN_ORDER
    made = traced.lower().compile(QUICK | order if target.compiler == "cpu" else None)
    memory, cost = made.memory_analysis(), made.cost_analysis() or {}
    values = (
        memory.temp_size_in_bytes,
        max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        memory.argument_size_in_bytes,
        cost.get("flops"),
        cost.get("bytes accessed"),
        {kind: list(found) for kind, found in sorted(collectives(made.as_text()).items())},
    )
    return dict(zip(COMPILED, values, strict=True))


# ---- time


def bounds(row: dict[str, Any], target: Target) -> dict[str, float | None]:
    """Seconds that a program takes at least: FLOPs at the peak, bytes of memory and of the network at their rates.

    Bytes of memory are those that the compiler for such devices counts or, with another one, arguments and outputs
    once each. None: the device's peaks, or the bytes, are not known.
    """
    if target.peak is None:
        return {"compute": None, "memory": None, "network": None}
    moved = row["bytes_accessed"] if target.compiler != "cpu" else row["arguments"] and row["arguments"] + row["new"]
    sent = received(row)
    return {
        "compute": row["flops"] / target.peak.flops,
        "memory": moved and moved / target.peak.bandwidth,
        "network": sent and sent / target.peak.network,
    }


def received(row: dict[str, Any]) -> float | None:
    """Bytes that a device receives from others in a run of the program; None if it was not compiled."""
    return None if row["collectives"] is None else sum(size for _, size in row["collectives"].values())


def hours(rows: list[dict[str, Any]], devices: int, target: Target) -> dict[str, float | None]:
    """Hours of the whole training at UTILISATION, and in hours of one chip; evaluation and checkpoints left out."""
    total = sum(row["runs"] * row["flops"] for row in rows)
    wall = total / (UTILISATION * target.peak.flops) / 3600 if target.peak and rows else None
    return {"hours": wall, "chip_hours": wall and wall * devices}


# ---- if it does not fit


def changes(experiment: Experiment, target: Target, run: Outline, found: dict, limit: float) -> list[dict[str, Any]]:
    """What to change, each with the bytes that it saves on a device; those that save most come first.

    The bytes of weights and optimiser are exact. Of temporaries, only remat is compiled; other values are estimates.
    """
    now, settings = sum(found["held"].values()), experiment.run
    rows = found["programs"] or [UNKNOWN | {"gradients": found["gradients"]}]
    largest = max(rows, key=lambda row: row["peak"] or 0)
    activations = max((largest["temporaries"] or 0) - largest["gradients"], 0)
    devices, made = run.parts.mesh.size, []

    def add(change: str, saves: float, how: str):
        left = (found["peak"] or now) - saves
        if saves > 0:
            made.append({"change": change, "saves": int(saves), "how": how, "fits": bool(left <= limit)})

    if settings.fsdp not in (-1, devices):
        whole = sharding.make_mesh(-1, target.devices)
        shared = 1 - run.parts.mesh.shape["fsdp"] / devices  # of the gradients
        add("fsdp=-1", now - sum(resident(run, whole).values()) + shared * largest["gradients"], "exact")
    variants = [(x, "exact") for x in lighter(experiment).items()]
    variants += [(x, "exact, without gradients") for x in loras(experiment).items()]
    for (change, variant), how in variants:
        other = outline(variant, run.parts.mesh)
        add(change, now - sum(resident(other, run.parts.mesh).values()), how)
    if not settings.remat and activations:
        variant = experiment._replace(run=dataclasses.replace(settings, remat=True))
        other = temporaries(variant, target, largest["name"])
        add("remat=True", largest["temporaries"] - other, "compiled")
    if settings.dtype == "float32":
        add("dtype='bfloat16'", activations / 2, "estimate: activations halved")
    rows = settings.batch_size // (devices * settings.accumulate)
    if rows > 1 and rows % 2 == 0:
        micro = activations / 2 - (largest["gradients"] if settings.accumulate == 1 else 0)
        add(f"accumulate={2 * settings.accumulate}", micro, "estimate: half the activations, one more gradient")
        add(f"batch_size={settings.batch_size // 2}", activations / 2, "estimate: half the activations; another run")
    if settings.fsdp in (-1, devices) and devices > 1:
        add(f"{2 * devices} devices, fsdp=-1", now / 2 + largest["gradients"] / 2, "estimate")
    return sorted(made, key=lambda change: -change["saves"])


def lighter(experiment: Experiment) -> dict[str, Experiment]:
    """The run with frozen networks and moments in fewer bits, by the change."""
    run, optim = experiment.run, experiment.optim
    made = {"frozen_dtype='bfloat16'": experiment._replace(run=dataclasses.replace(run, frozen_dtype="bfloat16"))}
    for dtype in ("bfloat16", "int8"):
        own = {turn: dataclasses.replace(config, state_dtype=dtype) for turn, config in optim.items()}
        made[f"optim.state_dtype='{dtype}'"] = experiment._replace(optim=own)
    return made


def loras(experiment: Experiment) -> dict[str, Experiment]:
    """The run with its networks as LoRAs, for methods that have the option, by the change."""
    fields = [f.name for f in dataclasses.fields(experiment.method) if f.name.endswith("_lora")]
    off = [name for name in fields if getattr(experiment.method, name) == "none"]
    if not off or getattr(experiment.method, "adapter", "none") != "none":
        return {}
    change = " ".join(f"method.{name}='blocks'" for name in off)
    return {change: experiment._replace(method=dataclasses.replace(experiment.method, **dict.fromkeys(off, "blocks")))}


def temporaries(experiment: Experiment, target: Target, name: str) -> int:
    """Temporaries, in bytes on a device, of the program of this name."""
    run = outline(experiment, sharding.make_mesh(experiment.run.fsdp, target.devices))
    program = next(program for program in programs(run) if program.name == name)
    return compiled(program.traced, target)["temporaries"]


# ---- in words


def of_buckets(size: int, text: str) -> list[str]:
    """What data.buckets change: the plan is for squares of data.size."""
    if not text:
        return []
    height, width = max(buckets.parse(text), key=np.prod)
    times = height * width / size**2
    grows = f"the largest of data.buckets, {width}x{height}, has {times:.2f} times as many pixels"
    return [f"this is a plan for squares of {size} px: {grows}, and activations and FLOPs grow with them"]


def notes(rows: list[dict[str, Any]], target: Target, depth: Depth) -> list[str]:
    """What to know about the numbers."""
    said = [f"hours are FLOPs at {UTILISATION:.0%} of the peak (ours), without evaluation, checkpoints and input"]
    compile = depth == "compiled"
    if not compile:
        said.append(f"nothing was compiled{', or traced' * (depth == 'bytes')}: what that would show is missing")
    elif target.compiler == "cpu" and target.kind != "cpu":
        said.append(
            "compiled by XLA's compiler for CPUs: temporaries and collectives of a GPU or TPU differ, as do its "
            "attention kernels" + "; pip install 'cddistill[tpu]' compiles for TPUs" * target.is_tpu
        )
    if compile:
        said.append("collectives in a loop count once, and so do the compiler's FLOPs (flops_compiler)")
    if any(row["unknown_loops"] for row in rows):
        said.append("loops whose length depends on the data count once in FLOPs")
    if target.kind in ("h100", "h200", "a100", "a100-40", "l4"):
        said.append("JAX takes 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says more")
    return said


def gb(n: float | None) -> str:
    """Bytes in words."""
    return "?" if n is None else f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


def seconds(x: float | None) -> str:
    """Seconds in words."""
    return "?" if x is None else f"{x:.3g} s"


def described(found: dict[str, Any]) -> str:
    """A plan as text of several lines."""
    device = found["device"]
    lines = [f"{device['number']} x {device['kind']}, data {device['data']} x fsdp {device['fsdp']}; on each:"]
    lines += [f"  {name:<28} {gb(size):>10}" for name, size in found["held"].items()]
    for row in found["programs"]:
        bound = ", ".join(f"{name} {seconds(x)}" for name, x in row["bounds"].items())
        lines += [
            f"{row['name']} ({row['runs']} times)" if row["runs"] else row["name"],
            f"  {'temporaries':<28} {gb(row['temporaries']):>10}  of them gradients {gb(row['gradients'])}",
            f"  {'peak':<28} {gb(row['peak']):>10}",
            f"  {'FLOPs':<28} {row['flops'] / 1e12:>7.3g} T     received from others {gb(received(row))}",
            f"  {'takes at least':<28} {bound}",
        ]
    verdict = {True: "it fits", False: "IT DOES NOT FIT", None: "whether it fits is not known"}[found["fits"]]
    memory = f" of {gb(device['memory'])}, {USABLE:.0%} of it usable" if device["memory"] else ""
    lines.append(f"peak {gb(found['peak'])}{memory}: {verdict}")
    for change in found["changes"]:
        effect = "fits" if change["fits"] else "is not enough alone"
        lines.append(f"  {change['change']:<40} saves {gb(change['saves'])} ({change['how']}), {effect}")
    if found["hours"] is not None:
        lines.append(f"{found['steps']} steps: {found['hours']:.3g} hours, {found['chip_hours']:.4g} chip-hours")
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])


def plan_run(settings, target: Target, output: PurePath) -> None:
    """Print the plan of a config, and write it as JSON."""
    experiment = config.resolve(settings)
    if not experiment.method.turns():
        raise ValueError("this method trains nothing: there is nothing to plan")
    print("compiling the run's programs: seconds for small networks, minutes for large ones ...", flush=True)
    found = plan(experiment, target)
    print(described(found))
    io.write_json(output, found)
    print(f"written to {output}")
