"""Our side of the comparisons: train steps, samplers and the loader on random weights of the given shapes.

The functions of `torch_side`'s names take a `shapes.Setup` and return a `shapes.Work`, as those do.
"""

import functools
import pathlib
import runpy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from shapes import CRITIC_GAN, DECAY, GAN, GUIDANCE, LR, RATIO, Setup, Work, arrays

from cddistill import config, sampling, sharding
from cddistill.build import initial, make_optimizers
from cddistill.diffusion import DDPM
from cddistill.models.convert import build
from cddistill.models.init import init_params, weight_shapes
from cddistill.models.unet import Apply
from cddistill.models.vae import Decode, Encode
from cddistill.net import Autoencoder, Denoiser
from cddistill.step import active, train_step

RECIPES = {  # name -> (method, whether it has a condition image, its hyper-parameters)
    "unet": ("diffusion", False, {}),
    "dmd2": ("dmd2", False, {
        "real_guidance": GUIDANCE, "gan_weight": GAN, "critic_gan_weight": CRITIC_GAN, "ratio": RATIO,
    }),
    "codi": ("codi", True, {}),
    "pe_codi": ("codi", True, {"freeze_backbone": True}),
    "sdxl_lora": ("dmd2", False, {}),  # configs/dmd2_sdxl.py:lora
}  # fmt: skip
SDXL = pathlib.Path(__file__).parents[1] / "configs/dmd2_sdxl.py"


class Training(NamedTuple):
    """A recipe's train step and all that it takes, on the devices."""

    driver: sharding.Driver
    turns: dict
    state: Any
    frozen: Any
    batch: Any


def experiment_of(recipe: str, setup: Setup) -> config.Experiment:
    """A recipe at this setup's batch and dtype."""
    method, _, fields = RECIPES[recipe]
    found = config.defaults(method)
    found.update(batch_size=setup.batch, dtype=setup.dtype)
    found.optim.lr = LR
    found.method.update(ema_decay=DECAY, **fields)
    if recipe == "sdxl_lora":
        given = runpy.run_path(str(SDXL))["get_config"]("lora")
        found.method, found.optim = given.method, given.optim
        found.method.lora_rank = min(found.method.lora_rank, setup.config["block_out_channels"][0] // 4)  # if tiny
        found.method.student_timesteps = (399,)  # of several steps, a random number is played in each turn
    return config.resolve(found)


def random_weights(module):
    """Weights for a module, as numpy arrays: pieces of one random array, since new numbers would take a minute."""
    shapes = weight_shapes(module)
    largest = max(x.size for x in jax.tree.leaves(shapes))
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, largest + 4096).astype("f")

    def some(shape, bound=1.0):
        start = rng.integers(4096)
        return np.float32(bound) * noise[start : start + np.prod(shape, dtype=int)].reshape(shape)

    return init_params(shapes, some, some)


def denoiser(setup: Setup, remat: bool = False, flash: bool = True, weights: Callable = random_weights) -> Denoiser:
    """The UNet, with random weights on the host."""
    module = build(setup.config, dtype=jnp.dtype(setup.dtype), remat=remat, flash=flash)
    return Denoiser(weights(module), Apply(module), DDPM(), "eps")


def autoencoder(options: dict, dtype: str) -> Autoencoder:
    """An AutoencoderKL, with random weights on the host."""
    module = build(options | {"_class_name": "AutoencoderKL"}, dtype=jnp.dtype(dtype))
    return Autoencoder(random_weights(module), Encode(module), Decode(module))


def text_of(setup: Setup, embeddings) -> dict:
    """The UNet's text argument; SDXL's pooled embedding and sizes are zeros."""
    text = {"encoder_hidden_states": embeddings}
    if times := setup.config.get("addition_time_embed_dim"):
        pooled = setup.config["projection_class_embeddings_input_dim"] - 6 * times
        zeros = lambda n: np.zeros((setup.batch, n), "f")
        text["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    return text


def batch_of(recipe: str, setup: Setup) -> dict:
    """A batch as the recipe's losses see it."""
    given = arrays(setup, cond=RECIPES[recipe][1])
    texts = {name: text_of(setup, given[name]) for name in ("text", "null")}
    return given | texts | {"index": np.arange(setup.batch, dtype="i")}


def step_of(experiment: config.Experiment) -> Callable:
    """`train_step` of an experiment, not compiled."""
    method = experiment.method
    return functools.partial(train_step, turns=method.turns(), optimizers=make_optimizers(experiment), ema=method.ema())


def training(recipe: str, setup: Setup, remat: bool = False, flash: bool = True) -> Training:
    """The train step of a recipe and its state at step 0."""
    experiment, mesh, batch = experiment_of(recipe, setup), sharding.make_mesh(), batch_of(recipe, setup)
    frozen = {"teacher": denoiser(setup, remat, flash), "autoencoder": Autoencoder()}
    frozen = sharding.put(frozen, sharding.by_shape(mesh, frozen))
    make = functools.partial(initial, experiment, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch))
    layout = sharding.by_shape(mesh, jax.eval_shape(make, frozen))
    state = jax.jit(make, out_shardings=layout)(frozen)
    driver = sharding.make_driver("jit", step_of(experiment), mesh, state)
    return Training(driver, experiment.method.turns(), state, frozen, driver.put_batch(batch))


def flops(recipe: str, setup: Setup, play: tuple[str, ...]) -> float | None:
    """Floating-point operations of these turns, counted by XLA in the program before optimisation; nothing runs.

    Without fused kernels, whose operations XLA does not know, and without recomputation, which is no useful work. None
    if JAX has no CPU backend, which counts.
    """
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError:
        return None
    experiment, batch = experiment_of(recipe, setup), batch_of(recipe, setup)
    frozen = {"teacher": denoiser(setup, flash=False, weights=weight_shapes), "autoencoder": Autoencoder()}
    state = jax.eval_shape(functools.partial(initial, experiment), batch, frozen)
    with jax.default_device(cpu):
        lowered = jax.jit(functools.partial(step_of(experiment), play=play)).lower(state, frozen, batch)
        return lowered.cost_analysis()["flops"]


def steps_of(parts: Training, number: int = 1) -> Work:
    """That many train steps, each with the turns that are due."""
    state, metrics, done = parts.state, None, 0

    def run():
        nonlocal state, metrics, done
        for _ in range(number):
            state, metrics = parts.driver.step(state, parts.frozen, parts.batch, active(parts.turns, done))
            done += 1

    return Work(run, lambda: jax.block_until_ready((state, metrics)))


def unet_step(setup: Setup) -> Work:
    """One training step of the UNet."""
    return steps_of(training("unet", setup))


def dmd2_cycle(setup: Setup) -> Work:
    """RATIO turns of the critic and one of the student."""
    return steps_of(training("dmd2", setup), RATIO)


def codi_step(setup: Setup) -> Work:
    """One step of CoDi, in which UNet and ControlNet train."""
    return steps_of(training("codi", setup))


def calls(f: Callable, *given) -> Work:
    """Calls of f on the same arguments."""
    found = None

    def run():
        nonlocal found
        found = f(*given)

    return Work(run, lambda: jax.block_until_ready(found))


def sampling_steps(setup: Setup, steps: int, decoder: dict | None = None) -> Work:
    """A batch by DDIM without guidance; decoder is the config of the VAE that decodes it."""
    mesh, latents = sharding.make_mesh(), arrays(setup)
    vae = autoencoder(decoder, setup.dtype) if decoder else Autoencoder()
    nets = denoiser(setup), vae
    nets = sharding.put(nets, sharding.by_shape(mesh, nets))
    given = latents["x0"], text_of(setup, latents["text"])

    def sample(nets, z, text):
        net, vae = nets
        return vae.decode(sampling.ddim(lambda z, t: net(z, t, text), net.schedule, z, net.schedule.grid(steps)))

    return calls(jax.jit(sharding.inside(mesh, sample)), nets, *given)


def loader(folder: str, images: int) -> Work:
    """`images` random crops of 256 px in batches of 8."""
    from cddistill import data
    from cddistill.data import configure

    options = configure(source="folder", path=folder, size=256, crop="random")
    stream = data.batches(options, batch_size=8, seed=0, rows=slice(0, 8))
    return Work(lambda: [next(stream) for _ in range(images // 8)], lambda: None)
