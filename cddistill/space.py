"""What a Hugging Face Space needs beside an exported student: app.py, requirements.txt, front matter of the card."""

import dataclasses
from pathlib import Path
from typing import Any

import cddistill
from cddistill import io
from cddistill.data.contracts import Task

SDK = {"sdk": "gradio", "sdk_version": "6.31.0", "app_file": "app.py", "license": "other"}
"""Front matter. The version is that of constraints.txt; the licence is the teacher's, which is not known here."""

APP = '''\
"""The page of this student: python app.py, after pip install -r requirements.txt."""

from pathlib import Path

from cddistill import demo

FOLDER = Path(__file__).parent
demo.serve(demo.open_folder(FOLDER, {arguments}))
'''
REQUIREMENTS = """\
# Where no index has it, put its wheel beside this file, and here ./NAME.whl[demo]
cddistill[demo]=={version}
"""


def check(how, drawn: bool) -> None:
    """ValueError for a student whose folder cannot be sampled by itself: `how` is its `models.schedulers.Sampling`, and
    drawn whether diffusers has its networks."""
    if how is None or not drawn:
        raise ValueError(
            "--space is for students that a scheduler of diffusers samples, and this is none: leave it out"
        )


def scales(method, how) -> dict[str, float]:
    """The guidance scales with which a student's folder is sampled as the student was; without training how is None."""
    embedded = {"embedded_guidance": method.guidance} if getattr(method, "embedding_width", 0) else {}
    return {"guidance": getattr(how or method, "guidance", 1.0)} | embedded


def write(folder: Path, task_name: str, task: Task, scales: dict[str, float]) -> None:
    """app.py, which opens the page of the student in this folder, and requirements.txt."""
    options = {f.name: getattr(task, f.name) for f in dataclasses.fields(task)}
    arguments = ", ".join([repr(task_name), repr(options), *(f"{name}={scale!r}" for name, scale in scales.items())])
    io.write_atomic(folder / SDK["app_file"], APP.format(arguments=arguments))
    io.write_atomic(folder / "requirements.txt", REQUIREMENTS.format(version=cddistill.__version__))


def front_matter(title: str) -> dict[str, Any]:
    """The keys of the card that a Space reads."""
    return {"title": title} | SDK
