"""Weights from and to diffusers folders: config.json plus safetensors (PyTorch) or msgpack (diffusers' former Flax).

The rule: our path down_blocks_0/resnets_1/conv1/kernel is PyTorch's down_blocks.0.resnets.1.conv1.weight, transposed.
The former Flax files already have our paths and shapes; that code approximated GELU by tanh, we compute it exactly as
PyTorch does, so outputs differ from its by about 5e-5. Every name and shape is compared before anything is returned.
"""

import dataclasses
import json
import re
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from cddistill.diffusion import DDPM
from cddistill.models.adapter import ControlNetModel, MuBlendModel
from cddistill.models.init import draw_numpy, weight_shapes
from cddistill.models.unet import Apply, UNet2DConditionModel
from cddistill.net import Denoiser, Net

ASSETS = Path(__file__).parent / "assets"
TORCH_FILE, FLAX_FILE = "diffusion_pytorch_model.safetensors", "diffusion_flax_model.msgpack"
CLASSES = {c.__name__: c for c in (UNet2DConditionModel, ControlNetModel, MuBlendModel)}
PREDICTS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def torch_name(path: tuple[str, ...]) -> str:
    """PyTorch's name of the weight at our path."""
    *module, leaf = path
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    return re.sub(r"(?<!linear)_(\d+)(?=\.)", r".\1", ".".join([*module, leaf]))  # linear_1 is a name of theirs


def to_torch(path, x):
    """Our array in PyTorch's layout: [h, w, in, out] and [in, out] here are [out, in, h, w] and [out, in] there."""
    if path[-1] != "kernel":
        return x
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


def from_torch(path, x):
    """PyTorch's array in our layout."""
    if path[-1] != "kernel":
        return x
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def resolve(folder, subfolder: str = "unet") -> Path:
    """The directory meant by a path, an embedded model's name ("emoji") or a Hub id "owner/name".

    Raises ValueError, with what to do, if it is none of them or the download fails.
    """
    embedded = {p.name: p for p in sorted(ASSETS.glob("*")) if p.is_dir()}
    path = embedded.get(str(folder), Path(folder).expanduser())
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        raise ValueError(f"{str(folder)!r} is neither a folder nor an embedded model; those are {[*embedded]}")
    try:
        from huggingface_hub import snapshot_download

        stem = TORCH_FILE.removesuffix(".safetensors")  # with it the index and shards of large models
        files = ["config.json", f"{stem}*.safetensors", f"{stem}*.json", FLAX_FILE]
        patterns = ["scheduler/*.json", *files, *(f"{subfolder}/{file}" for file in files)]
        return Path(snapshot_download(str(folder), allow_patterns=patterns))
    except Exception as error:  # whatever the Hub's client raises: offline, unknown name, not installed
        raise ValueError(
            f"{str(folder)!r} is not a folder and could not be downloaded from the Hub ({type(error).__name__}); "
            "download it on a machine with network access and pass the path of the folder instead"
        ) from error


def load(folder, subfolder: str = "unet", dtype=jnp.float32, remat: bool = False) -> Denoiser | Net:
    """The network in a diffusers folder, by the class its config.json names: a UNet as Denoiser, a branch as Net.

    folder is a path, "emoji" or a Hub id; the network lies in its subfolder, or in the folder itself. Weights become
    float32 whatever the file holds; dtype is what layers compute in. A UNet's schedule and prediction type come from
    scheduler/scheduler_config.json beside it; a UNet that lies alone is taken for Stable Diffusion 1.x (scaled-linear
    betas, eps). Raises ValueError naming the file or key for anything missing, truncated, misshapen or unsupported.
    """
    root = resolve(folder, subfolder)
    path = root / subfolder if (root / subfolder).is_dir() else root
    config = read_json(path / "config.json")
    module = build(config, dtype=dtype, remat=remat)
    params = read_params(path, weight_shapes(module))
    if isinstance(module, UNet2DConditionModel):
        return Denoiser(params, Apply(module), *read_scheduler(path.parent / "scheduler" / "scheduler_config.json"))
    return Net(params, Apply(module))


def build(config: dict, **ours):
    """The module of a config.json, which may be one of diffusers' former Flax classes."""
    name = config.get("_class_name", "UNet2DConditionModel")
    if name.removeprefix("Flax") not in CLASSES:
        raise ValueError(f"_class_name {name!r} is not supported, only {', '.join(CLASSES)} are")
    return CLASSES[name.removeprefix("Flax")].from_config(config, **ours)


def abstract(config: dict):
    """(module, shapes of its weights) for a config.json, without memory: for counting and planning."""
    module = build(config)
    return module, weight_shapes(module)


def init(
    config: dict, seed: int = 0, schedule=None, predicts: str = "eps", zero_out: bool = True, dtype=jnp.float32,
    remat: bool = False,
) -> Denoiser:  # fmt: skip
    """A UNet to train from scratch: PyTorch's default initialisation; zero_out starts conv_out at 0 (predicts 0)."""
    module = build(config, dtype=dtype, remat=remat)
    params = draw_numpy(weight_shapes(module), seed)
    if zero_out:
        params["conv_out"] = jax.tree.map(jnp.zeros_like, params["conv_out"])
    return Denoiser(params, Apply(module), DDPM() if schedule is None else schedule, predicts)


def read_json(path: Path) -> dict:
    """A JSON file's content."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: expected a diffusers folder")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_scheduler(path: Path) -> tuple[DDPM, str]:
    """(schedule, what the network predicts) of a scheduler_config.json; defaults are diffusers'."""
    if not path.is_file():
        return DDPM(), "eps"
    config = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000}
    config |= {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "trained_betas": None} | read_json(path)
    allowed = {"beta_schedule": ("scaled_linear", "linear", "squaredcos_cap_v2"), "prediction_type": tuple(PREDICTS)}
    for key, values in (allowed | {"trained_betas": (None,)}).items():
        if config[key] not in values:
            raise ValueError(f"{path}: {key} = {config[key]!r} is not supported, only {', '.join(map(str, values))}")
    schedule = DDPM(
        num_timesteps=config["num_train_timesteps"],
        beta_schedule=config["beta_schedule"],
        beta_start=config["beta_start"],
        beta_end=config["beta_end"],
        zero_snr=bool(config["rescale_betas_zero_snr"]),
    )
    return schedule, PREDICTS[config["prediction_type"]]


def write_scheduler(folder: Path, schedule, predicts: str) -> None:
    """scheduler/scheduler_config.json of a DDPM schedule, with the spacing that students are trained on.

    Raises ValueError for other schedules, which diffusers folders cannot hold.
    """
    if not isinstance(schedule, DDPM):
        raise ValueError(f"diffusers folders hold DDPM schedules, not {type(schedule).__name__}")
    fields = dataclasses.asdict(schedule)
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": fields.pop("num_timesteps"),
        "rescale_betas_zero_snr": fields.pop("zero_snr"),
        "timestep_spacing": "trailing",
        "prediction_type": {ours: theirs for theirs, ours in PREDICTS.items()}[predicts],
        "set_alpha_to_one": True,
        "clip_sample": False,
        **fields,
    }
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_params(path: Path, shapes) -> dict:
    """The weights in a folder as a float32 tree of exactly these shapes."""
    shapes = flax.traverse_util.flatten_dict(shapes)
    index, variants = path / f"{TORCH_FILE}.index.json", sorted(path.glob("diffusion_pytorch_model.*.safetensors"))
    if (path / TORCH_FILE).is_file():
        arrays = read_safetensors([path / TORCH_FILE])
    elif index.is_file():
        arrays = read_safetensors([path / name for name in sorted({*read_json(index)["weight_map"].values()})])
    elif variants:  # e.g. diffusion_pytorch_model.fp16.safetensors
        arrays = read_safetensors(variants[:1])
    elif (path / FLAX_FILE).is_file():
        return unflatten(match(read_msgpack(path / FLAX_FILE), shapes, "/".join, lambda _, x: x, path / FLAX_FILE))
    else:
        pickled = ": convert its .bin with diffusers' save_pretrained" if [*path.glob("*.bin")] else ""
        raise ValueError(f"{path} holds neither {TORCH_FILE} nor {FLAX_FILE}{pickled}")
    return unflatten(match(arrays, shapes, torch_name, from_torch, path))


def match(arrays: dict, shapes: dict, name_of, layout, where) -> dict:
    """The arrays of a file under our paths, after comparing every name and shape with what the config implies."""
    names = {path: name_of(path) for path in shapes}
    if missing := sorted({*names.values()} - {*arrays}):
        raise ValueError(f"{where} lacks {few(missing)}: the weights do not belong to this config.json")
    if extra := sorted({*arrays} - {*names.values()}):
        raise ValueError(f"{where} has {few(extra)}, which this config.json has no place for")
    ours = {path: layout(path, arrays[name]) for path, name in names.items()}
    wrong = [f"{names[p]} {x.shape}, not {shapes[p].shape}" for p, x in ours.items() if x.shape != shapes[p].shape]
    if wrong:
        raise ValueError(f"{where} has the wrong shape (channels last) for {few(wrong)}")
    return ours


def unflatten(flat: dict) -> dict:
    """A nested float32 tree of JAX arrays from {path: numpy array}."""
    return flax.traverse_util.unflatten_dict({p: jnp.asarray(np.asarray(x, np.float32)) for p, x in flat.items()})


def few(names) -> str:
    """The first names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_safetensors(files: list[Path]) -> dict:
    """All tensors of these files by PyTorch name."""
    arrays = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing, but the index lists it")
        try:
            arrays |= safetensors.numpy.load_file(file)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} is truncated or not a safetensors file ({error}); download it again") from error
    return arrays


def read_msgpack(file: Path) -> dict:
    """All arrays of one of diffusers' former Flax files, by "a/b/c" path."""
    try:
        tree = flax.serialization.msgpack_restore(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is truncated or not a Flax msgpack file ({error}); download it again") from error
    return flax.traverse_util.flatten_dict(tree, sep="/")


def save(folder, subfolder: str, params, config: dict, dtype=np.float16) -> Path:
    """Write config.json and safetensors, as PyTorch diffusers loads them, to folder/subfolder; returns that path.

    params are a UNet's or branch's weights, config its config.json (module.to_config()). Exact with dtype float32.
    """
    path = Path(folder) / subfolder
    path.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(jax.device_get(params))
    tensors = {torch_name(p): np.array(to_torch(p, np.asarray(x)), dtype, order="C") for p, x in flat.items()}
    safetensors.numpy.save_file(tensors, path / TORCH_FILE, metadata={"format": "pt"})
    (path / TORCH_FILE).chmod(0o644)  # safetensors makes files that only their owner can read
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path
