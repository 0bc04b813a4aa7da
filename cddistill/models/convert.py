"""Load and save networks in the folder layout of diffusers and transformers: config.json beside the weights.

The rule: our path down_blocks_0/resnets_1/conv1/kernel is PyTorch's down_blocks.0.resnets.1.conv1.weight, transposed.
Files of diffusers' former Flax classes already have our layout. Those classes approximated GELU by tanh; we compute it
exactly, as PyTorch does, so outputs differ by about 5e-5. All names and shapes are checked before any data is read.

A module may define `published(tensors, where) -> tensors`, which renames a file's tensors to current PyTorch names and
drops those that are not weights.
"""

import json
import re
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from cddistill import io
from cddistill.diffusion import DDPM, EDM
from cddistill.models import clip, files, folders
from cddistill.models.adapter import ControlNetModel, MuBlendModel
from cddistill.models.clip import CLIPTextModel, CLIPTextModelWithProjection
from cddistill.models.edm import KarrasUNet
from cddistill.models.families import DENOISERS, read_schedule
from cddistill.models.index import parts_of, read_index
from cddistill.models.init import init_params_numpy, weight_shapes
from cddistill.models.state_dict import bare_names
from cddistill.models.tiny_vae import AutoencoderTiny
from cddistill.models.unet import Apply
from cddistill.models.vae import AutoencoderKL, Decode, Encode
from cddistill.net import Autoencoder, Denoiser, Net
from cddistill.typed import brief

TORCH_FILE = "diffusion_pytorch_model.safetensors"
CONTROLNETS = (ControlNetModel, MuBlendModel)  # classes of a student's branch
AUTOENCODERS = (AutoencoderKL, AutoencoderTiny)
TEXT_ENCODERS = (CLIPTextModel, CLIPTextModelWithProjection)
CLASSES = {c.__name__: c for c in (*DENOISERS, *CONTROLNETS, *AUTOENCODERS, *TEXT_ENCODERS)}


def torch_name(path: tuple[str, ...] | list[str]) -> str:
    """PyTorch's name of the weight at a Flax path."""
    *module, leaf = path
    leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    return re.sub(r"(?<!linear)_(\d+)(?=\.)", r".\1", ".".join([*module, leaf]))  # linear_1 is diffusers' own name


def to_torch(path, x):
    """Flax to PyTorch layout: kernels [h, w, in, out] to [out, in, h, w], [in, out] to [out, in]."""
    if path[-1] != "kernel":
        return x
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


def from_torch(path, x):
    """PyTorch to Flax layout: the inverse of `to_torch`."""
    if path[-1] != "kernel":
        return x
    return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T


def load(
    folder, subfolder: str = "unet", dtype=jnp.float32, remat: bool | str = False, flash: bool = True, place=None,
    expect=(), shapes: bool = False,
):  # fmt: skip
    """Load a network: a Denoiser, Autoencoder or Net, by the class that config.json names.

    Args:
        folder: a path, "emoji" or a Hub id with the network in its subfolder or at its top, or a weight file with
            config.json beside it; models/files.py lists the formats. Stable Diffusion in one file is converted to a
            folder beside it first (models/single_file.py). A UNet's schedule and prediction type come from
            scheduler/scheduler_config.json of the pipeline that it lies in; without that file they are Stable Diffusion
            1.x's (scaled-linear betas, eps), and a warning says so.
        dtype: compute type of the layers. Weights are float32, whatever the file's type; kernels are [h, w, in, out] or
            [in, out].
        remat: recompute activations in the backward pass, which saves memory; a key of `configured.POLICIES` says which
            are kept.
        flash: allow fused attention kernels, which have no second derivatives.
        place: place(path, array) puts each weight on a device as it is read, so there is never a second copy of the
            network; the default is the first device.
        expect: classes, one of which the network must have; empty for any.
        shapes: jax.ShapeDtypeStruct in place of weights, of which no file is needed.

    Raises ValueError naming the file or key for anything missing, truncated, misshapen, unsupported or unexpected.
    """
    root, path, config = open_config(folder, subfolder)
    if expect and config["_class_name"] not in [cls.__name__ for cls in expect]:
        raise ValueError(unexpected(root, path, config["_class_name"], subfolder, expect))
    try:
        module = build(config, dtype=dtype, remat=remat, flash=flash)
        weight_shapes(module)  # options that do not fit together; kept for `read_params`
    except ValueError as error:
        raise ValueError(f"{config_file(path)}: {error}") from error
    if not shapes and (form := path.is_dir() and folders.foreign_format(sorted(path.iterdir()))):
        raise ValueError(form)
    process = read_schedule(module, root) if isinstance(module, DENOISERS) else ()  # before weights are read
    return as_net(module, weight_shapes(module) if shapes else read_params(path, module, place), process)


def open_config(folder, subfolder: str) -> tuple[Path, Path, dict]:
    """(pipeline's folder, network's folder or weight file, its config.json) of a name; ValueError as for `load`."""
    root, path = folders.locate(folder, subfolder)
    other = {*CLASSES} - {cls.__name__ for cls in DENOISERS}  # a VAE may be loaded from any pipeline
    if subfolder in folders.PARTS and folders.class_in(config_file(path).parent) not in other:
        folders.check_pipeline(root)
    return root, path, read_config(path)


def unexpected(root: Path, path: Path, name: str, subfolder: str, expect) -> str:
    """A sentence on a network of another class than those expected."""
    held, wanted = (f"{'an' if x[0] in 'AEIO' else 'a'} {x}" for x in (name, " or ".join(c.__name__ for c in expect)))
    remedy = "point at a folder that holds one, or that has it in " + subfolder + "/"
    if (root / subfolder).is_dir() and root / subfolder != path:
        remedy = f"point at {root}"
    if name in [cls.__name__ for cls in CONTROLNETS]:
        remedy += ", and pass this one as config.controlnet"
    return f"{path} holds {held}, not {wanted}: {remedy}"


def as_net(module, params, process: tuple):
    """Module and parameters as a Denoiser, Autoencoder or Net; process is a denoiser's (schedule, what it predicts)."""
    if isinstance(module, DENOISERS):
        return Denoiser(params, Apply(module), *process)
    if isinstance(module, AUTOENCODERS):
        return Autoencoder(params, Encode(module), Decode(module))
    return Net(params, clip.Apply(module) if isinstance(module, TEXT_ENCODERS) else Apply(module))


def config_file(path: Path) -> Path:
    """The config.json in a folder or beside a weight file."""
    return (path if path.is_dir() else path.parent) / "config.json"


def read_config(path: Path) -> dict:
    """Contents of the config.json in a folder or beside a weight file, with the class as "_class_name".

    A file that names no class has that of the pipeline's model_index.json. Raises ValueError, saying what is there
    instead, if config.json is missing, and if nothing names the class.
    """
    file = config_file(path)
    if not file.is_file() and (what := folders.what_is(path)):
        raise ValueError(f"{file} is missing: {what}")
    names = [path.name] if path.is_file() else sorted(p.name for p in path.glob("*"))
    if not file.is_file() and (weights := files.choose(names)):
        raise ValueError(
            f'{file} is missing: {weights} needs one beside it, with the network class as "_class_name" '
            f"({', '.join(CLASSES)}) and the options of that class"
        )
    config = io.read_json(file)
    _, indexed = parts_of(read_index(file.parent.parent)).get(file.parent.name, ("", None))
    name = folders.class_name(config) or indexed
    if name is None:
        remedy = f'add "_class_name" ({", ".join(CLASSES)})'
        if (file.parent / "checkpoints").is_dir():
            remedy = "it is the config of a run, whose network is written with --mode=export"
        raise ValueError(f"{file} does not name the class of a network: {remedy}")
    return config | {"_class_name": name}


def build(config: dict, **run_options):
    """The module for a config.json, by default of a UNet2DConditionModel.

    run_options are dtype, remat, flash. Raises ValueError for anything unsupported.
    """
    name = folders.class_name(config) or "UNet2DConditionModel"
    if name not in CLASSES:
        raise ValueError(f"_class_name {brief(name)} is not supported, only {', '.join(CLASSES)} are")
    cls = CLASSES[name]
    return cls.from_config(config, **{k: v for k, v in run_options.items() if k in cls.__dataclass_fields__})


def abstract(config: dict):
    """(module, tree of jax.ShapeDtypeStruct of its weights) for a config.json; nothing is allocated."""
    module = build(config)
    return module, weight_shapes(module)


def init(
    config: dict, seed: int = 0, schedule=None, predicts: str | None = None, zero_out: bool = True, dtype=jnp.float32,
    remat: bool | str = False, flash: bool = True,
) -> Denoiser:  # fmt: skip
    """A randomly initialised denoiser, with float32 weights as PyTorch's layers initialise them.

    config is the config.json of one of DENOISERS. schedule and predicts ("eps", "v", "x0") default to Stable Diffusion
    1.x's (scaled-linear betas, eps); EDM's networks have EDM() and "x0" by construction. zero_out sets the output layer
    to zero. dtype, remat and flash are as in `load`. Raises ValueError for other networks, and for EDM's networks with
    another schedule or prediction type.
    """
    module = build(config, dtype=dtype, remat=remat, flash=flash)
    if not isinstance(module, DENOISERS):
        names = ", ".join(c.__name__ for c in DENOISERS)
        raise ValueError(f"{type(module).__name__} does not denoise: models.init takes the config of a {names}")
    karras = isinstance(module, KarrasUNet)
    schedule, predicts = schedule or (EDM() if karras else DDPM()), predicts or ("x0" if karras else "eps")
    if karras and not (isinstance(schedule, EDM) and predicts == "x0"):
        raise ValueError(f"{type(module).__name__} predicts x0 on the schedule EDM(), not {predicts} on {schedule}")
    params = flax.traverse_util.flatten_dict(init_params_numpy(weight_shapes(module), seed))
    if zero_out:
        params |= {p: jnp.zeros_like(x) for p, x in params.items() if p[-2].endswith(module.output_layer)}
    return Denoiser(flax.traverse_util.unflatten_dict(params), Apply(module), schedule, predicts)


def read_params(path: Path, module, place=None) -> dict:
    """The module's weights from a folder or file, as a nested dict of float32 arrays."""
    tensors, file = files.read(path)
    layout = from_torch
    if file.suffix == ".msgpack":
        tensors, layout = {torch_name(p.split("/")): x for p, x in tensors.items()}, lambda _, x: x
    tensors = bare_names(tensors, file)
    if hasattr(module, "published"):
        tensors = module.published(tensors, file)
    shapes = flax.traverse_util.flatten_dict(weight_shapes(module))
    return unflatten(match(tensors, shapes, torch_name, layout, file), place)


def match(arrays: dict, shapes: dict, name_of, layout, where, config: str = "this config.json") -> dict:
    """The arrays of a file by Flax path; ValueError for any name or shape that the config does not imply.

    Older files store some linear layers as 1x1 convolutions; these are accepted.
    """
    names = {path: name_of(path) for path in shapes}
    if missing := sorted({*names.values()} - {*arrays}):
        if inside := next((name for name in arrays if name.endswith(f".{missing[0]}")), None):
            raise ValueError(f"{where} has {inside} instead of {missing[0]}: save that network's state_dict() alone")
        raise ValueError(f"{where} lacks {abbreviate(missing)}: the weights do not belong to {config}")
    if extra := sorted({*arrays} - {*names.values()}):
        raise ValueError(f"{where} has {abbreviate(extra)}, which {config} has no place for")
    ours = {path: layout(path, arrays[name]) for path, name in names.items()}
    ours = {p: x.squeeze((0, 1)) if x.shape == (1, 1, *shapes[p].shape) else x for p, x in ours.items()}
    wrong = [f"{names[p]} {x.shape}, not {shapes[p].shape}" for p, x in ours.items() if x.shape != shapes[p].shape]
    if wrong:
        raise ValueError(f"{where} has the wrong shape (channels-last) for {abbreviate(wrong)}")
    return ours


def unflatten(flat: dict, place=None) -> dict:
    """{path: array} as a nested float32 dict; arrays are read and placed one by one, and JAX may keep their memory."""
    place = place or (lambda path, x: jax.device_put(x))
    return flax.traverse_util.unflatten_dict({p: place(p, np.asarray(x, np.float32)) for p, x in flat.items()})


def abbreviate(names) -> str:
    """The first three names and the number of others: "a, b, c and 5 more"."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save(folder, subfolder: str, params, config: dict, dtype=np.float16) -> Path:
    """Write config.json and safetensors, which PyTorch diffusers loads, to folder/subfolder; returns that path.

    params are the float32 weights of a network, config its config.json (module.to_config()). dtype is the file's type;
    float32 is lossless. Raises OSError if the file cannot be written.
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
    file.chmod(0o644)  # safetensors creates files that only their owner can read
    (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return path
