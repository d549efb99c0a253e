"The script against the package it carries, the files of a submission, what is refused, the proof, the statistics"
import ast
import importlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats

from pgolf import recipes
from pgolf.ground.files import sha256_file
from pgolf.recipes import run as run_room
from pgolf.submit import folder
from pgolf.submit.alone import print_figures, script_parser
from pgolf.submit.carry import EXTRAS, LIBRARIES, CarryError, carry, import_nodes, imported, package_sources
from pgolf.submit.finished import SubmissionError, read_finished, recomputed
from pgolf.submit.folder import make_submission
from pgolf.submit.memory import serve
from pgolf.submit.prove import allowed_modules, from_weights, prove, run_alone
from pgolf.submit.ran import packages_of, pinned
from pgolf.submit.script import minified, recipe_load, train_gpt_script
from pgolf.submit.significance import compare_runs, compare_seeds, margin_bpb, seeds_needed
from pgolf.text.build import build_dataset, embedded_dataset
from pgolf.text.corpus import folder_documents
from pgolf.train.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]


# ---- what is carried, on packages made up

NUMBERS = itertools.count()


@contextmanager
def opened(sources, module):
    "A module of a package that is served from memory, and gone afterwards"
    package = next(iter(sources)).partition(".")[0]
    hook, carried = sys.excepthook, serve(sources, f"/nowhere/{package}.py")
    try:
        yield importlib.import_module(module)
    finally:
        sys.meta_path.remove(carried)
        sys.path_hooks.pop(0)
        sys.excepthook = hook
        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            del sys.modules[name]


@st.composite
def packages(draw):
    "Modules in wings whose functions call earlier ones: sources, the module of the last, its value at 3, what it reaches"
    name, count = f"made{next(NUMBERS)}", draw(st.integers(1, 6))
    sources, value, needs = {f"{name}.__init__": ""}, {}, {}
    for m in range(count):
        wing, used = f"w{draw(st.integers(0, 2))}", draw(st.sets(st.sampled_from(sorted(value)), max_size=3)) if value else set()
        add, lines, calls = draw(st.integers(-5, 5)), ["import math", "from dataclasses import dataclass as dc"], []
        sources.setdefault(f"{name}.{wing}.__init__", "'A wing'\n")
        for other in sorted(used):
            alias, inside = f"g{len(calls)}", draw(st.booleans())
            dots = f".{other.split('.')[1]}" if other.split(".")[0] == wing else f"..{other}"
            line = f"from {dots} import f as {alias}"
            calls.append((alias, line if inside else ""))
            lines += [] if inside else [line]
        body = [f"    {line}" for _, line in calls if line] + [f"    return {add} + K * x" + "".join(f" + {a}(x + 1)" for a, _ in calls)]
        lines += [f"K = {m} + 2", "def f(x):", "    'Doc'", *body]
        key = f"{wing}.m{m}"
        sources[f"{name}.{key}"] = "\n".join(lines) + "\n"
        value[key] = lambda x, m=m, add=add, used=used: add + (m + 2) * x + sum(value[u](x + 1) for u in used)
        needs[key] = used
    root, reached = f"{draw(st.sampled_from(sorted(value)))}", set()
    todo = [root]
    while todo:
        if (n := todo.pop()) not in reached:
            reached.add(n)
            todo += needs[n]
    return name, sources, root, value[root](3), reached


@settings(max_examples=80, deadline=None, derandomize=True)
@given(packages())
def test_what_is_carried_behaves_like_its_package_and_holds_only_what_is_reached(package):
    name, sources, root, expected, reached = package
    load = carry([f"{name}.{root}"], sources)
    assert {k for k in load.sources if not k.endswith("__init__")} == {f"{name}.{r}" for r in reached}
    for made in (load.sources, {k: minified(text) for k, text in load.sources.items()}):
        with opened(made, f"{name}.{root}") as module:
            assert module.f(3) == expected


def test_it_behaves_like_the_imported_package(tmp_path, monkeypatch):
    sources = {"__init__": "from .lazy import lazy_names\n__getattr__, __dir__, __all__ = lazy_names(__name__, 'c: go; b: LIMIT')\n",
               "lazy": (ROOT / "pgolf/ground/lazy.py").read_text(),
               "a": "from dataclasses import dataclass\nSEEN = {}\ndef note(f):\n    SEEN[f.__name__] = f\n    return f\n",
               "b": "from .a import SEEN, note\nimport os.path as p\nLIMIT = 1; STEP = 2\nLIMIT += 3\n@note\ndef square(x):\n    'Doc'\n"
                    "    return x*x\nSEEN['cube'] = lambda x: x**3\n",
               "c": "import os.path as p\nfrom . import b as bee\n"
                    "def go(x): return [f(x) for f in bee.SEEN.values()], bee.LIMIT, p.join('a', 'b')\n",
               "d": "from . import go\n", "_modidx": "d = {}\n"}
    (tmp_path / "made_up").mkdir()
    for name, text in sources.items():
        (tmp_path / "made_up" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    expected = importlib.import_module("made_up.d").go(3)
    read = package_sources(tmp_path / "made_up")
    load = carry(["made_up.d"], read)
    assert set(read) == {f"made_up.{n}" for n in sources if n != "_modidx"}
    assert set(load.sources) == set(read), "a lent name brings the room that lends it"
    for name in [n for n in sys.modules if n.partition(".")[0] == "made_up"]:
        del sys.modules[name]
    with opened(load.sources, "made_up.d") as module:
        assert module.go(3) == expected == ([9, 27], 4, "a/b") and module.__spec__.origin == "/nowhere/made_up.py/made_up/d.py"


@pytest.mark.parametrize("sources, part", [
    (dict(main="from .gone import f"), "the package has no bag.gone"),
    (dict(main="def go():\n    import bag.gone"), "the package has no bag.gone"),
    (dict(main="import made_up"), "main, line 1: `import made_up`"),
    (dict(main="def go():\n    try: import made_up\n    except ImportError: pass"), "do without made_up"),
    (dict(main="try: import made_up\nexcept ImportError: made_up = None"), "do without made_up"),
    (dict(main="from .a import f", a="import matplotlib.pyplot as plt\ndef f(): pass"), "bag.a, line 1"),
    (dict(main="import triton"), "inside functions"),
    (dict(main="class C:\n    import flash_attn"), "inside functions"),
    (dict(main="def go(): return open(__file__)"), "line 1: __file__ is not there"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_what_cannot_travel_is_refused_in_a_sentence(sources, part):
    with pytest.raises(CarryError) as e:
        carry(["bag.main"], {"bag.__init__": ""} | {f"bag.{k}": v for k, v in sources.items()})
    assert part in str(e.value) and "\n" not in str(e.value)


def test_known_extras_may_be_imported_where_they_are_used():
    text = "import numpy\n" + "".join(f"def f{i}():\n    import {name}\n" for i, name in enumerate(EXTRAS))
    load = carry(["bag.main"], {"bag.__init__": "", "bag.main": text})
    assert load.needs == ("numpy",)
    guarded = "from pathlib import Path\ndef go(): return Path(__file__) if '__file__' in globals() else None\n"
    load = carry(["bag.main"], {"bag.__init__": "", "bag.main": guarded})
    with opened(load.sources, "bag.main") as module:
        assert module.go() is None


INSIDE = """
import importlib, inspect, json, pgolf
from pgolf.ground.code import code_digest, payload_sources
from pgolf.model import GPT
from pgolf.recipes import Recipe
from pgolf.submit.alone import script_main
absent = []
for name in ("pgolf.lab.show", "pgolf.referee", "pgolf.submit.carry", "pgolf.quantize", "pgolf.no_such_thing"):
    try: importlib.import_module(name)
    except ModuleNotFoundError as e: absent.append(e.name)
print(json.dumps(dict(
    absent=absent, digest=code_digest(), carried=sorted(payload_sources()), here=GPT.__module__ + " " + Recipe.__module__,
    source=inspect.getsource(script_main).splitlines()[0],
    files=[m.__name__ for n, m in sorted(__import__("sys").modules.items()) if n.partition(".")[0] == "pgolf" and hasattr(m, "__file__")])))
"""


def test_in_a_script_the_package_is_what_it_carries_though_another_lies_on_the_path(tmp_path):
    recipe = recipes.get("pr1992")
    digests = set()
    for form in ({}, dict(minify=True, pack="lzma")):
        made = train_gpt_script(recipe, **form)
        (tmp_path / "train_gpt.py").write_text(f"from runpy import run_path\nscope = run_path({str(tmp_path / 'made.py')!r})\n"
                                               f"scope['serve'](scope['SOURCES'], __file__)\n{INSIDE}")
        (tmp_path / "made.py").write_text(made)
        done = subprocess.run([sys.executable, tmp_path / "train_gpt.py"], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert len(said["absent"]) == 5 and said["files"] == [] and said["here"] == f"pgolf.model.gpt {recipes.Recipe.__module__}"
        assert said["carried"] == sorted(recipe_load(recipe).sources) and said["source"].startswith("def script_main(")
        digests.add(said["digest"])
    assert len(digests) == 2 and all(len(d) == 16 for d in digests), "a script's run has a code hash: that of the script's own code"


def test_a_traceback_of_a_script_shows_its_lines(tmp_path):
    text = train_gpt_script(recipes.get("pr1536", scale="smoke"), "words", pack="lzma")
    (tmp_path / "made.py").write_text(text)
    (tmp_path / "x.py").write_text(f"from runpy import run_path\nscope = run_path({str(tmp_path / 'made.py')!r})\n"
                                   "scope['serve'](scope['SOURCES'], __file__)\nfrom pgolf.ground.bits import bits_per_byte\nbits_per_byte(None, None)\n")
    done = subprocess.run([sys.executable, "-I", tmp_path / "x.py"], capture_output=True, text=True)
    assert f'{tmp_path / "x.py"}/pgolf/ground/bits.py", line' in done.stderr and "in bits_per_byte\n    if nats.shape" in done.stderr


def test_minifying_keeps_fields_types_and_keywords():
    source = ("from dataclasses import asdict, dataclass, fields\n@dataclass(frozen=True)\nclass Config:\n    'Doc'\n    width:int=3 # units\n    name:str='a'\n\n"
              "def scaled(config:Config, factor:float=2.0, *, offset:int=0)->float:\n    'Doc'\n    value:float = config.width * factor\n    return value + offset\n"
              "kinds = [f.type.__name__ for f in fields(Config)]\nout = asdict(Config(width=5)), scaled(config=Config(), factor=3, offset=1), kinds\n")
    exec(source, plain := {})
    exec(minified(source), small := {})
    assert small["out"] == plain["out"] == ({"width": 5, "name": "a"}, 10, ["int", "str"]) and len(minified(source)) < 0.8*len(source)


def test_a_script_carries_no_bench_and_asks_for_no_other_library():
    load = recipe_load(recipes.get("pr1992"))
    wings = {key.split(".")[1] for key in load.sources}
    assert wings == {"__init__", "ground", "text", "model", "train", "pack", "score", "recipes", "submit"}
    assert {k for k in load.sources if k.startswith("pgolf.submit")} == {"pgolf.submit.__init__", "pgolf.submit.alone"}
    outside = {module.partition(".")[0]: inside for key, text in load.sources.items() for node, inside in import_nodes(ast.parse(text))
               for module, _ in imported(node, key) if not module.startswith("pgolf")}
    assert set(outside) - set(sys.stdlib_module_names) - set(EXTRAS) == set(load.needs) <= set(LIBRARIES)
    scope = {"__name__": "x"}
    exec(train_gpt_script(recipes.get("pr1992"), minify=True, pack="brotli"), scope)
    assert set(scope["SOURCES"]) == set(load.sources)


# ---- the file against the library

@pytest.fixture(scope="module")
def words(small_text, tmp_path_factory):
    return build_dataset(folder_documents(small_text), tmp_path_factory.mktemp("data"), 320, name="words")


@pytest.fixture(scope="module")
def run_of(words, tmp_path_factory):
    "Library runs at the smallest scale, each once"
    made, home = {}, tmp_path_factory.mktemp("runs")

    def run(name, seed=1, **changes):
        key = (name, seed, *sorted(changes.items()))
        if key not in made:
            made[key] = home / f"{name}-{len(made)}"
            recipes.run_recipe(recipes.get(name, scale="smoke", seed=seed, **changes), made[key], words, progress=False)
        return made[key]
    return run


def shards(dataset):
    return dataset.train[0].parent


def written(path, run, **options):
    path.write_text(train_gpt_script(read_finished(run).recipe, "words", **options))
    return path


SMALL, READABLE = dict(minify=True, pack="lzma"), {}
FORMS = {"pr1536": SMALL, "pr761": READABLE, "pr1232": dict(minify=True), "pr1696": dict(pack="brotli"), "pr1992": dict(minify=True, pack="brotli")}


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.names())
def test_the_file_alone_gives_the_artifact_and_the_score_of_the_library(name, run_of, words, tmp_path):
    run = run_of(name)
    proof = prove(written(tmp_path / "train_gpt.py", run, **FORMS.get(name, SMALL)), run, shards(words))
    assert proof["equal"] and proof["run"] == proof["script"]
    assert proof["run"]["artifact_sha256"] == sha256_file(run / "model.pgolf")
    assert proof["run"]["val_bpb"] == json.loads((run / "score.json").read_text())["val_bpb"]


@pytest.mark.slow
def test_another_recipe_is_not_equal(run_of, words, tmp_path):
    other = run_of("pr1536", muon_lr=0.05)
    assert not prove(written(tmp_path / "x.py", other), run_of("pr1536"), shards(words))["equal"]


@pytest.mark.slow
def test_a_run_under_a_clock_is_proven_from_its_weights(run_of, words, tmp_path):
    run = run_of("pr1536", max_seconds=0.3, steps=100_000)
    assert read_finished(run).end["reason"] == "seconds"
    proof = prove(written(tmp_path / "x.py", run, **SMALL), run, shards(words))
    assert proof["equal"] and "from its trained weights" in proof["how"]
    with pytest.raises(SubmissionError, match="has no weights.pt"):
        prove(tmp_path / "x.py", changed(run, tmp_path, weights_pt=None, run_json={"settings": {"data": str(shards(words))}}), shards(words))
    with pytest.raises(SubmissionError, match="does not say what it was trained on"):
        read_finished(changed(run, tmp_path, weights_pt=None))


ON_RANKS = """import sys
from pgolf import recipes
from pgolf.text.dataset import open_dataset
from pgolf.train.ranks import joined_ranks, leave
with joined_ranks("cpu") as (_, device):
    recipes.run_recipe(recipes.get("pr1536", scale="smoke"), sys.argv[1], open_dataset(sys.argv[2]), progress=False, device=device)
leave(0)
"""


@pytest.mark.slow
def test_under_torchrun_the_file_repeats_a_run_on_two_ranks(words, tmp_path):
    (tmp_path / "ranks.py").write_text(ON_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=localhost", "--nproc_per_node=2", tmp_path / "ranks.py", tmp_path / "run", shards(words)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    assert read_finished(tmp_path / "run").start["ranks"] == 2
    assert prove(written(tmp_path / "x.py", tmp_path / "run", **SMALL), tmp_path / "run", shards(words))["equal"]


@pytest.mark.slow
def test_on_the_embedded_corpus_the_file_makes_its_own_data(tmp_path):
    dataset = embedded_dataset(tmp_path, 320)
    recipe = recipes.get("tiny", scale="smoke", eval__stride=64)
    recipes.run_recipe(recipe, tmp_path / "run", dataset, progress=False)
    (tmp_path / "train_gpt.py").write_text(train_gpt_script(recipe, "embedded", **SMALL))
    proof = prove(tmp_path / "train_gpt.py", tmp_path / "run")
    assert proof["equal"]


@pytest.mark.slow
def test_nothing_but_the_allowed_packages_can_be_imported(run_of, words, tmp_path):
    names = ["pgolf", "scipy", "huggingface_hub", "matplotlib"]
    assert all(importlib.import_module(name) for name in names), "they are here, but not for a file that runs alone"
    (tmp_path / "x.py").write_text(f"import importlib, numpy, sentencepiece, brotli, constriction, zstandard\nhere = []\nfor name in {names}:\n"
                                   "    try: importlib.import_module(name); here.append(name)\n    except ModuleNotFoundError: pass\n"
                                   "raise SystemExit(f'found {here}')\n")
    with pytest.raises(SubmissionError, match=r"found \[\]"):
        run_alone(tmp_path / "x.py", read_finished(run_of("pr1536")), "", sys.executable)


@pytest.mark.slow
def test_a_missing_compressor_is_told_before_the_training(run_of, words, tmp_path):
    run = read_finished(run_of("pr1536"))
    with pytest.raises(SubmissionError, match="needs brotli, .*not installed here: pip install brotli"):
        run_alone(written(tmp_path / "x.py", run.folder), run, str(shards(words)), sys.executable, ("torch", "numpy", "sentencepiece", "tqdm"))


@pytest.mark.slow
def test_the_requirements_name_what_the_file_unpacks_itself_with(run_of, tmp_path):
    run = run_of("pr1696")
    make_submission([run], tmp_path / "out", pack="brotli")
    said = (tmp_path / "out" / "requirements.txt").read_text()
    assert {line.partition("==")[0] for line in said.split()} == set(recipe_load(read_finished(run).recipe).needs) | {"brotli"}


@pytest.mark.slow
def test_flash_attention_is_named_and_importable_when_the_run_used_it(run_of, tmp_path, monkeypatch):
    run = read_finished(run_of("pr1536"))
    for module, name in (("flash_attn", "flash-attn"), ("flash_attn_interface", "flash_attn_3")):
        about = tmp_path / f"{name.replace('-', '_')}-2.8.3.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.8.3\nRequires-Dist: einops\n")
        (about / "top_level.txt").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    allowed_modules.cache_clear()
    needs = recipe_load(run.recipe).needs
    for attention, module, name in (("fa2", "flash_attn", "flash-attn"), ("fa3", "flash_attn_interface", "flash_attn_3")):
        on_gpu = replace(run, start=run.start | {"attention": attention, "device": "cuda:0"})
        assert f"{name}==2.8.3\n" in pinned(on_gpu, needs) and "flash" not in pinned(run, needs)
        assert module in allowed_modules(tuple(packages_of(on_gpu, needs)))
        assert not [m for m in allowed_modules(tuple(packages_of(run, needs))) if "flash" in m]
        assert "no GPU trains twice alike" in from_weights(on_gpu) and from_weights(run) == ""


@pytest.mark.slow
def test_the_file_tells_wrong_data_in_a_sentence(run_of, tmp_path):
    script = written(tmp_path / "train_gpt.py", run_of("pr1536"))
    said = subprocess.run([sys.executable, "-I", script, "--data", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 1 and said.stderr.startswith("train_gpt.py: no dataset at nowhere") and said.stderr.count("\n") == 1


def test_the_file_takes_its_data_from_the_environment(monkeypatch):
    assert script_parser("data/x").parse_args([]).data == "data/x"
    monkeypatch.setenv("DATA_PATH", "/elsewhere")
    assert script_parser("data/x").parse_args([]).data == "/elsewhere"
    assert script_parser("data/x").parse_args(["--data", "here"]).data == "here"
    assert "torchrun --standalone --local_addr=localhost --nproc_per_node=8 train_gpt.py" in script_parser("").format_help()


def test_the_rank_that_packs_takes_every_core(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(run_room.os, "cpu_count", lambda: before + 1)
    with run_room.every_core():
        assert torch.get_num_threads() == before
    monkeypatch.setattr(run_room, "current_ranks", lambda: Ranks(0, 2))
    with run_room.every_core():
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_too_many_bytes_end_in_an_error(capsys):
    f = dict(val_loss=1.0, val_bpb=1.0, tokens=1, bytes=1, artifact_bytes=15_950_000, artifact_sha256="0", code_bytes=50_000, total_bytes=16_000_000)
    assert print_figures(f) == 0
    assert print_figures(f | {"code_bytes": 50_001, "total_bytes": 16_000_001}) == 1
    assert capsys.readouterr().err == "train_gpt.py: 1 bytes too many: lower the recipe's limit by as much\n"


# ---- the folder

@pytest.fixture(scope="module")
def three(run_of):
    return [run_of("pr761", seed=s) for s in (1, 2, 3)]


@pytest.mark.slow
def test_a_submission_holds_every_file_and_every_seed(three, words, tmp_path):
    about = make_submission(three, tmp_path / "entry", "A. Uthor", "auth", "An entry", minify=True, pack="lzma", drop={2: "power cut"}, proof=True, data=shards(words))
    entry = {p.name: p.read_text() for p in (tmp_path / "entry").iterdir()}
    assert sorted(entry) == ["README.md", "proof.json", "requirements.txt", "submission.json", "train_gpt.py", *(f"train_seed{s}.log" for s in (1, 2, 3))]
    assert json.loads(entry["submission.json"]) == about and json.loads(entry["proof.json"])["equal"]
    scores = {s: json.loads((run / "score.json").read_text())["val_bpb"] for s, run in enumerate(three, 1)}
    assert about["val_bpb"] == (scores[1] + scores[3]) / 2 and about["seeds"] == [1, 3] and about["dropped"] == {"2": "power cut"}
    assert about["bytes_code"] == len(entry["train_gpt.py"]) and about["bytes_total"] == about["bytes_code"] + max((r / "model.pgolf").stat().st_size for r in (three[0], three[2]))
    for seed, bpb in scores.items():
        assert f"{bpb:.6f}" in entry["README.md"] and f"val_bpb {bpb:.8f}" in entry[f"train_seed{seed}.log"]
    measured, reported = entry["README.md"].split("## Reported by the author")
    assert "0.9581" in reported and "0.9581" not in measured and "left out: power cut" in measured and "not audited" in measured
    assert "zstandard==" in entry["requirements.txt"] and all("==" in line for line in entry["requirements.txt"].split())
    assert not any(str(tmp_path) in text or str(three[0]) in text for text in entry.values())


def changed(run, tmp_path, **files):
    "A copy of a run folder with some files replaced; None removes one"
    copy = shutil.copytree(run, tmp_path / f"copy{len(list(tmp_path.iterdir()))}")
    for name, content in files.items():
        path = copy / name.replace("_", ".", 1)
        path.unlink(missing_ok=True) if content is None else path.write_text(content if isinstance(content, str) else json.dumps(content))
    return copy


def of_other_text(run):
    "A run folder whose score is of half the text"
    with np.load(run / "positions.npz") as each:
        arrays = {k: v for k, v in each.items()}
    half = {k: arrays[k][:len(arrays[k]) // 2] for k in ("nats", "bytes")}
    np.savez_compressed(run / "positions.npz", **arrays | half)
    score, parts = json.loads((run / "score.json").read_text()), recomputed(half["nats"].astype(float), half["bytes"].astype(int))
    (run / "score.json").write_text(json.dumps(score | parts))
    return run


def refused(runs, out, **options):
    "The sentence of a refusal; nothing may have been written"
    with pytest.raises(ValueError) as e:
        make_submission(runs, out, **options)
    assert not out.exists() and "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.slow
def test_unfinished_and_foreign_runs_are_refused(three, run_of, tmp_path):
    out, run = tmp_path / "out", three[0]
    score = json.loads((run / "score.json").read_text())
    for name in ("recipe_json", "train_jsonl", "model_pgolf", "score_json"):
        assert "has no " + name.replace("_", ".") in refused([changed(run, tmp_path, **{name: None})], out)
    log = (run / "train.jsonl").read_text().splitlines(keepends=True)
    assert "is not finished" in refused([changed(run, tmp_path, train_jsonl="".join(log[:-1]))], out)
    assert "is not finished" in refused([changed(run, tmp_path, run_json={"finished": False})], out)
    assert "is not JSON" in refused([changed(run, tmp_path, score_json="{")], out)
    assert "is not the artifact that was scored" in refused([changed(run, tmp_path, run_json={"finished": True, "result": {"artifact_sha256": "0"}})], out)
    assert "waives rules of the challenge (not causal)" in refused([changed(run, tmp_path, score_json=score | {"stamps": ["not causal"]})], out)
    assert "scored on another text" in refused([run, changed(three[1], tmp_path, score_json=json.loads((three[1] / "score.json").read_text()) | {"stream": "0"})], out)
    assert "was trained on words but scored on others" in refused([changed(run, tmp_path, score_json=score | {"dataset": "others"})], out)
    assert "holds no object" in refused([changed(run, tmp_path, score_json=[])], out) and "lacks the field 'loss'" in refused([changed(run, tmp_path, score_json={})], out)
    assert "train.matrix.lr is 0.05" in refused([run_of("pr1536"), run_of("pr1536", muon_lr=0.05)], out)
    assert "no runs" in refused([], out)
    assert "two of the runs have seed 1" in refused([run, changed(run, tmp_path)], out)


@pytest.mark.slow
def test_a_hand_written_audit_and_a_divided_score_are_not_believed(three, tmp_path):
    run, out = three[0], tmp_path / "out"
    score = json.loads((run / "score.json").read_text())
    half = {k: score[k] / 2 for k in ("val_bpb", "val_loss")}
    assert "but the losses in positions.npz give" in refused([changed(run, tmp_path, score_json=score | half)], out)
    assert "but the losses in positions.npz give" in refused([changed(run, tmp_path, score_json=score | {"bytes": 2 * score["bytes"]})], out)
    assert "has no positions.npz" in refused([changed(run, tmp_path, positions_npz=None)], out)
    for name, value in (("tokens", -1), ("val_bpb", float("nan")), ("bytes", float("inf")), ("val_loss", "1.0"), ("tokens", True), ("bytes", 1605.5)):
        assert f"ScoreFacts.{name} is" in refused([changed(run, tmp_path, score_json=score | {name: value})], out)
    assert "ScoreFacts.seconds is {'total': -3}" in refused([changed(run, tmp_path, score_json=score | {"seconds": {"total": -3}})], out)
    lines = (run / "train.jsonl").read_text().splitlines()
    ends = json.dumps(json.loads(lines[-1]) | {"seconds": -9.0})
    assert "End.seconds is -9.0" in refused([changed(run, tmp_path, train_jsonl="\n".join([*lines[:-1], ends]) + "\n")], out)
    good = {"sha256": read_finished(run).sha256, "claimed_bpb": score["val_bpb"], "ok": True, "failed": [],
            "findings": [{"rule": "causal", "verdict": "pass", "evidence": "trust me"}]}
    (tmp_path / "alone").mkdir()
    make_submission([changed(run, tmp_path / "alone", audit_json=good)], out)
    page = (out / "README.md").read_text()
    assert "not audited" in page and "trust me" not in page and "no rule broken" not in page


@pytest.mark.slow
def test_the_referee_is_asked_when_the_folder_is_made(run_of, words, tmp_path):
    alone = shutil.copytree(run_of("pr761", seed=1), tmp_path / "run")  # other tests make more seeds beside it
    make_submission([alone], tmp_path / "out", audit=True, data=shards(words))
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| causal | pass |" in page and "Seed 1: the referee finds" in page and "counted when this folder was made" in page


@pytest.mark.slow
def test_a_smoke_run_says_so_in_its_title(run_of, tmp_path):
    about = make_submission([run_of("pr1536")], tmp_path / "out", name="A record")
    assert about["name"] == "A record (smoke scale)" and about["scale"] == "smoke scale"
    assert (tmp_path / "out" / "README.md").read_text().startswith("# A record (smoke scale)\n")


@pytest.mark.slow
def test_a_recipe_for_study_is_refused(run_of, words, tmp_path):
    recipe = recipes.faithful("pr761", scale="smoke")
    recipes.run_recipe(recipe, tmp_path / "run", words, accept_illegal=True, progress=False)
    assert "waives rules of the challenge" in refused([tmp_path / "run"], tmp_path / "out") and "adapt_first" in refused([tmp_path / "run"], tmp_path / "out")


@pytest.mark.slow
def test_drops_need_a_run_and_a_reason(three, tmp_path):
    out = tmp_path / "out"
    assert "without a reason" in refused(three, out, drop={2: " "})
    assert "none of the runs has it" in refused(three, out, drop={9: "slow"})
    assert "every seed is dropped" in refused(three[:1], out, drop={1: "slow"})


@pytest.mark.slow
def test_over_budget_is_refused_with_both_numbers(three, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "LIMIT_BYTES", 100_000)
    said = refused(three, tmp_path / "out")
    assert "too many" in said and "code" in said and "model" in said


@pytest.mark.slow
def test_what_is_there_is_not_overwritten(three, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(SubmissionError, match="is not empty"):
        make_submission(three, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_command(three, words, tmp_path):
    (tmp_path / "pgolf_submit").write_text("import sys\nfrom pgolf.submit.command import pgolf_submit\nsys.exit(pgolf_submit())\n")

    def command(*words):
        return subprocess.run([sys.executable, tmp_path / "pgolf_submit", *map(str, words)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    said = command(*three, "--out", tmp_path / "a", "--author", "A", "--github_id", "a", "--minify", "--pack", "brotli", "--drop", "3=the disk was full")
    assert said.returncode == 0 and said.stderr == ""
    assert "seed 3 left out: the disk was full" in said.stdout and "over 2 seeds" in said.stdout and "(smoke scale)" in said.stdout
    for arguments in ((*three, "--out", tmp_path / "b", "--drop", "3"), (tmp_path, "--out", tmp_path / "b")):
        said = command(*arguments)
        assert said.returncode == 1 and said.stdout == "" and said.stderr.count("\n") == 1 and said.stderr.startswith("pgolf_submit: ")
    said = command("--help")
    assert said.returncode == 0 and "Example:" in said.stdout and "SEED=REASON" in said.stdout


# ---- statistics

def test_welch_is_scipys():
    x, y = [1.0701, 1.0709, 1.0693], [1.0771, 1.0781, 1.0775, 1.0769]
    for margin in (0.0, 0.005, 0.02):
        made = compare_seeds(x, y, 2.5, margin)
        theirs = stats.ttest_ind(x, np.array(y) - margin_bpb(2.5, margin), equal_var=False, alternative="less")
        assert (made.p, -made.t, made.df) == pytest.approx((theirs.pvalue, theirs.statistic, theirs.df), rel=1e-9)
        exact = compare_seeds(x, 1.0775, 2.5, margin)
        theirs = stats.ttest_1samp(x, 1.0775 - margin_bpb(2.5, margin), alternative="less")
        assert (exact.p, -exact.t, exact.df) == pytest.approx((theirs.pvalue, theirs.statistic, theirs.df), rel=1e-9)


def test_the_margin_is_in_nats_per_token_of_theirs():
    score = json.loads('{"val_loss": 2.0, "tokens": 1000, "bytes": 2410}')
    bpb = lambda loss: loss / math.log(2) * score["tokens"] / score["bytes"]
    assert margin_bpb(2.41) == pytest.approx(bpb(2.0) - bpb(1.995), rel=1e-9)
    assert "0.005 nats per token of theirs = 0.002993 bpb" in repr(compare_seeds([1, 1.001], [1.1, 1.101], 2.41))


def test_every_seed_is_shown_and_a_drop_tells_why():
    made = compare_seeds({1: 1.07, 2: 1.071, 5: 1.09}, {1: 1.08, 2: 1.081}, 2.5, drop={5: "a GPU was lost"})
    assert made.p == compare_seeds({1: 1.07, 2: 1.071}, {1: 1.08, 2: 1.081}, 2.5).p
    for view in (repr(made), made._repr_html_()):
        assert "seed 5, 1.090000" in view and "a GPU was lost" in view
    for drop in ({5: ""}, {9: "gone"}):
        with pytest.raises(SubmissionError, match="needs a reason"):
            compare_seeds({1: 1.07, 2: 1.071, 5: 1.09}, 1.08, 2.5, drop=drop)
    with pytest.raises(SubmissionError, match="no spread"):
        compare_seeds([1.07], [1.08, 1.09], 2.5)


@pytest.mark.slow
def test_runs_are_compared_on_one_text(three, run_of, tmp_path):
    made = compare_runs(three[:2], [run_of("pr1536"), run_of("pr1536", seed=2)], margin_nats=0.0)
    score = lambda run: json.loads((run / "score.json").read_text())
    assert made.ours == {s: score(three[s - 1])["val_bpb"] for s in (1, 2)} and made.theirs == {s: score(run_of("pr1536", seed=s))["val_bpb"] for s in (1, 2)}
    with pytest.raises(SubmissionError, match="scored on texts of"):
        compare_runs(three[:2], [of_other_text(changed(r, tmp_path)) for r in three[:2]])
    with pytest.raises(SubmissionError, match="same seed"):
        compare_runs([three[0], three[0]], three)


def test_seeds_without_spread():
    assert compare_seeds([1.0, 1.0], [1.1, 1.1], 2.5).beaten and not compare_seeds([1.0, 1.0], [1.001, 1.001], 2.5).beaten


def test_seeds_needed_against_simulation():
    draw = np.random.default_rng(1).normal
    for sd, other in ((1.0, 1.0), (1.0, 0.3)):
        n = seeds_needed(2.0, sd, other, alpha=0.05, power=0.8)
        seen = {k: np.mean(stats.ttest_ind(draw(-2, sd, (k, 20_000)), draw(0, other, (k, 20_000)), equal_var=False, alternative="less").pvalue < 0.05) for k in (n - 1, n)}
        assert seen[n] > 0.79 and seen[n - 1] < 0.81
    one = seeds_needed(1.0, 1.0, 0.0, alpha=0.05, power=0.8)
    seen = np.mean(stats.ttest_1samp(draw(-1, 1, (one, 20_000)), 0, alternative="less").pvalue < 0.05)
    assert one == 8 and seen == pytest.approx(0.8, abs=0.03)
    assert seeds_needed(0.0, 1.0) == 0 and seeds_needed(1e-6, 1.0) == 0


@pytest.mark.slow
def test_a_finished_run_says_what_it_is(three):
    run = read_finished(three[1])
    assert (run.seed, run.corpus, run.start["ranks"], run.audit) == (2, "words", 1, {})
    assert replace(run, recipe=recipes.get("pr761")).recipe.name == "pr761"
