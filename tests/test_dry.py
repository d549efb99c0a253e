"The dry run: every recipe on one and on eight fake GPUs, the command, and mistakes that it must find"
import pytest

from pgolf.lab.dry import dry_runs, dry_table, report_lines
from pgolf.lab.fake_cuda import stub_missing
from pgolf.recipes.recipes import get, names

pytestmark = pytest.mark.skipif(bool(stub_missing()), reason=stub_missing() or "a fake GPU can be made")
FULL = [n for n in names() if n != "tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_the_training_step_of_every_recipe_fits_on_one_and_on_eight(name):
    one, = dry_runs(name, (1,), compiled=False, parts=("training",)) # calibration is the same on any number
    eight, = dry_runs(name, (8,), compiled=False)
    for report in (one, eight):
        assert report["stopped"] == {}
        step = report["forms"]["step"]
        assert 1 < step["peak_gib"] <= 78
        assert step["syncs"] == {} and step["mixed"] == {} and step["slow_tflop"] == 0
    assert one["tokens"] * one["accum"] == 8 * eight["tokens"] * eight["accum"]
    assert one["clock"] is False
    late = [problem for problem in eight["problems"] if problem.startswith("evaluation takes")]
    assert not late or not get(name).eval_seconds
    assert all(line.startswith("forecast") for line in report_lines(eight))
    assert name in repr(dry_table([one, eight]))


def test_a_process_that_dies_is_reported(monkeypatch):
    from pgolf.lab import dry
    right = dry.with_fake_gpu
    dying = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    monkeypatch.setattr(dry, "with_fake_gpu", lambda code, *args: right(dying, *args))
    report, = dry_runs("tiny", (1,), compiled=False)
    assert report["problems"] == ["steps stops: its process died of signal 11, so nothing is known of this part"]


def test_a_micro_batch_that_cannot_be_cut_is_a_problem():
    report, = dry_runs("tiny", (8,), compiled=False)
    assert any("cannot be cut over 8 ranks" in p for p in report["problems"])


def test_a_step_that_fetches_a_number_is_found():
    "The command runs the same code in its own process; here a wrong step is put in place of the right one"
    import subprocess
    from pgolf.lab.fake_cuda import with_fake_gpu
    code = """
from pgolf.lab import dry_steps
from pgolf.lab.dry_steps import *
from pgolf.recipes.recipes import get
from pgolf.train import trainer
right = trainer.micro_loss
def fetching(*args):
    loss = right(*args)
    loss.item()
    return loss
trainer.micro_loss = fetching
with stage() as (mode, ledger):
    t = fake_trainer(get("tiny", "smoke"), 1, mode)
    try: step_counts(t, ledger, True)
    except Exception as e: print(type(e).__name__, dict(ledger.take().syncs), flush=True)
import os; os._exit(0)
"""
    done = subprocess.run(with_fake_gpu(code), capture_output=True, text=True)
    assert "DataDependentOutputException" in done.stdout, done.stderr[-1000:]
