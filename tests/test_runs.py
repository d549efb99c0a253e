"The record notebook as a whole: executed by papermill, refused, broken, killed"
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest

from pgolf import recipes
from pgolf.pack.reading import unpack
from pgolf.text.data import open_dataset
from pgolf.lab.parameters import Refusal

NOTEBOOK = "nbs/runs/record.ipynb"
ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
pytestmark = pytest.mark.slow


def command(out, module="pgolf.lab.execute", **parameters):
    "The papermill command of a run into the folder `out`"
    asked = {"out": str(out), **parameters}
    words = [part for name, value in asked.items() for part in ("-p", name, str(value))]
    return [sys.executable, "-m", module, NOTEBOOK, f"{out}.ipynb", "--no-progress-bar", *words]


def papermill(bench, out, **parameters):
    "Runs it to its end: exit code, all it said, the executed notebook"
    out.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command(out, **parameters), cwd=bench, env=ENV, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    return done.returncode, done.stdout, nbformat.read(f"{out}.ipynb", as_version=4)


def mentioning(word):
    "Processes alive whose command line holds this word"
    found = []
    for p in psutil.process_iter(["cmdline"]):
        if any(word in part for part in p.info["cmdline"] or []) and p.status() != psutil.STATUS_ZOMBIE:
            found.append(p)
    return found


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def finished(bench, tmp_path_factory, small_run):
    "One whole small run"
    out = tmp_path_factory.mktemp("finished") / "run"
    code, said, nb = papermill(bench, out, **small_run)
    assert code == 0 and "eavesdropping" not in said, said  # a kernel at a port warns of that
    return out, nb


def test_a_run_ends_with_table_pictures_and_record(finished, small_run):
    out, nb = finished
    record, score = json.loads((out / "run.json").read_text()), json.loads((out / "score.json").read_text())
    assert record["finished"] and record["parameters"]["steps"] == small_run["steps"]
    assert {"data", "train", "pack", "score"} <= record["seconds"].keys()
    assert record["versions"]["torch"] and record["hardware"] and "commit" in record
    assert record["result"]["artifact_sha256"] == sha256(out / "model.pgolf")
    assert record["result"]["val_bpb"] == score["val_bpb"]
    texts = ["".join(o.text for o in c.outputs if o.output_type == "stream") for c in nb.cells if c.cell_type == "code"]
    table, verdict = next(t for t in texts if "artifact bytes" in t), texts[-1]
    audit = json.loads((out / "audit.json").read_text())
    pages = ["".join(o.data["text/html"]) for o in nb.cells[-1].outputs if "text/html" in o.get("data", {})]
    assert audit["ok"] and "no rule is broken" in verdict and "skipped" in verdict
    assert len(pages) == 1 and "causal" in pages[0] and "<td>" in pages[0], "in JupyterLab the rules are a table"
    for word in ("val_bpb", "tokens", "bytes", "artifact bytes", "seconds"):
        assert word in table
    outputs = [o for c in nb.cells if c.cell_type == "code" for o in c.outputs]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3


def test_the_score_is_that_of_the_bytes_of_the_text(finished):
    out, _ = finished
    score, each = json.loads((out / "score.json").read_text()), np.load(out / "positions.npz")
    dataset = open_dataset(json.loads((out / "run.json").read_text())["settings"]["data"])
    ids = dataset.val_ids()
    assert score["tokens"] == len(each["nats"])
    assert score["bytes"] == each["bytes"].sum() <= int(dataset.byte_table().count(ids[:-1], ids[1:]).sum())
    assert np.isclose(score["val_bpb"], each["nats"].sum() / np.log(2) / each["bytes"].sum())


def test_the_same_seed_gives_the_same_artifact_and_score(bench, tmp_path, finished, small_run):
    out, _ = finished
    code, said, _ = papermill(bench, tmp_path / "again", **small_run)
    assert code == 0, said
    first, second = (json.loads((f / "run.json").read_text())["result"] for f in (out, tmp_path / "again"))
    assert first == second


def test_two_ranks_find_what_one_finds(bench, tmp_path, small_text):
    "Trained and scored under torchrun, test-time training and cache on"
    small = {"recipe": "pr761", "scale": "smoke", "data": str(small_text), "steps": 6, "compressors": False, "audit": False,
             "overrides": "vocab=320 ttt__chunk_tokens=512"}
    found = []
    for nproc in (1, 2):
        code, said, _ = papermill(bench, tmp_path / f"ranks{nproc}", nproc=nproc, **small)
        assert code == 0, said
        found.append(json.loads((tmp_path / f"ranks{nproc}" / "run.json").read_text())["result"])
    one, two = found
    assert one["tokens"] == two["tokens"] and one["bytes"] == two["bytes"]
    assert two["val_bpb"] == pytest.approx(one["val_bpb"], rel=2e-3)


def test_an_unknown_parameter_fails_papermill_in_a_sentence(bench, tmp_path):
    code, said, _ = papermill(bench, tmp_path / "run", module="papermill", sede=3)
    last = said.strip().splitlines()[-1]
    assert code != 0 and last.startswith("Refusal: there is no parameter 'sede'; did you mean 'seed'?")
    assert not (tmp_path / "run").exists()


def refusal(bench, parameters):
    "The sentence with which the notebook's cells, run here with these parameters, refuse to go on"
    nb, scope = nbformat.read(bench / NOTEBOOK, as_version=4), {}
    for cell in nb.cells:
        if cell.cell_type == "code":
            assert "run_command(" not in cell.source, "got as far as training"
            try:
                exec(cell.source, scope)
            except Refusal as e:
                return str(e)
            if "parameters" in cell.metadata.get("tags", []):
                scope |= parameters


BAD = {
    "type": ({"seed": "one"}, "parameter seed must be int, not 'one'"),
    "recipe": ({"recipe": "tinny"}, "did you mean 'tiny'?"),
    "override": ({"overrides": "layres=2"}, "layers"),
    "no pair": ({"overrides": "layers 2"}, "name=value"),
    "value": ({"overrides": {"heads": 5}}, "heads"),
    "folder": ({"data": "no/such/folder"}, "no/such/folder"),
    "steps": ({"steps": -1}, "steps must be at least 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused_before_anything_is_made(bench, tmp_path, monkeypatch, case):
    monkeypatch.chdir(bench)
    parameters, words = BAD[case]
    said = refusal(bench, {**parameters, "out": str(tmp_path / "run")})
    assert words in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_is_refused(bench, tmp_path, monkeypatch, finished):
    monkeypatch.chdir(bench / "nbs" / "runs")
    data = json.loads((finished[0] / "run.json").read_text())["settings"]["data"]
    said = refusal(bench, {"data": data, "out": str(tmp_path / "run")})
    assert "vocabulary" in said and "320" in said and "1024" in said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_left_alone(bench, tmp_path, monkeypatch, small_run):
    monkeypatch.chdir(bench)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "holds files but no run" in refusal(bench, {**small_run, "out": str(tmp_path / "mine")})
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_failing_training_process_fails_the_notebook_with_its_last_lines(bench, tmp_path, finished, small_run):
    wild = {**small_run, "overrides": small_run["overrides"] + " embed_lr=1e30"}
    code, said, nb = papermill(bench, tmp_path / "run", **wild)
    assert code != 0
    end = said[said.rindex("CommandError"):]
    assert "gradient norm nan" in end and "_train_000000.bin at" in end and "elastic" not in end
    assert mentioning(str(tmp_path / "run")) == []
    assert not (tmp_path / "run" / "model.pgolf").exists()


def reads_as_whole(out):
    "Reads everything in a run folder that has its final name, as a later run would"
    for path in out.glob("*.json"):
        json.loads(path.read_text())
    if (out / "model.pgolf").exists():
        unpack((out / "model.pgolf").read_bytes())
    if (out / "recipe.json").exists():
        recipes.read_recipe(out)
    if (out / "positions.npz").exists():
        assert np.load(out / "positions.npz")["nats"].size


def wait_gone(word, seconds):
    end = time.monotonic() + seconds
    while mentioning(word) and time.monotonic() < end:
        time.sleep(0.1)
    return [p.cmdline() for p in mentioning(word)]


def test_a_killed_run_leaves_nothing_running_and_nothing_half_written(bench, tmp_path, finished, small_run):
    out, rng = tmp_path / "run", random.Random(time.time_ns())
    whole = json.loads((finished[0] / "run.json").read_text())["result"]
    moments = [rng.uniform(1, 14) for _ in range(3)]
    print("killed after", moments)   # shown when the test fails
    for moment in moments:
        run = subprocess.Popen(command(out, **small_run), cwd=bench, env=ENV, stdin=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        kernels = psutil.Process(run.pid).children(recursive=False)
        run.kill()
        run.wait()
        for kernel in kernels:
            kernel.kill()
        assert wait_gone(str(out), 30) == []
        reads_as_whole(out)
    code, said, _ = papermill(bench, out, **small_run)
    assert code == 0, said
    assert json.loads((out / "run.json").read_text())["result"] == whole
