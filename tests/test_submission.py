"The bundler against the package it bundles, the files of a submission, what is refused, the proof, the statistics"
import ast
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from pgolf import recipes, submission
from pgolf.data import build_dataset, embedded_dataset, folder_documents
from pgolf.submission import (AbsentLibrary, BundleError, SilentBar, SubmissionError, compare_runs, compare_seeds, global_names, make_bundle, make_submission,
                              margin_bpb, minified, package_sources, print_figures, prove, read_finished, run_alone, seeds_needed,
                              self_extracting, submit_main, train_gpt_parser, train_gpt_script)

ROOT = Path(__file__).resolve().parents[1]


# ---- the shaker, on packages made up

@st.composite
def packages(draw):
    "Modules of functions that call earlier ones: sources, the root, its value at 3, what it reaches"
    count = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    names, calls, value, lines, imports = [], {}, {}, {}, {}
    for m, n in enumerate(count):
        for i in range(n):
            name, earlier = f"f{m}_{i}", list(names)
            used = sorted(set(draw(st.lists(st.sampled_from(earlier), max_size=3)))) if earlier else []
            shadow = draw(st.sampled_from(earlier)) if earlier and draw(st.booleans()) else ""
            shadow = "" if shadow in used else shadow   # a local of that name: keeps nothing alive
            add = draw(st.integers(-5, 5))
            body = [f"    {shadow} = x" if shadow else "    pass", f"    return {add} + K{m} * x" + "".join(f" + {u}(x + 1)" for u in used)]
            lines.setdefault(m, []).append("\n".join([f"def {name}(x):  # {i}", *body]))
            imports.setdefault(m, set()).update(u for u in used if not u.startswith(f"f{m}_"))
            names.append(name); calls[name] = used
            value[name] = lambda x, m=m, add=add, used=used: add + (m + 2)*x + sum(value[u](x + 1) for u in used)
    sources = {}
    for m in range(len(count)):
        froms = "".join(f"from .m{u[1:].split('_')[0]} import {u}\n" for u in sorted(imports[m]))
        sources[f"m{m}"] = f"'Doc'\nimport math\n{froms}__all__ = []\nK{m} = {m} + 2\nUNUSED{m} = math.pi\n\n" + "\n\n".join(lines[m]) + "\n\nif __name__ == '__main__': 1/0\n"
    root, reached = draw(st.sampled_from(names)), set()
    todo = [root]
    while todo:
        if (n := todo.pop()) not in reached: reached.add(n); todo += calls[n]
    return sources, root, value[root](3), reached


@settings(max_examples=80, deadline=None, derandomize=True)
@given(packages())
def test_a_bundle_behaves_like_its_package_and_holds_only_what_is_reached(package):
    sources, root, expected, reached = package
    module = "m" + root[1:].split("_")[0]
    for shake in (True, False):
        text = make_bundle(sources, [(module, root)], shake=shake).text()
        for made in (text, minified(text), self_extracting(text)):
            exec(made, scope := {"__name__": "__main__"})
            assert scope[root](3) == expected
        functions = {n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)}
        assert functions == reached if shake else functions >= reached
    assert ("UNUSED" not in make_bundle(sources, [(module, root)]).text())


def test_a_bundle_behaves_like_the_imported_package(tmp_path, monkeypatch):
    sources = {"a": "from dataclasses import dataclass\nSEEN = {}\ndef note(f):\n    SEEN[f.__name__] = f\n    return f\n",
               "b": "from .a import SEEN, note\nimport os.path as p\ntry: import no_such_thing\nexcept ImportError: no_such_thing = None\n"
                    "LIMIT = 1; STEP = 2\nLIMIT += 3\n@note\ndef square(x):\n    'Doc'\n    return x*x\nSEEN['cube'] = lambda x: x**3\n"
                    "def never(): return STEP\n",
               "c": "import os.path as p\nfrom .b import LIMIT, SEEN, no_such_thing\n"
                    "def go(x): return [f(x) for f in SEEN.values()], LIMIT, no_such_thing, p.join('a', 'b')\n"}
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "__init__.py").touch()
    for name, text in sources.items():
        (tmp_path / "made_up" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    expected = importlib.import_module("made_up.c").go(3)
    bundle = make_bundle(package_sources(tmp_path / "made_up"), [("c", "go")])
    exec(bundle.text(), scope := {})
    assert scope["go"](3) == expected == ([9, 27], 4, None, "a/b")
    assert bundle.modules == ("a", "b", "c") and "def never" not in bundle.text() and "STEP" not in bundle.text()
    assert bundle.imports == ("from os import path as p",)


@pytest.mark.parametrize("sources, part", [
    (dict(main="from .a import *\ndef go(): pass", a=""), "main, line 1"),
    (dict(main="from .a import f as g\ndef go(): g()", a="def f(): pass"), "instead of g"),
    (dict(main="from . import a\ndef go(): a.f()", a="def f(): pass"), "import names from it"),
    (dict(main="import pgolf.a\ndef go(): pgolf.a.f()", a="def f(): pass"), "relative import"),
    (dict(main="def go():\n    from .a import f\n    f()", a="def f(): pass"), "inside a definition"),
    (dict(main="def go():\n    import pgolf.bits"), "runs alone"),
    (dict(main="from importlib import import_module\ndef go(): import_module('pgolf.bits')"), "runs alone"),
    (dict(main="from .a import f\ndef go(): f(); g()\ndef g(): pass", a="def f(): g()\ndef g(): pass"), "bound by a and by main"),
    (dict(main="from .a import f\nimport json\ndef go(): f(json)", a="def f(x): json()\ndef json(): pass"), "json is bound by an import and by a"),
    (dict(main="from .a import f\ndef go(): f()", a="from .b import g\ndef f(): g()", b="from .a import f\ndef g(): f()"), "circle: a -> b -> a"),
    (dict(main="def go(): return open(__file__)"), "__file__"),
    (dict(main="def go(): return __doc__"), "__doc__"),
    (dict(main="def go(): return eval('1')"), "eval()"),
    (dict(main="def go(): return globals()['x']"), "globals()"),
    (dict(main="def len(x): return 0\ndef go(): return len([])"), "Python's own"),
    (dict(main="def go(): return nothing"), "nothing, which nothing there binds"),
    (dict(main="from .gone import f\ndef go(): f()"), "no module 'gone'"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_the_bundler_refuses_in_a_sentence(sources, part):
    with pytest.raises(BundleError) as e:
        make_bundle(sources, [("main", "go")])
    assert part in str(e.value) and "\n" not in str(e.value)


def test_what_can_do_without_its_file_may_ask_for_it_and_what_is_shaken_out_may_do_anything():
    fine = "from pathlib import Path\ndef go(): return Path(__file__) if '__file__' in globals() else None\ndef other(): return open(__file__)\n"
    exec(make_bundle({"main": fine}, [("main", "go")]).text(), scope := {})
    assert scope["go"]() is None


def test_a_scope_called_top_is_no_module():
    assert global_names("class C:\n    def top(self, a): return self.x + Y + (lambda: a)()")[1] == {"Y"}
    assert global_names("def top():\n    global Z\n    Z = Q")[1] >= {"Q"} and global_names("def top():\n    global Z\n    Z = Q")[0] == {"top", "Z"}


def test_minifying_keeps_fields_types_and_keywords():
    source = ("from dataclasses import asdict, dataclass, fields\n@dataclass(frozen=True)\nclass Config:\n    'Doc'\n    width:int=3 # units\n    name:str='a'\n\n"
              "def scaled(config:Config, factor:float=2.0, *, offset:int=0)->float:\n    'Doc'\n    value:float = config.width * factor\n    return value + offset\n"
              "kinds = [f.type.__name__ for f in fields(Config)]\nout = asdict(Config(width=5)), scaled(config=Config(), factor=3, offset=1), kinds\n")
    exec(source, plain := {})
    exec(minified(source), small := {})
    assert small["out"] == plain["out"] == ({"width": 5, "name": "a"}, 10, ["int", "str"]) and len(minified(source)) < 0.8*len(source)


def test_the_whole_package_fits_one_namespace():
    plain, shaken = (train_gpt_script(recipes.get("pr1992"), shake=s) for s in (False, True))
    top = [n.name for n in ast.parse(plain).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    assert len(top) == len(set(top)) and len(shaken) < 0.9*len(plain)
    assert "huggingface_hub" not in shaken and "pydoc_data" not in shaken, "a run on the challenge's shards neither fetches nor makes data"
    imported = {a.name.split(".")[0] for n in ast.walk(ast.parse(shaken)) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(ast.parse(shaken)) if isinstance(n, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"torch", "numpy", "sentencepiece", "brotli", "constriction", "zstandard", "tqdm"}


def test_stand_ins():
    with SilentBar(total=3, disable=True) as bar:
        bar.update(2), bar.set_postfix(loss=1), bar.set_postfix_str("x", refresh=False), bar.close()
    assert bar.n == 2 and list(SilentBar([1, 2], "reading", leave=False)) == [1, 2]
    with pytest.raises(ImportError, match="pip install brotli"):
        AbsentLibrary("brotli").compress(b"")


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


@pytest.mark.parametrize("name", [n if n in ("pr1536", "pr761") else pytest.param(n, marks=pytest.mark.slow) for n in recipes.names()])
def test_the_file_alone_gives_the_artifact_and_the_score_of_the_library(name, run_of, words, tmp_path):
    run = run_of(name)
    proof = prove(written(tmp_path / "train_gpt.py", run, **FORMS.get(name, SMALL)), run, shards(words))
    assert proof["equal"] and proof["run"] == proof["script"]
    assert proof["run"]["artifact_sha256"] == submission.sha256_file(run / "model.pgolf")
    assert proof["run"]["val_bpb"] == json.loads((run / "score.json").read_text())["val_bpb"]


def test_whole_modules_give_the_same(run_of, words, tmp_path):
    run = run_of("pr1536")
    assert prove(written(tmp_path / "x.py", run, shake=False), run, shards(words))["equal"]


def test_another_recipe_is_not_equal(run_of, words, tmp_path):
    other = run_of("pr1536", muon_lr=0.05)
    assert not prove(written(tmp_path / "x.py", other), run_of("pr1536"), shards(words))["equal"]


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
from pgolf.data import open_dataset
from pgolf.train import joined_ranks
with joined_ranks("cpu") as (_, device):
    recipes.run_recipe(recipes.get("pr1536", scale="smoke"), sys.argv[1], open_dataset(sys.argv[2]), progress=False, device=device)
"""


@pytest.mark.slow
def test_under_torchrun_the_file_repeats_a_run_on_two_ranks(words, tmp_path):
    (tmp_path / "ranks.py").write_text(ON_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "ranks.py", tmp_path / "run", shards(words)]
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


def test_nothing_but_the_allowed_packages_can_be_imported(run_of, words, tmp_path):
    names = ["pgolf", "tqdm", "huggingface_hub", "matplotlib"]
    assert all(importlib.import_module(name) for name in names), "they are here, but not for a file that runs alone"
    (tmp_path / "x.py").write_text(f"import importlib, numpy, sentencepiece, brotli, constriction, zstandard\nhere = []\nfor name in {names}:\n"
                                   "    try: importlib.import_module(name); here.append(name)\n    except ModuleNotFoundError: pass\n"
                                   "raise SystemExit(f'found {here}')\n")
    with pytest.raises(SubmissionError, match=r"found \[\]"):
        run_alone(tmp_path / "x.py", read_finished(run_of("pr1536")), "", sys.executable)


def test_a_missing_compressor_is_told_before_the_training(run_of, words, tmp_path):
    run = read_finished(run_of("pr1536"))
    with pytest.raises(SubmissionError, match="packs with brotli, not installed here: pip install brotli"):
        run_alone(written(tmp_path / "x.py", run.folder), run, str(shards(words)), sys.executable, ("torch", "numpy", "sentencepiece"))


def test_the_requirements_name_what_the_file_unpacks_itself_with(run_of, tmp_path):
    run = run_of("pr1696")
    submission.make_submission([run], tmp_path / "out", pack="brotli")
    assert "brotli==" in (tmp_path / "out" / "requirements.txt").read_text()


def test_the_file_tells_wrong_data_in_a_sentence(run_of, tmp_path):
    script = written(tmp_path / "train_gpt.py", run_of("pr1536"))
    said = subprocess.run([sys.executable, "-I", script, "--data", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 1 and said.stderr.startswith("train_gpt.py: no dataset at nowhere") and said.stderr.count("\n") == 1


def test_the_file_takes_its_data_from_the_environment(monkeypatch):
    assert train_gpt_parser("data/x").parse_args([]).data == "data/x"
    monkeypatch.setenv("DATA_PATH", "/elsewhere")
    assert train_gpt_parser("data/x").parse_args([]).data == "/elsewhere"
    assert train_gpt_parser("data/x").parse_args(["--data", "here"]).data == "here"
    assert "torchrun --standalone --nproc_per_node=8 train_gpt.py" in train_gpt_parser("").format_help()


def test_too_many_bytes_end_in_an_error(capsys):
    f = dict(val_loss=1.0, val_bpb=1.0, tokens=1, bytes=1, artifact_bytes=15_950_000, artifact_sha256="0", code_bytes=50_000, total_bytes=16_000_000)
    assert print_figures(f) == 0
    assert print_figures(f | {"code_bytes": 50_001, "total_bytes": 16_000_001}) == 1
    assert capsys.readouterr().err == "train_gpt.py: 1 bytes too many: lower the recipe's limit by as much\n"


# ---- the folder

@pytest.fixture(scope="module")
def three(run_of):
    return [run_of("pr761", seed=s) for s in (1, 2, 3)]


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


def refused(runs, out, **options):
    "The sentence of a refusal; nothing may have been written"
    with pytest.raises(ValueError) as e:
        make_submission(runs, out, **options)
    assert not out.exists() and "\n" not in str(e.value)
    return str(e.value)


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
    assert "holds no facts" in refused([changed(run, tmp_path, score_json=[])], out) and "has no val_bpb" in refused([changed(run, tmp_path, score_json={})], out)
    assert "train.muon_lr is 0.05" in refused([run_of("pr1536"), run_of("pr1536", muon_lr=0.05)], out)
    assert "no runs" in refused([], out)
    assert "two of the runs have seed 1" in refused([run, changed(run, tmp_path)], out)


def test_a_recipe_for_study_is_refused(run_of, words, tmp_path):
    recipe = recipes.faithful("pr761", scale="smoke")
    recipes.run_recipe(recipe, tmp_path / "run", words, accept_illegal=True, progress=False)
    assert "waives rules of the challenge" in refused([tmp_path / "run"], tmp_path / "out") and "adapt_first" in refused([tmp_path / "run"], tmp_path / "out")


def test_drops_need_a_run_and_a_reason(three, tmp_path):
    out = tmp_path / "out"
    assert "without a reason" in refused(three, out, drop={2: " "})
    assert "none of the runs has it" in refused(three, out, drop={9: "slow"})
    assert "every seed is dropped" in refused(three[:1], out, drop={1: "slow"})


def test_over_budget_is_refused_with_both_numbers(three, tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "LIMIT_BYTES", 100_000)
    said = refused(three, tmp_path / "out")
    assert "too many" in said and "code" in said and "model" in said


def test_what_is_there_is_not_overwritten(three, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(SubmissionError, match="is not empty"):
        make_submission(three, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_the_command(three, words, tmp_path, capsys):
    runs = [str(r) for r in three]
    assert submit_main([*runs, "--out", str(tmp_path / "a"), "--author", "A", "--github-id", "a", "--minify", "--pack", "brotli", "--drop", "3=the disk was full"]) == 0
    said = capsys.readouterr()
    assert "seed 3 left out: the disk was full" in said.out and "over 2 seeds" in said.out and said.err == ""
    assert submit_main([*runs, "--out", str(tmp_path / "b"), "--drop", "3"]) == 1
    assert submit_main([str(tmp_path), "--out", str(tmp_path / "b")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 2 and all(line.startswith("pgolf_submit: ") for line in said.err.splitlines())
    with pytest.raises(SystemExit) as e:
        submit_main(["--help"])
    assert e.value.code == 0 and "example:" in capsys.readouterr().out


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


def test_runs_are_compared_on_one_text(three, run_of, tmp_path):
    made = compare_runs(three[:2], [run_of("pr1536"), run_of("pr1536", seed=2)], margin_nats=0.0)
    score = lambda run: json.loads((run / "score.json").read_text())
    assert made.ours == {s: score(three[s - 1])["val_bpb"] for s in (1, 2)} and made.theirs == {s: score(run_of("pr1536", seed=s))["val_bpb"] for s in (1, 2)}
    with pytest.raises(SubmissionError, match="scored on texts of"):
        compare_runs(three[:2], [changed(r, tmp_path, score_json=score(r) | {"bytes": 7}) for r in three[:2]])
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


def test_a_finished_run_says_what_it_is(three):
    run = read_finished(three[1])
    assert (run.seed, run.corpus, run.start["ranks"], run.audit) == (2, "words", 1, {})
    assert replace(run, recipe=recipes.get("pr761")).recipe.name == "pr761"
