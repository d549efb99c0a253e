"""Every file of a run, changed in every way: the commands that read it end with a status and one sentence, never with a traceback.

PGOLF_MUTATIONS=1000 tries that many changes of each file instead of the few that a test has time for."""
import json
import os
import shutil
import signal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SMALL = "vocab=320 dim=32 heads=2 kv_heads=1 layers=2 batch_tokens=1024 seq_len=64 eval.seq_len=64 eval.stride=32"
TRIES = int(os.environ.get("PGOLF_MUTATIONS", 6))
STRANGE = [0, 1, -1, 2**31, 2**63, 2**70, 10**400, -10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"), True, False, None, "", "x", "\x00", "\ud800",
           "../../etc/passwd", "custom", "a" * 5000, [], {}, [[]], [None], ["x"], [1] * 50, {"a": {"b": {}}}, {"kind": "custom"}, {"kind": []}]
TEXTS = [b"", b"null", b"[]", b"{}", b"3", b'"x"', b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe\x00", b'{"a": ' + b"9" * 5000 + b"}", b"\x00" * 64]


@pytest.fixture(scope="module")
def whole(small_text, tmp_path_factory):
    "A finished run and the submission made of it, side by side"
    from pgolf.recipes.run import begin, Run
    from pgolf.lab.conduct import finish
    from pgolf.lab.parameters import asked_recipe, parse_overrides
    from pgolf.recipes.phases import prepare_data
    from pgolf.submit.folder import Entry, make_entry
    home = tmp_path_factory.mktemp("whole")
    asked = dict(recipe="tiny", scale="full", seed=1, steps=2, nproc=1, overrides=parse_overrides(SMALL))
    recipe = asked_recipe(asked)
    dataset, run = prepare_data(recipe, small_text, home / "data", progress=False), Run(home / "run")
    begin(run, recipe, dataset, asked)
    run.train("cpu", False)
    run.pack(device="cpu")
    run.score("cpu", False)
    finish(run)
    (run.folder / "audit.json").write_text(json.dumps({"ok": True, "proved": True, "failed": [], "sha256": run.result["artifact_sha256"]}))
    make_entry([run.folder], home / "entry", Entry(), False, False, "", lambda line: None)
    shutil.copy(run.folder / "model.pgolf", home / "entry")
    return home


@pytest.fixture(scope="module")
def light():
    "Work that begins once everything is read is left out, so that a thousand changes take a minute"
    import pgolf.lab.conduct
    import pgolf.lab.sample
    import pgolf.recipes.phases
    import pgolf.recipes.run as run
    import pgolf.referee.audit_artifact
    import pgolf.referee.audit_folder
    import pgolf.referee.audit_run
    import pgolf.submit.folder
    import pgolf.train.command
    from pgolf.lab.launch import CommandError
    def reached(*_, **__): raise ValueError("the work begins here")
    def phase(own, name, *_, any_work=False, **__):
        words = [name, str(own.folder), "--device", "cpu", *["--any_work"] * any_work]
        if run.run_main(words): raise CommandError("")
    with pytest.MonkeyPatch.context() as patch:
        for room, name in ((run, "train"), (run, "pack_run"), (run, "score_run"), (pgolf.train.command, "train"),
                           (pgolf.recipes.phases, "evaluate"), (pgolf.lab.sample, "written"), (pgolf.referee.audit_artifact, "artifact_trial"),
                           (pgolf.referee.audit_run, "audit_artifact"), (pgolf.referee.audit_folder, "audit_artifact")):
            patch.setattr(room, name, reached)
        patch.setattr(pgolf.lab.conduct, "conduct", phase)
        patch.setattr(pgolf.submit.folder, "train_gpt_script", lambda *_: "pass")
        yield


PHASES = ("train", "pack", "score")
READ_BY = {"run/run.json": (*PHASES, "pgolf_score", "pgolf_runs", "pgolf_compare", "pgolf_submit", "pgolf_audit"),
           "run/recipe.json": (*PHASES, "train.command", "pgolf_score", "pgolf_submit", "pgolf_audit"),
           "run/score.json": ("pgolf_submit", "pgolf_audit"), "run/audit.json": ("pgolf_runs", "pgolf_compare"),
           "run/train.jsonl": ("pgolf_submit", "pgolf_audit"), "entry/submission.json": ("pgolf_audit of a folder",)}


def readers(home):
    "Commands that read files of a run, each a function without arguments"
    from pgolf.lab.commands import pgolf_score
    from pgolf.lab.side_by_side import pgolf_compare, pgolf_runs
    from pgolf.recipes.run import run_main
    from pgolf.referee.command import audit_main
    from pgolf.submit.command import pgolf_submit
    from pgolf.train.command import train_main
    run = home / "run"
    phases = {name: lambda name=name: run_main([name, str(run), "--device", "cpu"]) for name in PHASES}
    return phases | {"train.command": lambda: train_main([str(run), "--data", str(home)]), "pgolf_score": lambda: pgolf_score(run),
                     "pgolf_runs": lambda: pgolf_runs([str(home)]), "pgolf_compare": lambda: pgolf_compare([str(run), str(run)]),
                     "pgolf_submit": lambda: pgolf_submit([str(run)], out=str(home / "made")), "pgolf_audit": lambda: audit_main([str(run)]),
                     "pgolf_audit of a folder": lambda: audit_main([str(home / "entry")])}


def late(*_): raise BaseException("it hangs")


def status(call, capsys):
    "Exit status of a command, after whatever it says was seen to be no traceback and one sentence"
    signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    try: code = call() or 0
    except SystemExit as stop: code = stop.code
    finally: signal.alarm(0)
    said = capsys.readouterr()
    assert code in (0, 1, 2) and "Traceback" not in said.err, said.err
    if code and not said.out: assert said.err.strip() and len(said.err.strip()) < 2000, said.err[:500]
    return code, said.err


def places(node, path=()):
    "Every place in a JSON value"
    if path: yield path
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield from places(node[key], (*path, key))


def changed(draw, plain):
    "A JSON value with one place changed: another kind, another place's value, gone, or a fact that nobody knows"
    every = sorted(places(plain), key=lambda path: (len(path), str(path)))
    near = [path for path in every if len(path) <= draw(st.sampled_from([1, 2, 9]))]
    *way, key = draw(st.sampled_from(near or every))
    node = plain
    for step in way: node = node[step]
    what = draw(st.sampled_from(["strange", "strange", "strange", "other", "gone", "unknown"]))
    if what == "gone": del node[key]
    elif what == "unknown" and isinstance(node, dict): node["no_such_fact"] = draw(st.sampled_from(STRANGE))
    elif what == "other":
        value = plain
        for step in draw(st.sampled_from(every)):
            if not isinstance(value, (dict, list)) or value is node: break
            value = value[step] if isinstance(value, list) or step in value else None
        node[key] = json.loads(json.dumps(value))
    else: node[key] = draw(st.sampled_from(STRANGE))
    return plain


def damaged(draw, data):
    "The bytes of a JSON file, or of a log of JSON lines, with something wrong"
    how = draw(st.sampled_from(["changed"] * 6 + ["cut", "text", "noise"]))
    if how == "cut": return data[:draw(st.integers(0, len(data)))]
    if how == "text": return draw(st.sampled_from(TEXTS))
    if how == "noise": return draw(st.binary(max_size=200))
    lines = data.decode().splitlines()
    if len(lines) > 1 and lines[0].endswith("}"):
        at = draw(st.integers(0, len(lines) - 1))
        lines[at] = json.dumps(changed(draw, json.loads(lines[at])))
        return "".join(line + "\n" for line in lines).encode()
    return json.dumps(changed(draw, json.loads(data))).encode()


@pytest.mark.slow
@pytest.mark.parametrize("file", READ_BY)
def test_a_damaged_file_is_a_status_and_a_sentence(whole, light, tmp_path_factory, capsys, monkeypatch, file):
    home, before = tmp_path_factory.mktemp("try") / "home", (whole / file).read_bytes()
    calls = [call for name, call in readers(home).items() if name in READ_BY[file]]
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))

    @settings(max_examples=TRIES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def every(data):
        new = damaged(data.draw, before)
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(whole, home, ignore=shutil.ignore_patterns("data"))
        for call in calls:
            (home / file).write_bytes(new)
            shutil.rmtree(home / "made", ignore_errors=True)
            status(call, capsys)
    every()


def sealed(whole, home, change):
    "The artifact of the run, alone in a folder, its recipe changed"
    from pgolf.pack.container import open_header, seal
    header, payload = open_header((whole / "run" / "model.pgolf").read_bytes())
    header = json.loads(json.dumps(header))
    header["meta"] = change(header["meta"])
    home.mkdir(exist_ok=True)
    (home / "model.pgolf").write_bytes(seal(header, bytes(payload)))
    return home / "model.pgolf"


def readers_of_a_file(file, data):
    from pgolf.lab.commands import pgolf_score
    from pgolf.lab.sample import pgolf_sample
    from pgolf.referee.command import audit_main
    return [lambda: pgolf_score(file, data=data), lambda: pgolf_sample(file, data=data), lambda: audit_main([str(file), "--data", data])]


@pytest.mark.slow
def test_an_artifact_that_says_strange_things_of_its_recipe(whole, light, tmp_path, capsys):
    data = str(next((whole / "data" / "datasets").iterdir()))

    @settings(max_examples=TRIES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def every(drawn):
        def change(meta):
            new = changed(drawn.draw, {"recipe": {k: meta["recipe"][k] for k in ("eval", "predict", "name")} | {"predict": [{"kind": "ttt", "epochs": 2}]}})
            return meta | {"recipe": meta["recipe"] | new["recipe"]} if isinstance(new.get("recipe"), dict) else new
        try: file = sealed(whole, tmp_path / "home", change)
        except ValueError: return # NaN is no JSON there
        for call in readers_of_a_file(file, data): status(call, capsys)
    every()


ENDLESS = [({"predict": [{"kind": "ttt", "epochs": 10**9}]}, "ttt alone 3,000,000,000"), ({"predict": [{"kind": "phased", "epochs": 10**9}]}, "passes of each token"),
           ({"predict": [{"kind": "lora", "rank": 10**9}]}, "LoRAConfig.rank is 1000000000"), ({"eval": {"cut": "custom"}}, "windows were made by hand"),
           ({"eval": {"cut": "streaming", "seq_len": 64, "lanes": 10**6}}, "passes of each token"),
           ({"eval": {"cut": "documents", "seq_len": 64, "doc_chunk": 64, "doc_batch": 10**9}}, "tokens at once"), ({"eval": 5}, "must be an object"), ({"predict": "ttt"}, "predict"),
           ({"predict": [{"kind": "os"}]}, "there is no Predictor 'os'"), ({"eval": {"seqlen": 64}}, "did you mean 'seq_len'?")]


@pytest.mark.parametrize("more, says", ENDLESS)
def test_work_without_end_is_refused_before_it_starts(whole, light, tmp_path, capsys, more, says):
    data = str(next((whole / "data" / "datasets").iterdir()))
    file = sealed(whole, tmp_path / "home", lambda meta: meta | {"recipe": meta["recipe"] | more})
    score, _, audit = readers_of_a_file(file, data)
    code, said = status(score, capsys)
    assert code == 1 and says in said and said.count("\n") == 1, said
    assert "the limit is" not in said or "--any_work" in said
    code, said = status(audit, capsys)
    assert code == 2 and says in said and said.count("\n") == 1, said


def test_who_means_it_may_have_it(whole, light, tmp_path, capsys):
    from pgolf.lab.commands import pgolf_score
    data = str(next((whole / "data" / "datasets").iterdir()))
    file = sealed(whole, tmp_path / "home", lambda meta: meta | {"recipe": meta["recipe"] | {"predict": [{"kind": "ttt", "epochs": 10**9}]}})
    assert status(lambda: pgolf_score(file, data=data, any_work=True), capsys) == (1, "pgolf_score: the work begins here\n")


ENDLESS_PACKING = [({"calibration": 10**9}, "tokens of calibration"), ({"predict": [{"kind": "prequant", "epochs": 10**9}]}, "before packing"),
                   ({"coder": {"kind": "auto", "coders": [{"kind": "brotli"}] * 1000}}, "repairs and coders in the plan")]


@pytest.mark.parametrize("more, says", ENDLESS_PACKING)
def test_packing_without_end_is_refused_before_the_training_and_by_who_packs(whole, tmp_path, capsys, more, says):
    from pgolf.ground.settings import ConfigError
    from pgolf.lab.commands import pgolf_train
    from pgolf.recipes.phases import pack_run
    from pgolf.text.dataset import open_dataset
    home = shutil.copytree(whole, tmp_path / "home")
    recipe = json.loads((home / "run" / "recipe.json").read_text())
    recipe |= {"quant": recipe["quant"] | more} if "coder" in more else more
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps(recipe))
    code, said = status(lambda: pgolf_train(str(mine), data=str(next((home / "data" / "datasets").iterdir())), out=str(tmp_path / "new")), capsys)
    assert code == 1 and "packing would take" in said and says in said and said.count("\n") == 1, said
    assert not (tmp_path / "new").exists()
    (home / "run" / "recipe.json").write_text(mine.read_text())
    (home / "run" / "weights.pt").unlink()  # it is refused before they are read
    with pytest.raises(ConfigError, match="packing would take") as refused:
        pack_run(home / "run", open_dataset(next((home / "data" / "datasets").iterdir())), accept_illegal=True)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_no_recipe_comes_near_the_limits():
    from pgolf.pack.work import asked_of_packing
    from pgolf.recipes import get, names
    from pgolf.score.work import MOST_AT_ONCE, MOST_PASSES, largest_query, total_passes
    for name in names():
        recipe = get(name)
        for n in (10**5, 62_000_000):
            assert sum(total_passes(recipe.eval, recipe.predict, n).values()) < MOST_PASSES / 5, name
            assert largest_query(recipe.eval, n) < MOST_AT_ONCE / 4, name
        lessons = sum(way.passes_before_packing() for way in recipe.predict)
        for what, asked, most in asked_of_packing(recipe.quant, recipe.calibration, recipe.train.seq_len, lessons):
            assert asked < most / 8, (name, what)
