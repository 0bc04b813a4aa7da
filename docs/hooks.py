"""For MkDocs: pages of the site that lie in the repository's root."""

import pathlib

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_files(files: Files, config) -> Files:
    """Add PAGES to those of docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files
