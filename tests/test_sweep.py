"Many record runs through submitit's local executor"
import json
import subprocess
import sys
import time

import pytest
from test_runs import ENV, wait_gone

from pgolf.recipes.recipes import get
from pgolf.lab.parameters import asked_recipe
from pgolf.lab.study import by_group, sweep_results
from pgolf.lab.sweep import SweepError, check_jobs, grid, launch_many

SMALL = dict(vocab=320, steps=4)


@pytest.mark.slow
def test_a_sweep_names_the_run_that_failed_repeats_only_that_and_trains_once_for_two_scores(tmp_path, bench, small_text):
    fixed = dict(scale="smoke", data=str(small_text), compressors=False, audit=False, overrides=SMALL)
    runs = grid(fixed, recipe=["pr761"], seed=[1, 2])
    runs["full windows"] = {**runs["pr761-seed=1"], "overrides": {**SMALL, "eval__cut": "full"}}
    notebook = bench / "nbs" / "runs" / "record.ipynb"
    spoiled = {**runs, "pr761-seed=2": {**runs["pr761-seed=2"], "overrides": {**SMALL, "batch_tokens": 1000}}}
    said = []
    with pytest.raises(SweepError, match="1 of 3 runs failed: pr761-seed=2: .*batch_tokens 1000 .*.see .*err"):
        check_jobs(launch_many(spoiled, tmp_path, notebook, at_once=2, show=said.append))
    assert len(said) == 2
    first = (tmp_path / "pr761-seed=1" / "run.json").stat().st_mtime_ns
    jobs = launch_many(runs, tmp_path, notebook, at_once=2, show=None)
    check_jobs(jobs)
    assert list(jobs) == ["pr761-seed=2"] and (tmp_path / "pr761-seed=1" / "run.json").stat().st_mtime_ns == first
    one, two, bare = sweep_results(tmp_path, runs)
    assert one["val_bpb"] != two["val_bpb"] and bare["val_bpb"] > one["val_bpb"]
    assert list(by_group([one, two], lambda r: r["recipe"])) == ["pr761"]
    same = [(tmp_path / n / "weights.pt").read_bytes() for n in ("pr761-seed=1", "full windows")]
    assert same[0] == same[1]
    log = (tmp_path / "full windows" / "train.log").read_text() if (tmp_path / "full windows" / "train.log").exists() else ""
    assert "step " not in log, "it trained again"


SWEEP = """
import sys
from pgolf.lab.sweep import launch_many
from pgolf.lab.parameters import Refusal
try: launch_many({"one": dict(scale="smoke", data=sys.argv[3], overrides=dict(vocab=320, steps=100_000))}, sys.argv[1], sys.argv[2])
except Refusal as e: print(e)
"""


@pytest.mark.slow
def test_a_killed_sweep_takes_its_jobs_along_and_a_second_one_is_refused(tmp_path, bench, small_text):
    command = [sys.executable, "-c", SWEEP, str(tmp_path), str(bench / "nbs" / "runs" / "record.ipynb"), str(small_text)]
    first = subprocess.Popen(command, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    training, end = tmp_path / "one" / "train.jsonl", time.monotonic() + 120
    while not training.exists() and time.monotonic() < end:
        time.sleep(0.2)
    assert training.exists(), [f.read_text() for f in (tmp_path / "jobs").glob("*.err")]
    second = subprocess.run(command, env=ENV, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert "another sweep is at work" in second.stdout, second.stderr
    assert first.poll() is None
    first.kill()
    first.wait()
    assert wait_gone(str(tmp_path / "one"), 30) == []


def test_a_sweep_of_an_unknown_field_is_refused(tmp_path):
    with pytest.raises(ValueError, match="muon_rate"):
        launch_many(grid({}, muon_rate=[1]), tmp_path / "runs", "record.ipynb")
    assert not (tmp_path / "runs").exists()
    assert asked_recipe({}) == get("tiny", seed=1)


def test_results_of_an_unfinished_sweep_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.json").write_text(json.dumps({"finished": False}))
    with pytest.raises(SweepError, match="run a in .* is not finished"):
        sweep_results(tmp_path, {"a": {}})
