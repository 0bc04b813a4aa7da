"""Errors against PyTorch: tests bound them with the fixture `parity`, `pytest --parity FILE` writes a table of them."""

import pathlib
import re
import textwrap

import flax.traverse_util
import jax
import numpy as np
import pytest
from golden import make_clip, make_edm, make_lora, make_models, make_modules, make_schedulers, make_vae

from cddistill.models import convert

# Sums in another order change a network's output by 1e-6, GELU's tanh approximation, which must fail, by 5e-5; a
# trajectory accumulates the rounding errors of its steps.
LIMITS = {"output": 1e-5, "trajectory": 3e-5, "input gradient": 1e-4, "weight gradients": 1e-3}
SECTIONS = {  # test file: (title, recorder of PyTorch's outputs, meaning of the names)
    "test_modules": (
        "Modules", make_modules, "UNetBlock is the block of EDM's networks, in the configurations that diffusers has.",
    ),
    "test_models": (
        "UNets and ControlNets", make_models,
        "pixel is a class-conditional pixel model, upscaler has cross-attention only and classes, ssd1b and layers "
        "have numbers of transformer blocks per layer, no_mid has no middle block, odd has options that no published "
        "model uses.",
    ),
    "test_vae": (
        "Autoencoders", make_vae,
        "sd is the architecture of Stable Diffusion 1, 2 and XL, sd3 that of Stable Diffusion 3 and Flux, tiny that of "
        "TAESD; odd has the remaining options.",
    ),
    "test_clip": ("Text encoders", make_clip, "The input gradient is that of the token embedding table."),
    "test_prompt": ("Prompts", make_clip, "The text inputs of the UNet, for prompts and for the null text."),
    "test_edm": (
        "EDM's networks", make_edm,
        "There is no PyTorch package of them: the other side is a second implementation in `make_edm.py`, which agrees "
        "with diffusers where that can express the same network.",
    ),
    "test_lora": ("LoRA", make_lora, "A LoRA's weights are its down and up matrices."),
    "test_schedulers": ("Samplers", make_schedulers, "Every z and x0 of whole trajectories, at equal timesteps."),
}  # fmt: skip
TEXT = """\
# Parity with PyTorch

```
python -m pytest -m "not weights and not device" --parity docs/parity.md tests/test_{{{tests}}}.py
```

generates this file from the errors that these tests measure; do not edit it. PyTorch's outputs were recorded by
`tests/golden/make_*.py` on tiny networks with random weights, so the tests need no PyTorch. Ours are float32, jax
{jax} on a {device}.

An error is max |ours - theirs| / max |theirs| over an array; of several arrays, the largest. For weights, the norm of
each gradient is compared with the recorded norm, relative to the larger of that norm and a thousandth of the largest
norm. *Numbers* counts the compared numbers. Unless a row says otherwise, the tests allow at most
{limits}.
"""
SIZES = """
## Parameters of the published models

Ours are counted by `jax.eval_shape` from the full configs; nothing is computed or allocated. Theirs are those of the
classes of PyTorch diffusers and transformers for these configs. EDM's ImageNet-64 network is counted in the published
file; the literature gives 55.7 and 56.4 million for its CIFAR-10 networks.

| | ours | theirs |
|---|---:|---:|
"""


def pytest_addoption(parser):
    """pytest --parity FILE."""
    parser.addoption("--parity", metavar="FILE", type=pathlib.Path, help="write the table of errors against PyTorch")


class Parity:
    """Compares with PyTorch and records the error in the test's report, which xdist sends to the main process."""

    def __init__(self, record):
        self.record = record

    def __call__(self, network: str, part: str, ours, theirs, limit: float | None = None):
        """Assert that the error of a part ("output" or "input gradient") is within its limit."""
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        self.note(network, part, np.abs(ours - theirs).max() / np.abs(theirs).max(), limit, theirs.size)

    def weights(self, network: str, grads, norms, name_of=convert.torch_name):
        """The same for the gradients of all weights; the recorded norms are sorted by PyTorch name."""
        flat = flax.traverse_util.flatten_dict(grads)
        ours = {name_of(path): np.linalg.norm(g) for path, g in flat.items()}
        ours = np.array([ours[name] for name in sorted(ours)])
        assert ours.shape == norms.shape
        error = np.abs(ours - norms) / np.maximum(norms, 1e-3 * norms.max())
        self.note(network, "weight gradients", error.max(), None, len(ours))

    def note(self, network, part, error, limit, numbers):
        limit = LIMITS[part] if limit is None else limit
        self.record("parity", (network, part, float(error), limit, int(numbers)))
        assert error <= limit, f"{network}: {part} differs from PyTorch by {error:.1e} of its largest value"

    def size(self, network: str, shapes, published: int):
        """Assert that a network has as many parameters as the published one."""
        ours = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
        self.record("size", (network, ours, published))
        assert ours == published


@pytest.fixture
def parity(record_property):
    """parity(network, part, ours, theirs) asserts that the error is within its limit and records it."""
    return Parity(record_property)


def pytest_terminal_summary(terminalreporter, config):
    """With --parity, write the table if every section was tested and nothing failed."""
    path, stats = config.getoption("--parity"), terminalreporter.stats
    if path is None:
        return
    reports = sorted(stats.get("passed", ()), key=lambda report: report.nodeid)
    stems = [(pathlib.Path(report.nodeid.split("::")[0]).stem, report) for report in reports]
    found = [(stem, kind, tuple(noted)) for stem, report in stems for kind, noted in report.user_properties]
    if "not slow" in config.getoption("markexpr"):
        terminalreporter.write_line(
            f"{path} is left as it was: its numbers are of the slow tests, too; see its command"
        )
        return
    missing = [name for name in SECTIONS if not any(f[:2] == (name, "parity") for f in found)]
    if missing or stats.get("failed") or stats.get("error"):
        terminalreporter.write_line(f"{path} is left as it was: tests failed, or none ran of {missing}")
        return
    path.write_text(document(found))
    terminalreporter.write_line(f"wrote {path}")


def document(found) -> str:
    """The whole file from records (test file, kind, values)."""
    text = TEXT.format(
        tests=",".join(name.removeprefix("test_") for name in SECTIONS), jax=jax.__version__,
        device=jax.devices()[0].platform.upper(), limits=", ".join(f"{x:.0e} for {part}" for part, x in LIMITS.items()),
    )  # fmt: skip
    for name, (title, recorder, meaning) in SECTIONS.items():
        recorded = re.search(r"Recorded with (.+?)\.\s", recorder.__doc__.replace("\n", " "))[1]
        text += f"\n## {title}\n\n{textwrap.fill(f'{meaning} Recorded with {recorded}.', 120)}\n\n"
        text += table([noted for file, kind, noted in found if (file, kind) == (name, "parity")])
    sizes = sorted({noted for _, kind, noted in found if kind == "size"})
    return text + SIZES + "".join(f"| {network} | {ours:,} | {theirs:,} |\n" for network, ours, theirs in sizes)


def table(noted) -> str:
    """A row per network, a column per part."""
    parts = [part for part in LIMITS if any(n[1] == part for n in noted)]
    text = f"| | {' | '.join(parts)} | numbers |\n|---|{'---:|' * (len(parts) + 1)}\n"
    for network in sorted({n[0] for n in noted}):
        of = [n for n in noted if n[0] == network]
        cells = [cell([n for n in of if n[1] == part], LIMITS[part]) for part in parts]
        text += f"| {network} | {' | '.join(cells)} | {sum(n[-1] for n in of):,} |\n"
    return text


def cell(noted, usual: float) -> str:
    """The largest error of a part, with its limit if that is not the usual one."""
    if not noted:
        return ""
    own = {limit for *_, limit, _ in noted} - {usual}
    return f"{max(n[2] for n in noted):.1e}".replace("0.0e+00", "0") + "".join(f" (limit {x:.0e})" for x in own)
