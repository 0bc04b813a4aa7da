"""From a name to a network's files and the pipeline they belong to; what folders hold that are neither.

A name is a path, an embedded model's name ("emoji") or a Hub id. A path may be that of a pipeline's folder, of a
network's folder in or outside of a pipeline, or of a weight file in a network's folder.
"""

import re
from pathlib import Path
from typing import NamedTuple

from cddistill import checksums, io
from cddistill.models import files, index
from cddistill.models.families import DENOISERS, FAMILIES, supported
from cddistill.typed import brief

ASSETS = Path(__file__).parent / "assets"
PARTS = tuple(dict.fromkeys(family.denoiser for family in FAMILIES.values()))  # subfolders of denoisers
BESIDE = ("vae", "controlnet", "adapter", "prior")  # diffusers' networks that leave the denoiser as it is
FORMATS = {".onnx": "ONNX", ".xml": "OpenVINO", ".gguf": "GGUF", ".engine": "TensorRT", ".plan": "TensorRT",
           ".mlmodelc": "Core ML", ".mlpackage": "Core ML", ".tflite": "TensorFlow", ".h5": "TensorFlow",
           ".pb": "TensorFlow"}  # fmt: skip
LORA_FILES = ("pytorch_lora_weights.*", "adapter_config.json", "adapter_model.*")  # of diffusers and PEFT


class Place(NamedTuple):
    """Where a network lies."""

    root: Path  # the pipeline's folder; of a network that belongs to none, its own
    part: Path  # the network's folder, or its weight file


def locate(name, part: str = "unet") -> Place:
    """The place of a part of a pipeline, or of the network that a path points at; nothing in it is read.

    Other parts are found from the denoiser's folder, or its weight file, too: locate("sd/unet", "vae") is sd/vae. The
    network of a Hub id is downloaded. Raises ValueError if there is nothing of that name.
    """
    path = find(name, part)
    if (path / part).is_dir():
        return Place(path, path / part)
    own = path if path.is_dir() else path.parent
    root = pipeline_of(own)
    if part not in PARTS and (root / part).is_dir() and holds_denoiser(own):
        return Place(root, root / part)
    return Place(root, path)


def resolve(name, part: str = "unet") -> Path:
    """The pipeline's folder of a name; of a Hub id, with that part. Raises ValueError as `locate`."""
    return locate(name, part).root


def embedded() -> dict[str, Path]:
    """{name: folder} of the models, students and LoRAs that come with the package."""
    return {p.name: p for p in sorted(ASSETS.glob("*")) if p.is_dir()}


def shipped(name) -> Path | None:
    """The folder of that name in the package, with no file damaged; None if there is none."""
    folder = embedded().get(str(name))
    if folder:
        checksums.check_shipped(folder)
    return folder


def find(name, part: str) -> Path:
    """The absolute path of a name, which exists; of Stable Diffusion in one file, the folder it is converted to."""
    from cddistill.models import single_file  # which imports this module

    given = embedded().get(str(name)) or (io.local(name) if io.is_remote(name) else Path(name).expanduser())
    path = given.resolve() if ".." in given.parts else given.absolute()
    if str(name) and path.exists():
        if ASSETS in path.parents:
            checksums.check_shipped(ASSETS / path.relative_to(ASSETS).parts[0])
        return path.parent if path.is_file() and path.name in JSON_FILES else single_file.folder_of(followed(path))
    if given.is_symlink():
        raise ValueError(f"{given} is a link to {given.readlink()}, which does not exist")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):
        known = f"a folder nor an embedded model ({', '.join(embedded())}) nor a Hub id"
        raise ValueError(f"{str(name)!r} is neither {known}")
    try:
        return download(str(name), part)
    except Exception as error:  # any error of the Hub's client: offline, unknown name, not installed
        raise ValueError(
            f"{str(name)!r} is not a folder and could not be downloaded from the Hub ({type(error).__name__}); "
            "download it on a machine with network access and pass the path of the folder instead"
        ) from error


JSON_FILES = (index.FILE, "config.json", "scheduler_config.json")  # which stand for the folder that they describe


def followed(path: Path) -> Path:
    """A link to a weight file, with no config.json beside it, as the file itself."""
    target = path.resolve()
    alone = path.is_file() and not (path.parent / "config.json").is_file()
    return target if alone and (target.parent / "config.json").is_file() else path


def download(name: str, part: str) -> Path:
    """Download a Hub repository: configs, and its preferred weight file in the part or, without one, at the top."""
    from huggingface_hub import snapshot_download

    for patterns in files.PATTERNS:
        wanted = ["config.json", *patterns]
        wanted += [f"{part}/{pattern}" for pattern in wanted]
        small = ["model_index.json", "scheduler/*.json", "scheduler_config.json", "tokenizer*/*"]
        root = Path(snapshot_download(name, allow_patterns=[*small, *wanted]))
        held = root / part if (root / part).is_dir() else root
        if files.choose(p.name for p in held.iterdir()):
            break
    return root


def pipeline_of(folder: Path) -> Path:
    """The pipeline's folder that a network's folder lies in, or is; the folder itself if it belongs to none.

    A folder is a pipeline's if it has a model_index.json or a scheduler; if a network's folder is named unet/, also if
    a vae/ or text_encoder/ lies beside. A link counts as lying where it is or, failing that, where it points to.
    """
    if any((folder / part).is_dir() for part in PARTS) or is_pipeline(folder):
        return folder
    for real in (folder, folder.resolve()):
        named = real.name in PARTS and any((real.parent / part).is_dir() for part in ("vae", "text_encoder"))
        if named or is_pipeline(real.parent):
            return real.parent
    return folder


def is_pipeline(folder: Path) -> bool:
    """Whether a folder says that it is a pipeline's."""
    return (folder / index.FILE).is_file() or (folder / "scheduler" / "scheduler_config.json").is_file()


def class_name(config: dict) -> str | None:
    """Class name in a config.json of diffusers or transformers, without the "Flax" of their former Flax classes."""
    architectures = config.get("architectures")
    names = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    return next((name.removeprefix("Flax") for name in names if isinstance(name, str)), None)


def class_in(folder: Path) -> str | None:
    """The class that a folder's config.json names; None if it cannot be read."""
    try:
        return class_name(io.read_json(folder / "config.json"))
    except ValueError:
        return None


def holds_denoiser(folder: Path) -> bool:
    """Whether a folder holds a network that denoises."""
    return class_in(folder) in [cls.__name__ for cls in DENOISERS]


def check_pipeline(root: Path) -> None:
    """Raise ValueError, naming what it has instead, for a pipeline whose denoiser is not supported."""
    content = index.read_index(root)
    parts = index.parts_of(content)
    denoisers = [cls.__name__ for cls in DENOISERS]
    other = {
        part: name
        for part, (library, name) in parts.items()
        if (part in PARTS and name not in denoisers)
        or (library == "diffusers" and not name.endswith("Scheduler") and part not in (*PARTS, *BESIDE))
    }
    if not other and parts and not any(part in parts or (root / part).is_dir() for part in PARTS):
        other = {part: name for part, (_, name) in parts.items() if "tokenizer" not in part}
    if other:
        kind = content.get("_class_name")
        kind = kind if isinstance(kind, str) and kind.isidentifier() else "pipeline"
        raise ValueError(
            f"{root} is a {kind} with {listed(other)}, which is not supported; a teacher's denoiser is a {supported()}"
        )


def what_is(path: Path) -> str:
    """What lies at a path instead of a network with its config.json, and what to do, as the rest of a sentence."""
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    if not entries:
        return "the folder is empty"
    if loras := lora_files(path, entries):
        return (
            f"{loras[0]} is a LoRA, not a whole network; pass it as config.lora, and the model that it was made for as "
            "config.teacher"
        )
    if inside := networks_in(path):
        return f"{path} itself holds no network; point at {' or '.join(map(str, inside[:3]))}"
    if form := foreign_format(entries):
        return form
    if held := {p.name: class_in(p) for p in entries if p.is_dir() and class_in(p)}:
        return f"{path} holds {listed(held)}, but no denoiser that is supported: a {supported()}"
    if path.is_file() and path.suffix not in (*files.SUFFIXES, ".json"):
        return f"{path} is not a weight file ({', '.join(files.SUFFIXES)})"
    if path.name not in PARTS and not files.choose(p.name for p in entries) and pipeline_of(path) != path:
        return f"it is a part of the pipeline {pipeline_of(path)}; point at that folder"
    return ""


def listed(parts: dict) -> str:
    """{part: class} in words: "transformer/ (FluxTransformer2DModel), vae/ (AutoencoderKL)", three at most."""
    words = [f"{part}/ ({brief(name)[1:-1]})" for part, name in parts.items()]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def lora_files(path: Path, entries: list[Path]) -> list[Path]:
    """The files of a LoRA: by their names or, for the only weight file of a folder, by the names of its tensors."""
    if path.is_dir() and (found := [p for pattern in LORA_FILES for p in path.glob(pattern)]):
        return found
    weights = [p for p in entries if p.suffix == ".safetensors"]
    return [p for p in weights[:1] if len(weights) == 1 and any("lora" in name for name in files.read(p).tensors)]


def networks_in(folder: Path) -> list[Path]:
    """Folders one level down with a pipeline or a denoiser, also in a cache of the Hub, its current version first."""
    if not folder.is_dir():
        return []
    found = [p for pattern in ("*", "snapshots/*", "models--*/snapshots/*") for p in sorted(folder.glob(pattern))]
    found = [p for p in found if p.is_dir() and (is_pipeline(p) or holds_denoiser(p) or (p / PARTS[0]).is_dir())]
    main = folder / "refs" / "main"
    current = main.read_text().strip() if main.is_file() else None
    return sorted(found, key=lambda p: (p.name != current, p))


def foreign_format(entries: list[Path]) -> str:
    """A sentence on weights in a format that cannot be read, if the entries of a folder have no other; else ""."""
    found = [p for p in entries if p.suffix.lower() in FORMATS]
    names = [p.name for p in entries if p.suffix != ".bin" or p.with_suffix(".xml") not in entries]  # OpenVINO's .bin
    if not found or files.choose(names):
        return ""
    form = FORMATS[found[0].suffix.lower()]
    return f"{found[0]} is in {form}'s format, which cannot be read: download the weights for PyTorch, or safetensors"
