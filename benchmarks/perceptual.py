"""What a perceptual loss on latents saves, and what an ensemble of transforms is for.

    python benchmarks/perceptual.py cost --size=32 --repeats=3      E-LatentLPIPS against decoding and LPIPS
    python benchmarks/perceptual.py overfit --steps=4000 --seeds=3  one image, found again by descending a metric
    python benchmarks/perceptual.py overfit --metric=emoji.safetensors       a latent LPIPS of one's own for emoji

cost: forward and backward of both for one pair of latents, on random weights of the published shapes (the paper: 9.7
times, on an A100 and 64 x 64 latents of Stable Diffusion). overfit: Adam on the pixels of an image that starts as
noise, down LPIPS-VGG or another metric of it and a test image, plain and under an ensemble; the result is judged
without transforms.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compare import spread
from train_step import seconds

from cddistill import data, losses
from cddistill.data import configure
from cddistill.models import vae
from cddistill.models.init import init_params_numpy, weight_shapes
from cddistill.net import Autoencoder, Net
from cddistill.perceptual import ensemble, latent_lpips, lpips
from cddistill.perceptual.lpips import VGG

POLICIES = ("none", "b", "bg", "bgo")


def random_latent_lpips(family="sd15"):
    """LatentLPIPS with random weights, its norms folded into the convolutions as in the published ones."""
    channels = latent_lpips.FAMILIES[family]
    layers = latent_lpips.init_convs(jax.random.key(0), channels, [stage[-1] for stage in VGG])
    heads = [jnp.full(stage[-1], 0.1) for stage in VGG]
    return Net({"convs": [layer[:2] for layer in layers], "heads": heads}, latent_lpips.LatentLPIPS(family))


def cost(args):
    """Seconds of either loss with its gradient, and their ratio."""
    metric, pixel = random_latent_lpips(), lpips.load("vgg")
    module = vae.AutoencoderKL.from_config({
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    })  # fmt: skip
    autoencoder = Autoencoder(init_params_numpy(weight_shapes(module), 0), vae.Encode(module), vae.Decode(module))
    rng, shape = np.random.default_rng(0), (args.batch, args.size, args.size, 4)
    a, b = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    keys, policy = jax.random.split(jax.random.key(0), args.batch), ensemble.POLICIES["bgo"]

    def decoded(autoencoder, a, b):
        return pixel(autoencoder.decode(a), autoencoder.decode(b)).sum()

    contenders = {
        "E-LatentLPIPS": (lambda metric, a, b: ensemble.ensemble(metric, a, b, keys, policy).sum(), metric),
        "  of that LatentLPIPS": (lambda metric, a, b: metric(a, b).sum(), metric),
        "decoding and LPIPS": (decoded, autoencoder),
    }
    found = {}
    for name, (loss, net) in contenders.items():
        gradient = jax.jit(jax.grad(loss, 1))
        memory = gradient.lower(net, a, b).compile().memory_analysis().temp_size_in_bytes
        found[name] = seconds(lambda gradient=gradient, net=net: gradient(net, a, b), args.repeats)
        print(f"{name:24}{found[name]:8.3f} s   temporaries {memory / 1e9:.2f} GB", flush=True)
    size = f"{args.size} x {args.size} latents, {8 * args.size} px, batch {args.batch}, {jax.devices()[0].device_kind}"
    print(f"{found['decoding and LPIPS'] / found['E-LatentLPIPS']:.1f} times ({size})")


def overfit(args):
    """The metric, LPIPS-VGG and PSNR of the image that descent finds, by ensemble: mean over images, standard error."""
    vgg = lpips.load("vgg")
    metric = latent_lpips.load(args.metric) if args.metric else vgg
    truth = jnp.asarray(data.examples(configure(), "test", args.seeds)["x0"])
    print(f"| {args.steps} steps of Adam, {args.seeds} images | the metric | LPIPS-VGG | PSNR |\n|---|---|---|---|")
    for name in POLICIES:
        drawn = descend(metric, truth, ensemble.POLICIES[name], args.steps)
        psnr = 10 * np.log10(4.0 / np.asarray(losses.mse(drawn, truth)))
        cells = [spread(np.asarray(x)) for x in (metric(drawn, truth), vgg(drawn, truth), psnr)]
        print("|", " | ".join((name, *cells)), "|", flush=True)


def descend(metric, truth, policy, steps, rate=1e-2):
    """Images that a metric leads to from noise; one transform is drawn for every image and step."""
    optimizer = optax.adam(rate)

    def step(carry, i):
        x, opt = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), i), len(truth))
        slope = jax.grad(lambda x: ensemble.ensemble(metric, x, truth, keys, policy).sum())(x)
        updates, opt = optimizer.update(slope, opt)
        return (x + updates, opt), None

    @jax.jit
    def run(x):
        return jax.lax.scan(step, (x, optimizer.init(x)), jnp.arange(steps))[0][0]

    return run(jax.random.normal(jax.random.key(0), truth.shape))


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "overfit"))
    parser.add_argument("--size", type=int, default=32, help="cost: of the latents")
    parser.add_argument("--batch", type=int, default=1, help="cost: pairs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--metric", default="", help="overfit: file of a latent LPIPS; none is LPIPS-VGG")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3, help="overfit: images")
    args = parser.parse_args()
    {"cost": cost, "overfit": overfit}[args.what](args)


if __name__ == "__main__":
    main()
