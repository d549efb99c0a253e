"Many runs through submitit's local executor"
from dataclasses import replace

import pytest

from pgolf.data import build_dataset
from pgolf.recipes import get
from pgolf.sweep import SweepError, launch_many, sweep_table, variations, wait_for_all

SMALL = dict(vocab=300, dim=16, layers=2, heads=2, kv_heads=1, rotary_dims=4, steps=6, batch_tokens=128, train__seq_len=32, log_every=1)


@pytest.mark.slow
def test_a_sweep_names_the_run_that_failed_and_repeats_only_that(tmp_path):
    words = "the cat sat on a mat and saw the rat that ate the malt in the house that Jack built".split()
    build_dataset([(f"doc{i}", " ".join(words[(i * 7 + j * (1 + i % 5)) % len(words)] for j in range(300))) for i in range(40)], tmp_path, vocab=300, name="toy")
    data, root = tmp_path / "datasets" / "toy_sp300", tmp_path / "runs"
    grid = variations("tiny", SMALL, seed=[1, 2])
    spoiled = {**grid, "seed=2": replace(grid["seed=2"], train=replace(grid["seed=2"].train, batch_tokens=100))}
    jobs = launch_many(spoiled, root, data, at_once=2)
    with pytest.raises(SweepError, match="1 of 2 runs failed: seed=2 .see .*err"): wait_for_all(jobs)
    first = (root / "seed=1" / "weights.pt").stat().st_mtime_ns
    wait_for_all(launch_many(grid, root, data, at_once=2))
    assert (root / "seed=1" / "weights.pt").stat().st_mtime_ns == first
    one, two = sweep_table(root, grid)
    assert one["steps"] == two["steps"] == 6 and one["loss"] != two["loss"] and one["seconds"] > 0


def test_a_sweep_of_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="muon_rate"): variations("tiny", {}, muon_rate=[1])
    assert get("tiny").train == variations("tiny", {}, seed=[get("tiny").train.seed]).popitem()[1].train
