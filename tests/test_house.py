"The rules of the house, read from the source: imports, names, notebooks, pins"
import ast
import configparser
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from pgolf import recipes
from pgolf.ground.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
LAST_PAYLOAD = 6  # wings up to here go into a submission
ALLOWED = {"torch", "numpy", "sentencepiece", "zstandard", "brotli", "constriction", "tqdm", "pgolf"}
MAY_NAME = {"recipes"}  # recipes are where techniques are chosen by name
OTHER_WORDS = ALLOWED | sys.stdlib_module_names | {"fp16", "fp32"}  # libraries and number formats, which coders are named after
CLIMBS = {("train", "pack")}  # quantisation-aware training rounds with the packer's own functions
OPTIONAL = {"flash_attn", "flash_attn_interface", "triton", "pyarrow"}
COMPONENTS = sorted(p for p in ROOT.glob("nbs/[0-9]_*/*.ipynb") if p.stem != "index")
RUNS = sorted(ROOT.glob("nbs/runs/*.ipynb"))
MODULES = sorted(p for p in (ROOT / "pgolf").glob("*/*.py") if not p.name.startswith("_"))


def dotted(path):
    "wing.room of a module's file"
    return f"{path.parent.name}.{path.stem}"


def cells(path):
    "Cells of a notebook, sources joined"
    nb = json.loads(path.read_text(encoding="utf8"))
    return [{**c, "source": "".join(c["source"])} for c in nb["cells"]]


def numbers():
    "Module (wing.room) -> number of the wing whose notebook exports it"
    found = {}
    for path in COMPONENTS:
        for cell in cells(path):
            if m := re.match(r"#\|\s*default_exp\s+([\w.]+)", cell["source"]):
                found[m[1]] = int(path.parent.name[0])
    return found


def absolute(node, path):
    "The module a statement imports from, relative ones resolved from the file"
    if not node.level:
        return node.module
    wing = f"{path.parent.name}." if node.level == 1 else ""
    return f"pgolf.{wing}{node.module or ''}".rstrip(".")


def imports(tree, path):
    "(imported module, enclosing function or '', node) of every import statement"
    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            deeper = f"{inside}.{child.name}" if isinstance(child, ast.FunctionDef) else inside
            if isinstance(child, ast.Import):
                yield from ((a.name, inside, child) for a in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.module:
                    yield absolute(child, path), inside, child
                else:
                    yield from ((f"{absolute(child, path)}.{a.name}", inside, child) for a in child.names)
            yield from walk(child, deeper)
    return list(walk(tree, ""))


def parse(path):
    return ast.parse(path.read_text(encoding="utf8"))


NUMBERS = numbers()
PAYLOAD = [p for p in MODULES if NUMBERS.get(dotted(p), 99) <= LAST_PAYLOAD]


def forbidden(path):
    "Sentences about imports that a payload module must not have"
    for name, inside, _ in imports(parse(path), path):
        top = name.split(".")[0]
        if top == "pgolf" and "." in name and NUMBERS.get(name.partition(".")[2], 0) > LAST_PAYLOAD:
            yield f"{path.name} imports the bench module {name}"
        elif top in sys.stdlib_module_names or top in ALLOWED or (top in OPTIONAL and inside):
            continue
        elif top == "huggingface_hub" and inside and path.stem == "remote":
            continue   # only who downloads needs it
        else:
            yield f"{path.name} imports {name}" + (f" in {inside[1:]}" if inside else "")


@pytest.mark.parametrize("path", PAYLOAD, ids=dotted)
def test_payload_imports_only_what_a_submission_may_carry(path):
    assert list(forbidden(path)) == []


def test_the_import_rule_can_fail(tmp_path):
    bad = tmp_path / "remote.py"
    bad.write_text("import torch, os\nimport matplotlib.pyplot as plt\nfrom huggingface_hub import x\n"
                   "from pgolf.ground.bits import y\ndef download_all():\n    import huggingface_hub\n"
                   "def f():\n    import flash_attn, fastcore\n")
    assert list(forbidden(bad)) == ["remote.py imports matplotlib.pyplot", "remote.py imports huggingface_hub",
                                    "remote.py imports fastcore in f"]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_every_module_comes_from_a_numbered_notebook(path):
    assert dotted(path) in NUMBERS


def between(path):
    "(imported module, enclosing function or '', node) of every import of another room"
    for name, inside, node in imports(parse(path), path):
        room = name.partition(".")[2]
        room = room if room in NUMBERS else room.rpartition(".")[0]
        if name.startswith("pgolf.") and room in NUMBERS:
            yield room, inside, node


def test_imports_between_rooms_have_no_circle_and_no_star():
    graph, stars = defaultdict(set), []
    for path in MODULES:
        for room, _, node in between(path):
            graph[dotted(path)].add(room)
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                stars.append(f"{path.name}: from {room} import *")
    assert stars == []
    TopologicalSorter(graph).prepare()


def upward(path):
    "Imports at the top of a module that climb to a wing with a higher number"
    own, wing = NUMBERS[dotted(path)], path.parent.name
    return [f"{dotted(path)} imports {room}" for room, inside, _ in between(path)
            if not inside and NUMBERS[room] > own and (wing, room.partition(".")[0]) not in CLIMBS]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_a_wing_imports_only_from_wings_below_it(path):
    assert upward(path) == []


def techniques():
    "Kind of every technique, quantiser, predictor ... -> the room it lives in; bases without a home have none"
    for name in NUMBERS:
        importlib.import_module(f"pgolf.{name}")
    todo, found = [Settings], {}
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        if cls.home and cls.kind and cls.kind not in OTHER_WORDS and cls.__module__.startswith("pgolf."):
            found.setdefault(cls.kind, set()).add(cls.__module__.partition(".")[2])
    return found


def texts(tree):
    "(line, text) of every string constant that is not a docstring"
    docs = {id(n.body[0].value) for n in ast.walk(tree)
            if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and n.body and isinstance(n.body[0], ast.Expr)}
    return [(n.lineno, n.value) for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs]


def naming(path, found):
    "Sentences about techniques that a module outside their room names as text"
    return [f"{dotted(path)} line {line} names {text!r}, which lives in {', '.join(sorted(found[text]))}"
            for line, text in texts(parse(path)) if text in found and dotted(path) not in found[text]]


def test_no_technique_is_named_outside_its_room_and_the_recipes():
    found = techniques()
    wrong = [line for path in MODULES if path.parent.name not in MAY_NAME for line in naming(path, found)]
    assert wrong == []


def test_the_rule_about_names_can_fail(tmp_path):
    (tmp_path / "sweep.py").write_text('"xsa"\ndef f(part):\n    "xsa"\n    return part == "xsa" or part == "xsa_last"\n')
    said = naming(tmp_path / "sweep.py", {"xsa": {"model.xsa"}})
    assert [line.partition(" line ")[2] for line in said] == ["4 names 'xsa', which lives in model.xsa"]


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_nothing_is_unpickled(path):
    wrong = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only" and getattr(k.value, "value", 0) is True]
            wrong += [] if safe else [f"line {node.lineno}: torch.load without weights_only=True"]
    if dotted(path) != CARRIED: wrong += [f"imports {n}" for n, _, _ in imports(parse(path), path) if n in {"pickle", "dill", "cloudpickle"}]
    assert wrong == []


CARRIED = "referee.carried" # a predictor that its owner holds in memory travels with its code


def test_what_was_carried_is_made_again_behind_the_shut_door_only():
    users = [dotted(path) for path in MODULES if any(isinstance(node, ast.Name) and node.id == "arrive" for node in ast.walk(parse(path)))]
    assert users == ["referee.caged"]
    steps = [line.strip() for line in next(p for p in MODULES if dotted(p) == "referee.caged").read_text(encoding="utf8").splitlines()]
    assert 0 < next(i for i, line in enumerate(steps) if line.startswith("shut_cage(")) < next(i for i, line in enumerate(steps) if "= _decode_job(job)" in line)


@pytest.mark.parametrize("path", COMPONENTS + RUNS, ids=dotted)
def test_notebook_opens_with_title_and_promise(path):
    first, second = ([line for line in cells(path)[0]["source"].splitlines() if line.strip()] + [""])[:2]
    assert cells(path)[0]["cell_type"] == "markdown"
    assert first.startswith("# ") and second.startswith("> ")
    assert path.stat().st_size < 700_000, "keep pictures at dpi 72-100 and tables short"


def is_rule_page(path):
    "Does a notebook export a rule of the referee?"
    return any(re.match(r"#\|\s*export", c["source"]) and "@rule(" in c["source"] for c in cells(path))


def missing_parts(page):
    "What the page of a rule lacks: its cells go in, names of parts come out"
    texts = [c["source"] for c in page if c["cell_type"] == "markdown"]
    code = [c["source"] for c in page if c["cell_type"] == "code" and not c["source"].startswith("#| export")]
    headings = [line for text in texts for line in text.splitlines() if line.startswith("#")]
    there = {
        "a formula": any("$" in text for text in texts),
        "a heading '## Slowly'": any(line.startswith("## Slowly") for line in headings),
        "a figure": any(re.search(r"\bPicture\(|\bplt\.(subplots|show)\(", source) for source in code),
        "a heading '## The rule' or '## The rules'": any(line.startswith("## The rule") for line in headings),
        "a heading with 'cheat'": any("cheat" in line for line in headings),
        "a heading '## An honest oddity'": any(line.startswith("## An honest oddity") for line in headings)}
    return [part for part, found in there.items() if not found]


RULE_PAGES = [p for p in COMPONENTS if p.parent.name == "9_referee" and is_rule_page(p)]


@pytest.mark.parametrize("path", RULE_PAGES, ids=dotted)
def test_the_page_of_a_rule_is_complete(path):
    missing = missing_parts(cells(path))
    assert not missing, f"{path.relative_to(ROOT)} lacks {', '.join(missing)}"


def test_every_rule_of_the_report_has_a_page_and_an_empty_page_lacks_each_part():
    from pgolf.referee.rules import RULES
    exported = "\n".join(c["source"] for p in RULE_PAGES for c in cells(p))
    assert [name for name in RULES if f'@rule("{name}"' not in exported] == []
    headed = {"cell_type": "markdown", "source": "## Slowly\n## The rule\n## Its cheat\n## An honest oddity\n$x$"}
    assert len(missing_parts([])) == 6 and missing_parts([headed]) == ["a figure"]


@pytest.mark.parametrize("path", RUNS, ids=dotted)
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


PATIENT = [p for p in sorted(ROOT.glob("nbs/[0-9]_*/*.ipynb")) if '"#| slow' in p.read_text(encoding="utf8")]


@pytest.mark.slow
@pytest.mark.parametrize("page", PATIENT, ids=lambda p: p.stem)
def test_cells_too_slow_for_every_day_run_too(page):
    words = ["nbdev_test", "--path", page, "--flags", "slow", "--n_workers", "0"]
    done = subprocess.run([Path(sys.executable).with_name(words[0]), *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Success" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_notebook_check_sees_a_stale_module_an_edited_one_and_an_unclean_notebook(tmp_path):
    for folder in ("nbs", "pgolf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_*"))
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pgolf" / "stale.py").write_text("x = 1\n")
    (tmp_path / "pgolf" / "ground" / "bits.py").open("a").write("# an edit\n")
    notebook = tmp_path / "nbs" / "0_ground/bits.ipynb"
    notebook.write_text(notebook.read_text().replace('"execution_count": null', '"execution_count": 3', 1))
    done = subprocess.run([sys.executable, ROOT / "tools" / "check_notebooks.py", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "nbs/0_ground/bits.ipynb: differs; run make export",
        "pgolf/ground/bits.py: differs; run make export",
        "pgolf/stale.py: no notebook exports it; remove it"]


@pytest.mark.parametrize("hurt, says", [
    (lambda text: text.replace("def bits_per_byte(", "def bits_per_byte((", 1), "nbs/0_ground/bits.ipynb, cell 5 ("),
    (lambda text: text[:len(text) // 2], "nbs/0_ground/bits.ipynb is cut short"),
    (lambda text: "[]", "nbs/0_ground/bits.ipynb is cut short")])
def test_a_notebook_that_is_no_python_is_named_and_the_old_modules_stay(tmp_path, hurt, says):
    for folder in ("nbs/0_ground", "pgolf/ground"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_*"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    notebook = tmp_path / "nbs" / "0_ground" / "bits.ipynb"
    notebook.write_text(hurt(notebook.read_text()))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    done = subprocess.run([sys.executable, ROOT / "tools" / "check_notebooks.py", tmp_path, "--fix"], capture_output=True, text=True)
    first, last = done.stderr.splitlines()
    assert done.returncode == 1 and first.startswith(says) and last == "nothing was written: mend that first", done.stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def a_notebook(path, source, *outputs):
    "A notebook of one code cell that keeps these outputs"
    cell = {"cell_type": "code", "execution_count": None, "id": "a1", "metadata": {}, "outputs": [*outputs], "source": source}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.mark.parametrize("source, kept, said", [
    ("print(2 + 2)", "4\n", ""),
    ("print(2 + 2)", "5\n", "cell 0 prints '4', keeps '5'"),
    ("print(0.12345, 1.7281)", "0.12346 1.7281\n", ""),
    ("print('best', 1.7281)", "best 1.7198\n", "keeps 'best 1.7198'"),
    ("assert 2 + 2 == 5", "5\n", "AssertionError"),
    ("import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()", "5\n", "keeps '5'")])
def test_the_check_of_kept_outputs_sees_a_page_that_contradicts_itself(tmp_path, source, kept, said):
    a_notebook(tmp_path / "page.ipynb", source, {"name": "stdout", "output_type": "stream", "text": [kept]})
    command = [sys.executable, ROOT / "tools" / "check_outputs.py", tmp_path / "page.ipynb"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == bool(said) and said in done.stdout


def test_the_check_of_kept_outputs_mends_a_page_and_sees_another_picture(tmp_path):
    page = tmp_path / "page.ipynb"
    command = [sys.executable, ROOT / "tools" / "check_outputs.py", page]
    draw = "import matplotlib.pyplot as plt; plt.plot({}); plt.show()"
    a_notebook(page, draw.format([1, 2]), {"name": "stdout", "output_type": "stream", "text": ["old"]})
    assert subprocess.run([*command, "--fix"]).returncode == 0 and subprocess.run(command).returncode == 0
    page.write_text(page.read_text().replace("[1, 2]", "[2, 1]"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "draws another picture" in done.stdout


def test_links_in_the_texts_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\((?![a-z]+:|#)([^)]+)\)", (ROOT / name).read_text(encoding="utf8"))
        assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == [], name


def parameters_of(recipe):
    "Counted, on no device"
    with torch.device("meta"):
        return sum(p.numel() for p in recipes.build(recipe).parameters())


def test_the_recipe_table_of_the_readme_says_what_the_recipes_say():
    rows = re.findall(r"^\| `(pr\d+)` \| ([\d,]+) \| ([\d,]+) \|.*\| ([\d.]+)(?: \\?[*†])? \| (.+) \|$",
                      (ROOT / "README.md").read_text(encoding="utf8"), re.MULTILINE)
    number = lambda text: None if text == "not known here" else float(text.strip("~").replace(",", "").replace(" M", "e6"))
    said = {name: [number(t) for t in rest] for name, *rest in rows}
    facts = {n: [r.model.vocab, r.reported.get("parameters", parameters_of(r)), r.reported["final"], r.reported.get("artifact_bytes")]
             for n, r in ((n, recipes.get(n)) for n in recipes.names()) if r.reported}
    assert said.keys() == facts.keys() and len(said) == 8
    assert said == {n: [f and pytest.approx(f, rel=1e-9) for f in fs] for n, fs in facts.items()}
