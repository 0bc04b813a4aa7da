"""How often generated scenes show what their prompt says, by a classifier trained on rendered scenes.

    python benchmarks/prompt_accuracy.py train --classifier=runs/scenes.safetensors
    python benchmarks/prompt_accuracy.py measure --classifier=runs/scenes.safetensors --model=runs/pocket \
        --guidance 1 2 4 7 --steps=50 --n=200

The classifier says of every pixel which of the 24 solids (8 colours x 3 shapes) it shows, or none. It is trained on the
renderer's instance masks of scenes of all combinations. An image shows a colour's solid if at least VISIBLE pixels have
that colour, in the shape that most of them have. `train` prints the accuracy of that on 1,000 unseen scenes. A solid is
right if its colour has its shape; a prompt is right if all eight colours are. "Seen" prompts are captions of test
scenes without a combination that was held out of training, "held out" those with at least one.
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

import cddistill
from cddistill.data.sources.scenes import COLOURS, HELD_OUT, SHAPES, scene

SIZE = 64  # px
TRAIN, TEST = 9_000, 1_000  # scenes
VISIBLE = 8  # pixels of 32 x 32
SEED = 77  # of the scenes, in no split of the data source


class Classifier(nn.Module):
    """Images [b, 64, 64, 3] in [0, 1] to logits [b, 32, 32, 25] of every other pixel: none, or 1 + 3 colour + shape."""

    @nn.compact
    def __call__(self, x):
        conv = lambda x, width, stride=1: nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3), strides=stride)(x)))
        up = lambda x: x.repeat(2, 1).repeat(2, 2)
        fine = conv(conv(2.0 * x - 1.0, 24, 2), 32)
        middle = conv(conv(fine, 64, 2), 64)
        coarse = conv(conv(conv(middle, 96, 2), 96), 96)
        middle = conv(jnp.concatenate([middle, up(coarse)], -1), 64)
        fine = conv(jnp.concatenate([fine, up(middle)], -1), 32)
        return nn.Dense(1 + len(COLOURS) * len(SHAPES))(fine)


def shown(logits):
    """For each colour 0 (absent) or 1 + the number of its shape, int [b, 8], of the classifier's logits."""
    votes = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]).sum((1, 2))[:, 1:]
    votes = votes.reshape(len(votes), len(COLOURS), len(SHAPES))
    return jnp.where(votes.sum(-1) < VISIBLE, 0, 1 + votes.argmax(-1))


def wanted(caption: str) -> np.ndarray:
    """For each colour 0 (absent) or 1 + the number of its shape, int [8]."""
    words = [solid.split() for solid in caption.split(" and ")]  # a big red ball
    shapes = {colour: SHAPES.index(shape) + 1 for *_, colour, shape in words}
    return np.array([shapes.get(colour, 0) for colour in COLOURS])


def scenes(first: int, n: int):
    """(images uint8 [n, 64, 64, 3], classes of their pixels uint8 [n, 32, 32], what they show int [n, 8])."""
    found = [scene.__wrapped__((SEED, i), SIZE) for i in range(first, first + n)]
    target = np.stack([wanted(s["caption"]) for s in found])
    classes = np.stack([of_pixels(s["mask"][::2, ::2], s["caption"]) for s in found])
    return np.stack([s["image"] for s in found]), classes, target


def of_pixels(mask: np.ndarray, caption: str) -> np.ndarray:
    """The classifier's class of every pixel, uint8 [h, w], of an instance mask [h, w] and its caption."""
    words = [solid.split() for solid in caption.split(" and ")]
    classes = [0, *(1 + len(SHAPES) * list(COLOURS).index(c) + SHAPES.index(shape) for *_, c, shape in words)]
    return np.uint8(classes)[mask]


def accuracy(predicted: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """(share of the named solids that are right, share of the prompts that are) of int [n, 8]."""
    named = target > 0
    return float((predicted == target)[named].mean()), float((predicted == target).all(1).mean())


def train(path: pathlib.Path, steps: int, batch: int = 64) -> None:
    """Train the classifier, print its accuracy on unseen scenes and write its weights."""
    images, classes, _ = scenes(0, TRAIN)
    model = Classifier()
    params = model.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    state, rng = optimizer.init(params), np.random.default_rng(0)

    @jax.jit
    def step(params, state, x, y):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x / 255), y).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    for i in range(steps):
        rows = rng.integers(0, TRAIN, batch)
        mirror = np.s_[:, :, :: i % 2 * 2 - 1]
        x = images[rows][mirror] * rng.uniform(0.9, 1.1, (batch, 1, 1, 1)).astype(np.float32)
        y = classes[rows][mirror]
        params, state, value = step(params, state, x, y)
        if i % 100 == 0:
            print(f"{i}/{steps} cross-entropy {float(value):.4f}", flush=True)
    images, _, target = scenes(TRAIN, TEST)
    solids, prompts = accuracy(predict(params, images), target)
    print(f"on {TEST} unseen scenes: {100 * solids:.1f} % of the solids, {100 * prompts:.1f} % of the scenes")
    flat = flax.traverse_util.flatten_dict(params["params"], sep=".")
    safetensors.numpy.save_file({name: np.asarray(x) for name, x in flat.items()}, path)


def predict(params, images) -> np.ndarray:
    """What images [n, 64, 64, 3], uint8 or in [0, 1], show, as `shown`."""
    x = images / 255 if images.dtype == np.uint8 else images
    classify = jax.jit(lambda x: shown(Classifier().apply(params, x)))
    return np.concatenate([classify(jnp.float32(x[i : i + 100])) for i in range(0, len(x), 100)])


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
    params = {"params": flax.traverse_util.unflatten_dict(flat, sep=".")}
    loaded = cddistill.load(model)
    print(f"{model}, {steps} steps, {n} prompts of each kind, seed {seed}\n")
    print("| guidance | prompts | solids right, % | prompts right, % |\n|---|---|---|---|")
    for scale in guidance:
        for kind, captions in prompts(n).items():
            options = {} if scale == 1.0 else {"guidance": scale}
            images = cddistill.sample(loaded, prompt=captions, steps=steps, seed=seed, **options)
            target = np.stack([wanted(caption) for caption in captions])
            solids, right = accuracy(predict(params, images), target)
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
