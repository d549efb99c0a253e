"The notebooks that launch many runs, each executed by papermill at the smallest size"
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import pytest

from pgolf.text.build import build_dataset

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(bench, small_text, tmp_path_factory):
    "Executes one notebook into one folder of runs that all share: what all it printed, and its record"
    folder = tmp_path_factory.mktemp("studies")

    def execute(name, record, **parameters):
        asked = {"scale": "smoke", "data": small_text, "at_once": 2, "out": folder / "runs", **parameters}
        words = [w for k, v in asked.items() if v is not None for w in ("-p", k, str(v))]
        command = [sys.executable, "-m", "pgolf.lab.execute", f"nbs/runs/{name}.ipynb", str(folder / f"{name}.ipynb"), "--no-progress-bar", *words]
        for again in (True, False): # a run that failed is repeated by launching again, as the message says; the reason is shown
            done = subprocess.run(command, cwd=bench, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500)
            if not done.returncode or not (again and "SweepError" in done.stdout): break
            warnings.warn(f"{name} was launched again: {done.stdout[done.stdout.rindex('SweepError'):]}")
        assert done.returncode == 0, done.stdout[-3000:]
        outputs = [o for c in nbformat.read(folder / f"{name}.ipynb", as_version=4).cells if c.cell_type == "code" for o in c.outputs]
        assert any("image/png" in o.get("data", {}) for o in outputs), "no picture"
        return "".join(o.get("text", "") for o in outputs), json.loads((folder / "runs" / record).read_text())
    return execute


SAME = {"overrides": "vocab=320 limit=550000"}


def test_compare_holds_recipes_against_each_other_and_seeds_takes_its_runs(study):
    said, record = study("compare", "compare.json", recipes="pr1992 best", seeds="1 2", tokens=2048, **SAME)
    assert set(record["scores"]) == {"pr1992", "best"} and all(len(s) == 2 for s in record["scores"].values())
    assert 0 <= record["p"]["pr1992"] <= 1 and max(record["artifact_bytes"]["best"]) <= 550_000
    assert "best beats" in said and "4 runs" not in said
    again, seeds = study("seeds", "seeds-best-smoke.json", recipe="best", seeds="1 2", steps=8, against="2.0 2.01", **SAME)
    assert "done; now" not in again, "a finished run was repeated"
    assert seeds["scores"] == record["scores"]["best"]


def test_ablation_takes_one_technique_away(study):
    said, record = study("ablation", "ablation.json", recipe="pr1992", seeds="1", steps=3, techniques="['test-time training', 'sliding windows']", overrides="vocab=320")
    assert list(record["variants"]) == ["all on", "no sliding windows", "no test-time training"]
    assert len({s[0] for s in record["scores"].values()}) > 1, said


def test_scaling_draws_steps_against_score(study):
    said, record = study("scaling", "scaling.json", lengths="2 8", warmdowns="0.5", seeds="1", overrides="vocab=320 ttt=None eval__cut=full")
    short, long = (record["scores"][f"{n} steps, warmdown 0.5"][0] for n in (2, 8))
    assert long < short and "best warmdown" in said


def test_forms_of_a_text_are_compared_by_bytes_of_the_original(study, small_text, tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    documents = [(p.name, p.read_text()) for p in sorted(small_text.glob("*.txt"))]
    made = (build_dataset(documents, root, 330, name="x", transform=t) for t in ("", "caseops"))
    forms = [dataset.val[0].parent for dataset in made]
    said, record = study("forms", "forms.json", recipe="tiny", forms=[str(f) for f in forms], seeds="1", steps=4, overrides="vocab=330", data=None)
    plain, marked = (f.name for f in forms)
    assert list(record["scores"]) == [plain, marked] and record["bytes"][plain] == record["bytes"][marked]
    assert record["tokens"][plain] != record["tokens"][marked] and "lowest mean" in said
