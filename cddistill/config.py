"""From a config file to typed values: the only module besides train and main that sees a ConfigDict.

Defaults live in the dataclasses (Run here; the method's, data's and optimiser's own), so every field of them can be
set from a config file or the command line, and a key that is none of them is an error naming the nearest that is.
"""

import dataclasses
import difflib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from cddistill.data import DataConfig
from cddistill.method import Method
from cddistill.methods import METHODS
from cddistill.methods.pretrained import ODE_SAMPLERS
from cddistill.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything about a run that is neither method, data nor optimiser."""

    teacher: str = "emoji"  # a diffusers folder, or "emoji", the one that ships with the package
    lora: str = ""  # a LoRA (safetensors file or its folder) that is merged into the teacher and its text encoders
    lora_scale: float = 1.0
    controlnet: str = ""  # a ControlNet's folder: where a student's branch starts; what guides a network made elsewhere
    scratch: bool = False  # random weights for the teacher's architecture: to train a teacher
    steps: int = 1000  # updates of the first turn
    batch_size: int = 32  # global, over all devices and hosts
    accumulate: int = 1  # micro-batches per step
    seed: int = 0
    parallel: str = "jit"  # or "pmap"
    fsdp: int = 1  # devices that share one copy of the weights; -1 = all; jit only
    dtype: str = "float32"  # of the networks' arithmetic; "bfloat16" halves activations; weights stay float32
    remat: bool = False  # recompute activations block by block in the backward pass
    flash: bool = True  # attention by fused kernels where there are any; False if a loss takes second derivatives
    log_every: int = 10  # steps
    checkpoint_every: int = 500  # steps
    keep: int = 2  # newest checkpoints kept, besides the best
    eval_every: int = 100  # steps between sample grids
    sample_steps: tuple[int, ...] = (1, 2, 4)  # student steps that are evaluated
    eval_images: int = 0  # of the test split; 0 = all
    baseline: str = ""  # folder, or "emoji_sr": a fine-tuned network without distillation, for the report
    baseline_steps: tuple[int, ...] = (4, 50)
    teacher_steps: tuple[int, ...] = ()  # of the teacher itself, for the report: its own samples at so many steps
    teacher_guidance: float = 1.0  # classifier-free, in those
    teacher_sampler: str = "ddim"  # or "heun", "dpm_solver_pp": in those, and in pairs
    pairs: int = 10_000  # rows that --mode=pairs makes, in the last of teacher_steps
    pairs_shard: int = 1024  # of them in one file
    pairs_batch: int = 64  # of them drawn at a time, on all devices together
    start_from: str = ""  # workdir of a run whose trained weights, of nets that both have, are the first of this one
    report: bool = True  # evaluate and write report.html at the end


class Experiment(NamedTuple):
    """A config, typed."""

    run: Run
    method: Method
    data: DataConfig
    optim: dict[str, OptimConfig]  # by turn


FREE = (
    *("steps", "log_every", "checkpoint_every", "keep", "eval_every", "eval_images", "sample_steps", "report"),
    *("teacher_steps", "teacher_guidance", "teacher_sampler", "baseline", "baseline_steps", "parallel", "fsdp"),
    *("pairs", "pairs_shard", "pairs_batch"),
    *("method.guidance", "method.grid_power", "method.sampler"),
)
"""Fields that may change when a run is continued: they alter neither the weights' path nor the data."""


def defaults(method: str) -> ConfigDict:
    """A ConfigDict with every field at its default, for config files to start from.

    Where a method has several turns, optim.<turn>.<field> is optim.<field> until it is set itself.
    """
    config, default = ConfigDict(dataclasses.asdict(Run())), choose("method.name", METHODS, method)()
    config.method = ConfigDict({"name": method} | dataclasses.asdict(default))
    config.data = ConfigDict(dataclasses.asdict(DataConfig()))
    config.optim = ConfigDict(dataclasses.asdict(OptimConfig()))
    if len(turns := default.turns()) > 1:
        fields = list(config.optim)
        for turn in turns:
            config.optim[turn] = ConfigDict({field: config.optim.get_oneway_ref(field) for field in fields})
    return config.lock()


def resolve(config: ConfigDict | dict[str, Any]) -> Experiment:
    """Typed values; ValueError in one sentence for an unknown key, a wrong type or a value out of range."""
    config = plain(config)
    method = dict(config.pop("method", {}))
    cls = choose("method.name", METHODS, method.pop("name", None))
    method = build(cls, method, "method.")
    optim = dict(config.pop("optim", {}))
    changes = {name: optim.pop(name, {}) for name in cls().turns() | method.turns()}  # also for turns switched off
    data = build(DataConfig, config.pop("data", {}), "data.")
    by_turn = {name: build(OptimConfig, optim | changes[name], "optim.") for name in method.turns()}
    run = build(Run, config, "")
    counts = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep", "eval_every")
    for name in (*counts, "pairs", "pairs_shard", "pairs_batch"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(run, name)}")
    if not run.sample_steps or min(run.sample_steps) < 1:
        raise ValueError(f"sample_steps {run.sample_steps} must be numbers of at least 1, as in (1, 4)")
    choose("teacher_sampler", dict.fromkeys(ODE_SAMPLERS), run.teacher_sampler)
    if run.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {run.dtype!r} is neither 'float32' nor 'bfloat16'")
    return Experiment(run, method, data, by_turn)


def build(cls, values: dict[str, Any], prefix: str):
    """cls(**values), with unknown names and wrong types said in one sentence."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name, value in values.items():
        choose(f"config key {prefix}{name}", {f"{prefix}{k}": k for k in fields}, f"{prefix}{name}")
        default = fields[name].default
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            values = values | {name: float(value)}
        elif isinstance(default, tuple) and isinstance(value, list):
            values = values | {name: tuple(value)}
        elif type(value) is not type(default):
            raise ValueError(f"{prefix}{name} must be {type(default).__name__}, not {type(value).__name__} {value!r}")
    return cls(**values)


def choose(what: str, table: dict[str, Any], name):
    """table[name], or a ValueError naming the nearest entry."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(table)}"
    raise ValueError(f"unknown {what if str(name) in what else f'{what} {name!r}'}: {hint}")


def plain(config) -> dict[str, Any]:
    """A ConfigDict as nested dicts of plain values (tuples stay tuples)."""
    if isinstance(config, ConfigDict):
        config = config.to_dict()
    return {k: plain(v) if isinstance(v, dict) else v for k, v in config.items()}
