"""Precompute pairs of noise and the teacher's ODE sample, in the format of data/shards.py, for `data.pairs`.

The regression losses of DMD, of DMD2's warm-up and of Diffusion2GAN train on such pairs.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

import cddistill
from cddistill import data, encoders, generate, pipeline, progress, sharding
from cddistill.checks import check_heun, check_shapes, check_table, describe_schedule
from cddistill.config import Experiment
from cddistill.data import ode_pairs
from cddistill.data.loader import stack
from cddistill.data.shards import FORMAT, MANIFEST, flatten_text, num_shards, shard_file, shard_rows, unflatten_text
from cddistill.models import adapter
from cddistill.models.fingerprint import of_network
from cddistill.precompute import writing
from cddistill.precompute.encode import weights_of
from cddistill.precompute.writing import stored

UNUSED = ("pairs", "skip_bad", "window", "threads", "buckets")  # config.data.<name>: rows do not depend on these


def make_pairs(experiment: Experiment, output: pathlib.Path, config: dict) -> None:
    """Write run.num_pairs rows of x0 (float16) and text to the folder `output`, in shards.

    Text comes from the training split, encoded if it is captions, and repeated as needed. x0 is sampled from the row's
    noise with run.teacher_sampler, run.teacher_guidance and the last of run.teacher_steps. Host h of n writes shards h,
    h + n ... Complete shards are kept; if all are complete, a few rows are generated again and compared. Raises
    ValueError if teacher_steps is empty or `output` was written by another command, and FloatingPointError if an x0 is
    not finite.
    """
    run = experiment.run
    experiment = experiment._replace(data=dataclasses.replace(experiment.data, pairs=""))  # not there yet
    if not run.teacher_steps:
        raise ValueError("--mode=pairs needs the teacher's number of steps: set --config.teacher_steps=50,")
    dataset, teacher = data.load(experiment.data, "train", augment=False), pipeline.of_run(run)
    if data.parts_of(experiment.data) and experiment.data.source.precomputed:
        raise ValueError(
            f"--mode=pairs makes x0 of one shape, and {experiment.data.path} has rows of several: make pairs of images "
            "(data.source=folder, say)"
        )
    encodes = encoders.needed(experiment, teacher)
    if encodes:
        dataset = encoders.Items(dataset, encoders.make(experiment, teacher), encoders.networks(teacher))
    controlnet = teacher.controlnet(run.controlnet) if run.controlnet else None
    kind = adapter.kind_of(teacher.denoiser, controlnet, teacher.denoiser.module.out_channels)
    if kind != "none" and not experiment.data.task.conditional:
        raise ValueError("this teacher takes a conditioning image: set data.task to the task that it was trained for")
    first = row(dataset, run.seed, 0, kind)
    fingerprints = {"schedule": describe_schedule(teacher.denoiser)} | data.fingerprint(experiment.data)
    fingerprints |= {"controlnet": of_network(controlnet.params, controlnet.module)} if controlnet else {}
    manifest = manifest_of(run, config["data"], teacher.weights, first["noise"].shape, fingerprints)
    manifest |= {"encoders": weights_of(teacher)} if encodes else {}
    check_shapes(teacher.denoiser, stack([first | {"x0": first["noise"]}]))
    check_table(experiment, experiment.method.requires(), teacher)
    manifest = prepare_folder(output, manifest, first["null"])
    size = -(-min(run.pairs_batch, run.pairs_shard) // jax.device_count()) * jax.local_device_count()
    generate_x0 = sampler(run, teacher.denoiser, size, controlnet)
    missing = writing.missing(output, ode_pairs.KIND, manifest, range(num_shards(manifest)))
    if not missing and sharding.is_host0():
        error, n = check_regenerated(ode_pairs.OdePairs(output), generate_x0)
        print(f"all {run.num_pairs} rows exist; {n} of them generated again differ by at most {error:.1e}", flush=True)
    host_shards = [k for k in missing if writing.is_mine(k)]
    total = sum(len(shard_rows(manifest, k)) for k in host_shards)
    with progress.counting("pairs", total, shown=sharding.is_host0()) as advance:
        for k in host_shards:
            rows = functools.partial(row, dataset, run.seed, kind=kind)
            make_shard(output, manifest, k, rows, generate_x0, size, advance)
    multihost_utils.sync_global_devices("pairs are made")  # a host that exits early would stop the others


def manifest_of(run, data_config: dict, weights: str, shape, fingerprints: Mapping[str, str] = {}) -> dict:
    """The manifest: everything that the rows depend on, as it reads back from JSON.

    weights is the fingerprint of the network, and fingerprints are those of the schedule and of the data's files.
    """
    manifest = {
        "format": FORMAT,
        "made_by": f"cddistill {cddistill.__version__}, numpy {np.__version__}",
        "teacher": run.teacher,
        "weights": weights,
        "lora": run.lora,
        "lora_scale": run.lora_scale,
        "sampler": run.teacher_sampler,
        "steps": run.teacher_steps[-1],
        "guidance": run.teacher_guidance,
        "dtype": run.dtype,
        "seed": run.seed,
        "rows": run.num_pairs,
        "shard": run.pairs_shard,
        "x0": [*shape],
        "data": {name: x for name, x in data_config.items() if name not in UNUSED},
        "fingerprints": dict(fingerprints),
    }
    return json.loads(json.dumps(manifest))


def prepare_folder(folder: pathlib.Path, manifest: dict, null: dict) -> dict:
    """Write the null text and, unless there is one, the manifest; delete incomplete files; return the manifest there.

    Raises ValueError if that is of another command or from other data, and for one without fingerprints.
    """
    if (folder / MANIFEST).is_file():
        there = ode_pairs.read_manifest(folder)
        if "fingerprints" not in there:
            raise ValueError(
                f"{folder} is from a version of cddistill that kept no fingerprints of the data, so it may serve for "
                "training but not be continued: make pairs again, with another --output"
            )
        moved = {"made_by", *(f"data.{name}" for name in UNUSED)}  # an older version wrote all of these
        moved |= {"teacher", "lora", "data.path", "data.prompts"} if len(manifest["fingerprints"]) > 1 else set()
        if changes := writing.changed(there, manifest, moved):
            said = "; ".join(changes)
            raise ValueError(f"{folder} was made by another command ({said}): undo it or choose another --output")
        manifest = there
    writing.prepare(folder, manifest, flatten_text(null))
    return manifest


def row(dataset, seed: int, i: int, kind: str = "none") -> dict:
    """Noise, text, null text and the condition of row i. Text and condition are rounded to float16, as files have them.

    kind is that of `adapter.kind_of`.
    """
    item = dataset.item(i % len(dataset), np.random.default_rng([seed, i]))

    def rounded(text):
        flat = flatten_text(text)
        half = {name: stored(name, np.asarray(x)[None], np.float16, [f"row {i}"])[0] for name, x in flat.items()}
        return unflatten_text(half)

    given = {name: rounded(item[name]) for name in ("text", "null")}
    given |= {} if kind == "none" else {"cond": np.float16(adapter.condition(kind, item))}
    return given | {"row": i, "noise": ode_pairs.noise(seed, i, item["x0"].shape)}


def sampler(run, denoiser, size: int, controlnet=None):
    """generate_x0(rows) -> x0 float16 [b, h, w, c] of up to `size` rows, split over this host's devices."""
    mesh, steps = sharding.make_mesh(devices=jax.local_devices()), run.teacher_steps[-1]
    if run.teacher_sampler == "heun":
        check_heun(denoiser.schedule)
    frozen = {"teacher": denoiser} | ({"controlnet": controlnet} if controlnet else {})
    frozen = jax.device_put(frozen, sharding.replicated(mesh))
    teacher = generate.teacher_as_student(run, generate.Student(None, mesh, frozen, {}, {}))

    def integrate(nets, batch):
        student = generate.Student(teacher.method, mesh, *nets)
        return generate.images(student, batch, batch["noise"], None, steps, decode=False).astype(jnp.float16)

    integrate = jax.jit(sharding.inside(mesh, integrate), out_shardings=sharding.by_row(mesh))

    def generate_x0(rows):
        batch = stack([{name: r[name] for name in ("noise", "text", "null", "cond") if name in r} for r in rows])
        batch = jax.tree.map(lambda x: x if np.issubdtype(x.dtype, np.integer) else np.float32(x), batch)
        batch |= {"index": np.arange(len(rows), dtype=np.int32)}
        batch = jax.tree.map(lambda x: generate.pad(x, size), batch)
        x0 = np.asarray(integrate(teacher[2:], jax.device_put(batch, sharding.by_row(mesh))))[: len(rows)]
        if not np.isfinite(x0).all():
            row = rows[np.flatnonzero(~np.isfinite(x0).all((1, 2, 3)))[0]].get("row", "?")
            raise FloatingPointError(f"x0 of row {row} is not finite in float16: check that the data suits the teacher")
        return x0

    return generate_x0


def make_shard(folder: pathlib.Path, manifest: dict, k: int, row, generate_x0, size: int, advance) -> None:
    """Generate and write shard k. It depends only on the manifest and k."""
    numbers, batches = shard_rows(manifest, k), []
    for start in range(numbers.start, numbers.stop, size):
        rows = [row(i) for i in range(start, min(start + size, numbers.stop))]
        cond = {name: np.stack([r[name] for r in rows]) for name in ("cond",) if name in rows[0]}
        batches.append(flatten_text(stack([r["text"] for r in rows])) | cond | {"x0": generate_x0(rows)})
        advance(len(rows))
    arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    writing.save(shard_file(folder, k), arrays, ode_pairs.describe(manifest, k))


def check_regenerated(pairs: ode_pairs.OdePairs, generate_x0, count: int = 4) -> tuple[float, int]:
    """Generate up to `count` rows again: (largest absolute difference from the stored x0, number of rows)."""
    rows = [pairs.item(i) for i in np.unique(np.linspace(0, len(pairs) - 1, count).astype(int))]
    return max(float(np.abs(generate_x0([r])[0] - r["x0"]).max()) for r in rows), len(rows)
