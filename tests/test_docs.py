"""The pages of docs/: each is reached from the site, has its figure, and quotes what the code really says."""

import ast
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest
import tiny
import yaml

from cddistill import health
from cddistill.data import SOURCES, TASKS
from cddistill.methods import METHODS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
TROUBLE = (DOCS / "troubleshooting.md").read_text()
WRITTEN = {"contributing.md", "changelog.md", "refusals.md"}  # by docs/hooks.py


def module(path):
    """A file of docs/, which is no package, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def pages(nav):
    """The files in a navigation of MkDocs."""
    for entry in nav:
        entry = next(iter(entry.values())) if isinstance(entry, dict) else entry
        yield from [entry] if isinstance(entry, str) else pages(entry)


def test_every_page_is_in_the_navigation():
    listed = [*pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])]
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert len(listed) == len({*listed})
    assert {*listed} == there | WRITTEN


def test_no_two_pages_have_the_same_title():
    titles = [path.read_text().partition("\n")[0] for path in DOCS.rglob("*.md")]
    assert all(title.startswith("# ") for title in titles)
    assert len(titles) == len({*titles})


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)", prose):
        if not target.startswith("http") and target not in WRITTEN:
            assert (page.parent / target).exists(), target


def test_every_method_has_a_page_with_the_figure_that_the_code_draws():
    draw = module(DOCS / "figures" / "draw.py")
    assert {*draw.FIGURES} == {*METHODS}
    for name, figure in draw.FIGURES.items():
        assert f"](figures/{name}.svg)" in (DOCS / f"{name}.md").read_text(), name
        assert (DOCS / "figures" / f"{name}.svg").read_text() == draw.picture(figure), "run docs/figures/draw.py"


@pytest.mark.parametrize(("page", "names"), [("tasks", TASKS), ("teachers", SOURCES)])
def test_every_task_and_source_has_a_row(page, names):
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / f"{page}.md").read_text(), re.MULTILINE)
    assert {*names} <= {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def section(page, anchor):
    """The text below the heading that a link names."""
    slug = lambda title: re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    parts = re.split(r"^(#+) (.+)$", page.read_text(), flags=re.MULTILINE)[1:]
    at = next(i for i in range(0, len(parts), 3) if slug(parts[i + 1]) == anchor)
    ends = (i for i in range(at + 3, len(parts), 3) if len(parts[i]) <= len(parts[at]))
    return "".join(parts[at + 2 : next(ends, len(parts))])


def test_numbers_of_the_readme_are_those_of_the_results():
    number = r"(?<![\w.,])\d+(?:[.,]\d+)*"
    rows = [row for row in (ROOT / "README.md").read_text().splitlines() if "](docs/" in row and row.startswith("| [")]
    checked = 0
    for cell in (cell for row in rows for cell in row.split(" | ")[2:]):
        if found := re.findall(r"\]\((docs/[\w.]+)#([\w-]+)\)", cell):
            text = " ".join(section(ROOT / page, anchor) for page, anchor in found)
            there = [float(x.replace(",", "")) for x in re.findall(number, text)]
            for x in re.findall(number, re.sub(r"\]\([^)]*\)", "]", cell).replace(", ", " ")):
                decimals = len(x.partition(".")[2])
                assert any(f"{y:.{decimals}f}" == x for y in there), (x, cell)
                checked += 1
    assert checked > 40


# ---- troubleshooting


def faults():
    """The names of all alarms; those of weights that do not move are one."""
    tables = [value for value in vars(health).values() if isinstance(value, dict)]
    rules = [rules for rules in tables if any(isinstance(x, health.Rule) for x in rules.values())]
    rules += [method.health_rules() for method in (*tiny.VARIANTS.values(), *(cls() for cls in METHODS.values()))]
    return {name for table in rules for name in table}


def test_every_alarm_has_an_entry():
    entries = re.findall(r"^### (.+)", TROUBLE.partition("## Refusals")[0], re.MULTILINE)
    frozen = {name for name in faults() if name.endswith(" frozen")}
    assert {name.removesuffix(" frozen") for name in frozen} >= {"student", "critic"}
    assert {*entries[1:]} == faults() - frozen
    assert entries[0].startswith("student frozen, critic frozen")


def sentences():
    """All strings of the package; what is put into one is "…"."""
    text = module(DOCS / "refusals.py").text
    for path in (ROOT / "cddistill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant) and (found := text(node)) != "…":
                yield found


def test_every_refusal_that_is_explained_exists():
    rows = re.findall(r"^\| (`.*?`) \|", TROUBLE.partition("## Refusals")[2], re.MULTILINE)
    assert len(rows) > 60
    said = "\n".join({*sentences()})
    for row in rows:
        pattern = ".*?".join(re.escape(part) for part in row.strip("`…").split("…"))
        assert re.search(pattern, said), row


def test_all_refusals_are_a_page():
    refusals = module(DOCS / "refusals.py")
    page, found = refusals.page(), [*refusals.refusals()]
    assert len(found) > 500
    assert all(f"- `{said.replace('`', chr(39))}`\n" in page for _, said in found)
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert {*sections} == {*refusals.PARTS}
    assert "- `data.size … must be divisible by data.scale …`" in sections["Tasks"]
    assert "is sampled in one step" in sections["Methods"]
    assert "(refusals.md)" in TROUBLE


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in ("", "dmd2", "contributing", "refusals", "api/training"):
        assert (tmp_path / "site" / page / "index.html").is_file()
