"""README.md from nbs/index.ipynb: `python tools/readme.py` writes it, `--check` says whether it is up to date.

Cells that start with `#| hide` stay out, the others go through nbconvert; links
are turned to start from the root of the repository."""
import re
import sys
from os.path import normpath
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"


def hidden(cell):
    "Is the cell for checks only?"
    return cell.cell_type == "code" and re.match(r"\s*#\|\s*hide\b", cell.source)


def readme(index):
    "The text of README.md for this notebook"
    nb = nbformat.read(index, as_version=4)
    nb.cells = [c for c in nb.cells if not hidden(c)]
    nb.metadata["language_info"] = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\((?![a-z]+:|#)([^)]+)\)", lambda m: f"]({normpath('nbs/' + m[1])})", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text + "\n<!-- made from nbs/index.ipynb by `make readme`: edit there -->\n"


if __name__ == "__main__":
    text = readme(INDEX)
    if "--check" not in sys.argv[1:]:
        README.write_text(text, encoding="utf8")
    elif not README.exists() or README.read_text(encoding="utf8") != text:
        sys.exit("README.md is not what nbs/index.ipynb says: run make readme")
    print("README.md is up to date")
