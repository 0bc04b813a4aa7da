"""Notebooks: sources and notebooks are pairs, each has what Colab needs, and each runs in a short size."""

import ast
import json
import os
import pathlib
import re
import runpy

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"
NAMES = ("quickstart", "tasks", "dmd2_health", "diffusion2gan", "your_teacher", "compare_students", "add_a_method")
MARK = re.compile(r"^# %%(?= |$)( \[markdown\])?.*$", re.MULTILINE)
MOST = 1_000_000  # bytes of a notebook
WANTED = {  # what a notebook says if it does what it is for
    "dmd2_health": "GAN dominates", "add_a_method": " passed", "your_teacher": "model_index.json",
}  # fmt: skip
every = pytest.mark.parametrize("name", NAMES)


def constant(name):
    """A constant of build.py, which is not imported: it needs jupytext."""
    tree = ast.parse((FOLDER / "build.py").read_text())
    return next(ast.literal_eval(x.value) for x in tree.body if isinstance(x, ast.Assign) and x.targets[0].id == name)


def notebook(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def cells(name):
    """[(cell_type, source)] of the notebook."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook(name)["cells"]]


def written(name):
    """[(cell_type, source)] of the source, as jupytext reads it."""
    text = (FOLDER / f"{name}.py").read_text()
    marks = [*MARK.finditer(text)]
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    found = []
    for mark, end in zip(marks, ends, strict=True):
        body = text[mark.end() : end].strip("\n")
        if mark[1]:
            body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        found.append(("markdown" if mark[1] else "code", re.sub(r"^# (?=%%)", "", body, flags=re.MULTILINE)))
    return found


def tagged(name, tag):
    """The source of the one cell with this tag."""
    (cell,) = (x for x in notebook(name)["cells"] if tag in x["metadata"].get("tags", ()))
    return "".join(cell["source"])


def parameters(name):
    """{name: default} of the settings."""
    tree = ast.parse(tagged(name, "parameters"))
    return {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body}


def test_every_notebook_is_known():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {*NAMES} == {*constant("SAVED")} == {*constant("SHORT")}
    assert {path.stem for path in FOLDER.glob("*.py")} == {*NAMES, "build"}


@every
def test_source_and_notebook_have_the_same_cells(name):
    """After a change of NAME.py: python notebooks/build.py."""
    assert cells(name) == written(name)


@every
def test_a_notebook_starts_with_a_badge_that_opens_it_and_a_title(name):
    kind, first = cells(name)[0]
    badge, title = first.split("\n\n")[0], first.split("\n\n")[1]
    assert kind == "markdown"
    repository = re.search(r'"https://github.com/([^/"]+/[^/"]+)"', tagged(name, "install"))[1]
    place = f"https://colab.research.google.com/github/{repository}/blob/main/notebooks/{name}.ipynb"
    assert badge == f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({place})"
    assert title.startswith("# ")


@every
def test_metadata_are_what_colab_reads(name):
    metadata = notebook(name)["metadata"]
    assert metadata["accelerator"] == "GPU"
    assert metadata["colab"]["name"] == f"{name}.ipynb"
    assert metadata["kernelspec"]["name"] == "python3"


@every
def test_the_install_cell_is_that_of_all_and_does_nothing_twice(name, monkeypatch):
    install = tagged(name, "install")
    assert install == tagged(NAMES[0], "install")
    assert cells(name)[1][1] == install
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("it runs a program although all is installed"))
    exec(install, {})


def test_the_install_cell_installs_for_the_processor(tmp_path, monkeypatch):
    """A clone, once, and the extra of the processor."""
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: calls.append(command))
    monkeypatch.setattr("os.path.exists", lambda path: path == "/dev/accel0")
    exec(tagged(NAMES[0], "install"), {})
    assert calls[0][:2] == ["git", "clone"]
    assert calls[1][1:] == ["-m", "pip", "install", "--quiet", "./cddistill-source[eval,tpu]"]
    monkeypatch.setattr("os.path.exists", lambda path: path == "cddistill-source")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name == "nvidia-smi" else None)
    exec(tagged(NAMES[0], "install"), {})
    monkeypatch.setattr("shutil.which", lambda name: None)
    exec(tagged(NAMES[0], "install"), {})
    assert [call[-1] for call in calls[2:]] == ["./cddistill-source[eval,gpu]", "./cddistill-source[eval]"]


@every
def test_settings_are_a_form_before_the_device_is_named(name):
    form, kinds = tagged(name, "parameters"), [cell["metadata"].get("tags") for cell in notebook(name)["cells"][1:4]]
    assert kinds == [["install"], ["parameters"], ["device"]]
    assert form.startswith("# @title ")
    lines = [line for line in form.splitlines() if not line.startswith("#")]
    assert lines
    assert all("  # @param" in line for line in lines)
    for source in (form, tagged(name, "install"), tagged(name, "device")):
        (cell,) = (x for x in notebook(name)["cells"] if "".join(x["source"]) == source)
        assert cell["metadata"]["cellView"] == "form"
    for field, value in parameters(name).items():
        line = next(line for line in lines if line.startswith(f"{field} = "))
        if choices := re.search(r"# @param (\[.*\])", line):
            assert value in json.loads(choices[1])
        else:
            kind = re.search(r'type:"(\w+)"', line)[1]
            types = {"integer": int, "string": str, "boolean": bool, "number": float, "slider": int}
            assert type(value) is types[kind], line


@every
def test_saved_outputs_are_small_whole_and_of_the_run_that_is_named(name):
    """Of all cells, in order: python notebooks/build.py --execute."""
    path, saved = FOLDER / f"{name}.ipynb", constant("SAVED")[name]
    assert path.stat().st_size < MOST
    assert {*saved, *constant("SHORT")[name]} <= {*parameters(name)}
    intro = " ".join(cells(name)[0][1].split())
    assert "Outputs that are saved here are of a run on a CPU with" in intro
    for field, value in saved.items():
        assert f"`{field} = {json.dumps(value)}`" in intro
    code = [cell for cell in notebook(name)["cells"] if cell["cell_type"] == "code"]
    outputs = [out for cell in code for out in cell["outputs"]]
    assert all(out["output_type"] != "error" and out.get("name") != "stderr" for out in outputs)
    counts = [cell["execution_count"] for cell in code]
    assert None not in counts, "a cell was not run, or has changed since"
    assert counts == sorted(counts)
    assert any("image/png" in out.get("data", ()) for out in outputs)
    shown = "".join("".join(out.get("data", {}).get("text/plain", ())) for out in outputs)
    assert " at 0x" not in shown, "a cell ends with an object that says nothing"
    said = "".join("".join(out.get("text", ())) for out in outputs)
    assert "\x1b" not in said  # drawings of progress bars
    assert len(said) < 20_000
    assert not re.search(r"/(home|root|tmp|work|usr)/", said), "a path of the machine that ran it"
    assert WANTED.get(name, "") in said


def parameters_of_a_test(name, folder, changes):
    """Those of the saved outputs but for SHORT; your_teacher distils a tiny random pipeline."""
    values = constant("SAVED")[name] | constant("SHORT")[name] | changes
    if name == "your_teacher":
        from test_export import text_teacher  # not above: it imports the package

        values |= {"TEACHER": str(text_teacher(folder / "teacher")), "SIZE": 16, "RANK": 4}
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in NAMES), ("your_teacher", {"METHOD": "PE-CoDi"})],
    ids=[*NAMES, "PE-CoDi of your_teacher"],
)
def test_a_notebook_runs(name, changes, tmp_path, monkeypatch):
    """In a short size, on one device. Minutes each."""
    pytest.importorskip("jupytext")
    pytest.importorskip("nbclient")
    flags = os.environ["XLA_FLAGS"].split()  # conftest's, which the notebook's process inherits
    monkeypatch.setenv("XLA_FLAGS", " ".join(flag for flag in flags if "device_count" not in flag))
    build = runpy.run_path(str(FOLDER / "build.py"))
    assert [(cell.cell_type, cell.source) for cell in build["source"](name).cells] == cells(name)
    done = build["execute"](name, parameters_of_a_test(name, tmp_path, changes), tmp_path)
    said = "".join(out.get("text", "") for cell in done.cells for out in cell.get("outputs", ()))
    assert WANTED.get(name, "") in said
    assert " failed" not in said
