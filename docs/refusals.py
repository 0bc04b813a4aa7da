"""The page of all refusals: the sentences with which the package raises a ValueError, as they stand in its source."""

import ast
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parents[1]
PARTS = {  # {heading: beginnings of paths in the package}; a file belongs to the longest that fits
    "Command line and config": ("main", "commands", "config", "typed", "checks", "build", "runs", "api"),
    "Workdir, checkpoints and storage": (
        *("checkpoint", "bucket", "storage", "remote", "io", "lock", "log", "clock", "checksums", "train"),
    ),
    "Images, captions and shards": ("data", "encoders"),
    "Tasks": ("data/tasks",),
    "Encoding and pairs": ("precompute", "data/encoded", "data/ode_pairs", "data/shards", "data/sources/arrays"),
    "Methods": ("method", "methods", "sampling", "diffusion", "step", "optim", "losses", "generate"),
    "Teachers and other weights": ("models", "pipeline", "net", "perceptual"),
    "Evaluation": ("evals",),
    "Export, pages and the hub": ("export", "page", "unrolled", "space", "demo", "hub"),
    "Devices, hosts and plans": ("sharding", "profiling", "plan", "outline", "targets", "memory", "reduction"),
}
INTRO = """# All refusals

Every sentence with which the program refuses something, as it stands in the source; `…` stands for names and numbers.
A sentence says what is wrong and what to do; those that are met most are explained in
[troubleshooting](troubleshooting.md#refusals). This page is written from the source when the site is built.
"""


def part_of(path: str) -> str:
    """The heading for a file, such as "data/tasks/sr". ValueError for one that PARTS does not name."""
    fits = [(len(start), heading) for heading, starts in PARTS.items() for start in starts if begins(path, start)]
    if not fits:
        raise ValueError(f"cddistill/{path}.py refuses something: add it to PARTS in docs/refusals.py")
    return max(fits)[1]


def begins(path: str, start: str) -> bool:
    """Whether `start` names the file, its folder, or the beginning of its name before "_"."""
    return path == start or path.startswith((f"{start}/", f"{start}_"))


def text(node: ast.expr) -> str:
    """A string in the source; what is put into it is "…"."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return "…"


def refusals() -> Iterator[tuple[str, str]]:
    """(file, sentence) of every ValueError that the package raises with a text of its own."""
    package = ROOT / "cddistill"
    for path in sorted(package.rglob("*.py")):
        name = str(path.relative_to(package).with_suffix(""))
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            if ast.unparse(node.exc.func) == "ValueError" and (said := text(node.exc.args[0])).strip("…:;() "):
                yield name, " ".join(said.split())


def page() -> str:
    """The page, in Markdown."""
    found = {heading: set() for heading in PARTS}
    for path, said in refusals():
        found[part_of(path)].add(said)
    parts = [INTRO]
    for heading, sentences in found.items():
        rows = "\n".join(f"- `{said.replace('`', chr(39))}`" for said in sorted(sentences, key=str.lower))
        parts.append(f"## {heading}\n\n{rows}\n")
    return "\n".join(parts)
