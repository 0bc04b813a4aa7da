"""Defaults of PyTorch diffusers' and transformers' classes: python tests/golden/make_defaults.py

Recorded with diffusers 0.42.1, transformers 5. defaults.json holds, per class, what a missing key of its config file
means. "schedulers" are all schedulers of diffusers, of every noise process; "networks" are the classes that we have.
"""

import ast
import inspect
import json
from pathlib import Path

NETWORKS = ("UNet2DConditionModel", "ControlNetModel", "AutoencoderKL", "AutoencoderTiny")


def schedulers(folder: Path) -> dict:
    """{class: {option: default}} from the sources, since some classes need packages that are not installed."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for cls in ast.parse(path.read_text()).body:
            if isinstance(cls, ast.ClassDef) and any("ConfigMixin" in ast.unparse(base) for base in cls.bases):
                init = next(f for f in cls.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
                names = [arg.arg for arg in init.args.args][-len(init.args.defaults) :]
                values = [eval(ast.unparse(x)) for x in init.args.defaults]  # noqa: S307  (of an installed package)
                found[cls.name] = dict(zip(names, values, strict=True))
    return found


def main():
    """Ask the installed packages and write defaults.json next to this file."""
    import diffusers
    import transformers

    networks = {
        name: {k: p.default for k, p in inspect.signature(getattr(diffusers, name)).parameters.items()}
        for name in NETWORKS
    }
    networks["CLIPTextModel"] = transformers.CLIPTextConfig().to_dict()
    out = {"schedulers": schedulers(Path(diffusers.__file__).parent / "schedulers"), "networks": networks}
    path = Path(__file__).parent / "defaults.json"
    lines = [f'"{kind}": {{\n' + ",\n".join(f'"{name}": {json.dumps(x)}' for name, x in classes.items()) + "\n}"
             for kind, classes in out.items()]  # fmt: skip
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print({kind: len(classes) for kind, classes in out.items()})


if __name__ == "__main__":
    main()
