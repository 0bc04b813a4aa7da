"""Our side of the comparisons: train steps, samplers and the loader on random weights of the given shapes.

The functions of `torch_side`'s names take a `shapes.Setup` and return a `shapes.Work`, as those do.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from shapes import CRITIC_GAN, DECAY, GAN, GUIDANCE, LR, RATIO, Setup, Work, arrays

from cddistill import config, models, sampling, sharding
from cddistill.build import initial, make_optimizers
from cddistill.diffusion import DDPM
from cddistill.net import Autoencoder
from cddistill.step import active, train_step


class Training(NamedTuple):
    """A method's train step and all that it takes."""

    step: Callable  # train_step, pure, not compiled
    driver: sharding.Driver
    turns: dict
    state: Any
    frozen: Any
    batch: Any


def settings(method: str, setup: Setup, **fields):
    """The default config of a method at this setup's batch and dtype; fields are the method's."""
    found = config.defaults(method)
    found.update(batch_size=setup.batch, dtype=setup.dtype)
    found.optim.lr = LR
    found.method.update(ema_decay=DECAY, **fields)
    return found


def denoiser(setup: Setup, remat: bool = False, flash: bool = True):
    """The UNet with random weights."""
    return models.init(setup.config, 0, DDPM(), "eps", False, jnp.dtype(setup.dtype), remat, flash)


def text_of(setup: Setup, embeddings) -> dict:
    """The UNet's text argument; SDXL's pooled embedding and sizes are zeros."""
    text = {"encoder_hidden_states": embeddings}
    if times := setup.config.get("addition_time_embed_dim"):
        pooled = setup.config["projection_class_embeddings_input_dim"] - 6 * times
        zeros = lambda n: np.zeros((setup.batch, n), "f")
        text["added_cond_kwargs"] = {"text_embeds": zeros(pooled), "time_ids": zeros(6)}
    return text


def batch_of(setup: Setup, cond: bool = False) -> dict:
    """A batch as losses see it."""
    given = arrays(setup, cond)
    texts = {name: text_of(setup, given[name]) for name in ("text", "null")}
    return given | texts | {"index": np.arange(setup.batch, dtype="i")}


def training(wanted, teacher, batch) -> Training:
    """The train step of a config and its state at step 0, on the devices."""
    experiment, mesh = config.resolve(wanted), sharding.make_mesh()
    method, optimizers = experiment.method, make_optimizers(experiment)
    turns, frozen = method.turns(), {"teacher": teacher, "autoencoder": Autoencoder()}
    state = jax.jit(functools.partial(initial, experiment))(batch, frozen)
    step = functools.partial(train_step, turns=turns, optimizers=optimizers, ema=method.ema())
    driver = sharding.make_driver("jit", step, mesh, state)
    placed = driver.put_state(state), driver.put_frozen(frozen), driver.put_batch(batch)
    return Training(step, driver, turns, *placed)


def steps_of(parts: Training, number: int = 1) -> Work:
    """That many train steps, each with the turns that are due."""
    state, metrics, done = parts.state, None, 0

    def run():
        nonlocal state, metrics, done
        for _ in range(number):
            batch = parts.driver.put_batch(parts.batch)
            state, metrics = parts.driver.step(state, parts.frozen, batch, active(parts.turns, done))
            done += 1

    return Work(run, lambda: jax.block_until_ready((state, metrics)))


def unet_training(setup: Setup, remat: bool = False, flash: bool = True) -> Training:
    """Of `unet_step`."""
    return training(settings("diffusion", setup), denoiser(setup, remat, flash), batch_of(setup))


def dmd2_training(setup: Setup, remat: bool = False) -> Training:
    """Of `dmd2_cycle`."""
    recipe = {"real_guidance": GUIDANCE, "gan_weight": GAN, "critic_gan_weight": CRITIC_GAN, "ratio": RATIO}
    return training(settings("dmd2", setup, **recipe), denoiser(setup, remat), batch_of(setup))


def codi_training(setup: Setup, remat: bool = False, freeze: bool = False) -> Training:
    """Of `codi_step`, and with `freeze` of `pe_codi_step`."""
    wanted = settings("codi", setup, freeze_backbone=freeze)
    return training(wanted, denoiser(setup, remat), batch_of(setup, cond=True))


def unet_step(setup: Setup) -> Work:
    """One training step of the UNet."""
    return steps_of(unet_training(setup))


def dmd2_cycle(setup: Setup) -> Work:
    """RATIO turns of the critic and one of the student."""
    return steps_of(dmd2_training(setup), RATIO)


def codi_step(setup: Setup) -> Work:
    """One step of CoDi, in which UNet and ControlNet train."""
    return steps_of(codi_training(setup))


def sampler(setup: Setup, steps: int, decode: Callable = lambda params, z: z):
    """The program (teacher, decoder's weights, noise) -> what `decode` makes of a batch by DDIM without guidance."""

    def run(net, params, z, text):
        x0 = sampling.ddim(lambda z, t: net(z, t, text), net.schedule, z, net.schedule.grid(steps))
        return decode(params, x0)

    return jax.jit(sharding.inside(sharding.make_mesh(), run))


def sampling_steps(setup: Setup, steps: int) -> Work:
    """A batch by DDIM without guidance."""
    net, given, found = denoiser(setup), arrays(setup), None
    program, text = sampler(setup, steps), text_of(setup, given["text"])

    def run():
        nonlocal found
        found = program(net, None, given["x0"], text)

    return Work(run, lambda: jax.block_until_ready(found))


def loader(folder: str, images: int) -> Work:
    """`images` random crops of 256 px in batches of 8."""
    from cddistill import data
    from cddistill.data import configure

    options = configure(source="folder", path=folder, size=256, crop="random")
    stream = data.batches(options, batch_size=8, seed=0, rows=slice(0, 8))
    return Work(lambda: [next(stream) for _ in range(images // 8)], lambda: None)
