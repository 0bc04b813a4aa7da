"""Stable Diffusion in one file, as model sites have it: converted once to the folder that diffusers would make of it.

config.teacher = FILE converts to a folder beside it, whose name is FILE's with -diffusers; or choose the folder:

python -m cddistill.models.single_file FILE FOLDER

The file (.safetensors, .ckpt) holds the UNet, VAE and text encoders of Stable Diffusion 1.x, 2.x or XL, also for
inpainting or editing, under the names of the original code. What it does not hold is taken from beside it, as in a
diffusers folder: tokenizer/ (for XL also tokenizer_2/), scheduler/, a network that it lacks, a config.json of one that
it has (unet/config.json).
"""

import argparse
import logging
import re
import shutil
import uuid
from pathlib import Path
from typing import NamedTuple

import flax.traverse_util
import ml_dtypes
import numpy as np
import safetensors

from cddistill import io
from cddistill.diffusion import DDPM
from cddistill.models import convert, files, ldm, schedulers
from cddistill.models.init import weight_shapes
from cddistill.models.state_dict import bare_names

RECORD = "single_file.json"  # in the folder: what it was made from
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")  # beside the file
OTHERS = ("config.json", "model_index.json", "unet", "adapter_config.json")  # in folders that are no single file's
UNET = ("model.diffusion_model.", "diffusion_model.")
VAE = "first_stage_model."
ROOTS = (  # of names in single files, also in those of other models, which are refused by name
    *UNET, VAE, "cond_stage_model.", "conditioner.embedders.", "input_blocks.0.", "control_model.", "double_blocks.",
    "joint_blocks.",
)  # fmt: skip
IGNORED = re.compile(  # averages of the weights, buffers, what training needs, markers that `prediction` reads
    r"(first_stage_model\.)?model_ema\..*|.*\b(position_ids|logit_scale|attn_mask)|denoiser\..*"
    r"|first_stage_model\.loss\..*|v_pred|ztsnr"
)
FOREIGN = {  # {pattern in a name: what the file is}
    r"double_blocks\.": "Flux", r"joint_blocks\.": "Stable Diffusion 3", r"^control_model\.": "a ControlNet",
    r"time_stack|time_mixer|temporal": "a video model", r"^edm_mean$": "Playground 2.5", r"^edm_vpred\.": "CosXL",
    r"^noise_augmentor\.|^embedder\.": "Stable Diffusion unCLIP", r"^depth_model\.": "a depth-conditional model",
    r"^low_scale_model\.|diffusion_model\.label_emb\.weight": "an upscaler",
    r"^conditioner\.embedders\.0\.model\.": "the refiner of Stable Diffusion XL",
}  # fmt: skip
LAYERS = {"unet": ldm.unet_names, "vae": ldm.vae_names}  # layers -> {layer: its name in the file}
EDITING = {4: "", 8: "InstructPix2Pix", 9: "Inpaint"}  # by input channels: the end of the pipeline's class


class Encoder(NamedTuple):
    """A text encoder in the file."""

    prefix: str  # of its names
    config: dict  # what shapes do not say of its config.json
    open_clip: bool = False
    unused: str = r"text_projection\..*"  # names of tensors that the UNet's text features do not depend on


class Kind(NamedTuple):
    """A version of Stable Diffusion; a dict holds what shapes do not say of a JSON file."""

    name: str
    width: int  # of the text features, which tells the version
    encoders: dict[str, Encoder]  # by subfolder
    predicts: str | None  # prediction_type; None if models of this version differ
    sizes: dict[str, int]  # height and width of latents by prediction_type
    unet: dict
    vae: dict
    scheduler: dict
    pipeline: str  # diffusers' class without "Pipeline"
    index: dict


CLIP_L = {"architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu"}
CLIP_H = {"architectures": ["CLIPTextModel"], "hidden_act": "gelu"}
CLIP_G = {"architectures": ["CLIPTextModelWithProjection"], "hidden_act": "gelu"}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SD1 = Kind(
    name="Stable Diffusion 1.x",
    width=768,
    encoders={"text_encoder": Encoder("cond_stage_model.transformer.", CLIP_L)},
    predicts="epsilon",
    sizes={"epsilon": 64, "v_prediction": 64},
    unet={"attention_head_dim": 8},
    vae={"scaling_factor": 0.18215},
    scheduler=BETAS | {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    pipeline="StableDiffusion",
    index={"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False},
)
SD2 = SD1._replace(
    name="Stable Diffusion 2.x",
    width=1024,
    encoders={
        "text_encoder": Encoder(  # the UNet takes the features of layer 22
            "cond_stage_model.model.", CLIP_H, True, r"text_projection\..*|text_model\.encoder\.layers\.23\..*"
        )
    },
    predicts=None,
    sizes={"epsilon": 64, "v_prediction": 96},
    unet={},
)
XL = Kind(
    name="Stable Diffusion XL",
    width=2048,
    encoders={
        "text_encoder": Encoder("conditioner.embedders.0.transformer.", CLIP_L),
        "text_encoder_2": Encoder("conditioner.embedders.1.model.", CLIP_G, open_clip=True, unused=""),
    },
    predicts="epsilon",
    sizes={"epsilon": 128, "v_prediction": 128},
    unet={
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={"scaling_factor": 0.13025},
    scheduler=BETAS | {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear"},
    pipeline="StableDiffusionXL",
    index={"force_zeros_for_empty_prompt": True},
)
KINDS = {kind.width: kind for kind in (SD1, SD2, XL)}
SUPPORTED = ", ".join(kind.name for kind in KINDS.values())


def folder_of(path: Path) -> Path:
    """The path or, if it is Stable Diffusion in one file, the diffusers folder beside it, converted at the first call.

    The path of a folder with no other weights than such a file is that of the file. Raises ValueError as
    `convert_file`, and if the folder beside it was made from other files or cannot be written.
    """
    file = path
    if path.is_dir() and not any((path / name).exists() for name in OTHERS):
        file = path / (files.choose(p.name for p in path.iterdir() if p.is_file()) or "")
    if file.suffix not in files.SUFFIXES or not file.is_file():
        return path
    folder = file.with_name(f"{file.stem}-diffusers")
    if (folder / RECORD).is_file():
        if io.read_json(folder / RECORD) != record(file, file.parent):
            raise ValueError(f"{folder} was made from {file} and files beside it that have changed: delete that folder")
        return folder
    if not any(name.startswith(ROOTS) for name in read(file)):
        return path
    if folder.exists():
        raise ValueError(f"{folder} was not made from {file}: move that folder away, or pass it instead of the file")
    try:
        convert_file(file, folder)
    except OSError as error:
        if (folder / RECORD).is_file():  # of another process
            return folder
        command = f"python -m {__spec__.name} {file} FOLDER"
        raise ValueError(f"{folder} cannot be written ({error}): run {command}, and pass FOLDER instead") from error
    return folder


def read(file: Path) -> dict:
    """The tensors of a file, without those that are ignored."""
    held = files.read(file).tensors
    return bare_names({name: x for name, x in held.items() if not IGNORED.fullmatch(name)}, file)


def record(file: Path, beside: Path) -> dict:
    """{file: [bytes, time of change in ns]} of what a folder is made from."""
    used = {f"{part}/{p.name}": p for part in PARTS for p in sorted((beside / part).glob("*")) if p.is_file()}
    return {name: [p.stat().st_size, p.stat().st_mtime_ns] for name, p in ({file.name: file} | used).items()}


def convert_file(file: Path, folder: Path, beside: Path | None = None) -> None:
    """Write the diffusers folder of Stable Diffusion in one file; weights keep their values.

    beside is the folder with tokenizer/ and whatever else the file lacks, by default the file's own. Raises ValueError
    naming the file and what it is, lacks or has too much, before anything is written.
    """
    beside, tensors = beside or file.parent, read(file)
    kind = kind_of(tensors, file)
    scheduler = scheduler_config(kind, file, beside)
    parts = split(tensors, kind, file)
    copied = [part for part, own in parts.items() if not own]
    copied += [part.replace("text_encoder", "tokenizer") for part in kind.encoders]
    if missing := " and ".join(f"{part}/" for part in copied if not (beside / part).is_dir()):
        raise ValueError(f"{file} has no {missing}: copy {missing} of a diffusers folder of {kind.name} into {beside}")
    networks = {part: network(part, own, kind, scheduler, beside, file) for part, own in parts.items() if own}
    index = index_of(kind, networks["unet"][0].in_channels, scheduler, file)
    logging.warning("%s is converted once, to %s", file, folder)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")  # another host may convert the same file
    try:
        for part, (module, weights) in networks.items():
            tree = flax.traverse_util.unflatten_dict(weights)
            convert.save(draft, part, tree, module.to_config(), narrowest(weights.values()))
        for part in copied:
            shutil.copytree(beside / part, draft / part)
        io.write_json(draft / "scheduler" / "scheduler_config.json", scheduler)
        io.write_json(draft / "model_index.json", index)
        io.write_json(draft / RECORD, record(file, beside))
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def kind_of(tensors: dict, file: Path) -> Kind:
    """The version of Stable Diffusion; ValueError naming what the file is instead."""
    for pattern, what in FOREIGN.items():
        if name := next((name for name in tensors if re.search(pattern, name)), None):
            raise ValueError(f"{file} is {what} ({name}), which is not supported; {SUPPORTED} are")
    widths = {x.shape[-1] for name, x in tensors.items() if name.endswith(".attn2.to_k.weight")}
    if len(widths) != 1 or (width := widths.pop()) not in KINDS:
        known = ", ".join(map(str, KINDS))
        raise ValueError(f"{file} has no UNet of {SUPPORTED}, whose text has width {known}: choose another file")
    return KINDS[width]


def split(tensors: dict, kind: Kind, file: Path) -> dict[str, dict]:
    """{part: {name without prefix: tensor}}; ValueError for names of no part.

    Text encoders have transformers' names, and lack what the UNet does not need.
    """
    unet = next((prefix for prefix in UNET if any(name.startswith(prefix) for name in tensors)), "")
    prefixes = {"unet": unet, "vae": VAE, **{part: encoder.prefix for part, encoder in kind.encoders.items()}}
    if other := sorted(name for name in tensors if not name.startswith(tuple(prefixes.values()))):
        raise ValueError(f"{file} has {convert.abbreviate(other)}, which {kind.name} has no place for")
    parts = {
        part: {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        for part, prefix in prefixes.items()
    }
    for part, encoder in kind.encoders.items():
        own = ldm.open_clip(parts[part]) if encoder.open_clip else parts[part]
        parts[part] = {name: x for name, x in own.items() if not re.fullmatch(encoder.unused, name)}
    return parts


def network(part: str, own: dict, kind: Kind, scheduler: dict, beside: Path, file: Path):
    """(module, {path: tensor in our layout}) of a part, whose tensors are not read yet.

    The config is the config.json beside the file or, without one, follows from shapes and version. Raises ValueError
    naming the file for names and shapes that the config does not imply.
    """
    source = beside / part / "config.json"
    if source.is_file():
        config = io.read_json(source)
    else:
        config, source = infer(part, {name: x.shape for name, x in own.items()}, kind, scheduler, file), file
    try:
        module = convert.build(config)
        shapes = flax.traverse_util.flatten_dict(weight_shapes(module))
        layers = {convert.torch_name(path).rpartition(".")[0] for path in shapes}
        theirs = LAYERS[part](layers) if part in LAYERS else {}
    except ValueError as error:
        raise ValueError(f"{source} ({part}): {error}") from error
    own = module.published(own, file) if hasattr(module, "published") else own

    def name_of(path):
        layer, _, leaf = convert.torch_name(path).rpartition(".")
        return f"{theirs.get(layer, layer)}.{leaf}"

    return module, convert.match(own, shapes, name_of, convert.from_torch, f"{file} ({part})", kind.name)


def infer(part: str, shapes: dict, kind: Kind, scheduler: dict, file: Path) -> dict:
    """config.json of a part, from the shapes of its tensors and the version."""
    size = kind.sizes.get(scheduler.get("prediction_type"), kind.sizes["epsilon"])
    try:
        if part == "unet":
            config = ldm.unet_config(shapes)
            config |= {"attention_head_dim": [width // 64 for width in config["block_out_channels"]]}
            return config | {"sample_size": size, "cross_attention_dim": kind.width} | kind.unet
        if part == "vae":
            config = ldm.vae_config(shapes)
            return config | {"sample_size": size * 2 ** (len(config["block_out_channels"]) - 1)} | kind.vae
        return ldm.clip_config(shapes) | kind.encoders[part].config
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{file} holds no whole {part} of {kind.name} ({error!r}): download it again") from error


def scheduler_config(kind: Kind, file: Path, beside: Path) -> dict:
    """scheduler_config.json: the one beside the file, or that of the version with what the file says it predicts."""
    own = beside / "scheduler" / "scheduler_config.json"
    if own.is_file():
        schedulers.read_scheduler(own)  # raises ValueError for another process
        config = io.read_json(own)
        return config | {"_class_name": schedulers.read_class(own, config)}
    held, remedy = files.read(file).tensors, f"put the folder scheduler/ of its model's diffusers folder into {beside}"
    predicts, zero_snr = prediction(kind, held, file, remedy), "ztsnr" in held
    alphas = np.asarray(DDPM(zero_snr=zero_snr).alpha_sigma(np.arange(1000))[0]) ** 2
    theirs = np.asarray(held.get("alphas_cumprod", alphas), np.float32)
    if theirs.shape != alphas.shape or not np.allclose(theirs, alphas, rtol=1e-2, atol=1e-3):  # float16 in some files
        raise ValueError(f"{file} has another noise schedule (alphas_cumprod) than {kind.name}: {remedy}")
    spacing = {"timestep_spacing": "trailing" if zero_snr else "leading", "steps_offset": 1}
    return kind.scheduler | spacing | {"prediction_type": predicts, "rescale_betas_zero_snr": zero_snr}


def prediction(kind: Kind, held: dict, file: Path, remedy: str) -> str:
    """prediction_type, by a marker among the tensors, by the header, or of the version."""
    if "v_pred" in held:
        return "v_prediction"
    said = None
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, "numpy") as opened:
            said = (opened.metadata() or {}).get("modelspec.prediction_type")
    known = {"v": "v_prediction", "epsilon": "epsilon", None: kind.predicts}
    if said not in known:
        raise ValueError(f"{file} says modelspec.prediction_type = {said!r}, which is neither epsilon nor v: {remedy}")
    if known[said] is None:
        raise ValueError(
            f"{file} is {kind.name} and does not say whether it predicts eps (512 pixels) or v (768 pixels): {remedy}"
        )
    return known[said]


def index_of(kind: Kind, channels: int, scheduler: dict, file: Path) -> dict:
    """model_index.json of a UNet with this number of input channels; ValueError if no pipeline has one."""
    if channels not in EDITING:
        known = ", ".join(map(str, EDITING))
        raise ValueError(f"{file} has a UNet of {channels} input channels; supported are {known}: choose another file")
    content = {"_class_name": f"{kind.pipeline}{EDITING[channels]}Pipeline"}
    content |= {"scheduler": ["diffusers", scheduler["_class_name"]]}
    content |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for part, encoder in kind.encoders.items():
        content[part] = ["transformers", *encoder.config["architectures"]]
        content[part.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    return content | kind.index


def narrowest(tensors):
    """The type that holds all values in at most 32 bits: that of the tensors if all have the same 16-bit one."""
    kinds = {x.dtype for x in tensors}
    return kinds.pop() if len(kinds) == 1 and kinds <= {np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16)} else np.float32


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(f"python -m {__spec__.name}", description=__doc__.partition("\n")[0])
    path = lambda text: Path(text).expanduser()
    parser.add_argument("file", type=path, help="a .safetensors or .ckpt file")
    parser.add_argument("folder", type=path, help="folder to write")
    parser.add_argument("--parts", type=path, help="folder with tokenizer/, tokenizer_2/, scheduler/ (default: FILE's)")
    args = parser.parse_args(argv)
    try:
        if not args.file.is_file():
            raise ValueError(f"{args.file} does not exist: name a .safetensors or .ckpt file")
        if args.folder.exists():
            raise ValueError(f"{args.folder} exists: name a new folder")
        convert_file(args.file, args.folder, args.parts)
    except (ValueError, OSError) as error:
        parser.exit(2, f"cddistill: {error}\n")
    print(f"converted to {args.folder}: train with --config.teacher={args.folder}")


if __name__ == "__main__":
    main()
