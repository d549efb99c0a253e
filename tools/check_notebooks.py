"""Do notebooks and modules agree? Works on a copy, so a dirty tree is judged as it stands and never changed.

Each notebook must name the kernel python3 (else JupyterLab asks and papermill stops), `nbdev_clean` must leave every notebook byte for byte as it is, and `nbdev_export` into an empty
package must give exactly the modules that are there (so a renamed notebook's old module shows too). With `--fix` it makes all that true.
A notebook that is cut short, or a cell that is no Python, is named before anything is written: the old modules stay as they are."""
import ast
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parents[1]
SKIP = shutil.ignore_patterns(".*", "__pycache__", "*.pyc")


KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}


def notebooks(root):
    "Every notebook of a repository"
    return sorted(p for p in (root / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def cell_fault(source):
    "What is wrong with a cell as Python, IPython's own words like %time allowed; empty for a sound one"
    try: ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError as e: return f"line {e.lineno}: {e.msg}: {(e.text or '').strip()[:80]}".removesuffix(": ")
    except ValueError as e: return str(e) # a NUL in the text
    return ""


def faults(root):
    "Sentences, one for each notebook that cannot be read and each cell that is no Python"
    for path in notebooks(root):
        where = path.relative_to(root)
        try: cells = json.loads(path.read_text(encoding="utf8"))["cells"]
        except (ValueError, KeyError, TypeError) as e:
            yield f"{where} is cut short or no notebook ({e}): take it from git again"
            continue
        for i, cell in enumerate(cells):
            if cell["cell_type"] != "code": continue
            wrong = cell_fault("".join(cell["source"]))
            if wrong: yield f"{where}, cell {i} ({cell.get('id', 'no id')}), {wrong}"


def name_kernel(root):
    "Has every notebook name its kernel, and drops other metadata"
    for path in notebooks(root):
        nb = json.loads(path.read_text(encoding="utf8"))
        if nb["metadata"] != KERNEL:
            nb["metadata"] = KERNEL
            text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
            path.write_text(text, encoding="utf8")


def files(root, folder):
    "Contents of every file of a folder, by path relative to the root"
    hidden = lambda p: any(part.startswith(".") or part == "__pycache__" for part in p.parts)
    paths = (p.relative_to(root) for p in sorted((root / folder).rglob("*")) if p.is_file())
    return {str(p): (root / p).read_bytes() for p in paths if not hidden(p)}


def nbdev(command, cwd):
    "One nbdev command in the copy; its words only when it fails"
    program = Path(sys.executable).with_name(command)
    env = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(program)], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command} failed:\n{done.stdout}{done.stderr}")


def differences(before, after):
    "Sentences, one for each file that is not the same"
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            yield f"{name}: no notebook exports it; remove it"
        elif name not in before:
            yield f"{name}: exported by a notebook but not there; run make export"
        elif before[name] != after[name]:
            yield f"{name}: differs; run make export"


def fix(root):
    "Makes the notebooks clean and the package their export"
    name_kernel(root)
    nbdev("nbdev_clean", root)
    nbdev("nbdev_export", root)


def check(root):
    "All disagreements of a repository, as sentences"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "repo"
        copy.mkdir()
        for folder in ("nbs", "pgolf"):
            shutil.copytree(root / folder, copy / folder, ignore=SKIP)
        for name in ("settings.ini", "setup.py", "pyproject.toml"):
            shutil.copy(root / name, copy / name)
        for module in (copy / "pgolf").rglob("*.py"):
            if module.parent != copy / "pgolf" or module.name != "__init__.py":
                module.unlink()
        fix(copy)
        return [line for folder in ("nbs", "pgolf")
                for line in differences(files(root, folder), files(copy, folder))]


if __name__ == "__main__":
    args = [a for a in sys.argv[1:] if a != "--fix"]
    root = Path(args[0]).resolve() if args else ROOT
    if broken := list(faults(root)):
        sys.exit("\n".join([*broken, "nothing was written: mend that first"]))
    if "--fix" in sys.argv[1:]:
        fix(root)
    wrong = check(root)
    print("\n".join(wrong) or "notebooks are clean and the package is their export")
    sys.exit(bool(wrong))
