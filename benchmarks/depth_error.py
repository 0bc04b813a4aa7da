"""How well generated scenes have the depth they were asked for, by a network trained on rendered scenes.

    python benchmarks/depth_error.py train --network=runs/depth.safetensors
    python benchmarks/depth_error.py measure --network=runs/depth.safetensors --workdir=runs/ccd_depth --steps 1 4

The network estimates the condition of `data.task=depth`, inverse depth from 0 (farthest) to 1 (nearest), of every other
pixel. `train` prints its own root mean square error on 1,000 unseen scenes. `measure` prints the error between its
estimate and the condition for a run's images of the test split, for the true images, and for those of other scenes.
"""

import argparse
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from prompt_accuracy import SEED, SIZE, TEST, TRAIN, Pixels, fit

from cddistill import commands, data, generate, io
from cddistill.data.resample import to_uint8
from cddistill.data.sources.scenes import scene
from cddistill.data.tasks.depth import normalised


def scenes(first: int, n: int):
    """(images uint8 [n, 64, 64, 3], inverse depth float32 [n, 32, 32] in [0, 1])."""
    found = [scene.__wrapped__((SEED, i), SIZE) for i in range(first, first + n)]
    depth = [normalised(1 / s["depth"], "a scene")[::2, ::2, 0] for s in found]
    return np.stack([s["image"] for s in found]), np.stack(depth)


def errors(params, images: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Root mean square errors [n] of the depth of images, uint8 [n, 64, 64, 3]."""
    predict = jax.jit(lambda x: Pixels(1).apply({"params": params}, x / 255)[..., 0])
    found = np.concatenate([predict(jnp.float32(images[i : i + 100])) for i in range(0, len(images), 100)])
    return np.sqrt(((found - depth) ** 2).mean((1, 2)))


def train(path: pathlib.Path, steps: int) -> None:
    """Train the network, print its error on unseen scenes and write its weights."""
    squared = lambda found, depth: ((found[..., 0] - depth) ** 2).mean()
    params = fit(Pixels(1), *scenes(0, TRAIN), lambda y, mirror: y[mirror], steps, squared)
    print(f"on {TEST} unseen scenes: RMSE {line(errors(params, *scenes(TRAIN, TEST)))}")
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    safetensors.numpy.save_file({name: np.asarray(x) for name, x in flat.items()}, path)


def measure(path: pathlib.Path, workdir: pathlib.Path, steps: list[int], n: int, seed: int) -> None:
    """Print the errors of a run's images, with standard errors over images."""
    params = flax.traverse_util.unflatten_dict(safetensors.numpy.load_file(path), sep=".")
    parts, state = commands.finished(io.read_json(workdir / "config.json"), workdir, "latest")
    examples = data.examples(parts.experiment.data, "test", n)
    batch, student = generate.batch_of(parts, examples), generate.student_of(parts, state)
    depth, truth = np.asarray(batch["cond"])[:, ::2, ::2, 0], to_uint8(generate.targets(parts, examples))
    print(f"{workdir}, {len(depth)} test scenes, seed {seed}\n\n| | depth RMSE |\n|---|---|")
    print(f"| true images | {line(errors(params, truth, depth))} |")
    print(f"| those of other scenes | {line(errors(params, np.roll(truth, 1, 0), depth))} |")
    for k in steps:
        images = generate.sample(student, batch, k, seed, task=parts.experiment.data.task)
        print(f"| {k} step{'s' * (k > 1)} | {line(errors(params, to_uint8(images), depth))} |", flush=True)


def line(values: np.ndarray) -> str:
    """Mean and standard error."""
    return f"{values.mean():.4f} ± {values.std(ddof=1) / len(values) ** 0.5:.4f}"


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "measure"))
    parser.add_argument("--network", type=pathlib.Path, default=pathlib.Path("runs/depth.safetensors"))
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/ccd_depth"))
    parser.add_argument("--steps", type=int, nargs="+", help="train: updates (800); measure: sampling steps (4)")
    parser.add_argument("--n", type=int, default=200, help="test scenes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "train":
        train(args.network, (args.steps or [800])[0])
    else:
        measure(args.network, args.workdir, args.steps or [4], args.n, args.seed)


if __name__ == "__main__":
    main()
