"""From a config file to typed values: the only module besides train, commands and main that sees a ConfigDict.

Defaults live in the dataclasses: Run here, the others beside the method, the data and the optimiser. Each of their
fields can be set in a config file or on the command line; an unknown key is an error that names the nearest known one.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from ml_collections import ConfigDict, FieldReference

from cddistill import data, io, typed
from cddistill.data import SOURCES, TASKS, DataConfig
from cddistill.data.loader import option_classes
from cddistill.method import Method
from cddistill.methods import METHODS
from cddistill.models.configured import POLICIES
from cddistill.optim import OptimConfig
from cddistill.sampling import OdeSampler
from cddistill.typed import SOME, Count, Limit, Natural, NonNegative, SamplingSteps, within

MAX_SEED = 2**31 - 100  # a seed and the few that are counted on from it fit JAX's int32
Seed = Annotated[int, within(least=0, below=MAX_SEED)]
BatchSize = Annotated[int, within(least=1, most=2**20)]
PAIR = Limit("two numbers, or none", lambda x: len(x) in (0, 2))


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything about a run that is neither method, data nor optimiser."""

    teacher: str = "emoji"  # a diffusers folder, a Hub id, or "emoji", the teacher that ships with the package
    lora: str = ""  # a LoRA (safetensors file or its folder) to merge into the teacher and its text encoders
    lora_scale: float = 1.0  # times the LoRA's update of the weights; 1 = as it was trained
    controlnet: str = ""  # a ControlNet's folder: initialises a student's branch, or conditions a pretrained network
    random_init: bool = False  # initialise the teacher at random, to train one
    steps: Count = 1000  # updates of the first turn
    batch_size: BatchSize = 32  # global, over all devices and hosts
    accumulate: Count = 1  # micro-batches per step
    seed: Seed = 0  # of new weights, of the order of the data, and of all noise
    parallel: Literal["jit", "pmap"] = "jit"
    fsdp: Annotated[int, within(off=-1, least=1)] = 1  # devices that share the weights; -1 = all; jit only
    dtype: Literal["float32", "bfloat16"] = "float32"  # that networks compute in; "bfloat16" halves activations;
    # weights stay float32
    reduce_dtype: Literal["same", "float32"] = "same"  # in which devices sum gradients: "same" as networks compute in
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights of networks that do not train, while
    # others do and in evaluation; "bfloat16" halves them. Norms and biases stay float32; exports do not change
    remat: bool = False  # recompute activations block by block in the backward pass
    remat_policy: Literal[*POLICIES] = "nothing_saveable"  # what remat keeps of a block besides its inputs: nothing,
    # convolutions and products with weights, all products, those with weights, or these in the host's memory
    flash: bool = True  # fused attention kernels where available; False if a loss takes second derivatives
    log_every: Count = 10  # steps
    log: Literal["tensorboard", "wandb", "none"] = "tensorboard"  # besides metrics.jsonl and the terminal: TensorBoard
    # files; "wandb": these and Weights & Biases (extra wandb); "none": nothing
    checkpoint_every: Count = 500  # steps
    keep: Count = 2  # number of latest checkpoints kept, besides the best
    eval_every: Count = 100  # steps between sample grids
    sample_steps: Annotated[tuple[SamplingSteps, ...], SOME] = (1, 2, 4)  # in which the student is evaluated
    eval_images: Natural = 0  # images of the test split; 0 = all
    baseline: str = ""  # a folder with unet/ and controlnet/, or "emoji_sr": fine-tuned without distillation
    baseline_steps: tuple[SamplingSteps, ...] = (4, 50)  # numbers of steps in which the baseline is evaluated
    teacher_steps: tuple[SamplingSteps, ...] = ()  # numbers of steps in which the teacher itself is evaluated
    teacher_guidance: NonNegative = 1.0  # classifier-free guidance scale of the teacher's samples; 1 = none
    teacher_sampler: OdeSampler = "ddim"  # for the teacher's samples, also in pairs
    num_pairs: Count = 10_000  # rows that --mode=pairs generates, in the last of teacher_steps
    pairs_shard: Count = 1024  # rows per file
    pairs_batch: Count = 64  # rows generated at a time, on all devices together
    encode_epochs: Count = 1  # passes of --mode=encode over the training split; those after the first are augmented
    encode_sample: bool = False  # latents are drawn from the VAE's posterior, in training on images anew; or its mean
    encode_dtype: Literal["float16", "float32"] = "float16"  # of latents and embeddings that --mode=encode writes
    encode_shard: Count = 1024  # rows per file
    decode_batch: Natural = 0  # images that the VAE decodes at a time when samples are generated; 0 = all of a batch
    decode_tile: Annotated[int, within(off=0, least=8)] = 0  # side of the overlapping tiles of a latent, in its pixels,
    # in which the VAE decodes larger ones; 0 = whole. Tiles change images slightly: norms and attention see less
    profile: Annotated[tuple[Count, ...], PAIR] = ()  # first and last step of a trace, written to workdir/profile
    init_from_run: str = ""  # workdir of a run whose trained weights initialise the nets that both runs have
    report: bool = True  # evaluate and write report.html at the end
    protocol: str = ""  # for --mode=evaluate: a published evaluation, such as imagenet64_50k; see docs/evaluation.md
    protocol_data: str = ""  # folder with what it needs: Inception's weights, the reference, prompts
    protocol_images: Natural = 0  # images that it samples; 0 = its own number; with fewer, numbers are not comparable
    protocol_batch: Count = 64  # images sampled and measured at a time, on all devices together
    protocol_png: bool = False  # also write every sampled image as PNG, for other programs


class Experiment(NamedTuple):
    """A config, typed."""

    run: Run
    method: Method
    data: DataConfig
    optim: dict[str, OptimConfig]  # by turn


MUTABLE_ON_RESUME = (
    *("steps", "log_every", "log", "checkpoint_every", "keep", "eval_every", "eval_images", "sample_steps", "report"),
    *("profile", "decode_batch", "decode_tile"),
    *("teacher_steps", "teacher_guidance", "teacher_sampler", "baseline", "baseline_steps", "parallel", "fsdp"),
    *("num_pairs", "pairs_shard", "pairs_batch", "encode_epochs", "encode_dtype", "encode_shard"),
    "data.threads",
    *("protocol", "protocol_data", "protocol_images", "protocol_batch", "protocol_png"),
    "method.preset",  # the fields that it sets count themselves
)
"""Fields that may change when a run is resumed: they alter neither the updates nor the data. A method has more."""
PATHS = ("teacher", "lora", "controlnet", "baseline", "init_from_run", "data.path", "data.pairs", "data.prompts")


def mutable_on_resume(experiment: Experiment) -> set[str]:
    """The config keys that may change when this experiment is resumed for training.

    `steps` is one of them only where no learning rate depends on it, encode_sample where nothing is encoded.
    """
    free = {*MUTABLE_ON_RESUME, *(f"method.{name}" for name in experiment.method.mutable_on_resume)}
    free |= {"encode_sample"} if experiment.data.source.precomputed else set()
    return free if all(o.decay == "constant" for o in experiment.optim.values()) else free - {"steps"}


def paths(experiment: Experiment) -> set[str]:
    """The config keys that say where something lies. They may change: see `train.check_inputs`."""
    return {*PATHS, *(f"method.{name}" for name in experiment.method.paths)}


def defaults(method: str) -> ConfigDict:
    """A ConfigDict with every field at its default, for config files to start from.

    Where a method has several turns, optim.<turn>.<field> is optim.<field> until it is set itself. Where it has
    presets, fields have the values of method.preset until they are set themselves, in whatever order.
    """
    config, default = ConfigDict(dataclasses.asdict(Run())), typed.choose("method.name", METHODS, method)()
    config.method = ConfigDict({"name": method} | dataclasses.asdict(default))
    if default.presets:
        follow_presets(config.method, default.presets)
    config.data = ConfigDict(data.defaults())
    config.optim = ConfigDict(dataclasses.asdict(OptimConfig()))
    if len(turns := default.turns()) > 1:
        fields = list(config.optim)
        for turn in turns:
            config.optim[turn] = ConfigDict({field: config.optim.get_oneway_ref(field) for field in fields})
    return config.lock()


class Op(NamedTuple):
    """A function of a field's own value and of other fields, evaluated when the field is read."""

    fn: Any
    args: tuple[FieldReference, ...]


def follow_presets(method: ConfigDict, presets: Mapping[str, dict[str, Any]]) -> None:
    """Add the field preset; those that a preset has follow it until they are set."""
    method.preset = ""
    chosen = method.get_ref("preset")
    for field in {field for values in presets.values() for field in values}:
        follow = lambda own, name, field=field: presets.get(name, {}).get(field, own)
        method[field] = FieldReference(method[field], op=Op(follow, (chosen,)))


def resolve(config: ConfigDict | dict[str, Any]) -> Experiment:
    """Typed values; ValueError in one sentence for an unknown key, a wrong type or a value out of range."""
    config = plain(config)
    check_names(config)
    method = dict(config.pop("method", {}))
    cls = typed.choose("method.name", METHODS, method.pop("name", None))
    if cls.presets and (preset := typed.fit(method.pop("preset", ""), str, "method.preset")):
        method = typed.choose("method.preset", cls.presets, preset) | method
    method = typed.make(cls, method, "method.")
    optim = dict(config.pop("optim", {}))
    changes = {name: optim.pop(name, {}) for name in cls().turns() | method.turns()}  # also for turns switched off
    data_config = data.configure(**config.pop("data", {}))
    typed.make(OptimConfig, optim, "optim.")
    by_turn = {name: typed.make(OptimConfig, optim | own, f"optim.{name}.") for name, own in changes.items()}
    run = typed.make(Run, config, "")
    return Experiment(run, method, data_config, {name: by_turn[name] for name in method.turns()})


def check_names(config: dict[str, Any]) -> None:
    """ValueError for a key that no config has, with the one that was probably meant."""
    known = owners()
    for key, value in io.flatten(config).items():
        if any(name.startswith(f"{key}.") for name in known):
            raise ValueError(f"{key} holds options and cannot be {value!r}: give a dict of them, or leave it out")
        group, _, field = key.partition(".")
        common = f"optim.{field.rpartition('.')[2]}" if group == "optim" else key  # optim.<turn>.<field>
        if said := foreign(key, method_of(config)):
            raise ValueError(said)
        if common not in known:
            near = typed.nearest(key, known)
            raise ValueError(f"unknown config key {key}: {f'did you mean {near!r}?' if near else '--help lists all'}")


def method_of(config) -> str | None:
    """method.name of a ConfigDict or dict; None if it has none."""
    group = config.get("method")
    name = group.get("name") if isinstance(group, ConfigDict | dict) else None
    return name if isinstance(name, str) else None


def methods_with(option: str) -> list[str]:
    """The names of the methods that have an option."""
    options = lambda cls: {*(field.name for field in dataclasses.fields(cls)), *["preset"] * bool(cls.presets)}
    return [name for name, cls in METHODS.items() if option in options(cls)]


def foreign(key: str, method: str | None) -> str:
    """The sentence for an option that other methods have, "method.ratio", but this one has not; "" for other keys."""
    group, _, field = key.rpartition(".")
    names = methods_with(field)
    if group != "method" or method not in METHODS or method in names or not names:
        return ""
    has = f"{key} is an option of {', '.join(names)}, and the method is {method}"
    return f"{has}: leave it out, or start from a config file with that method"


def plain(config) -> dict[str, Any]:
    """A ConfigDict as nested dicts of plain values (tuples stay tuples). A text that starts with ~ is a path."""
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    return {k: plain(v) if isinstance(v, dict) else expand(v) for k, v in config.items()}


def expand(value):
    """The value; a text with its leading ~ as the home folder."""
    return os.path.expanduser(value) if isinstance(value, str) else value


# ---- all fields, for messages and --help


def owners() -> dict[str, type]:
    """The class of every config key, "optim.lr": OptimConfig; those of a method under "method.", whatever method."""
    groups = {"": (Run,), "method.": METHODS.values(), "optim.": (OptimConfig,)}
    groups["data."] = (DataConfig, *option_classes())
    keys = {f"{g}{f.name}": cls for g, classes in groups.items() for cls in classes for f in dataclasses.fields(cls)}
    return keys | {"method.name": Method, "method.preset": Method}


def describe(settings=None) -> list[str]:
    """--config.<field>=<value> and its comment, a line each: those of a config or, without one, of every method."""
    choices = {"method.name": METHODS, "data.source": SOURCES, "data.task": TASKS}
    notes, known = {key: f"one of {', '.join(table)}" for key, table in choices.items()}, owners()

    def lines(values: dict[str, Any], method: str):
        for key, value in values.items():
            cls, field = known.get(key), key.rpartition(".")[2]
            if key.startswith("method."):
                cls = METHODS[method]
            if key == "method.preset":
                notes[key] = f"{' or '.join(cls.presets)}: values of the fields that are not set themselves"
            if cls is None and value == values.get(f"optim.{field}"):
                continue  # optim.<turn>.<field> as for all turns
            note = notes.get(key) or typed.comments(cls or OptimConfig).get(field, "")
            yield f"  --config.{key}={shown(value):<{max(28 - len(key), 1)}}  {note}".rstrip()

    if settings is not None:
        settings = plain(settings)
        check_names(settings)
        return [*lines(io.flatten(settings), settings["method"]["name"])]
    common = io.flatten(plain(defaults(next(iter(METHODS)))))
    found = [*lines({k: v for k, v in common.items() if not k.startswith("method.")}, "")]
    for name in METHODS:
        own = {k: v for k, v in io.flatten(plain(defaults(name))).items() if k.startswith("method.")}
        found += ["", f"Of the method {name}:", *lines({k: v for k, v in own.items() if k != "method.name"}, name)]
    return found


def shown(value) -> str:
    """A value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
