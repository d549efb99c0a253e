"The rules of the house, read from the source: imports, names, notebooks, pins"
import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pgolf import recipes

ROOT = Path(__file__).resolve().parents[1]
LAST_PAYLOAD = 13
ALLOWED = {"torch", "numpy", "sentencepiece", "zstandard", "brotli", "constriction", "tqdm", "pgolf"}
OPTIONAL = {"flash_attn", "flash_attn_interface", "triton"}
COMPONENTS = sorted(ROOT.glob("nbs/[0-9][0-9]_*.ipynb"))
RUNS = sorted(ROOT.glob("nbs/runs/*.ipynb"))
MODULES = sorted(p for p in (ROOT / "pgolf").glob("*.py") if not p.name.startswith("_"))


def cells(path):
    "Cells of a notebook, sources joined"
    nb = json.loads(path.read_text(encoding="utf8"))
    return [{**c, "source": "".join(c["source"])} for c in nb["cells"]]


def numbers():
    "Module -> number of the notebook that exports it"
    found = {}
    for path in COMPONENTS:
        for cell in cells(path):
            if m := re.match(r"#\|\s*default_exp\s+(\w+)", cell["source"]):
                found[m[1]] = int(path.name[:2])
    return found


def imports(tree):
    "(imported module, enclosing function or '', node) of every import statement"
    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            deeper = f"{inside}.{child.name}" if isinstance(child, ast.FunctionDef) else inside
            if isinstance(child, ast.Import):
                yield from ((a.name, inside, child) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                package = "pgolf." if child.level else ""
                if child.module:
                    yield package + child.module, inside, child
                else:
                    yield from ((package + a.name, inside, child) for a in child.names)
            yield from walk(child, deeper)
    return list(walk(tree, ""))


def parse(path):
    return ast.parse(path.read_text(encoding="utf8"))


NUMBERS = numbers()
PAYLOAD = [p for p in MODULES if NUMBERS.get(p.stem, 99) <= LAST_PAYLOAD]


def forbidden(path):
    "Sentences about imports that a payload module must not have"
    for name, inside, _ in imports(parse(path)):
        top = name.split(".")[0]
        if top == "pgolf" and "." in name and NUMBERS.get(name.split(".")[1], 0) > LAST_PAYLOAD:
            yield f"{path.name} imports the bench module {name}"
        elif top in sys.stdlib_module_names or top in ALLOWED or (top in OPTIONAL and inside):
            continue
        elif top == "huggingface_hub" and inside and path.stem == "data":
            continue   # only who downloads needs it
        else:
            yield f"{path.name} imports {name}" + (f" in {inside[1:]}" if inside else "")


@pytest.mark.parametrize("path", PAYLOAD, ids=lambda p: p.stem)
def test_payload_imports_only_what_a_submission_may_carry(path):
    assert list(forbidden(path)) == []


def test_the_import_rule_can_fail(tmp_path):
    bad = tmp_path / "data.py"
    bad.write_text("import torch, os\nimport matplotlib.pyplot as plt\nfrom huggingface_hub import x\n"
                   "from pgolf.bits import y\ndef download_all():\n    import huggingface_hub\n"
                   "def f():\n    import flash_attn, fastcore\n")
    assert list(forbidden(bad)) == ["data.py imports matplotlib.pyplot", "data.py imports huggingface_hub",
                                    "data.py imports fastcore in f"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_module_comes_from_a_numbered_notebook(path):
    assert path.stem in NUMBERS


def top_level_names(tree):
    "Names a module binds at its top level, imports left out"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def test_top_level_names_are_unique_in_the_package():
    owners = defaultdict(set)
    for path in MODULES:
        for name in top_level_names(parse(path)):
            owners[name].add(path.stem)
    owners.pop("__all__", None)
    assert {n: sorted(o) for n, o in owners.items() if len(o) > 1} == {}


def test_imports_between_modules_have_no_cycle_no_star_no_alias():
    graph, wrong = defaultdict(set), []
    for path in MODULES:
        for name, _, node in imports(parse(path)):
            star = isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
            if star:
                wrong.append(f"{path.name}: from {name} import *")
            if name.startswith("pgolf."):
                graph[path.stem].add(name.split(".")[1])
                wrong += [f"{path.name}: {name} {a.name} as {a.asname}" for a in node.names if a.asname]
    assert wrong == []
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_nothing_is_unpickled(path):
    wrong = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only" and getattr(k.value, "value", 0) is True]
            wrong += [] if safe else [f"line {node.lineno}: torch.load without weights_only=True"]
    wrong += [f"imports {n}" for n, _, _ in imports(parse(path)) if n in {"pickle", "dill", "cloudpickle"}]
    assert wrong == []


@pytest.mark.parametrize("path", COMPONENTS + RUNS, ids=lambda p: p.stem)
def test_notebook_opens_with_title_and_promise(path):
    first, second = ([line for line in cells(path)[0]["source"].splitlines() if line.strip()] + [""])[:2]
    assert cells(path)[0]["cell_type"] == "markdown"
    assert first.startswith("# ") and second.startswith("> ")
    assert path.stat().st_size < 700_000, "keep pictures at dpi 72-100 and tables short"


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_run_notebook_is_clean_and_has_parameters(path):
    assert [c for c in cells(path) if c.get("outputs")] == []
    tagged = [c for c in cells(path) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    for node in ast.parse(tagged[0]["source"]).body:
        assert isinstance(node, ast.AnnAssign), "one literal per line, with its type"
        ast.literal_eval(node.value)


def test_every_requirement_is_pinned():
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf8")
    cfg = parser["DEFAULT"]
    keys = [k for k in cfg if k.endswith("requirements") and k != "flash_requirements"]
    wanted = {re.split(r"[<>=!~\[]", r)[0] for k in keys for r in cfg[k].split()}
    normal = lambda name: name.lower().replace("_", "-")
    pinned = {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().split()}
    assert sorted(n for n in wanted if normal(n) not in pinned) == []


def test_the_notebook_check_sees_a_stale_module_an_edited_one_and_an_unclean_notebook(tmp_path):
    for folder in ("nbs", "pgolf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_*"))
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pgolf" / "stale.py").write_text("x = 1\n")
    (tmp_path / "pgolf" / "bits.py").open("a").write("# an edit\n")
    notebook = tmp_path / "nbs" / "00_bits.ipynb"
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 3', 1))
    done = subprocess.run([sys.executable, ROOT / "tools" / "check_notebooks.py", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "nbs/00_bits.ipynb: differs; run make export",
        "pgolf/bits.py: differs; run make export",
        "pgolf/stale.py: no notebook exports it; remove it"]


def test_links_in_the_texts_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\((?![a-z]+:|#)([^)]+)\)", (ROOT / name).read_text(encoding="utf8"))
        assert [link for link in links if not (ROOT / link).exists()] == [], name


def test_the_recipe_table_of_the_readme_says_what_the_recipes_say():
    rows = re.findall(r"^\| `(pr\d+)` \| ([\d,]+) \| ([\d,]+) \|.*\| ([\d.]+)(?: \\\*)? \| (.+) \|$",
                      (ROOT / "README.md").read_text(encoding="utf8"), re.MULTILINE)
    number = lambda text: float(text.strip("~").replace(",", "").replace(" M", "e6"))
    said = {name: [number(t) for t in rest] for name, *rest in rows}
    facts = {n: [r.model.vocab, r.reported["parameters"], r.reported["final"], r.reported["artifact_bytes"]]
             for n, r in ((n, recipes.get(n)) for n in recipes.names()) if r.reported}
    assert said == {n: pytest.approx(f, rel=1e-9) for n, f in facts.items()}
