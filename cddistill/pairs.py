"""Noise and what the teacher's ODE makes of it, once and for all: what `data.pairs` reads, as data/odepairs.py has it.

Regression losses learn from such pairs: those of DMD, of DMD2's warm-up and of Diffusion2GAN.
"""

import functools
import json
import pathlib
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import cddistill
from cddistill import data, sharding
from cddistill.build import as_method, check_shapes, load_teacher, pad, weights_of, with_lora
from cddistill.checkpoint import flatten
from cddistill.config import Experiment
from cddistill.data import odepairs
from cddistill.data.loader import stack
from cddistill.encode import half
from cddistill.evals import grids


def make_pairs(experiment: Experiment, output: pathlib.Path, config: dict) -> None:
    """Write run.pairs rows of x0 (float16) and text below `output`, in shards, as `data.pairs` reads them.

    Texts are those of the training split, over and over; x0 is what run.teacher_sampler makes of a row's noise in the
    last of run.teacher_steps steps with run.teacher_guidance. Host h of n makes shards h, h + n ...; those that are
    there stay, and if all are, a few rows are drawn again and compared. Raises ValueError if no number of steps is set
    and for an `output` made by another command, FloatingPointError for an x0 that is no number.
    """
    run = experiment.run
    if not run.teacher_steps:
        raise ValueError("--mode=pairs needs the teacher's number of steps: --config.teacher_steps=50,")
    dataset, teacher = data.load(experiment.data, "train", augment=False), load_teacher(run)
    first = row(dataset, run.seed, 0)
    manifest = manifest_of(run, config["data"], weights_of(run, teacher), first["noise"].shape)
    teacher = with_lora(run, teacher)
    check_shapes(teacher, stack([first | {"x0": first["noise"]}]))
    begin(output, manifest, first["null"])
    size = -(-min(run.pairs_batch, run.pairs_shard) // jax.device_count()) * jax.local_device_count()
    draw = drawer(run, teacher, size)
    shards = range(odepairs.num_shards(manifest))
    missing = [k for k in shards if not complete(output, manifest, k)]
    if not missing and sharding.is_host0():
        most, n = drawn_again(odepairs.OdePairs(output), draw)
        print(f"all {run.pairs} rows were there; {n} of them, drawn again, differ by at most {most:.1e}", flush=True)
    mine = [k for k in missing if k % jax.process_count() == jax.process_index()]
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not (mine and sharding.is_host0())) as progress:
        task = progress.add_task("", total=sum(len(odepairs.shard_rows(manifest, k)) for k in mine))
        for k in mine:
            rows = functools.partial(row, dataset, run.seed)
            make_shard(output, manifest, k, rows, draw, size, functools.partial(progress.advance, task))
    multihost_utils.sync_global_devices("pairs are made")  # a host that leaves early would take the others with it


def manifest_of(run, data_config: dict, weights: str, shape) -> dict:
    """The manifest: all that the rows depend on, as JSON gives it back."""
    manifest = {
        "format": odepairs.FORMAT,
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
        "rows": run.pairs,
        "shard": run.pairs_shard,
        "x0": [*shape],
        "data": {name: x for name, x in data_config.items() if name not in ("pairs", "skip_bad")},
    }
    return json.loads(json.dumps(manifest))


def begin(folder: pathlib.Path, manifest: dict, null: dict) -> None:
    """Write the manifest and the null text, or compare the manifest that is there; what a killed host left goes."""
    path = folder / odepairs.MANIFEST
    if path.is_file():
        there, here = flatten(odepairs.read_manifest(folder)), flatten(manifest)
        names = [name for name in sorted({*there, *here} - {"made_by"}) if there.get(name) != here.get(name)]
        if names:
            said = "; ".join(f"{name}: {there.get(name)} there, {here.get(name)} now" for name in names)
            raise ValueError(f"{folder} was made by another command ({said}): undo it, or choose another --output")
    else:
        grids.replace(path, json.dumps(manifest, indent=2).encode())
    sizes = "added_cond_kwargs.time_ids"  # which the null text has from the row that it stands for
    null = {name: x[None] for name, x in odepairs.named(null).items() if name != sizes}
    if not (folder / odepairs.NULL).is_file():
        save(folder / odepairs.NULL, null, {})
    for draft in folder.glob(".*.safetensors.*.tmp"):
        number = re.match(r"\.(\d+)\.", draft.name)
        if number and int(number[1]) % jax.process_count() == jax.process_index():
            draft.unlink()


def row(dataset, seed: int, i: int) -> dict:
    """Noise, text and null text of row i; texts are those of an image of the data set, as the file will hold them."""
    item = dataset.item(i % len(dataset), np.random.default_rng([seed, i]))
    texts = {name: odepairs.nested(half(odepairs.named(item[name]))) for name in ("text", "null")}
    return texts | {"noise": odepairs.noise(seed, i, item["x0"].shape)}


def drawer(run, teacher, size: int):
    """draw(rows) -> their x0 in float16, of up to `size` rows at a time, split over this host's devices."""
    mesh, method, steps = (
        sharding.make_mesh(devices=jax.local_devices()),
        as_method(run, teacher.schedule),
        run.teacher_steps[-1],
    )
    teacher = jax.device_put(teacher, sharding.replicated(mesh))

    def integrate(teacher, batch):
        noise = batch["noise"]
        return method.sample(SimpleNamespace(teacher=teacher), noise, batch, None, steps).astype(jnp.float16)

    integrate = jax.jit(sharding.inside(mesh, integrate), out_shardings=sharding.by_row(mesh))

    def draw(rows):
        batch = stack([{name: r[name] for name in ("noise", "text", "null")} for r in rows])
        batch = jax.tree.map(lambda x: pad(x if np.issubdtype(x.dtype, np.integer) else np.float32(x), size), batch)
        batch |= {"index": np.arange(size, dtype=np.int32)}  # a sampler of an ODE adds no noise that would follow it
        x0 = np.asarray(integrate(teacher, jax.device_put(batch, sharding.by_row(mesh))))[: len(rows)]
        if not np.isfinite(x0).all():
            raise FloatingPointError("an x0 is not finite in float16: is the data what the teacher takes?")
        return x0

    return draw


def complete(folder: pathlib.Path, manifest: dict, k: int) -> bool:
    """Whether shard k is there, as long as it should be; what its bytes are is looked at when it is read."""
    try:
        return bool(odepairs.read_shard(folder, manifest, k))
    except ValueError:
        return False


def make_shard(folder: pathlib.Path, manifest: dict, k: int, row, draw, size: int, advance) -> None:
    """Draw and write shard k, which depends on nothing but the manifest and k."""
    numbers, made = odepairs.shard_rows(manifest, k), []
    for start in range(numbers.start, numbers.stop, size):
        rows = [row(i) for i in range(start, min(start + size, numbers.stop))]
        made.append(odepairs.named(stack([r["text"] for r in rows])) | {"x0": draw(rows)})
        advance(len(rows))
    arrays = {name: np.concatenate([part[name] for part in made]) for name in made[0]}
    save(odepairs.shard_file(folder, k), arrays, odepairs.describe(manifest, k))


def save(file: pathlib.Path, arrays: dict, said: dict) -> None:
    """Write a file whole or not at all, with the checksum of each of its arrays; its bytes are always the same."""
    arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    said = said | {"crc32": {name: odepairs.checksum(x) for name, x in arrays.items()}}
    grids.replace(file, safetensors.numpy.save(arrays, {"pairs": json.dumps(said, sort_keys=True)}))


def drawn_again(pairs: odepairs.OdePairs, draw, most: int = 4) -> tuple[float, int]:
    """The largest difference between stored x0 and what the sampler makes of their noise and text now; of how many."""
    rows = [pairs.item(i) for i in np.unique(np.linspace(0, len(pairs) - 1, most).astype(int))]
    return max(float(np.abs(draw([r])[0] - r["x0"]).max()) for r in rows), len(rows)
