"""The commands in the fences of README.md, CONTRIBUTING.md and docs/, and how the nightly run makes each small."""

import pathlib
import re
import shlex
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FIRST = re.compile(r"(\w+=\S+ )*(python3?|pip|pytest|cddistill|mkdocs|pre-commit|launch/\S+|tests/\S+|\.ci/\S+) ?")
MAIN = re.compile(r"python3? -m cddistill\.main ")


class Command(NamedTuple):
    """One command, without its comment; lines that \\ continues are one."""

    page: str
    text: str

    @property
    def arguments(self) -> list[str]:
        """Those of `python -m cddistill.main`."""
        return shlex.split(MAIN.sub("", self.text, count=1))


def commands() -> list[Command]:
    """All of them in order, those that && joins apart."""
    found = []
    for page in PAGES:
        for language, fence in FENCE.findall(page.read_text()):
            if language not in ("", "bash", "console", "sh"):
                continue
            for line in re.sub(r"\\\n\s*", "", fence).splitlines():
                line = re.split(r"\s+#|\s{3,}\S", line)[0]
                found += [Command(page.name, part.strip()) for part in line.split(" && ") if FIRST.match(part.strip())]
    return found


# ---- what the nightly run does with them

TINY = "--config.batch_size=8 --config.data.size=8 --config.eval_images=8 --config.eval_every=2 --config.log_every=1"
TINY += " --config.steps=2 --config.checkpoint_every=2 --config.teacher=TEACHER"  # 8 px; the teacher of tests/tiny.py
SMALL = (
    "--config.batch_size=8 --config.steps=2 --config.eval_every=2 --config.checkpoint_every=2 --config.eval_images=4"
)
SR = f"{TINY} --config.data.scale=2 --config.baseline= --config.sample_steps=1,2 --config.method.signal=l2"
PAIRS = "--config.teacher_steps=2 --config.num_pairs=16 --config.pairs_shard=8 --config.pairs_batch=8"
D2G = f"{TINY} {PAIRS} --config.sample_steps=1 --config.method.regression=l2 --config.method.metric="
EMOJI = f"{SMALL} --config.data.size=32"
FOLDER = f"{SMALL} --config.baseline= --config.sample_steps=1 --config.data.split=all"
MAIN_SR, MAIN_D2G, PRETRAINED = (
    f"python -m cddistill.main --config=configs/{name}.py" for name in ("ccd_sr", "d2g_emoji", "pretrained")
)
LPIPS = "python -m cddistill.main --config=configs/latent_lpips.py"
EXPORT_LPIPS = (
    "python -m cddistill.main --mode=export --config=configs/latent_lpips.py:judge --output=emoji.safetensors"
)
DMD2 = "python -m cddistill.main --config=configs/dmd2_emoji.py"
CHAINS: dict[str, list[tuple[str, str]]] = {  # {name: [(beginning of a command, options that make it small)]}
    "the first command": [
        (MAIN_SR, SR),
        (f"{MAIN_SR} --mode=sample --input=image.png", SR),
        ("python -m cddistill.main --mode=sample --config=configs/pretrained.py --config.teacher=emoji_codi", ""),
        ("python -m cddistill.main --mode=sample --config=configs/pretrained.py --config.teacher=pocket", ""),
        (f"{MAIN_SR} --mode=evaluate --checkpoint=best", SR),
        (f"{MAIN_SR} --mode=export --output=student", SR),
        (f"{MAIN_SR} --mode=export --output=student.stablehlo", SR),
        ("python -m cddistill.main --mode=plan --config=configs/ccd_sr.py", SR),
    ],
    "dmd2": [
        (DMD2, f"{TINY} --config.method.gan_weight=0"),
        (f"{DMD2} --workdir=runs/one", f"{TINY} --config.method.gan_weight=0"),
        (f"{DMD2} --workdir=runs/two", f"{TINY} --config.method.gan_weight=0"),
        ("python -m cddistill.main --mode=pairs --config=configs/dmd2_emoji.py", f"{TINY} {PAIRS}"),
        (
            f"{DMD2} --config.data.pairs=data/pairs",
            f"{TINY} --workdir=runs/three --config.method.gan_weight=0 --config.method.regression=l2",
        ),
    ],
    "diffusion2gan": [
        ("python -m cddistill.main --mode=pairs --config=configs/d2g_emoji.py", D2G),
        (MAIN_D2G, D2G),
    ],
    "latent lpips": [
        (LPIPS, EMOJI),
        (f"{LPIPS}:judge", EMOJI),
        (EXPORT_LPIPS, EMOJI),
    ],
    "pretrained": [
        (f"{PRETRAINED} --mode=evaluate --config.teacher=FOLDER", "--config.sample_steps=2 --config.eval_images=8"),
        (f"{PRETRAINED} --mode=sample --output=sheet.png", "--config.sample_steps=1 --n=4"),
        (f"{PRETRAINED} --mode=sample --config.teacher=pocket", "--config.sample_steps=1"),
    ],
    "pocket's students": [
        (
            f"python -m cddistill.main --config=configs/ccd_{task}.py",
            f"{SMALL} --config.sample_steps=1 --config.baseline=",
        )
        for task in ("inpaint", "edit", "depth", "canny")
    ],
    "an autoencoder": [
        ("python -m cddistill.main --config=configs/autoencoder_pocket.py", SMALL),
        ("python -m cddistill.main --config=configs/autoencoder_pocket.py --mode=export", SMALL),
    ],
    "one's own images": [
        (f"{MAIN_SR} --config.data.source=folder", f"{FOLDER} --config.data.size=32"),
        (f"{MAIN_SR} --config.data.source=webdataset", f"{FOLDER} --workdir=runs/shards --config.data.size=32"),
        (
            f"{MAIN_SR} --mode=encode --output=latents",
            "--config.teacher=pocket --config.data.path=IMAGES --config.data.size=64 --config.data.split=all",
        ),
        (
            f"{MAIN_SR} --config.teacher=FOLDER --config.data.source=arrays",
            f"{SMALL} --config.teacher=pocket --config.baseline= --config.sample_steps=1 --workdir=runs/latents",
        ),
    ],
}
NOT_RUN = {  # {pattern of commands that the nightly run leaves out: why}
    r"python3 -m venv|pip install|pre-commit install|pytest|python -m pytest|\.ci/|tests/run_slow": "sets up, or tests",
    r"ONNXRUNTIME_WEB=": "tests",
    r"python notebooks/build\.py": "builds the notebooks: tests/test_notebooks.py runs them",
    r".*--mode=export --page|python -m http\.server": "needs npm, and a browser: tests/test_page.py does the same",
    r".*--mode=demo": "serves until it is interrupted: tests/test_demo.py opens the page",
    r"python student/app\.py|.*--space$": "serves a page, or makes one: tests/test_demo.py does both",
    r"python benchmarks/": "measures for minutes to hours",
    r".*configs/dmd2_(sd15|sdxl|imagenet64)\.py": "needs weights, data and accelerators that are not here",
    r"cddistill .*gs://": "needs a bucket: tests/test_object_store.py does the same on a local server",
    r"python -m cddistill\.models\.single_file": "needs such a file: tests/test_single_file.py runs it",
    r".*configs/(teacher_emoji|latent_lpips_pocket)\.py|.*configs/dmd2_pocket\.py:encode": "hours",
    r".*configs/finetune_pocket\.py:(inpaint|edit) --config\.steps=1500": "half an hour",
    r".*configs/(finetune_pocket\.py:canny|ccd_canny\.py) --config\.eval_images=500": "half an hour",
    r".*configs/finetune_pocket\.py:canny --workdir=WORKDIR": "exports a run of half an hour",
    r".*configs/dmd2_pocket\.py:four --config\.teacher": "an hour or more",
    r".*--flagfile=docs/pocket_prompts\.txt|.*--config\.data\.source=mixture": "half an hour",
    r".*--config=configs/d2g_emoji\.py --config\.method\.regression=latent_lpips": "repeats a row of the results",
    r".*configs/ccd_sr\.py --config\.teacher=FOLDER --config\.data\.source=folder": "needs a teacher of latents",
}
