"""Networks from and to folders as diffusers and transformers write them: config.json beside the weights.

The rule: our path down_blocks_0/resnets_1/conv1/kernel is PyTorch's down_blocks.0.resnets.1.conv1.weight, transposed.
The former Flax files already have our layout; their code approximated GELU by tanh, we compute it exactly as PyTorch
does, so outputs differ from its by about 5e-5. Every name and shape is compared before a number is read.

A module may have `published(tensors, where) -> tensors`: a file's tensors under today's PyTorch names, without what is
no weight.
"""

import json
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from cddistill.diffusion import DDPM, EDM
from cddistill.models import clip, files
from cddistill.models.adapter import ControlNetModel, MuBlendModel
from cddistill.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from cddistill.models.edm import DhariwalUNet, KarrasUNet, SongUNet
from cddistill.models.init import draw_numpy, weight_shapes
from cddistill.models.schedulers import read_json, read_scheduler
from cddistill.models.tiny_vae import AutoencoderTiny
from cddistill.models.unet import Apply, UNet2DConditionModel
from cddistill.models.vae import AutoencoderKL, Decode, Encode
from cddistill.net import Autoencoder, Denoiser, Net

ASSETS = Path(__file__).parent / "assets"
TORCH_FILE = "diffusion_pytorch_model.safetensors"
DENOISERS = (UNet2DConditionModel, DhariwalUNet, SongUNet)  # what can be a teacher
CONTROLNETS = (ControlNetModel, MuBlendModel)  # what can be a student's branch
AUTOENCODERS = (AutoencoderKL, AutoencoderTiny)
TEXT_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)
CLASSES = {c.__name__: c for c in (*DENOISERS, *CONTROLNETS, *AUTOENCODERS, *TEXT_ENCODERS)}


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
    """The folder, or weight file, meant by a path, an embedded model's name ("emoji") or a Hub id "owner/name".

    Raises ValueError, with what to do, if it is none of them or the download fails.
    """
    embedded = {p.name: p for p in sorted(ASSETS.glob("*")) if p.is_dir()}
    path = embedded.get(str(folder), Path(folder).expanduser())
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        raise ValueError(f"{str(folder)!r} is neither a folder nor an embedded model; those are {[*embedded]}")
    try:
        return download(str(folder), subfolder)
    except Exception as error:  # whatever the Hub's client raises: offline, unknown name, not installed
        raise ValueError(
            f"{str(folder)!r} is not a folder and could not be downloaded from the Hub ({type(error).__name__}); "
            "download it on a machine with network access and pass the path of the folder instead"
        ) from error


def download(name: str, subfolder: str) -> Path:
    """A snapshot of a Hub repository: configs, and the first kind of weight file that it has in subfolder or at top."""
    from huggingface_hub import snapshot_download

    for patterns in files.PATTERNS:
        wanted = ["config.json", *patterns]
        wanted += [f"{subfolder}/{pattern}" for pattern in wanted]
        small = ["model_index.json", "scheduler/*.json", "tokenizer*/*"]
        root = Path(snapshot_download(name, allow_patterns=[*small, *wanted]))
        if files.choose(p.name for p in inside(root, subfolder).iterdir()):
            break
    return root


def inside(root: Path, subfolder: str) -> Path:
    """The subfolder where there is one, else what was given."""
    return root / subfolder if (root / subfolder).is_dir() else root


def load(
    folder, subfolder: str = "unet", dtype=jnp.float32, remat: bool = False, flash: bool = True, place=None,
    expect=(),
):  # fmt: skip
    """The network in a folder, by the class that its config.json names: a Denoiser, an Autoencoder or a Net.

    folder is a path, "emoji" or a Hub id; the network lies in its subfolder, or in the folder itself. It may also be a
    weight file with a config.json beside it. models/files.py says which formats are read. A UNet's schedule and
    prediction type come from scheduler/scheduler_config.json beside its folder; a UNet that lies alone is taken for
    Stable Diffusion 1.x (scaled-linear betas, eps).

    Weights become float32 whatever the file holds, kernels [h, w, in, out] or [in, out]; dtype is what layers compute
    in, remat trades time for memory in the backward pass, flash allows attention kernels without second derivatives.
    place(path, array) puts each weight on a device as soon as it is read, so that no second copy of the network exists;
    the default is the first device. expect: classes of which the network must be. Raises ValueError naming the file or
    key for anything missing, truncated, misshapen, unsupported or unexpected.
    """
    path = inside(resolve(folder, subfolder), subfolder)
    config = read_config(path)
    if expect and class_name(config) not in (names := [c.__name__ for c in expect]):
        held, wanted = (f"{'an' if x[0] in 'AEIO' else 'a'} {x}" for x in (class_name(config), " or ".join(names)))
        raise ValueError(
            f"{path} holds {held}, not {wanted}: point at a folder that holds one, or that has it in {subfolder}/"
        )
    module = build(config, dtype=dtype, remat=remat, flash=flash)
    return as_net(module, read_params(path, module, place), path)


def as_net(module, params, path: Path):
    """A network ready to be called, as what its class is."""
    if isinstance(module, UNet2DConditionModel):
        return Denoiser(params, Apply(module), *read_scheduler(path.parent / "scheduler" / "scheduler_config.json"))
    if isinstance(module, DENOISERS):
        return Denoiser(params, Apply(module), EDM(), "x0")
    if isinstance(module, AUTOENCODERS):
        return Autoencoder(params, Encode(module), Decode(module))
    return Net(params, clip.Apply(module) if isinstance(module, TEXT_ENCODERS) else Apply(module))


def read_config(path: Path) -> dict:
    """The config.json of a folder, or beside a weight file."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    names = [path.name] if path.is_file() else sorted(p.name for p in path.glob("*"))
    if not file.is_file() and (weights := files.choose(names)):
        raise ValueError(
            f'{file} is missing: {weights} needs one beside it, with the class of its network as "_class_name" '
            f"({', '.join(CLASSES)}) and that network's options"
        )
    return read_json(file)


def class_name(config: dict) -> str:
    """The class that a config.json names, be it diffusers' or transformers', or one of their former Flax classes."""
    name = config.get("_class_name") or (config.get("architectures") or ["UNet2DConditionModel"])[0]
    return name.removeprefix("Flax")


def build(config: dict, **ours):
    """The module of a config.json; `ours` are dtype and, for classes that have them, remat and flash."""
    name = class_name(config)
    if name not in CLASSES:
        raise ValueError(f"_class_name {name!r} is not supported, only {', '.join(CLASSES)} are")
    cls = CLASSES[name]
    return cls.from_config(config, **{k: v for k, v in ours.items() if k in cls.__dataclass_fields__})


def abstract(config: dict):
    """(module, shapes of its weights) for a config.json, without memory: for counting and planning."""
    module = build(config)
    return module, weight_shapes(module)


def init(
    config: dict, seed: int = 0, schedule=None, predicts: str | None = None, zero_out: bool = True, dtype=jnp.float32,
    remat: bool = False, flash: bool = True,
) -> Denoiser:  # fmt: skip
    """A denoiser to train from scratch: PyTorch's default initialisation; zero_out starts its last layers at 0.

    config is the config.json of one of DENOISERS. Without schedule and predicts it is taken for Stable Diffusion 1.x
    (scaled-linear betas, eps); EDM's networks are EDM() and "x0" by construction. Raises ValueError for other networks
    and for EDM's with anything else.
    """
    module = build(config, dtype=dtype, remat=remat, flash=flash)
    if not isinstance(module, DENOISERS):
        names = ", ".join(c.__name__ for c in DENOISERS)
        raise ValueError(f"{type(module).__name__} does not denoise: models.init takes the config of a {names}")
    karras = isinstance(module, KarrasUNet)
    schedule, predicts = schedule or (EDM() if karras else DDPM()), predicts or ("x0" if karras else "eps")
    if karras and not (isinstance(schedule, EDM) and predicts == "x0"):
        raise ValueError(f"{type(module).__name__} predicts x0 on the schedule EDM(), not {predicts} on {schedule}")
    params = flax.traverse_util.flatten_dict(draw_numpy(weight_shapes(module), seed))
    if zero_out:
        params |= {p: jnp.zeros_like(x) for p, x in params.items() if p[-2].endswith(module.last)}
    return Denoiser(flax.traverse_util.unflatten_dict(params), Apply(module), schedule, predicts)


def read_params(path: Path, module, place=None) -> dict:
    """The module's weights from a folder or file, as a float32 tree."""
    tensors, file = files.read(path)
    layout = from_torch
    if file.suffix == ".msgpack":
        tensors, layout = {torch_name(p.split("/")): x for p, x in tensors.items()}, lambda _, x: x
    if hasattr(module, "published"):
        tensors = module.published(tensors, file)
    shapes = flax.traverse_util.flatten_dict(weight_shapes(module))
    return unflatten(match(tensors, shapes, torch_name, layout, file), place)


def match(arrays: dict, shapes: dict, name_of, layout, where) -> dict:
    """The arrays of a file under our paths, after comparing every name and shape with what the config implies.

    1x1 convolutions are taken where linear layers are due: the same weights, as older files have them.
    """
    names = {path: name_of(path) for path in shapes}
    if missing := sorted({*names.values()} - {*arrays}):
        raise ValueError(f"{where} lacks {few(missing)}: the weights do not belong to this config.json")
    if extra := sorted({*arrays} - {*names.values()}):
        raise ValueError(f"{where} has {few(extra)}, which this config.json has no place for")
    ours = {path: layout(path, arrays[name]) for path, name in names.items()}
    ours = {p: x.squeeze((0, 1)) if x.shape == (1, 1, *shapes[p].shape) else x for p, x in ours.items()}
    wrong = [f"{names[p]} {x.shape}, not {shapes[p].shape}" for p, x in ours.items() if x.shape != shapes[p].shape]
    if wrong:
        raise ValueError(f"{where} has the wrong shape (channels last) for {few(wrong)}")
    return ours


def unflatten(flat: dict, place=None) -> dict:
    """A nested float32 tree of {path: array}, read and placed one by one; JAX may keep the arrays themselves."""
    place = place or (lambda path, x: jax.device_put(x))
    return flax.traverse_util.unflatten_dict({p: place(p, np.asarray(x, np.float32)) for p, x in flat.items()})


def few(names) -> str:
    """The first names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save(folder, subfolder: str, params, config: dict, dtype=np.float16) -> Path:
    """Write config.json and safetensors, as PyTorch diffusers loads them, to folder/subfolder; returns that path.

    params are a UNet's or branch's weights, config its config.json (module.to_config()). Exact with dtype float32.
    """
    path = Path(folder) / subfolder
    path.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(jax.device_get(params))
    tensors = {torch_name(p): np.array(to_torch(p, np.asarray(x)), dtype, order="C") for p, x in flat.items()}
    file = path / ("model.safetensors" if "architectures" in config else TORCH_FILE)  # transformers, diffusers
    try:
        safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(f"{file} cannot be written ({error}): free some space, or choose another place") from error
    file.chmod(0o644)  # safetensors makes files that only their owner can read
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path
