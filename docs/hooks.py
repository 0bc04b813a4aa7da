"""For MkDocs: pages of the site that lie in the repository's root, and the one that is written from the source."""

import pathlib
import runpy

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config) -> Files:
    """Add PAGES and the refusals to those of docs/."""
    pages = {page: (ROOT / source).read_text("utf-8") for page, source in PAGES.items()}
    pages["refusals.md"] = runpy.run_path(str(ROOT / "docs" / "refusals.py"))["page"]()
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files
