"""Which files of a teacher's folder belong to its pipeline: what a student's folder takes along, and nothing else."""

import os
import re
from pathlib import Path

from cddistill.models import files
from cddistill.models.families import FAMILIES
from cddistill.models.index import parts_of

ENCODERS = {name for family in FAMILIES.values() for name in family.text_encoders}
TOKENIZERS = {name.replace("text_encoder", "tokenizer") for name in ENCODERS}
NETWORKS = {family.denoiser for family in FAMILIES.values()} | ENCODERS | {"vae"}
KNOWN = NETWORKS | TOKENIZERS | {"scheduler"}
TEXTS = (".json", ".txt", ".model")  # configs, vocabularies, sentencepiece's models
LICENCE = re.compile(r"(?i)(licen[cs]e|copying|notice)")


def pipeline_files(root: Path, index: dict) -> dict[str, Path]:
    """{"vae/config.json": file} of the parts that model_index.json names or a family has, and of licences.

    Not among them are hidden files and folders, checkpoints, optimizer states and weights in other precisions or
    formats than those that would be loaded. Raises ValueError naming a file that cannot be read.
    """
    parts = KNOWN | {*parts_of(index)}
    found = {p.name: p for p in sorted(root.iterdir()) if LICENCE.match(p.name) and p.is_file()}
    for part in sorted(parts):
        if (root / part).is_dir():
            found |= {f"{part}/{name}": file for name, file in part_files(root / part).items()}
    return found


def part_files(folder: Path) -> dict[str, Path]:
    """{name in a student's folder: file} of one part: its texts and licences, and the weights that would be loaded.

    A variant such as model.fp16.safetensors gets the name that is loaded by default, model.safetensors.
    """
    there = [p for p in sorted(folder.iterdir()) if not p.name.startswith(".") and not p.is_dir()]
    found = {p.name: p for p in there if LICENCE.match(p.name) or (p.suffix in TEXTS and ".index." not in p.name)}
    names = [p.name for p in there]
    if weights := files.choose(n for n in names if not n.endswith(".msgpack")) or files.choose(names):
        found[plain(weights)] = folder / weights
        if weights.endswith(".json"):
            found |= {name: folder / name for name in {*files.shards_of(folder / weights).values()}}
    for file in found.values():
        if not file.is_file() or not os.access(file, os.R_OK):
            raise ValueError(f"{file} cannot be read: download it again, or change its permissions")
    return found


def network_files(source: Path) -> dict[str, Path]:
    """{name in a student's folder: file} of a network's folder, or of a weight file with its config.json."""
    if source.is_dir() or source.suffix == ".json":  # an index of shards
        return part_files(source if source.is_dir() else source.parent)
    return {plain(source.name): source, "config.json": source.parent / "config.json"}


def plain(name: str) -> str:
    """The name of a weight file or index without its variant."""
    for stem, suffix in files.NAMES:
        if name.startswith(f"{stem}.") and suffix in name:
            return f"{stem}{suffix}.index.json" if name.endswith(".json") else f"{stem}{suffix}"
    return name
