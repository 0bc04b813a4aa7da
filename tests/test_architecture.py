"""Code layout: imports go one way through the layers, files stay small, and one module takes gradients."""

import ast
import pathlib

import cddistill

LAYERS = [  # a file imports from earlier lines only; modules on one line do not import each other
    {"progress"},
    {"remote", "reduction"},
    {
        *("diffusion", "sharding", "io", "typed", "health", "checksums", "signals", "collectives", "devices", "flops"),
        *("hub", "memory", "rounding"),
    },
    {"net", "storage", "lock", "environment", "profiling", "targets"},
    {"models", "method", "bucket"},
    {"perceptual", "pipeline"},
    {"losses", "sampling"},
    {"methods"},
    {"step", "optim", "data"},
    {"config"},
    {"config_files", "checkpoint", "checks", "log", "encoders", "clock"},
    {"build"},
    {"generate", "outline"},
    {"space"},
    {"evals", "precompute", "export", "plan", "unrolled"},
    {"page"},
    {"train"},
    {"commands"},
    {"api"},
    {"runs", "demo"},
    {"main"},
]
PUBLIC = {*cddistill.__all__}
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}
ROOT = pathlib.Path(__file__).parents[1] / "cddistill"


def imported(path):
    """The top-level modules of this package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cddistill":
            tail = node.module.split(".")[1:]
            yield from [tail[0]] if tail else [alias.name for alias in node.names]
        if isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("cddistill.")]


def test_imports_go_to_lower_layers_only():
    for path in ROOT.rglob("*.py"):
        unit = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for other in set(imported(path)) - {unit} - PUBLIC:
            assert unit in LEVEL, f"{unit} has no place in LAYERS"
            assert LEVEL[other] < LEVEL[unit], f"{path.relative_to(ROOT)} imports {other}"


def test_files_stay_small():
    for path in ROOT.rglob("*.py"):
        limit = 300 if "methods" in path.parts else 400
        assert len(path.read_text().splitlines()) <= limit, path


def test_only_step_takes_gradients_and_applies_updates():
    """Gradients and optimiser updates live in step.py and nowhere else."""
    for path in ROOT.rglob("*.py"):
        if path.name != "step.py":
            text = path.read_text()
            assert "value_and_grad" not in text, path
            assert "apply_updates" not in text, path


def test_no_public_name_is_that_of_a_module():
    """Importing the module would put it in the place of the function."""
    modules = {path.stem for path in ROOT.glob("*.py")} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not PUBLIC & modules
