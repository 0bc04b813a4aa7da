"""Options of PEFT's adapters: adapter_config.json beside the weights, or the header that diffusers writes."""

import re
from pathlib import Path

from cddistill import io
from cddistill.models import files
from cddistill.typed import brief

FILES = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of every name in PEFT's files
USED = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
NO_EFFECT = {  # on the update of the layers in the file
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip
NEUTRAL = {
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}  # others change W
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}  # {regular expression for ends of layers' names: value}
AGAIN = "download it again, or save the adapter again"
ANOTHER = "merge it into its model (merge_and_unload in PEFT) and load that"


def beside(file: Path) -> dict:
    """The options in adapter_config.json beside PEFT's weights; ValueError if it is missing or not a plain LoRA's."""
    config = file.parent / CONFIG
    if not config.is_file():
        raise ValueError(f"{config} is missing: {file.name} needs it for its scale, lora_alpha / r; download it too")
    options = io.read_json(config)
    if missing := [key for key in ("r", "lora_alpha") if key not in options]:
        raise ValueError(f"{config} lacks {' and '.join(missing)}, the scale of a LoRA: download it again")
    return check(options, config)


def header(file: Path, prefix: str) -> dict:
    """The options whose names have a prefix in the header of a safetensors file of diffusers; {} if there are none."""
    if file.suffix != ".safetensors":
        return {}
    said = files.safetensors_header(file)[0].get("__metadata__", {}).get("lora_adapter_metadata", "{}")
    try:
        options = io.parse_json(said)
    except ValueError as error:
        raise ValueError(f"{file} has lora_adapter_metadata that is no JSON ({error}): download it again") from error
    if not isinstance(options, dict):
        raise ValueError(f"{file} has lora_adapter_metadata that is no object {{...}}: download it again")
    return check({key.removeprefix(prefix): x for key, x in options.items() if key.startswith(prefix)}, file)


def check(options: dict, where) -> dict:
    """The options; ValueError naming one that makes the adapter more than down @ up in its layers."""
    if (kind := options.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"{where}: peft_type = {kind!r} is no LoRA: {ANOTHER}")
    for key, x in options.items():
        if x not in NEUTRAL[key] if key in NEUTRAL else x and key not in USED | NO_EFFECT:
            name = "DoRA" if key == "use_dora" else "more than a plain LoRA"
            raise ValueError(f"{where}: {key} = {str(x):.60} is {name}: {ANOTHER}")
    for key in ("r", "lora_alpha"):
        patterns = options.get(PATTERNS[key]) or {}
        numbers = [options.get(key, 1), *patterns.values()] if isinstance(patterns, dict) else [None]
        if not all(type(x) in (int, float) and 0 < x < 2**16 for x in numbers):
            raise ValueError(f"{where}: {key} or {PATTERNS[key]} is no positive number, or one for each layer: {AGAIN}")
        if wrong := [pattern for pattern in patterns if not is_quick(pattern)]:
            raise ValueError(f"{where}: {PATTERNS[key]} has {brief(wrong[0])}, which is no simple pattern: {AGAIN}")
    return options


def is_quick(pattern: str) -> bool:
    """Whether a regular expression is one, and cannot take forever to be found missing: few repeats, none of groups."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(pattern) <= 200 and not re.search(r"\)[*+{]", pattern) and len(re.findall(r"[*+{]", pattern)) <= 3


def of_layer(options: dict, key: str, name: str, default):
    """An option ("r" or "lora_alpha") of one layer: its pattern's, which matches ends of names, or the common one."""
    patterns = options.get(PATTERNS[key]) or {}
    special = (x for end, x in patterns.items() if re.fullmatch(rf"(.*\.)?({end})", name))
    return next(special, options.get(key, default))


def scale(options: dict, name: str, rank: int, where) -> float:
    """A layer's factor of down @ up: alpha / r, or alpha / sqrt(r) for rsLoRA; 1 without options."""
    if (expected := of_layer(options, "r", name, rank)) != rank:
        raise ValueError(f"{where}: {name} has rank {rank}, but its options say {expected}: they are another adapter's")
    alpha = of_layer(options, "lora_alpha", name, rank)
    return alpha / (rank**0.5 if options.get("use_rslora") else rank)
