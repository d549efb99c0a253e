"The GPU benchmark runs all its stages at tiny size on a CPU, so that it cannot rot"
import json

import pytest


@pytest.mark.slow
def test_every_stage_runs_on_a_cpu(tmp_path):
    from benchmarks.gpu import main
    path = tmp_path/"gpu.json"
    out = main(["--device", "cpu", "--minutes", "20", "--json", str(path)]) # a busy machine has time
    assert out["not_run"] == [] and json.loads(path.read_text())["stages"].keys() == out["stages"].keys()
    assert {k: v["failed"] for k, v in out["stages"].items() if "failed" in v} == {}
    assert out["stages"]["loss agrees"]["within"] and out["stages"]["loss agrees"]["kernel"] == "it needs a CUDA device"
    assert out["stages"]["backends agree"]["within"] and out["stages"]["training"]["falls"]
    assert all(v["ms"] > 0 for k, v in out["stages"]["steps best eager"].items() if k.startswith("recurrence"))


def test_without_minutes_it_says_what_it_left_out(tmp_path, capsys):
    from benchmarks.gpu import main
    out = main(["--device", "cpu", "--minutes", "0"])
    assert out["stages"] == {} and "backends agree" in out["not_run"]
    assert "no minutes left for: backends agree" in capsys.readouterr().out
