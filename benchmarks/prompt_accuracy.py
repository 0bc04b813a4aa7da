"""How often generated scenes show what their prompt says, by a classifier trained on rendered scenes.

    python benchmarks/prompt_accuracy.py train --classifier=runs/scenes.safetensors
    python benchmarks/prompt_accuracy.py measure --classifier=runs/scenes.safetensors --model=runs/pocket \
        --guidance 1 2 4 7 --steps=50 --n=200

A first network says of every pixel which of the eight colours its solid has, or none; an image shows a colour if at
least VISIBLE pixels have it. A second one says of the bounding box of these pixels whether they are a ball, a cube or
a cylinder. Both are trained on the renderer's instance masks of scenes of all combinations, and `train` prints their
accuracy on 1,000 unseen scenes. A solid is right if its colour has its shape; a prompt is right if all eight colours
are. "Seen" prompts are captions of test scenes without a combination that was held out of training, "held out" those
with at least one.
"""

import argparse
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from PIL import Image

import cddistill
from cddistill.data.resample import to_uint8
from cddistill.data.sources.scenes import COLOURS, HELD_OUT, SHAPES, scene

SIZE = 64  # px
TRAIN, TEST = 9_000, 1_000  # scenes
VISIBLE = 8  # pixels of 32 x 32
CROP, MARGIN = 24, 3  # px
SEED = 77  # of the scenes, in no split of the data source


def conv(x, width, stride=1):
    """A layer of both networks."""
    return nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3), strides=stride)(x)))


class Pixels(nn.Module):
    """Images [b, 64, 64, 3] in [0, 1] to [b, 32, 32, outputs] numbers of every other pixel."""

    outputs: int = 1 + len(COLOURS)  # logits: no colour, or 1 + the colour

    @nn.compact
    def __call__(self, x):
        fine = conv(conv(2.0 * x - 1.0, 16, 2), 24)
        coarse = conv(conv(conv(fine, 32, 2), 48, 2), 48)
        fine = conv(jnp.concatenate([fine, coarse.repeat(4, 1).repeat(4, 2)], -1), 32)
        return nn.Dense(self.outputs)(fine)


class Shapes(nn.Module):
    """Crops [b, 24, 24, 3] in [0, 1] to logits [b, 3]."""

    @nn.compact
    def __call__(self, x):
        x = conv(conv(2.0 * x - 1.0, 24), 24)
        x = conv(conv(x, 48, 2), 48)
        x = conv(conv(x, 96, 2), 96)
        return nn.Dense(len(SHAPES))(x.reshape(len(x), -1))


def wanted(caption: str) -> np.ndarray:
    """For each colour 0 (absent) or 1 + the number of its shape, int [8]."""
    words = [solid.split() for solid in caption.split(" and ")]  # a big red ball
    shapes = {colour: SHAPES.index(shape) + 1 for *_, colour, shape in words}
    return np.array([shapes.get(colour, 0) for colour in COLOURS])


def scenes(first: int, n: int):
    """(images uint8 [n, 64, 64, 3], 1 + colour or 0 of every other pixel uint8 [n, 32, 32], what they show [n, 8])."""
    found = [scene.__wrapped__((SEED, i), SIZE) for i in range(first, first + n)]
    target = np.stack([wanted(s["caption"]) for s in found])
    words = [[solid.split()[-2] for solid in s["caption"].split(" and ")] for s in found]
    colours = [np.uint8([0, *(1 + list(COLOURS).index(c) for c in names)]) for names in words]
    pixels = np.stack([colour[s["mask"][::2, ::2]] for s, colour in zip(found, colours, strict=True)])
    return np.stack([s["image"] for s in found]), pixels, target


def crops(images: np.ndarray, pixels: np.ndarray):
    """(crops uint8 [k, 24, 24, 3] around each colour's pixels, their image and colour int [k, 2])."""
    places = [(i, c) for i, p in enumerate(pixels) for c in range(len(COLOURS)) if (p == c + 1).sum() >= VISIBLE]
    return np.stack([crop(images[i], pixels[i] == c + 1) for i, c in places]), np.array(places)


def crop(image: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The bounding box of pixels, bool [32, 32], with a margin, as uint8 [24, 24, 3] of an image [64, 64, 3]."""
    (top, left), (bottom, right) = (2 * f(np.argwhere(shown), axis=0) for f in (np.min, np.max))
    box = (left - MARGIN, top - MARGIN, right + 2 + MARGIN, bottom + 2 + MARGIN)
    return np.asarray(Image.fromarray(image).resize((CROP, CROP), Image.Resampling.BILINEAR, clipped(box)))


def clipped(box) -> tuple[int, ...]:
    """A box within the image."""
    return tuple(int(min(max(x, 0), SIZE)) for x in box)


def accuracy(predicted: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """(share of the named solids that are right, share of the prompts that are) of int [n, 8]."""
    named = target > 0
    return float((predicted == target)[named].mean()), float((predicted == target).all(1).mean())


def train(path: pathlib.Path, steps: int) -> None:
    """Train both networks, print their accuracy on unseen scenes and write their weights."""
    images, pixels, target = scenes(0, TRAIN)
    cut, places = crops(images, pixels)
    shapes = target[places[:, 0], places[:, 1]] - 1
    params = {
        "colours": fit(Pixels(), images, pixels, lambda y, mirror: y[mirror], steps // 3),
        "shapes": fit(Shapes(), cut, shapes, lambda y, mirror: y, steps),
    }
    images, _, target = scenes(TRAIN, TEST)
    solids, prompts = accuracy(predict(params, images), target)
    print(f"on {TEST} unseen scenes: {100 * solids:.1f} % of the solids, {100 * prompts:.1f} % of the scenes")
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    safetensors.numpy.save_file({name: np.asarray(x) for name, x in flat.items()}, path)


def cross_entropy(logits, classes):
    """Mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()


def fit(model, images, targets, mirrored, steps: int, loss=cross_entropy, batch: int = 64) -> dict:
    """The weights of a network that was trained to give images, uint8 [n, h, w, 3], these classes, or other targets."""
    params = model.init(jax.random.key(0), jnp.zeros((1, *images.shape[1:])))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    state, rng = optimizer.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params, state, x, y):
        value, grads = jax.value_and_grad(lambda params: loss(model.apply(params, x / 255), y))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    for i in range(steps):
        rows, mirror = rng.integers(0, len(images), batch), np.s_[:, :, :: i % 2 * 2 - 1]
        x = images[rows][mirror] * rng.uniform(0.9, 1.1, (batch, 1, 1, 1)).astype(np.float32)
        params, state, value = step(params, state, x, mirrored(targets[rows], mirror))
        if i % 100 == 0:
            print(f"{type(model).__name__}: {i}/{steps} loss {float(value):.4f}", flush=True)
    return params["params"]


def predict(params, images) -> np.ndarray:
    """For each colour 0 (absent) or 1 + the number of its shape, int [n, 8], of images uint8 [n, 64, 64, 3]."""
    colours = jax.jit(lambda x: Pixels().apply({"params": params["colours"]}, x / 255).argmax(-1))
    shapes = jax.jit(lambda x: Shapes().apply({"params": params["shapes"]}, x / 255).argmax(-1))
    in_chunks = lambda f, x: np.concatenate([f(jnp.float32(x[i : i + 100])) for i in range(0, len(x), 100)])
    cut, places = crops(images, in_chunks(colours, images))
    found = np.zeros((len(images), len(COLOURS)), int)
    found[places[:, 0], places[:, 1]] = 1 + in_chunks(shapes, cut)
    return found


def prompts(n: int) -> dict[str, list[str]]:
    """n captions of test scenes without, and n with, combinations that were held out of training."""
    found = {"seen": [], "held out": []}
    for i in range(20 * n):
        caption = scene.__wrapped__((2, i), 8)["caption"]
        kind = "held out" if any(f"{colour} {shape}" in caption for colour, shape in HELD_OUT) else "seen"
        found[kind].append(caption)
    return {kind: captions[:n] for kind, captions in found.items()}


def measure(classifier: pathlib.Path, model: str, guidance, steps: int, n: int, seed: int) -> None:
    """Print accuracies, with standard errors over prompts."""
    flat = safetensors.numpy.load_file(classifier)
    params = flax.traverse_util.unflatten_dict(flat, sep=".")
    loaded = cddistill.load(model)
    print(f"{model}, {steps} steps, {n} prompts of each kind, seed {seed}\n")
    print("| guidance | prompts | solids right, % | prompts right, % |\n|---|---|---|---|")
    for scale in guidance:
        for kind, captions in prompts(n).items():
            options = {} if scale == 1.0 else {"guidance": scale}
            images = cddistill.sample(loaded, prompt=captions, steps=steps, seed=seed, **options)
            target = np.stack([wanted(caption) for caption in captions])
            solids, right = accuracy(predict(params, to_uint8(images)), target)
            error = 100 * (right * (1 - right) / n) ** 0.5
            print(f"| {scale:g} | {kind} | {100 * solids:.1f} | {100 * right:.1f} ± {error:.1f} |", flush=True)


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "measure"))
    parser.add_argument("--classifier", type=pathlib.Path, default=pathlib.Path("runs/scenes.safetensors"))
    parser.add_argument("--model", default="runs/pocket", help="diffusers folder or workdir of a run")
    parser.add_argument("--guidance", type=float, nargs="+", default=(1.0, 2.0, 4.0, 7.0))
    parser.add_argument("--steps", type=int, help="train: updates (default 1500); measure: sampling steps (50)")
    parser.add_argument("--n", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "train":
        train(args.classifier, args.steps or 1500)
    else:
        measure(args.classifier, args.model, args.guidance, args.steps or 50, args.n, args.seed)


if __name__ == "__main__":
    main()
