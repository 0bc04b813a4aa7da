"""cddistill: few-step conditional diffusion distillation in JAX.

student = cddistill.load("runs/ccd_sr")                        # a run, a diffusers folder or "emoji"
images = cddistill.sample(student, image="small.png", steps=4)  # float32 [n, h, w, 3] in [0, 1]

Training and looking at runs: `runs`.
"""

import importlib

__version__ = "0.1.0"
RUNS = (
    *("configure", "fit", "make_pairs", "encode_data", "save"),
    *("alarms", "evaluate", "examples", "grid", "records", "scores"),
)
HOMES = {"METHODS": "methods", "SOURCES": "data", "TASKS": "data", "load": "api", "sample": "api", "noises": "generate"}
HOMES |= dict.fromkeys(RUNS, "runs")  # no name is also that of a module, which an import of it would put in its place
__all__ = sorted(("__version__", *HOMES))


def __getattr__(name: str):
    """Public names are imported when they are first used: `import cddistill` itself starts no JAX."""
    if name not in HOMES:
        raise AttributeError(f"module 'cddistill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cddistill.{HOMES[name]}"), name)


def __dir__():
    return __all__
