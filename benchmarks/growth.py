"""How communication grows with the number of devices: collectives of the compiled train step and their bytes.

    python benchmarks/growth.py                          meshes of 2 to 64 fake CPU devices, DMD2's turns and CoDi
    python benchmarks/growth.py --methods dmd2 --devices 2 8 --width 64
    python benchmarks/growth.py --topologies v5e:2x2 v5e:4x4 v5e:8x8     by the TPU's compiler, with jax[tpu] installed

Each device has the same number of images. For every mesh the step is compiled for one and for two images a device, and
nothing runs: what grows with the batch is activations, and should be none; the rest is weights and their gradients.
Bytes are those of the arrays that a device receives, in multiples of the bytes of the trained networks' weights.
"""

# ruff: noqa: E402  (JAX reads the variables that are set before it is imported)
import argparse
import functools
import os

FLAGS = " --xla_force_host_platform_device_count=64"
FLAGS += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # the programs do not run
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + FLAGS
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from cddistill import config, models, sharding, targets
from cddistill.build import initial, make_optimizers
from cddistill.collectives import collectives
from cddistill.diffusion import DDPM
from cddistill.net import Autoencoder
from cddistill.step import train_step

FEW = 1024  # bytes of sums, such as losses and norms, that are not counted as growth


def compiled(method_name: str, width: int, mesh, rows: int) -> tuple[dict[str, str], int]:
    """({turns: optimised program}, bytes of the trained weights) with this many images a device, nothing allocated."""
    shape = {
        "block_out_channels": [width], "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2,
        "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"], "mid_block_type": None,
        "cross_attention_dim": 64,
    }  # fmt: skip
    settings = config.defaults(method_name)
    settings.update(batch_size=64)
    if method_name == "dmd2":
        settings.method.update(real_guidance=2.0, ema_decay=0.999)
    experiment, b = config.resolve(settings), rows * mesh.size
    method, optimizers = experiment.method, make_optimizers(experiment)
    array = lambda *shape: jax.ShapeDtypeStruct((b, *shape), np.float32)
    text = {"encoder_hidden_states": array(16, 64)}
    batch = {"x0": array(8, 8, 4), "text": text, "null": text, "index": jax.ShapeDtypeStruct((b,), np.int32)}
    batch |= {"cond": array(64, 64, 3)} if method_name == "codi" else {}
    teacher = jax.eval_shape(lambda: models.init(shape, 0, DDPM(), "eps"))
    frozen = {"teacher": teacher, "autoencoder": Autoencoder()}
    turns = method.turns()
    state = jax.eval_shape(functools.partial(initial, experiment), batch, frozen)
    step = functools.partial(train_step, turns=turns, optimizers=optimizers, ema=method.ema())
    driver = sharding.jit_driver(step, mesh, state, min_elements=2**10)
    placed = lambda tree, layout: jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, layout
    )
    by_shape = lambda tree: placed(tree, sharding.by_shape(mesh, tree, 2**10))
    rowwise = placed(batch, jax.tree.map(lambda _: sharding.by_row(mesh), batch))
    programs = {}
    for turn in turns:
        programs[turn] = driver.step.lower(by_shape(state), by_shape(frozen), rowwise, (turn,)).compile().as_text()
    return programs, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.nets))


def growth(method_name: str, width: int, mesh) -> list[dict]:
    """A row for each turn: collectives, their bytes and what grows with the batch, in multiples of the weights'."""
    (one, weights), (two, _) = (compiled(method_name, width, mesh, rows) for rows in (1, 2))
    rows = []
    for turn in one:
        counts, more = collectives(one[turn]), collectives(two[turn])
        total, doubled = (sum(size for _, size in found.values()) for found in (counts, more))
        grown = doubled - total
        rows.append({
            "turn": f"{method_name}, {turn}", "mesh": "x".join(map(str, mesh.devices.shape)),
            "number": {kind: n for kind, (n, _) in sorted(counts.items())}, "bytes": total / weights,
            "activations": 0.0 if abs(grown) < FEW else grown / weights,
        })  # fmt: skip
    return rows


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["dmd2", "codi"])
    parser.add_argument("--devices", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--topologies", nargs="+", help="of TPUs, instead of --devices")
    args = parser.parse_args()
    print("| turn | data x fsdp | collectives | bytes / weights | of activations |\n|---|---|---|---|---|")
    slices = [targets.of_tpu(t) for t in args.topologies or ()] or [jax.devices()[:n] for n in args.devices]
    for name in args.methods:
        for devices in slices:
            for fsdp in (1, len(devices)):
                mesh = sharding.make_mesh(fsdp, devices)
                for row in growth(name, args.width, mesh):
                    number = ", ".join(f"{k} {kind}" for kind, k in row["number"].items())
                    print(
                        f"| {row['turn']} | {row['mesh']} | {number} | {row['bytes']:.2f} | {row['activations']:.2f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
