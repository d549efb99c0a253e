"""The commands as people type them: on odd machines, inside odd environments, into pipes that close"""
import os
import subprocess
import sys
from configparser import ConfigParser

import pytest

STUB = "import sys\nfrom {module} import {name}\nif __name__ == '__main__':\n    sys.exit({name}())\n"


@pytest.fixture(scope="session")
def scripts(root, tmp_path_factory):
    "The commands as pip would install them: name -> file"
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root / "settings.ini")
    folder, found = tmp_path_factory.mktemp("bin"), {}
    for line in settings["DEFAULT"]["console_scripts"].split():
        command, _, target = line.partition("=")
        module, _, name = target.partition(":")
        found[command] = folder / command
        found[command].write_text(STUB.format(module=module, name=name))
    return found


@pytest.fixture
def typed(root, scripts, tmp_path):
    "Runs a command line in an empty folder"
    def run(words, before=(), timeout=120, **env):
        name, *rest = words
        command = [*before, sys.executable, str(scripts[name]), *map(str, rest)]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(root), **env},
                              capture_output=True, text=True, timeout=timeout)
    return run


RANKS = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
         "MASTER_ADDR": "localhost", "MASTER_PORT": "29587", "TORCHELASTIC_RESTART_COUNT": "0",
         "TORCHELASTIC_USE_AGENT_STORE": "True"}
LINES = ["pgolf_data embedded", "pgolf_train tiny", "pgolf_score run", "pgolf_audit tiny", "pgolf_submit run --out entry", "pgolf_upload run me/tiny"]


@pytest.mark.parametrize("line", LINES)
def test_inside_somebody_elses_ranks_every_command_says_so_at_once(typed, tmp_path, line):
    done = typed(line.split(), timeout=60, **RANKS)
    assert done.returncode in (1, 2) and "rank 1 of 2 under torchrun" in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_phase_with_variables_of_a_torchrun_that_is_gone_says_so(root, tmp_path):
    "A shell that a torchrun job has left behind hands them on"
    from pgolf.recipes.phases import write_recipe
    from pgolf.recipes.recipes import get
    write_recipe(get("tiny", "smoke"), tmp_path / "run")
    ask = [sys.executable, "-m", "pgolf.train.command", tmp_path / "run", "--data", tmp_path]
    done = subprocess.run(ask, env={**os.environ, "PYTHONPATH": str(root), **RANKS}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "no torchrun answers at localhost:29587" in done.stderr and done.stderr.count("\n") == 1


def test_torchrun_never_asks_for_the_name_of_the_machine(root):
    "With --standalone alone it waits for ever where that name does not resolve"
    said = [line for p in [*root.glob("pgolf/*/*.py"), root / "README.md"] for line in p.read_text().splitlines() if '--standalone' in line]
    assert len(said) >= 4 and all("--local_addr=localhost" in line for line in said), said


@pytest.mark.slow
def test_two_ranks_where_the_machines_name_does_not_resolve(typed, tmp_path, small_text):
    alone = ["unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine does not let a process have another host name")
    small = "vocab=320 dim=64 heads=2 kv_heads=1 layers=2 batch_tokens=2048 seq_len=256"
    done = typed(["pgolf_train", "tiny", "--steps", "2", "--set", small, "--data", small_text, "--nproc", "2"], before=alone)
    assert done.returncode == 0 and "packed" in done.stdout, done.stderr


def test_a_changed_run_has_a_name_of_its_own_and_moves_nothing(tmp_path, monkeypatch, small_text):
    import pgolf.lab.conduct
    from pgolf.lab.commands import pgolf_train
    def pretend(run, phase, *_):
        if phase == "pack":
            (run.folder / "model.pgolf").write_bytes(b"packed")
            run.note(finished=True)
    monkeypatch.setattr(pgolf.lab.conduct, "conduct", pretend)
    monkeypatch.chdir(tmp_path)
    asked = dict(scale="smoke", data=str(small_text))
    for words in ({"set": "vocab=320"}, {"set": "vocab=320 xsa=False"}, {"set": "vocab=320", "steps": 4}, {"set": "vocab=320", "seed": 2}):
        pgolf_train("tiny", **asked, **words)
    text = small_text.name
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        f"tiny-seed1-smoke-steps=4-vocab=320-{text}", f"tiny-seed1-smoke-vocab=320-xsa=False-{text}",
        f"tiny-seed1-smoke-vocab=320-{text}", f"tiny-seed2-smoke-vocab=320-{text}"}


WITHOUT_EXTRAS = '''
"Only what pip install pgolf brings can be imported"
import re, sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
def name_of(spec): return re.split(r"[^\\w.-]", spec)[0].lower().replace("_", "-")
brought, todo = set(), {specs}
while todo:
    name = name_of(todo.pop())
    if name in brought: continue
    brought.add(name)
    try: todo += [s for s in requires(name) or () if "extra ==" not in s]
    except PackageNotFoundError: pass
gone = {{m for m, ds in packages_distributions().items() if not {{name_of(d) for d in ds}} & brought and m != "pgolf"}}
class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in gone else super().find_spec(name, path, target)
sys.meta_path = [Present if f is PathFinder else f for f in sys.meta_path]
'''


@pytest.fixture(scope="session")
def bare(root, tmp_path_factory):
    "PYTHONPATH of an installation without the lab extras"
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root / "settings.ini")
    folder = tmp_path_factory.mktemp("bare")
    specs = settings["DEFAULT"]["requirements"].split()
    (folder / "sitecustomize.py").write_text(WITHOUT_EXTRAS.format(specs=specs))
    return f"{root}{os.pathsep}{folder}"


@pytest.mark.parametrize("line, says", [
    ("pgolf_data sp1024 --root-prefix datasets --shards 0", "--shards 0: ask for 1"), ("pgolf_data sp1024 --root_prefix=datasets --shards 0", "--shards 0: ask for 1"),
    ("pgolf_train tiny --other-code --nproc -1", "nproc must be at least 0"), ("pgolf_score nowhere --any-work --nproc -1", "--nproc must be at least 0"),
    ("pgolf_train tiny --nproc 0 --dry", "say how many GPUs"),
    ("pgolf_submit run --github-id me", "name the folder to make"), ("pgolf_sample nowhere --top-p 0.5", "nowhere does not exist"),
    ("pgolf_train tiny --no-such", "unrecognized arguments: --no-such")])
def test_an_option_of_two_words_may_be_typed_with_a_hyphen(typed, line, says):
    done = typed(line.split())
    assert done.returncode in (1, 2) and says in done.stderr, done.stderr


@pytest.mark.parametrize("name", ["pgolf_data", "pgolf_train", "pgolf_score", "pgolf_audit", "pgolf_submit", "pgolf_upload"])
def test_help_needs_no_extras(typed, bare, name):
    done = typed([name, "--help"], PYTHONPATH=bare)
    assert done.returncode == 0 and name in done.stdout, done.stderr


@pytest.mark.slow
def test_a_run_needs_no_extras(typed, bare, tmp_path, small_text):
    small = "vocab=320 dim=64 heads=2 kv_heads=1 layers=2 batch_tokens=2048 seq_len=256"
    words = ["--steps", "2", "--set", small, "--data", small_text, "--out", "run"]
    for line in (["pgolf_train", "tiny", *words], ["pgolf_score", "run"], ["pgolf_audit", "run"]):
        done = typed(line, PYTHONPATH=bare)
        assert done.returncode == 0, done.stderr


BESIDE = '''
"A script beside a clone called pgolf, which an editable installation serves through a finder that comes last"
import importlib.util, sys
from importlib.machinery import PathFinder
ROOT = {root!r}
class Editable:
    def find_spec(self, name, path=None, target=None):
        if name == "pgolf": return importlib.util.spec_from_file_location(name, ROOT + "/pgolf/__init__.py")
        if name.startswith("pgolf.") and name.count(".") == 1: return PathFinder.find_spec(name, path=[ROOT + "/pgolf"])
sys.meta_path = [f for f in sys.meta_path if "editable" not in str(f).lower()] + [Editable()]
from pgolf.lab.launch import run_command
run_command([sys.executable, "-c", "import pgolf.lab.launch; print('found')"])
'''


def test_a_script_beside_a_clone_called_pgolf_starts_processes(root, tmp_path):
    (tmp_path / "pgolf" / "nbs").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(BESIDE.format(root=str(root)))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "found\n"), done.stderr


@pytest.mark.parametrize("words, said", [
    (["--set", "dim=8 dim=16"], "dim stands 2 times"), (["--set", '{"dim": 8, "dim": 16}'], "dim stands 2 times"),
    (["--set", '{"dim":'], "as JSON"), (["--set", '{"a":' * 100_000], "as JSON"), (["--set", "[" * 200_000], "write name=value"), (["--set", "layers=" + "-" * 100_000 + "1"], "layers is '---"), (["--seed", str(2**70)], "seed must be from"),
    (["--set", "dim=1000000000"], "dim is 1000000000"), (["--nproc", "-1"], "nproc must be at least 0"),
    (["--steps", "-1"], "steps must be at least 0"), (["--data", "nowhere"], "nowhere"), (["--out", "/proc/x"], "/proc/x cannot be made"),
    (["--set", "calibration=1000000000"], "tokens of calibration (calibration=1000000000"),
    (["--set", "dim=100000 heads=100 kv_heads=100"], "an artifact holds at most 268,435,456"), (["--slurm", "cluster=lsf"], "must be slurm or local")])
def test_what_cannot_be_meant_is_a_sentence_before_anything_is_made(tmp_path, monkeypatch, capsys, words, said):
    from pgolf.lab.commands import pgolf_train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pgolf_train", "tiny", *words])
    asked = {name.lstrip("-"): int(value) if name in ("--seed", "--nproc", "--steps") else value for name, value in zip(words[::2], words[1::2])}
    with pytest.raises(SystemExit) as stop:
        pgolf_train("tiny", **asked)
    err = capsys.readouterr().err
    assert stop.value.code == 1 and said in err and err.count("\n") == 1 and len(err) < 1000, err[:1000]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_is_seen_before_any_data_is_made(tmp_path, monkeypatch, capsys):
    from pgolf.lab.commands import pgolf_train
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(SystemExit):
        pgolf_train("tiny", out="mine")
    assert "mine holds files but no run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_what_a_phase_says_of_its_failure_is_said_once(tmp_path, monkeypatch):
    import pgolf.lab.conduct as conductor
    from pgolf.lab.launch import CommandError
    from pgolf.recipes.phases import write_recipe
    from pgolf.recipes.recipes import get
    from pgolf.recipes.run import Run
    run = Run(write_recipe(get("tiny", "smoke"), tmp_path / "run"))
    child = "import sys; print('start'); sys.stderr.write('train: a shard is gone: fetch it\\n'*2); sys.exit(1)"
    monkeypatch.setattr(conductor, "torchrun", lambda *_: [sys.executable, "-c", child])
    shown = []
    with pytest.raises(CommandError) as failed:
        conductor.conduct(run, "train", show=shown.append)
    assert shown == ["start"] and str(failed.value) == f"train: a shard is gone: fetch it (all lines: {run.folder / 'train.log'})"


def test_a_phase_before_its_time_says_what_is_missing(tmp_path):
    from pgolf.ground.settings import ConfigError
    from pgolf.recipes.phases import pack_run, score_run, write_recipe
    from pgolf.recipes.recipes import get
    write_recipe(get("tiny", "smoke"), tmp_path / "run")
    for phase, name in ((pack_run, "weights.pt"), (score_run, "model.pgolf")):
        with pytest.raises(ConfigError, match=f"run has no {name} yet: give the command that began the run again"):
            phase(tmp_path / "run", None)


def test_without_a_recipe_all_are_listed(typed, tmp_path):
    done = typed(["pgolf_train"])
    assert done.returncode == 1 and "tiny, pr761" in done.stderr and done.stderr.count("\n") == 1


def test_a_printed_recipe_runs_from_its_file_and_a_wrong_field_is_named(tmp_path, monkeypatch, capsys, small_text):
    import pgolf.lab.conduct
    from pgolf.lab.commands import pgolf_train
    from pgolf.recipes import get
    from pgolf.recipes.phases import read_recipe
    def pretend(run, phase, *_): (run.folder / "model.pgolf").write_bytes(b"packed")
    monkeypatch.setattr(pgolf.lab.conduct, "conduct", pretend)
    monkeypatch.chdir(tmp_path)
    pgolf_train("pr1536", scale="smoke", seed=3, set="vocab=320", print_recipe=True)
    text = capsys.readouterr().out
    (tmp_path / "my.json").write_text(text)
    (tmp_path / "my.yaml").write_text(text)
    for file in ("my.json", "my.yaml"):
        pgolf_train(file, seed=3, data=str(small_text), out=f"run-{file}")
        assert read_recipe(f"run-{file}") == get("pr1536", "smoke", seed=3, vocab=320)
    capsys.readouterr()
    for old, new, says in (('"layers"', '"layerz"', "did you mean 'layers'?"), ('"limit": ', '"limit": "much", "x": ', "there is no field 'x'")):
        (tmp_path / "my.json").write_text(text.replace(old, new, 1))
        with pytest.raises(SystemExit): pgolf_train("my.json", data=str(small_text))
        err = capsys.readouterr().err
        assert "my.json: " in err and says in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_a_run_is_sent_as_a_job(tmp_path, monkeypatch, capsys, small_text, root):
    import time
    from pgolf.lab.commands import pgolf_train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    pgolf_train("tiny", scale="smoke", steps=2, set="vocab=320", data=str(small_text), out="run", slurm="cluster=local")
    assert "is sent; its lines: " in capsys.readouterr().out
    until = time.monotonic() + 200
    while not (tmp_path / "run" / "pack.json").exists() and time.monotonic() < until: time.sleep(0.5)
    assert (tmp_path / "run" / "model.pgolf").exists(), [p.read_text()[-500:] for p in (tmp_path / "jobs").glob("*.err")]


def test_a_token_beyond_the_vocabulary_is_found_before_the_first_step(tmp_path, small_text):
    import numpy as np
    from pgolf.recipes import get
    from pgolf.recipes.run import Run, begin
    from pgolf.text.dataset import open_dataset
    from pgolf.text.shards import SHARD_HEADER, ShardError
    from pgolf.text.sources import local_dataset
    dataset = local_dataset(small_text, tmp_path / "data", 320)
    ids = np.memmap(dataset.train[-1], "<u2", "r+", SHARD_HEADER)
    ids[-1] = 320
    ids.flush()
    with pytest.raises(ShardError, match="token 320 at .* is not below the vocabulary size 320"):
        begin(Run(tmp_path / "run"), get("tiny", "smoke", vocab=320), open_dataset(dataset.train[0].parent))
    assert not (tmp_path / "run").exists()
