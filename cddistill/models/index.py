"""model_index.json, which names the parts of a diffusers pipeline: {"unet": ["diffusers", "UNet2DConditionModel"]}."""

from pathlib import Path

from cddistill import io
from cddistill.typed import brief

FILE = "model_index.json"


def read_index(root: Path) -> dict:
    """model_index.json of a pipeline's folder; {} if there is none. ValueError for a part that is no subfolder."""
    path = root / FILE
    index = io.read_json(path) if path.is_file() else {}
    if wrong := [part for part in parts_of(index) if not io.is_plain_name(part)]:
        raise ValueError(f"{path} names the part {brief(wrong[0])}, which is no folder beside it: download it again")
    return index


def parts_of(index: dict) -> dict[str, tuple[str, str]]:
    """{part: (library, class)}, classes without the "Flax" of diffusers' former Flax classes; [null, null] is no part.

    Options, such as "requires_safety_checker": false, are no parts either.
    """
    named = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and isinstance(v[1], str)}
    return {part: (str(library), name.removeprefix("Flax")) for part, (library, name) in named.items()}


def has(root: Path, part: str) -> bool:
    """Whether a folder has a part; ValueError if its model_index.json names one that is not there."""
    if part in parts_of(read_index(root)) and not (root / part).is_dir():
        raise ValueError(f"{root} lacks {part}/, which its {FILE} names: download that folder too")
    return (root / part).is_dir()
