"Training: schedules against the reference, averaging, interruptions of every kind, any number of ranks"
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.text.data import build_dataset
from pgolf.ground.settings import ConfigError
from pgolf.model import Recurrence
from pgolf.pack.rounding import round_rows
from pgolf.ground.files import FileError, save_state
from pgolf.ground.settings import from_plain, to_json
from pgolf.train.checkpoint import load_weights, newest_checkpoint
from pgolf.train.config import TrainConfig
from pgolf.recipes import get
from pgolf.train.matrix import MatrixOptimizer
from pgolf.train.muon import Muon
from pgolf.train.qat import FakeQuant
from pgolf.train.run_log import read_log
from pgolf.train.schedule import budget_used, lr_frac, lr_iters, lr_multiplier
from pgolf.train.stopping import TrainError, TrainStopped
from pgolf.train.train import train
from pgolf.train.trainer import Trainer, train_step
from train_tools import QUICK, RECIPES, TINY, environment, recipe, run_python, run_ranks, toy_dataset, travelling, write_recipe


@pytest.fixture
def dataset(tmp_path): return toy_dataset(tmp_path / "data")


def steps_of(run): return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in read_log(run / "train.jsonl") if r["event"] == "step"]


def same(a, b): return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def quiet(*args, **kw): return train(*args, progress=False, **kw)


def do_at(step, action):
    "An on_log that does something once a step is done"
    return lambda r: action() if r["event"] == "step" and r["step"] == step else None


class PowerCut(Exception): pass


def power_cut(): raise PowerCut


# --- schedules ---

FINAL_MOMENTUM = {"pr1536": .97}


@pytest.mark.parametrize("pr", ["pr761", "pr1232", "pr1696", "pr1536", "pr1992"])
def test_schedules_of_the_reference(golden, pr):
    "Multiplier and momentum at every sampled point, exactly, under a wall clock (in ms, as there) and under steps"
    facts = json.loads((golden / "schedules.json").read_text())[pr]
    reserve = 12_000. if pr in ("pr1536", "pr1992") else 0.
    for mode in ("wallclock", "steps_20000", "steps_1000"):
        f = facts[mode]
        form = dict(schedule="iters", warmdown_iters=f["warmdown_iters"]) if f["warmdown_iters"] else dict(schedule="frac", warmdown_frac=f["warmdown_frac"])
        cap = dict(max_seconds=1000. * f["max_wallclock_s"], reserve_seconds=reserve) if "max_wallclock_s" in f else dict(steps=f["iterations"])
        cfg = TrainConfig(matrix=Muon(momentum=FINAL_MOMENTUM.get(pr, .99)), **form, **cap)
        for p in f["points"]:
            assert lr_multiplier(cfg, p["step"], p.get("elapsed_ms", 0.)) == p["lr_mul"], (mode, p)
            assert cfg.matrix.momentum_at(p["step"]) == p["muon_momentum"], (mode, p)


def test_switches_of_the_reference(golden):
    facts = json.loads((golden / "schedules.json").read_text())
    for pr in ("pr1536", "pr1992"):
        f = facts[pr]["switches_wallclock"]
        used = lambda ms: budget_used(0, 20_000, ms, f["effective_ms"])
        assert used(f["looping_at_ms"]) >= f["looping_frac"] > used(f["looping_at_ms"] - 1)
    f, ms = facts["pr1696"]["switches_wallclock"], facts["pr1696"]["wallclock"]["ms_per_step"]
    mul = lambda step: lr_iters(step, 20_000, 3500, step * ms, 600_000.)
    for step, threshold in ((f["swa_first_step_scale_lt_0p2"], .2), (f["late_qat_first_step_scale_lt_0p15"], .15)):
        assert mul(step) < threshold <= mul(step - 1)


def test_schedules_at_points_computed_by_hand():
    "What the reference's vectors check, for those who do not have them"
    form_a = TrainConfig(steps=20_000, warmdown_iters=3500, max_seconds=600.)
    form_b = TrainConfig(steps=1000, schedule="frac", warmdown_frac=.72, max_seconds=600., reserve_seconds=12.)
    a = [lr_multiplier(form_a, s, s * .1) for s in (0, 1, 2499, 2500, 4250, 6000)]     # 100 ms a step: 350 s of decline
    assert a == pytest.approx([1, 1, 1, 1, .5, 0], abs=1e-9) and a[4] < a[3]
    b = [lr_multiplier(form_b, 5, t) for t in (0., 588 * .28, 588 * .64, 588., 600.)]
    assert b == pytest.approx([1, 1, .5, 0, 0], abs=1e-9)
    by_steps = [lr_multiplier(replace(form_a, max_seconds=0.), s, 1e9) for s in (16_499, 16_500, 18_250, 19_999)]
    assert by_steps == [1, 1, .5, 1 / 3500]
    assert [Muon().momentum_at(s) for s in (0, 750, 1500, 9999)] == pytest.approx([.92, .955, .99, .99])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 500), st.integers(0, 800), st.just(0.) | st.floats(1e-3, 1), st.floats(0, 1))
def test_multipliers_fall_from_one_to_the_floor(steps, warmdown, frac, floor):
    a = [lr_iters(s, steps, warmdown) for s in range(steps)]
    b = [lr_frac(s / steps, frac, floor) for s in range(steps + 1)]
    for curve in (a, b): assert all(1 >= x >= y >= 0 for x, y in zip(curve, curve[1:]))
    assert a[-1] == 1 / warmdown if warmdown else a[-1] == 1
    assert b[-1] == (floor if frac else 1)


@settings(max_examples=40, deadline=None)
@given(st.builds(TrainConfig, steps=st.integers(1, 10**6), max_seconds=st.floats(13, 1e6), reserve_seconds=st.floats(0, 12),
                 averaging=st.sampled_from(["none", "ema", "swa", "swa_ema"]), matrix=st.builds(Muon, lr=st.floats(0, 10), ns=st.sampled_from(["classic", "polar"])), seed=st.integers(0, 2**31)))
def test_a_config_survives_json(cfg): assert from_plain(TrainConfig, json.loads(to_json(cfg))) == cfg


# --- averaging and fake quantisation are used, not only kept ---

@pytest.mark.parametrize("kind", ["none", "ema", "swa", "swa_ema"])
def test_the_exported_weights_are_the_average(kind, dataset, tmp_path):
    cfg = replace(QUICK, averaging=kind, swa_every=3)
    t = Trainer(TINY, cfg, dataset)
    ema, last, snaps = [p.detach().double() for p in t.model.parameters()], None, []
    for _ in range(cfg.steps):
        r = train_step(t)
        last = [p.detach().double() for p in t.model.parameters()]
        ema = [cfg.ema_decay * e + (1 - cfg.ema_decay) * p for e, p in zip(ema, last)]
        if r.record["lr"] < cfg.swa_start and r.record["step"] % 3 == 0: snaps.append(last if kind == "swa" else ema)
    t.loader.close()
    want = {"none": last, "ema": ema}.get(kind) or [sum(s) / len(snaps) for s in zip(*snaps)]
    exported = quiet(TINY, cfg, dataset, tmp_path / "run")
    assert len(snaps) == 2 and all((w - p).abs().max() < 1e-6 for w, p in zip(want, exported.parameters()))
    assert kind == "none" or any((w - p).abs().max() > 1e-3 for w, p in zip(want, last))
    assert same(load_weights(tmp_path / "run" / "weights.pt"), exported)


def test_swa_without_a_snapshot_says_so(dataset, tmp_path):
    with pytest.warns(UserWarning, match="took no snapshot"): quiet(TINY, replace(QUICK, averaging="swa", swa_every=100), dataset, tmp_path / "run")


@pytest.mark.parametrize("clip", ["max", "sigma 12.85"])
def test_training_sees_what_the_exporter_stores(clip, dataset):
    through = FakeQuant(TrainConfig(qat="late", qat_bits=6, qat_clip=clip)).at(.1)
    t = Trainer(TINY, QUICK, dataset)
    for _ in range(2): train_step(t)
    t.loader.close()
    for name, bank in t.model.banks.items():
        assert torch.allclose(through(name, bank), round_rows(bank, 6, clip).dequantize(), atol=1e-6) and not torch.equal(through(name, bank), bank)


@pytest.mark.parametrize("kind", ["late", "soft"])
def test_qat_changes_the_run_from_its_threshold_on(kind, dataset, tmp_path):
    quiet(TINY, QUICK, dataset, tmp_path / "plain"); quiet(TINY, replace(QUICK, qat=kind, qat_start=.5, qat_bits=4), dataset, tmp_path / kind)
    pairs = list(zip(steps_of(tmp_path / "plain"), steps_of(tmp_path / kind)))
    assert all((a[1] == b[1]) == (a[2] >= .5) for a, b in pairs), pairs


# --- what can go wrong on the way ---

def test_a_torn_checkpoint_falls_back_to_the_one_before(dataset, tmp_path):
    cfg, run = replace(QUICK, checkpoint_seconds=1e-9), tmp_path / "run"
    whole = quiet(TINY, cfg, dataset, tmp_path / "whole")
    with pytest.raises(PowerCut): quiet(TINY, cfg, dataset, run, on_log=do_at(9, power_cut))
    older, newest = sorted((run / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=f"{newest.name} is torn"): resumed = quiet(TINY, cfg, dataset, run)
    assert same(whole, resumed) and steps_of(run) == steps_of(tmp_path / "whole")
    assert [r["step"] for r in read_log(run / "train.jsonl") if r["event"] == "resume"] == [int(older.stem[5:])]


def test_nothing_of_another_run_is_used(dataset, tmp_path):
    cfg, run = replace(QUICK, checkpoint_seconds=1e-9), tmp_path / "run"
    with pytest.raises(PowerCut): quiet(TINY, cfg, dataset, run, on_log=do_at(5, power_cut))
    other = replace(cfg, matrix=cfg.matrix.replace(lr=.5))
    with warnings.catch_warnings(), pytest.raises(FileError, match="train.matrix.lr is 0.025, not 0.5"):
        warnings.simplefilter("ignore"); quiet(TINY, other, dataset, run)
    assert steps_of(run)                                                    # refused, and left as it was
    fresh = quiet(TINY, other, dataset, run, resume=False)
    assert same(fresh, quiet(TINY, other, dataset, tmp_path / "clean")) and len(steps_of(run)) == cfg.steps
    with pytest.raises(FileError, match="weights.pt is of another run"): quiet(TINY, cfg, dataset, run)


def test_a_stranger_s_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "owned"),)
    save_state(tmp_path / "step_00000001.pt", {"about": {}, "x": Evil()})
    with pytest.raises(Exception, match="(?i)weights.only"): newest_checkpoint(tmp_path, {})
    assert not (tmp_path / "owned").exists()


def test_nan_stops_with_the_data_and_the_last_good_state(dataset, tmp_path):
    cfg = replace(QUICK, checkpoint_seconds=1e-9)
    def poison(): trainers[0].model.embed.data[3, 0] = math.nan
    trainers, init = [], Trainer.__init__
    def spy(self, *a, **kw): init(self, *a, **kw); trainers.append(self)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Trainer, "__init__", spy)
        with pytest.raises(TrainError, match=r"step 8: the loss is nan.*toy_train_000000.bin at \d+.*step_00000007.pt"):
            quiet(TINY, cfg, dataset, tmp_path / "run", on_log=do_at(7, poison))
    # the checkpoint of step 7 was written after the poison here; the rule is that a step whose loss was read as finite is safe
    assert [s[0] for s in steps_of(tmp_path / "run")] == list(range(1, 8))


def test_a_full_disk_stops_clearly_and_spares_what_was_saved(dataset, tmp_path, monkeypatch):
    cfg, run, fsync = replace(QUICK, checkpoint_seconds=1e-9), tmp_path / "run", os.fsync
    def full(fd): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileError, match="step_00000006.pt could not be written.*No space left.*intact"):
        quiet(TINY, cfg, dataset, run, on_log=do_at(6, lambda: monkeypatch.setattr(os, "fsync", full)))
    monkeypatch.setattr(os, "fsync", fsync)
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000004.pt", "step_00000005.pt"]   # and no leftovers
    assert same(quiet(TINY, cfg, dataset, run), quiet(TINY, cfg, dataset, tmp_path / "whole"))


def test_a_shard_that_vanishes_stops_clearly(tmp_path):
    dataset = toy_dataset(tmp_path / "data", shards=2, tokens=3000)
    spare = dataset.train[1].read_bytes()
    cfg, run = replace(QUICK, steps=20, checkpoint_seconds=1e-9), tmp_path / "run"
    with pytest.raises(TrainError, match="step 1[0-9]: .*toy_train_000001.bin.*saved before it: .*step_000000"):
        quiet(TINY, cfg, dataset, run, on_log=do_at(2, dataset.train[1].unlink))
    dataset.train[1].write_bytes(spare)
    assert same(quiet(TINY, cfg, dataset, run), quiet(TINY, cfg, dataset, tmp_path / "whole"))


def test_impossible_wishes_are_refused_before_training(dataset, tmp_path):
    with pytest.raises(ConfigError, match="vocabulary of 64"): quiet(replace(TINY, vocab=64), QUICK, dataset, tmp_path)
    with pytest.raises(ConfigError, match="cannot be cut"): quiet(TINY, replace(QUICK, batch_tokens=100), dataset, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "data"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(signum, dataset, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainStopped, match=f"{signum.name} after step 5; saved as .*step_00000005.pt") as stop:
        quiet(TINY, QUICK, dataset, run, on_log=do_at(5, lambda: os.kill(os.getpid(), signum)))
    assert stop.value.signum == signum
    assert same(quiet(TINY, QUICK, dataset, run), quiet(TINY, QUICK, dataset, tmp_path / "whole"))
    assert steps_of(run) == steps_of(tmp_path / "whole")


def test_sparse_logging_keeps_its_rhythm_over_a_crash(dataset, tmp_path):
    cfg = replace(QUICK, log_every=5, checkpoint_seconds=1e-9)
    with pytest.raises(PowerCut): quiet(TINY, cfg, dataset, tmp_path / "run", on_log=do_at(10, power_cut))
    quiet(TINY, cfg, dataset, tmp_path / "run")
    assert [s[0] for s in steps_of(tmp_path / "run")] == [5, 10, 12]


def test_the_log_says_where_a_run_came_from(dataset, tmp_path):
    quiet(TINY, QUICK, dataset, tmp_path / "run", name="toy")
    start, *steps, end = read_log(tmp_path / "run" / "train.jsonl")
    assert start["event"] == "start" and start["recipe"] == "toy" and start["seed"] == QUICK.seed and start["ranks"] == 1
    assert start["parameters"] == sum(start["by_role"].values()) == sum(p.numel() for p in load_weights(tmp_path / "run" / "weights.pt").parameters())
    assert {"versions", "hardware", "commit", "attention"} <= set(start) and start["versions"]["torch"] == torch.__version__
    assert set(steps[0]) == {"event", "step", "seconds", "loss", "lr", "momentum", "tokens_per_s", "grad_norm", "memory_mb"}
    assert end["event"] == "end" and end["reason"] == "steps"


def test_recurrence_comes_on_when_its_share_is_used(dataset, monkeypatch):
    seen, model_cfg = [], replace(TINY, parts=(Recurrence(0, 1, 1), *TINY.parts))
    cfg = replace(QUICK, steps=10, recur_at=.35, accum=1, warmup_steps=1)
    t = Trainer(model_cfg, cfg, dataset)
    forward = t.model.forward
    monkeypatch.setattr(t.model, "forward", lambda *a, recurrent, **kw: (seen.append(recurrent), forward(*a, recurrent=recurrent, **kw))[1])
    for _ in range(10): train_step(t)
    t.loader.close()
    assert seen == [False] * 4 + [True] * 6


@pytest.mark.parametrize(("at", "off"), [(.4, 4), (0., 0), (1., 10)])
def test_recurrence_is_due_exactly_at_its_share(at, off, dataset, monkeypatch):
    "The step that begins when exactly `recur_at` of the steps is over is recurrent; with 0 the first one is, with 1 none"
    seen, cfg = [], replace(QUICK, steps=10, recur_at=at, accum=1)
    t = Trainer(replace(TINY, parts=(Recurrence(0, 1, 1), *TINY.parts)), cfg, dataset)
    forward = t.model.forward
    monkeypatch.setattr(t.model, "forward", lambda *a, recurrent, **kw: (seen.append(recurrent), forward(*a, recurrent=recurrent, **kw))[1])
    for _ in range(10): train_step(t)
    t.loader.close()
    assert seen == [False] * off + [True] * (10 - off)


def test_recurrence_is_due_exactly_at_its_share_of_the_clock(dataset, monkeypatch):
    seen, cfg = [], replace(QUICK, max_seconds=10., reserve_seconds=2., recur_at=.25, accum=1)
    t = Trainer(replace(TINY, parts=(Recurrence(0, 1, 1), *TINY.parts)), cfg, dataset)
    forward = t.model.forward
    monkeypatch.setattr(t.model, "forward", lambda *a, recurrent, **kw: (seen.append(recurrent), forward(*a, recurrent=recurrent, **kw))[1])
    for seconds in (0., 1.999, 2., 2.001): train_step(t, seconds)
    t.loader.close()
    assert seen == [False, False, True, True]


# --- another optimizer is a class of its own ---

class Descent(MatrixOptimizer, kind="descent"):
    "Gradient descent with momentum and a second buffer, for these tests"
    def fresh(self, like_nRC): return {"momentum": torch.zeros_like(like_nRC), "size": like_nRC.new_zeros(len(like_nRC), 1, 1)}

    def direction(self, grad_nRC, state, momentum):
        buf = grad_nRC + momentum * state["momentum"]
        size = .9 * state["size"] + .1 * buf.square().mean((-2, -1), keepdim=True)
        return buf / (size.sqrt() + 1e-7), {"momentum": buf, "size": size}


def test_another_matrix_optimizer_trains_and_goes_on(dataset, tmp_path):
    "A kind of its own, with a state of its own: it learns, survives JSON, and a crash changes nothing"
    cfg = replace(QUICK, steps=30, warmdown_iters=10, matrix=Descent(lr=.005, wd=0.), checkpoint_seconds=1e-9)
    assert from_plain(TrainConfig, json.loads(to_json(cfg))) == cfg
    whole = quiet(TINY, cfg, dataset, tmp_path / "whole")
    losses = [s[1] for s in steps_of(tmp_path / "whole")]
    assert losses[-1] < losses[0] - .3
    with pytest.raises(PowerCut): quiet(TINY, cfg, dataset, tmp_path / "run", on_log=do_at(9, power_cut))
    assert same(whole, quiet(TINY, cfg, dataset, tmp_path / "run"))


def test_overrides_reach_into_the_optimizer():
    "The old names, a dot, and the field alone where it is the only one"
    matrix = lambda **changes: get("tiny", **changes).train.matrix
    assert matrix(muon_lr=.03) == matrix(**{"muon.lr": .03}) == matrix(train__muon_lr=.03) == matrix().replace(lr=.03)
    assert matrix(muon_row_norm=True, ns="polar", muon_momentum_start=.5) == matrix().replace(row_norm=True, ns="polar", momentum_start=.5)
    with pytest.raises(ConfigError, match="muon_rl"): get("tiny", muon_rl=.03)
    with pytest.raises(ConfigError, match="Muon.ns is 'cubic': it must be one of classic, polar"): get("tiny", ns="cubic")


# --- processes ---

@pytest.fixture(scope="module")
def real_dataset(tmp_path_factory):
    "A dataset folder with a tokenizer, as the command line wants it"
    words = "the cat sat on a mat and saw the rat that ate the malt in the house that Jack built".split()
    docs = [(f"doc{i}", " ".join(words[(i * 7 + j * (1 + i % 5)) % len(words)] for j in range(300))) for i in range(40)]
    build_dataset(docs, tmp_path_factory.mktemp("corpus") , vocab=300, name="toy")
    return next(tmp_path_factory.getbasetemp().glob("corpus*/datasets/toy_sp300"))


def test_the_command_line_stops_on_sigterm_and_goes_on(real_dataset, tmp_path):
    run, model = tmp_path / "run", replace(TINY, vocab=300)
    write_recipe(run, model, replace(QUICK, steps=400, warmdown_iters=100))
    command = [sys.executable, "-m", "pgolf.train.command", str(run), "--data", str(real_dataset)]
    p = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    end = time.time() + 60
    while time.time() < end and p.poll() is None and len(steps_of(run)) < 10: time.sleep(.005)
    p.terminate()
    err = p.communicate(timeout=60)[1]
    assert p.returncode == 128 + signal.SIGTERM and "Traceback" not in err and "stopped by SIGTERM after step" in err, err
    done = run_python(*command[1:])
    assert done.returncode == 0 and "step 400/400" in done.stderr and [s[0] for s in steps_of(run)] == list(range(1, 401))
    assert [r["event"] for r in read_log(run / "train.jsonl") if r["event"] != "step"] == ["start", "resume", "end"]


def test_the_command_line_says_what_is_wrong_in_one_line(real_dataset, tmp_path):
    for model, train_cfg, word in ((replace(TINY, vocab=300), replace(QUICK, batch_tokens=100), "cannot be cut"), (None, None, "recipe.json cannot be read")):
        if model: write_recipe(tmp_path / word, model, train_cfg)
        p = run_python("-m", "pgolf.train.command", tmp_path / word, "--data", real_dataset)
        assert p.returncode == 1 and word in p.stderr and "Traceback" not in p.stderr and len(p.stderr.splitlines()) == 1, p.stderr


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    p = run_python("tests/train_killed.py" if os.path.exists("tests/train_killed.py") else __file__.replace("test_train.py", "train_killed.py"), tmp_path, 10)
    assert p.returncode == 0, p.stderr
    told = json.loads(p.stdout)
    assert len(told) == 10 and all(t["killed"] and t["status"] == 0 and t["log"] and t["weights"] for t in told), told
    assert sum(bool(t["resumed_at"]) for t in told) >= 7        # most had a checkpoint to go on from


@pytest.mark.slow
def test_one_two_and_four_ranks_make_the_same_curves(tmp_path):
    """Every recipe's optimizers, clipping at work: losses within 1e-4 over 20 steps, and the same weights. A run begun on one
    rank goes on with two and four, and under a clock all ranks stop at the same step."""
    worker = __file__.replace("test_train.py", "train_on_ranks.py")
    begun = travelling(checkpoint_seconds=1e-9)
    with pytest.raises(PowerCut): quiet(TINY, begun, toy_dataset(tmp_path / "data0"), tmp_path / "begun", on_log=do_at(7, power_cut))
    for world in (2, 4): shutil.copytree(tmp_path / "begun", tmp_path / str(world) / "travelling")
    for world in (1, 2, 4):
        p = run_ranks(world, worker, tmp_path / str(world), tmp_path / f"data{world}")
        assert p.returncode == 0, p.stderr[-3000:]
        assert read_log(tmp_path / str(world) / "timed" / "train.jsonl")[-1]["reason"] == "seconds"
    one = steps_of(tmp_path / "1" / "travelling")
    for world in (2, 4):
        assert "resume" in {r["event"] for r in read_log(tmp_path / str(world) / "travelling" / "train.jsonl")}
        assert max(abs(a[1] - b[1]) for a, b in zip(one, steps_of(tmp_path / str(world) / "travelling"), strict=True)) < 1e-4
    for name in RECIPES:
        one = steps_of(tmp_path / "1" / name)
        assert len(one) == 20 and sum(s[3] > recipe(name)[1].clip for s in one) >= 10 and one[-1][1] < one[0][1] - 1
        weights = load_weights(tmp_path / "1" / name / "weights.pt").state_dict()
        for world in (2, 4):
            many = steps_of(tmp_path / str(world) / name)
            assert max(abs(a[1] - b[1]) for a, b in zip(one, many, strict=True)) < 1e-4, (name, world)
            others = load_weights(tmp_path / str(world) / name / "weights.pt").state_dict()
            assert all(torch.allclose(weights[n], others[n], atol=1e-4) for n in weights), (name, world)
