"""From an experiment to its parts: frozen nets, the state at step 0 and how to sample from it."""

import functools
import pathlib
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cddistill import data, models, sharding
from cddistill.config import Experiment
from cddistill.data import odepairs
from cddistill.method import Generator, normal
from cddistill.methods import METHODS
from cddistill.models import adapter, latent_lpips, lora, lpips
from cddistill.models.fingerprint import fingerprint
from cddistill.net import Adapted, Autoencoder
from cddistill.optim import optimizer
from cddistill.step import TrainState, init_state, namespace, train_step


class Parts(NamedTuple):
    """A run, ready to start; nothing has been computed but the loading of frozen weights."""

    experiment: Experiment
    mesh: jax.sharding.Mesh
    rows: slice  # of the global batch, loaded by this host
    frozen: dict[str, Any]  # on the mesh
    abstract: TrainState  # shapes of the state, laid out on the mesh

    def init(self) -> TrainState:
        """The state at step 0, every array made where it will live."""
        layout = jax.tree.map(lambda x: x.sharding, self.abstract)
        return jax.jit(functools.partial(initial, self.experiment), out_shardings=layout)(self.frozen)

    def driver(self) -> sharding.Driver:
        """The train step, compiled for config.parallel."""
        run = self.experiment.run
        step = functools.partial(
            train_step,
            turns=self.experiment.method.turns(),
            optimizers=make_optimizers(self.experiment),
            ema=self.experiment.method.ema(),
            seed=run.seed,
            accumulate=run.accumulate,
        )
        return sharding.make_driver(run.parallel, step, self.mesh, self.abstract)


def build(experiment: Experiment) -> Parts:
    """Load and check everything that a run needs; any bad input raises a ValueError here, before the first step."""
    run, method = experiment.run, experiment.method
    mesh = sharding.make_mesh(run.fsdp)
    rows = sharding.local_rows(run.batch_size, run.accumulate)
    ours = options(run) | {"place": functools.partial(place, mesh)}
    frozen = load_denoisers(experiment, ours) if isinstance(method, Generator) else {}
    frozen["autoencoder"] = load_autoencoder(run.teacher, **ours)
    if getattr(method, "lpips", False):
        frozen["lpips"] = lpips.load("vgg")
    if file := getattr(method, "latent_lpips", None):
        frozen["latent_lpips"] = latent_lpips.load(*file)
    frozen = sharding.put(frozen, sharding.by_shape(mesh, frozen))
    if "imageless" in first_rows(experiment.data) and getattr(method, "needs_images", True):
        raise ValueError(
            "this method as it is set needs real images, and the data are texts alone: encode images with them, or for "
            "dmd2 set method.gan_weight=0 (and keep backward_simulation)"
        )
    if isinstance(method, Generator):
        check_shapes(frozen["teacher"], batch_shapes(experiment))
        as_method(run, frozen["teacher"].schedule)
        for steps in run.sample_steps:
            method.sampling(frozen["teacher"].schedule, steps)  # says so if the student cannot be sampled in so many
    check_labels(experiment.data, getattr(method, "labels", 0))
    shapes = jax.eval_shape(functools.partial(initial, experiment), frozen)
    layout = sharding.by_shape(mesh, shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)
    return Parts(experiment, mesh, rows, frozen, abstract)


def place(mesh, path, x):
    """A weight to the devices as soon as it is read: no host ever holds a whole network."""
    return sharding.put(x, sharding.by_shape(mesh, x))


def options(run) -> dict[str, Any]:
    """What a run says about the arithmetic of every network that it loads."""
    return {"dtype": jnp.dtype(run.dtype), "remat": run.remat, "flash": run.flash}


def load_denoisers(experiment: Experiment, ours) -> dict[str, Any]:
    """The teacher with the run's LoRA and, if there is one, its ControlNet."""
    run = experiment.run
    teacher = load_teacher(run, place=ours["place"])
    if experiment.data.pairs:
        check_pairs(experiment, weights_of(run, teacher))
    frozen = {"teacher": with_lora(run, teacher)}
    if run.controlnet:
        frozen["controlnet"] = models.load(run.controlnet, "controlnet", expect=models.CONTROLNETS, **ours)
    return frozen


def load_teacher(run, place=None):
    """The teacher as it is stored, still without the run's LoRA."""
    if run.scratch:
        return from_scratch(run.teacher, run.seed, **options(run))
    return models.load(run.teacher, place=place, expect=models.DENOISERS, **options(run))


def with_lora(run, teacher):
    """The teacher with the run's LoRA, if there is one, merged into it."""
    return lora.merge(run.lora, {"unet": teacher}, run.lora_scale)["unet"] if run.lora else teacher


def weights_of(run, teacher) -> str:
    """Fingerprint of the teacher and the run's LoRA, both as stored: sums of them differ from platform to platform."""
    loras = lora.read_for(run.lora, {"unet": teacher}) if run.lora else {}
    return fingerprint({"teacher": teacher.params} | {name: net.params for name, net in loras.items()})


def as_method(run, schedule):
    """The teacher as a student that needs no training, as it is sampled for the report and for pairs.

    Raises ValueError for Heun's method on a schedule that starts without signal.
    """
    if run.teacher_sampler == "heun" and run.teacher_steps and not schedule.alpha_sigma(schedule.grid(1))[0].all():
        sentence = "teacher_sampler heun divides by alpha, and this teacher's schedule starts at alpha = 0"
        raise ValueError(f"{sentence}: use ddim or dpm_solver_pp")
    return METHODS["pretrained"](guidance=run.teacher_guidance, sampler=run.teacher_sampler)


def check_pairs(experiment: Experiment, weights: str) -> None:
    """ValueError if data.pairs are of another teacher than this run's, or of another size than the data."""
    run, folder = experiment.run, experiment.data.pairs
    manifest = odepairs.read_manifest(folder)
    ours = {"teacher": run.teacher, "lora": run.lora, "lora_scale": run.lora_scale, "weights": weights}
    compared = ("weights", "lora_scale") if run.lora else ("weights",)
    if any(manifest[name] != ours[name] for name in compared):
        sentence = f"data.pairs {folder} was made by {called(manifest)}, and this run's teacher is {called(ours)}"
        raise ValueError(f"{sentence}: make pairs of that one with --mode=pairs")
    shape = first_rows(experiment.data)["x0"].shape[1:]
    if tuple(manifest["x0"]) != shape:
        raise ValueError(f"x0 of data.pairs {folder} is {(*manifest['x0'],)}, and that of the data is {shape}")


def called(of) -> str:
    """A teacher in words."""
    added = f" with {of['lora_scale']:g} of {of['lora']}" if of["lora"] else ""
    return f"{of['teacher']}{added} (weights {of['weights']})"


def load_autoencoder(teacher: str, **kwargs) -> Autoencoder:
    """The VAE of a teacher's pipeline; the identity for pixel models, which have none."""
    root = models.resolve(teacher, "vae")
    return models.load(root, "vae", expect=models.AUTOENCODERS, **kwargs) if has(root, "vae") else Autoencoder()


def has(root: pathlib.Path, part: str) -> bool:
    """Whether a teacher's pipeline has this part; ValueError if its model_index.json names one that is not there."""
    index = root / "model_index.json"
    named = index.is_file() and any(models.schedulers.read_json(index).get(part) or ())  # may be [null, null]
    if named and not (root / part).is_dir():
        raise ValueError(f"{root} lacks {part}/, which its model_index.json names: download that folder too")
    return (root / part).is_dir()


def from_scratch(folder, seed, **kwargs):
    """Random weights for the architecture and schedule that a diffusers folder describes; it needs no weights file."""
    root = models.resolve(folder)
    config, scheduler = root / "unet" / "config.json", root / "scheduler" / "scheduler_config.json"
    how = models.schedulers.read_scheduler(scheduler) if scheduler.is_file() else ()  # or what the network implies
    return models.init(models.convert.read_json(config), seed, *how, **kwargs)


def make_optimizers(experiment: Experiment):
    """One optax transformation per turn, its schedule as long as the turn's updates."""
    turns, steps = experiment.method.turns(), experiment.run.steps
    updates = {name: max(-(-(steps - turn.after) // turn.every), 1) for name, turn in turns.items()}
    return {name: optimizer(experiment.optim[name], updates[name]) for name in turns}


def initial(experiment: Experiment, frozen) -> TrainState:
    """State at step 0 as a pure function of the frozen nets."""
    method = experiment.method
    nets = method.init(jax.random.key(experiment.run.seed), frozen, batch_shapes(experiment))
    return init_state(nets, method.turns(), make_optimizers(experiment), method.ema())


@functools.cache
def first_rows(data_config):
    """Two training rows: what shows the shapes of a batch."""
    return next(data.batches(data_config, batch_size=2, seed=0))


def batch_shapes(experiment: Experiment):
    """Shapes of the global batch."""
    size = experiment.run.batch_size
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), first_rows(experiment.data))


def check_shapes(teacher, batch):
    """Let the network itself refuse data that it cannot take: channels, sizes, missing text."""
    names = ("x0", "text")
    if "cond" in batch and adapter.concats(teacher, batch["x0"].shape[-1]):
        teacher, names = Adapted(teacher), (*names, "cond")
    x0, *given = (batch[name] for name in names)
    jax.eval_shape(lambda n, x0, *given: n(x0, jnp.zeros(1, jnp.int32), *given), teacher, x0, *given)


def check_labels(config, classes: int):
    """ValueError if a method learns so many classes and the data has others, or images that have none."""
    if not classes:
        return
    text = first_rows(config)["text"]
    if "class_labels" not in text or (text["class_labels"] == config.num_classes).any():
        data_set = f"data.source={config.source} {config.path}".strip()
        raise ValueError(f"this method learns labels, and there are images in {data_set} that have none")
    if classes != config.num_classes:
        raise ValueError(f"method.classes is {classes}, and data.num_classes {config.num_classes}: set both alike")


def decoder(parts: Parts):
    """decode(x0) -> images [n, h, w, c] in [0, 1], numpy, of pixels or latents x0."""
    images, autoencoder = jax.jit(Autoencoder.images), parts.frozen["autoencoder"]

    def unit(x0):
        chunk = len(x0) if autoencoder.params is None else 8  # decoding takes memory
        return np.concatenate([images(autoencoder, x0[i : i + chunk]) for i in range(0, len(x0), chunk)])

    return unit


def arrays(examples):
    """The numeric part of `data.examples`, with the row numbers that noise follows."""
    kept = {k: examples[k] for k in ("x0", "text", "null", "cond") if k in examples}
    return kept | {"index": np.arange(len(examples["x0"]), dtype=np.int32)}


def sampler(parts: Parts):
    """sample(nets, batch, steps, seed) -> images [n, h, w, c] in [0, 1], numpy; `nets` is a state or anything with
    nets, ema. Noise follows batch["index"]."""
    method, mesh = parts.experiment.method, parts.mesh

    @functools.partial(jax.jit, static_argnums=4, out_shardings=sharding.replicated(mesh))
    @functools.partial(sharding.inside, mesh)
    def draw(nets, ema, frozen, batch, steps, seed):
        n = namespace(SimpleNamespace(step=0, ema=ema), frozen, nets)
        key = jax.random.key(seed)
        noise = normal(key, batch["index"], batch["x0"].shape[1:])
        x0 = method.sample(n, noise, batch, jax.random.fold_in(key, 1), steps)
        return n.autoencoder.images(x0)

    def sample(state, batch, steps, seed=0, chunk=64):
        return by_chunks(mesh, lambda rows: draw(state.nets, state.ema, parts.frozen, rows, steps, seed), batch, chunk)

    return sample


def scorer(parts: Parts):
    """score(state, batch, seed) -> {name: [n] numbers, one per image} of a method that trains a metric."""
    method, mesh = parts.experiment.method, parts.mesh

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    @functools.partial(sharding.inside, mesh)
    def compare(nets, frozen, batch, seed):
        return method.scores(namespace(SimpleNamespace(step=0, ema={}), frozen, nets), batch, jax.random.key(seed))

    def score(state, batch, seed=0, chunk=64):
        return by_chunks(mesh, lambda rows: compare(state.nets, parts.frozen, rows, seed), batch, chunk)

    return score


def by_chunks(mesh, f, batch, chunk: int):
    """f of all rows of a batch, numpy, so many at a time; padded, so that one program serves any number of rows."""
    total = len(batch["index"])
    chunk = -(-min(chunk, total) // mesh.size) * mesh.size
    made = []
    for start in range(0, total, chunk):
        part = jax.tree.map(lambda x, start=start: pad(x[start : start + chunk], chunk), batch)
        rows = sharding.put(part, jax.tree.map(lambda _: sharding.by_row(mesh), part))
        made.append(jax.tree.map(np.asarray, f(rows)))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[:total], *made)


def pad(x, n):
    """Repeat the last row up to n rows."""
    return np.concatenate([x, np.repeat(x[-1:], n - len(x), 0)]) if len(x) < n else x
