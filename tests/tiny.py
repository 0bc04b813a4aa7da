"""A UNet of a few thousand weights, batches for it, and small variants of every method for the contract tests."""

import functools
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cddistill import build, checkpoint, config, diffusion, method, models, sharding
from cddistill.diffusion import DDPM
from cddistill.methods import METHODS
from cddistill.models.schedulers import write_scheduler
from cddistill.net import Autoencoder, Denoiser, Net
from cddistill.step import active, init_state, train_step

UNET = {
    "in_channels": 3, "out_channels": 3, "block_out_channels": [8], "layers_per_block": 0,  # resnets: none down, one up
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "mid_block_type": "UNetMidBlock2D", "num_class_embeds": 4, "norm_num_groups": 4,
}  # fmt: skip
VARIANTS = {
    "diffusion": METHODS["diffusion"](text_dropout=0.5),
    "finetune": METHODS["diffusion"](adapter="controlnet"),
    "codi": METHODS["codi"](ema_decay=0.9),
    "codi_pe": METHODS["codi"](ema_decay=0.9, freeze_backbone=True),
    "codi_concat": METHODS["codi"](ema_decay=0.9, adapter="concat"),
    "dmd2": METHODS["dmd2"](student_timesteps=(999, 499), ratio=1, real_guidance=2.0, gan_weight=0.1, ema_decay=0.9),
    "dmd2_lora": METHODS["dmd2"](
        student_timesteps=(999, 499),
        ratio=1,
        student_lora="blocks",
        fake_lora="blocks",
        lora_rank=2,
        gan_features="teacher",
    ),
    "d2g": METHODS["diffusion2gan"](
        regression="l2", augment="bgo", ema_decay=0.9, mix="each", mix_share=0.5, r1_every=1, r1_stride=1
    ),
    "lcm": METHODS["lcm"](embedding_width=4, ema_decay=0.9),
    "gd": METHODS["gd"](first_steps=8, halvings=2, halve_every=3, embedding_width=4),  # resuming spans two stages
    "judge": METHODS["latent_lpips"](stage="judge", family="tiny", width=4, pools=(4,)),
    "autoencoder": METHODS["autoencoder"](channels=(8, 8), lpips_every=2, lpips_crop=4, ema_decay=0.9),
    "codi_released": METHODS["codi"](**METHODS["codi"].presets["released"], guidance_range=(2.0, 4.0)),
}

# conftest.py turns off optimisations to save compile time; training loops under lax.scan run faster with them.
fast = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False},
)


@functools.cache
def teacher(predicts="v", zero_out=False, seed=0):
    return models.init(UNET, seed, DDPM(beta_schedule="squaredcos_cap_v2", zero_snr=True), predicts, zero_out)


def save_teacher(folder, seed=0):
    """Write a random teacher, conditioned on emoji's labels, as a diffusers folder; returns (folder, net)."""
    net = models.init(UNET | {"num_class_embeds": 10, "sample_size": 8}, seed, teacher().schedule, "v", False)
    models.save(folder, "unet", net.params, net.module.to_config(), dtype=np.float32)
    write_scheduler(folder, net.schedule, net.predicts)
    return folder, net


def coarse_l2(params, a, b):
    """Stands in for LPIPS, which does not accept images this small."""
    means = lambda x: x.reshape(len(x), 4, x.shape[1] // 4, 4, x.shape[2] // 4, 3).mean((2, 4))
    return ((means(a) - means(b)) ** 2).mean((1, 2, 3))


def frozen():
    return {"teacher": teacher(), "autoencoder": Autoencoder(), "lpips": Net(None, coarse_l2)}


def make_batch(step=0, size=16):
    rng = np.random.default_rng(step)
    x0, cond = rng.normal(size=(size, 8, 8, 3)).astype("f"), rng.uniform(size=(size, 8, 8, 3)).astype("f")
    labels = rng.integers(0, 3, size).astype("i")
    batch = {"x0": x0, "cond": cond, "text": {"class_labels": labels}, "null": {"class_labels": np.full(size, 3, "i")},
             "index": np.arange(size, dtype="i")}  # fmt: skip
    pairs = {"noise": rng.normal(size=x0.shape).astype("f"), "x0": x0, "text": batch["text"], "null": batch["null"]}
    return batch | {"pairs": pairs, "others": jax.tree.map(lambda x: np.roll(x, -1, 0), pairs)}


def jitter(state, scale=0.1):
    """The state with perturbed nets: zero convolutions are no longer zero, nor averages equal to the weights."""
    leaves, tree = jax.tree.flatten(state.nets)
    rng = np.random.default_rng(1)
    leaves = [(x + scale * rng.normal(size=x.shape) / max(x.size, 1) ** 0.25).astype("f") for x in leaves]
    return state.replace(nets=jax.tree.unflatten(tree, leaves))


@functools.cache
def parts(name, lr=1e-3):
    """(method, turns, optimizers) of a variant."""
    method = VARIANTS[name]
    return method, method.turns(), {turn: optax.adam(lr) for turn in method.turns()}


@functools.cache
def start(name):
    """The state at step 0, in numpy: put_state copies it, as steps donate their state."""
    method, turns, optimizers = parts(name)

    def init(frozen, batch):
        return init_state(method.init(jax.random.key(0), frozen, batch), turns, optimizers, method.ema())

    return jitter(jax.tree.map(np.asarray, jax.jit(init)(frozen(), make_batch())))


@functools.lru_cache(20)  # a compiled step takes tens of megabytes
def driver(name, parallel="jit", devices=8, fsdp=1, accumulate=1):
    """A compiled driver, shared by all tests of one layout; arrays of 64 elements and more are sharded."""
    method, turns, optimizers = parts(name)
    step = functools.partial(train_step, turns=turns, optimizers=optimizers, ema=method.ema(), accumulate=accumulate)
    if parallel == "pmap":
        return sharding.pmap_driver(functools.partial(step, axis="devices"), sharding.make_mesh())
    mesh = jax.make_mesh(
        (devices // fsdp, fsdp),
        ("data", "fsdp"),
        devices=jax.devices()[:devices],
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
    )
    return sharding.jit_driver(step, mesh, start(name), min_elements=64)


def run(name, steps=3, state=None, first=0, **layout):
    """(final state as numpy, metrics of every step)."""
    d, turns = driver(name, **layout), parts(name)[1]
    state, held, logs = d.put_state(state or start(name)), d.put_frozen(frozen()), []
    for i in range(first, first + steps):
        state, metrics = d.step(state, held, d.put_batch(make_batch(i)), active(turns, i))
        logs.append(jax.tree.map(float, metrics))
    return jax.tree.map(np.asarray, d.get_state(state)), logs


def namespace(name, state=None):
    """The argument n of a loss: all nets by role, at step 0."""
    state = state or start(name)
    return types.SimpleNamespace(step=0, **frozen(), **state.nets, **{f"{k}_ema": v for k, v in state.ema.items()})


def until(step, workdir, copy):
    """A copy of a run's workdir without later checkpoints, as if the run had been killed after this one."""
    shutil.copytree(workdir, copy)
    for folder in (copy / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    assert (copy / "checkpoints" / str(step)).is_dir()
    return copy


def newest(workdir, experiment_settings):
    """The weights of a run's newest checkpoint."""
    parts = build.build(config.resolve(experiment_settings))
    return checkpoint.Checkpoints(workdir / "checkpoints", read_only=True).restore_weights(parts.abstract)


def step_noise(noise, seed):
    """The package's step_noise for samplers, given their initial `noise` [b, ...] and a seed or key."""
    key = jax.random.key(seed) if isinstance(seed, int) else seed
    return method.step_noise(key, jnp.arange(len(noise)), noise.shape[1:])


def noting(calls, role, x0=0.0):
    """A network that appends (role, timestep, text, mean of its input and of what else it is given) to `calls`.

    It predicts x0 = `x0` + 100 text. Features are noted as "<role> features". A batch must have one timestep and one
    text. See `run_noting`.
    """

    def apply(params, z_t, t, text, *given, features=False, **further):
        def note(t, text, *means):
            (time,), (label,) = ({*np.ravel(x).tolist()} for x in (t, text))
            calls.append((f"{role} features" if features else role, time, label, *map(float, means)))

        means = [x.mean() for x in (z_t, *given, *further.values())]
        jax.debug.callback(note, t, text, *means, ordered=True)
        out = 0.0 * z_t + x0 + 100.0 * diffusion.like(jnp.asarray(text, jnp.float32), z_t)
        return (out, z_t, [(z_t,)]) if features else out

    return Denoiser({}, apply, DDPM(), "x0")


def disturbed(net, seed=0, scale=0.1):
    """The net with noise added to every weight, so that none is zero."""
    leaves, tree = jax.tree.flatten(net)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [x + scale * jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


def run_noting(function):
    """Call a function of no arguments, jitted or not, and wait until its networks have noted all their calls."""
    jax.block_until_ready(function())
    jax.effects_barrier()


def randn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
