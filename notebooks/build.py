"""Write the notebooks from their sources, NAME.py in jupytext's percent format, and run them to save their outputs.

python notebooks/build.py                              every .ipynb; outputs are kept where a cell has not changed
python notebooks/build.py --execute quickstart tasks   runs these with SAVED and saves their outputs; minutes each
python notebooks/build.py --repository=you/cddistill   the GitHub repository that the badges and the install cell name
"""

import argparse
import pathlib
import re
import tempfile

import jupytext
import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent
SAVED = {  # the parameters of the saved outputs, which each notebook names
    "quickstart": {"STEPS": 3000, "EVAL_IMAGES": 32},
    "tasks": {"TASK": "inpaint", "STEPS": 1500},
    "dmd2_health": {"SICKNESS": "GAN weight x 100", "STEPS": 150, "LOG_EVERY": 5},
    "diffusion2gan": {"NUM_PAIRS": 128, "TEACHER_STEPS": 20, "METRIC_STEPS": 600, "STEPS": 200},
    "your_teacher": {"TEACHER": "pocket", "SIZE": 64, "NUM_IMAGES": 24, "STEPS": 6, "BATCH": 4},
    "compare_students": {"STEPS": "1, 2, 4, 8", "NUM_IMAGES": 32},
    "add_a_method": {"STEPS": 60},
}
SHORT = {  # what tests/test_notebooks.py changes of them, so that a test takes a minute or two
    "quickstart": {"STEPS": 12, "EVAL_IMAGES": 4},
    "tasks": {"STEPS": 4},
    "dmd2_health": {"STEPS": 30},
    "diffusion2gan": {"NUM_PAIRS": 16, "TEACHER_STEPS": 2, "METRIC_STEPS": 12, "STEPS": 8},
    "your_teacher": {},
    "compare_students": {"STEPS": "1, 2", "NUM_IMAGES": 8},
    "add_a_method": {"STEPS": 8},
}


def source(name: str) -> nbformat.NotebookNode:
    """A notebook without outputs; cells are named by their number, so that the same source gives the same file."""
    found = jupytext.read(HERE / f"{name}.py", fmt="py:percent")
    for i, cell in enumerate(found.cells):
        cell.id = f"cell-{i}"
    found.metadata.language_info = {"name": "python"}
    return found


def with_parameters(notebook: nbformat.NotebookNode, values: dict) -> nbformat.NotebookNode:
    """The notebook with a cell that sets these values after the cell tagged "parameters"."""
    (at,) = (i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    lines = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    cell = nbformat.v4.new_code_cell(lines, id="injected", metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(at + 1, cell)
    return notebook


def execute(name: str, values: dict, folder, timeout: int = 3600) -> nbformat.NotebookNode:
    """The notebook with its outputs, run with these parameters in a folder. A cell that fails raises its error."""
    notebook = with_parameters(source(name), values)
    nbclient.NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(folder)}}).execute()
    notebook.cells = [cell for cell in notebook.cells if cell.id != "injected"]
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":  # what programs say to stderr has paths of this machine
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


def with_old_outputs(notebook: nbformat.NotebookNode, path: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of the file there, of cells with the same source."""
    old = {cell.source: cell for cell in nbformat.read(path, 4).cells} if path.exists() else {}
    for cell in notebook.cells:
        if cell.cell_type == "code" and cell.source in old:
            cell.outputs, cell.execution_count = old[cell.source].outputs, old[cell.source].execution_count
    return notebook


def main():
    """Build every notebook."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--execute", nargs="+", choices=SAVED, default=[], metavar="NAME")
    parser.add_argument("--folder", type=pathlib.Path, help="where --execute runs; complete runs there are loaded")
    parser.add_argument("--repository", metavar="OWNER/NAME")
    args = parser.parse_args()
    for name, values in SAVED.items():
        path = HERE / f"{name}.ipynb"
        if args.repository:
            text = (HERE / f"{name}.py").read_text()
            for before in (r"(colab\.research\.google\.com/github/)[^/]+/[^/]+", r'(github\.com/)[^/"]+/[^/"]+(?=")'):
                text = re.sub(before, rf"\g<1>{args.repository}", text)
            (HERE / f"{name}.py").write_text(text)
        if name in args.execute:
            with tempfile.TemporaryDirectory() as fresh:
                pathlib.Path(args.folder or fresh).mkdir(parents=True, exist_ok=True)
                notebook = execute(name, values, args.folder or fresh)
        else:
            notebook = with_old_outputs(source(name), path)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
