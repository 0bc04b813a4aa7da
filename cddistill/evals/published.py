"""--mode=evaluate --config.protocol=NAME: sample as many images as a published evaluation has, and compute its numbers.

Images stream through: each host samples its rows of a batch, looks at them and forgets them; what is measured is kept
in files (stream.py) in the workdir, protocols/NAME/step-N/, so that a stopped evaluation continues.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

import jax
import numpy as np

from cddistill import generate, io, sharding, typed
from cddistill.build import Parts
from cddistill.evals import compare, grids, inception, looks, reference, scores, stream
from cddistill.evals.inputs import GIVEN, Rows, image_size
from cddistill.evals.protocols import PROTOCOLS, Protocol, said
from cddistill.evals.reference import TARGETS
from cddistill.evals.scores import Row
from cddistill.generate import Student
from cddistill.method import Generator
from cddistill.models.fingerprint import fingerprint
from cddistill.step import TrainState


class Plan(NamedTuple):
    """One evaluation by a protocol."""

    parts: Parts
    protocol: Protocol
    n: int  # images
    batch: int  # rows at a time, on all hosts together
    given: Callable[[np.ndarray], Rows]
    looks: Mapping[str, looks.Look]
    identity: dict  # what is measured depends on, apart from the student


def of_run(run) -> tuple[Protocol, Path]:
    """The protocol that a run's config names, and the folder of its files; of one on an object store, a local copy.

    Raises ValueError for an unknown protocol, and without Inception's weights.
    """
    protocol = typed.choose("protocol", PROTOCOLS, run.protocol)
    if not run.protocol_data or not (folder := io.local(run.protocol_data)).is_dir():
        raise ValueError(f"config.protocol_data={run.protocol_data!r} is no folder: name that of the protocol's files")
    inception.check(folder / inception.FILE)
    return protocol, folder


def evaluate(parts: Parts, state: TrainState, workdir: PurePath) -> list[Row]:
    """Compute and print the numbers of config.protocol, and write them to protocols/NAME/step-N/scores.json.

    Raises ValueError, before the first image, for anything that is missing in config.protocol_data.
    """
    run, (protocol, folder) = parts.experiment.run, of_run(parts.experiment.run)
    if not isinstance(parts.experiment.method, Generator):
        raise ValueError("protocols are for methods that generate images: leave config.protocol out")
    home, n, batch = workdir / "protocols" / run.protocol, run.protocol_images or protocol.n, run.protocol_batch
    batch, network = stream.batch_size(batch), looks.Inception(folder)
    given = GIVEN[protocol.given](parts, protocol, folder, n)
    columns, missing = looks.columns(protocol, folder, network)
    plan = Plan(parts, protocol, n, batch, given, columns, identity_of(parts, protocol, folder, network, columns))
    of_reference = {name: network.of(view) for name, view in protocol.views.items()}
    real = reference.opened(protocol, folder, home / "reference", of_reference, {"inception": network.digest}, batch)
    departures, rows = [*network.departures, *real.departures, *size_departures(parts, protocol)], []
    for name, student, steps in compare.contenders(parts, state):
        label = compare.row_name(name, steps)
        place = home / f"step-{int(state.step)}" / "".join(c if c.isalnum() else "-" for c in label)
        sample_all(plan, student, steps, place)
        metrics = real.compare(protocol, place, n) | means(plan, place)
        label += f" ({said(run.protocol, protocol, n, departures)})"
        rows.append(Row(label, metrics, n, student.method.nfe(steps), tuple(missing)))
    if sharding.is_host0():
        conclude(rows, run.protocol, protocol, home / f"step-{int(state.step)}")
    return rows


def identity_of(parts: Parts, protocol: Protocol, folder: Path, network: looks.Inception, columns) -> dict:
    """What is measured depends on, apart from the student."""
    run, config = parts.experiment.run, parts.experiment.data
    made = {"protocol": run.protocol, "seed": run.seed, "columns": [*columns], "inception": network.digest}
    made |= {"rows per file": stream.SHARD, "dtype": run.dtype, "files": looks.fingerprint(protocol, folder)}
    return made | {"data": repr(config) if protocol.given == "pairs" else str(config.num_classes)}


def size_departures(parts: Parts, protocol: Protocol) -> list[str]:
    """A sentence if a run generates images of another size than the protocol's."""
    size = image_size(parts)[0]
    return [f"images of {size} px, not {protocol.size}"] * (protocol.size not in (0, size))


def means(plan: Plan, place: PurePath) -> scores.Scores:
    """Means and standard errors of what is one number for each image."""
    names = [name for name in plan.looks if name.removesuffix(TARGETS) not in plan.protocol.views]
    return {name: scores.mean_and_error(stream.array(place, name, plan.n).astype(np.float64)) for name in names}


def conclude(rows: list[Row], name: str, protocol: Protocol, place: PurePath) -> None:
    """Print the table, and write scores.json."""
    print("\n".join([scores.markdown(rows), f"{protocol.source}. {protocol.note}", *rows[0].missing]), flush=True)
    finite = lambda pair: [float(x) if np.isfinite(x) else None for x in pair]
    found = [
        {"name": row.name, "n": row.n, "nfe": row.nfe, "metrics": {k: finite(v) for k, v in row.metrics.items()}}
        for row in rows
    ]
    io.write_json(place / "scores.json", {"protocol": name, "n": protocol.n, "rows": found})


# ---- sampling


def sample_all(plan: Plan, student: Student, steps: int, place: PurePath) -> None:
    """Sample a student's images and keep what is measured of them in a folder; of complete files nothing is sampled."""
    run, task = plan.parts.experiment.run, plan.parts.experiment.data.task
    png, tile = place / "png", student.frozen["autoencoder"].tile
    weights = fingerprint({str(i): x for i, x in enumerate(jax.tree.leaves(student[2:]))})
    identity = plan.identity | {"weights": weights, "sampling": repr(student.method), "steps": steps}

    def measure(numbers):
        rows = plan.given(numbers)
        images = sampled(student, rows.batch, steps, run.seed)
        images = task.finish(images, rows.batch["cond"]) if "cond" in rows.batch else images
        pixels = grids.to_uint8(images, f"{place.name}, rows {numbers[0]} to {numbers[-1]}")
        if run.protocol_png:
            for i, image in dict(zip(rows.batch["index"].tolist(), pixels, strict=True)).items():
                grids.save_image(png / f"{i:08}.png", image)
        return {name: look(list(pixels), rows) for name, look in plan.looks.items()}

    identity |= ({"png": True} if run.protocol_png else {}) | ({"decode_tile": tile} if tile else {})
    stream.measure_all(place, identity, plan.n, plan.batch, measure, place.name)


def sampled(student: Student, batch, steps: int, seed: int) -> np.ndarray:
    """This host's images [b, h, w, c] in [0, 1] of a batch, of which every host gives its rows."""
    autoencoder = student.frozen["autoencoder"]
    apart = generate.decodes_apart(autoencoder)
    program = sampling_program(student.method, student.mesh, not apart)
    made = program(student[2:], sharding.put_rows(student.mesh, batch), steps, seed)
    return stream.mine(generate.decoded(autoencoder, np.asarray(made))) if apart else own_rows(made)


@functools.lru_cache(maxsize=16)
def sampling_program(method, mesh, decode: bool):
    """As `generate.sampling_program`, but each host gets the images of its own rows only; every one all latents."""

    @functools.partial(
        jax.jit, static_argnums=2, out_shardings=(sharding.by_row if decode else sharding.replicated)(mesh)
    )
    @functools.partial(sharding.inside, mesh)
    def program(nets, batch, steps, seed):
        noise, after = generate.seeded(seed, batch["index"], batch["x0"].shape[1:])
        return generate.images(Student(method, mesh, *nets), batch, noise, after, steps, decode)

    return program


def own_rows(x: jax.Array) -> np.ndarray:
    """This host's rows of an array that is sharded by row, as `sharding.put_rows` took them."""
    shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])
