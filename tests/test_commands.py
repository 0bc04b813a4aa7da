"""The commands of README and docs: the program understands each, and each is run in a small size, or says why not.

tests/run_commands.sh runs them, which takes minutes.
"""

import io as bytes_io
import re
import shlex
import shutil
import tarfile

import commands
import numpy as np
import pytest
from absl import flags
from commands import CHAINS, MAIN, NOT_RUN, ROOT
from PIL import Image

from cddistill import config, main

ALL = commands.commands()
OURS = list(dict.fromkeys(command.text for command in ALL if MAIN.match(command.text)))


@pytest.fixture
def parsed(monkeypatch):
    """parsed(*arguments) is the config that they describe; a mistake raises."""

    def refuse(error):
        raise error

    monkeypatch.setattr(main, "fail", refuse)
    yield lambda *arguments: main.parse(["cddistill", *arguments])
    flags.FLAGS.unparse_flags()


@pytest.mark.parametrize("text", OURS)
def test_a_command_is_understood(text, parsed, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [argument for argument in shlex.split(MAIN.sub("", text)) if argument != "..."]
    if (
        "--config=..." not in arguments and (settings := parsed(*arguments)) is not None
    ):  # None: --mode=demo without one
        config.resolve(settings)


def chain_of(text):
    """(chain, index) of the entry for a command: the longest that it begins with, up to the end of an argument."""
    fits = [
        (len(start), name, i)
        for name, chain in CHAINS.items()
        for i, (start, _) in enumerate(chain)
        if f"{text} ".startswith(f"{start} ")
    ]
    return max(fits, default=None)


def test_the_commands_are_found():
    assert len(ALL) > 80
    assert {"README.md", "performance.md", "storage.md", "dmd2.md"} <= {command.page for command in ALL}
    assert all("#" not in command.text and "  " not in command.text for command in ALL)


def test_each_command_is_run_or_says_why_not():
    used, reasons = set(), set()
    for command in ALL:
        why = [pattern for pattern in NOT_RUN if re.match(pattern, command.text)]
        entry = chain_of(command.text)
        assert why or entry, f"{command.page}: add this command to tests/commands.py: {command.text}"
        reasons |= {*why}
        used |= {entry[1:]} if entry and not why else set()
    assert reasons == {*NOT_RUN}
    assert used == {(name, i) for name, chain in CHAINS.items() for i in range(len(chain))}


# ---- the nightly run


@pytest.fixture
def place(tmp_path, teacher, monkeypatch):
    """A folder like the repository's root, with a picture, a folder of pictures and a shard of them."""
    for name in ("configs", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    rng = np.random.default_rng(0)
    (tmp_path / "IMAGES").mkdir()
    (tmp_path / "SHARDS").mkdir()
    with tarfile.open(tmp_path / "SHARDS" / "00000.tar", "w") as tar:
        for i in range(16):
            path = tmp_path / "IMAGES" / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
            path.with_suffix(".txt").write_text(f"picture {i}")
            tar.add(path, path.name)
            text = tarfile.TarInfo(f"{i}.txt")
            text.size = len(f"picture {i}")
            tar.addfile(text, bytes_io.BytesIO(f"picture {i}".encode()))
    shutil.copy(tmp_path / "IMAGES" / "0.png", tmp_path / "image.png")
    for name in ("TEACHER", "FOLDER"):
        shutil.copytree(teacher, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def full(start):
    """The documented command for an entry of a chain: the first that has it."""
    return next(c.text for c in ALL if (entry := chain_of(c.text)) and CHAINS[entry[1]][entry[2]][0] == start)


@pytest.mark.slow
@pytest.mark.usefixtures("two_devices")
@pytest.mark.parametrize("name", CHAINS)
def test_commands_run(name, place, parsed):
    for start, options in CHAINS[name]:
        arguments = shlex.split(MAIN.sub("", full(start))) + options.split()
        print(f"\n{' '.join(arguments)}", flush=True)
        settings = parsed(*[argument for argument in arguments if argument != "..."])
        assert not main.main(settings)
        flags.FLAGS.unparse_flags()
    written = [*place.rglob("report.html"), *place.glob("*.png"), *place.glob("*.safetensors")]
    assert len(written) > 1
