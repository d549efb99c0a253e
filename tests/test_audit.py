"The referee: catches each cheat by its rule, fails nobody who is honest, never says pass for what did not run"
import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf import audit as referee
from pgolf.audit import RULES, SAMPLED, AuditReport, Effort, Finding, audit_folder, audit_main, audit_recipe, audit_run, check_clock, judge
from pgolf.referee import command
from pgolf.ground.files import sha256_file
from pgolf.referee.cage import of_the_library
from pgolf.referee.caged import Caged, CodedPiece
from pgolf.referee.data import KNOWN_MODELS, tokenizer_part
from pgolf.referee.causal import TOY_TTT
from pgolf.referee.clocks import check_evaluation_clock, run_clocks
from pgolf.referee.gallery import CHEATS, GALLERY_EFFORT, HONEST, SLIDING, try_cheat
from pgolf.referee.ground import brief_training, make_ground, sums
from pgolf.referee.one_model import check_forwards, check_gradients
from pgolf.referee.order import tail_windows
from pgolf.referee.proof import round_trip
from pgolf.referee.rule import Facts, Rule
from pgolf.referee.trial import make_case
from pgolf.text.data import write_shard
from pgolf.score.evaluate import EvalConfig, ModelPredictor, document_spans, evaluate
from pgolf.model.gpt import GPT
from pgolf.score.ngram import NgramConfig
from pgolf.score.wrap import build_predictor
from pgolf.recipes.phases import run_recipe
from pgolf.recipes.recipes import faithful, get
from pgolf.train.stopping import TrainError
from pgolf.score.lora import LoRAConfig


audit = partial(referee.audit, cage=False) # quick, in one process; tests/test_audit_table.py goes through the cage


@pytest.fixture(scope="module")
def ground(tmp_path_factory): return make_ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def finished(ground, tmp_path_factory):
    "A small finished run on the ground's dataset"
    run = tmp_path_factory.mktemp("run") / "tiny-small"
    val = ground.dataset.val_ids()
    short = torch.cat([val[lo:lo + 150] for lo, _ in document_spans(val)[:6].tolist()])
    folder = shutil.copytree(ground.dataset.train[0].parent, run.parent / "topics_sp512")
    shutil.copytree(ground.dataset.tokenizer.parent, run.parent / "tokenizers")
    (folder / "dataset.json").unlink()
    write_shard(folder / "topics_val_000000.bin", short.numpy().astype(np.uint16))
    dataset = referee.open_dataset(folder)
    recipe = get("tiny", vocab=512, dim=32, layers=2, heads=2, kv_heads=1, rotary_dims=8, bigram_hash__buckets=64, bigram_hash__dim=8, batch_tokens=512, train__seq_len=64,
                 eval__seq_len=64, eval__stride=16, steps=6, calibration=1)
    run_recipe(recipe, run, dataset, progress=False)
    return run, dataset


# --- the score, on a stream longer than the slice

class PeeksLate(ModelPredictor):
    "Says that it learns, never does, and reads targets where no short slice comes"
    learns = True
    def log_probs(self, query):
        rows, late = super().log_probs(query).clone(), query.positions > 300
        rows[late, query.stream._ids[query.positions + 1][late]] += 3.0
        return torch.log_softmax(rows, 1)


LONG = "tilt over lora over phases", "all", "all, in order", "document lora", "n-gram over sgd"
LONG_CHEATS = ("circular hints", "prequantisation adaptation", "smear across documents", "learning from the question",
               "side file", "trained on validation")


def with_slow(names, slow):
    "Cases for `parametrize`, those of `slow` marked so"
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]



def sampled(ground, make, claim, **more): return audit(make, ground.ids, ground.table, SLIDING, claim=claim, effort=SAMPLED, seed=3, **more)


@pytest.mark.slow
def test_what_lies_behind_the_slice_is_rescored(ground):
    assert len(ground.ids) > 2 * SAMPLED.positions
    three = CHEATS["best of three passes"].stage(ground)
    assert sampled(ground, three.subject, three.claim).failed == ["rescored"]
    late = lambda: PeeksLate(ground.model)
    score = evaluate(late(), ground.ids, ground.table, SLIDING, accept_illegal=True)
    effort = replace(SAMPLED, windows=12)
    assert "rescored" in audit(late, ground.ids, ground.table, SLIDING, claim=score, effort=effort, seed=3).failed
    learner = lambda: build_predictor(ground.model, (TOY_TTT,))
    honest = evaluate(learner(), ground.ids, ground.table, SLIDING)
    said = sampled(ground, learner, honest)
    assert said.ok and "before the first reveal" in said["rescored"].evidence
    touched = honest.to_json() | {"nats": np.where(np.arange(len(honest.nats)) < 400, honest.nats, honest.nats * 0.9)}
    touched = touched | sums(touched["nats"], honest.nbytes)
    assert sampled(ground, learner, touched)["rescored"].verdict == "pass"   # behind the first reveal: what a sample cannot tell, it does not say
    assert audit(learner, ground.ids, ground.table, SLIDING, claim=touched, effort=SAMPLED, thorough=True)["rescored"].verdict == "fail"


class KeepsTheStream(ModelPredictor):
    "Honest where an audit's slice ends, and no further"
    def __init__(self, model, ids):
        super().__init__(model)
        self.kept = ids
    def log_probs(self, query):
        rows, late = super().log_probs(query).clone(), query.positions > 300
        rows[late, self.kept[query.positions + 1][late]] += 3.0
        return rows.log_softmax(1)


@pytest.mark.slow
def test_who_makes_a_predictor_of_the_stream_is_scored_without_it(ground):
    score = evaluate(KeepsTheStream(ground.model, ground.ids), ground.ids, ground.table, SLIDING)
    make = lambda ids: KeepsTheStream(ground.model, ids)
    for options in (dict(effort=replace(SAMPLED, windows=12), seed=3), dict(effort=SAMPLED, thorough=True)):
        assert "rescored" in audit(make, ground.ids, ground.table, SLIDING, claim=score, **options).failed
    honest = lambda ids: ModelPredictor(ground.model)
    report = audit(honest, ground.ids, ground.table, SLIDING, claim=evaluate(ModelPredictor(ground.model), ground.ids, ground.table, SLIDING), effort=SAMPLED)
    assert report.ok and report["rescored"].verdict == "pass"
    late = lambda: PeeksLate(ground.model)
    score = evaluate(late(), ground.ids, ground.table, SLIDING, accept_illegal=True)
    assert "rescored" in audit(late, ground.ids, ground.table, SLIDING, claim=score, effort=SAMPLED, thorough=True).failed


def test_state_is_seen_wherever_it_is_kept():
    class Keeper: pass
    for before, after in ((frozenset({1}), frozenset({1, 2})), ({3: 0}, {4: 0}), (b"a", b"b"), (np.float64(1), np.float64(2)), (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
                          (np.random.default_rng(1), np.random.default_rng(2))):
        one, two = Keeper(), Keeper()
        one.x, two.x = before, after
        same = copy.copy(one)
        assert referee.state_digest(one) == referee.state_digest(same) != referee.state_digest(two), (before, after)


class NeverReserved(ModelPredictor):
    "Gives nothing to pieces that stand for no text, but to the start of a document"
    def log_probs(self, query):
        rows = super().log_probs(query).clone()
        rows[:, [0, 2, 3]] = -np.inf
        return rows.log_softmax(1)


def test_an_honest_predictor_may_rule_out_what_is_no_text(ground):
    make = lambda: NeverReserved(ground.model)
    assert audit(make, ground.ids, ground.table, SLIDING, claim=evaluate(make(), ground.ids, ground.table, SLIDING), effort=SAMPLED).ok


@pytest.mark.parametrize("options", (dict(ways=(NgramConfig(),)), dict(ways=(TOY_TTT,)), dict(ways=(TOY_TTT, LoRAConfig(rank=2)))), ids=("n-gram", "sgd", "lora over sgd"))
def test_documents_may_come_in_another_order_than_in_the_stream(ground, options):
    spans = document_spans(ground.ids).tolist()
    ids = torch.cat([ground.ids[lo:lo + n] for (lo, _), n in zip(spans, (20, 60, 90, 40))])
    cfg = EvalConfig("documents", seq_len=64, doc_chunk=16, doc_batch=1, doc_order="length")
    make = lambda: build_predictor(ground.model, **options)
    report = audit(make, ids, ground.table, cfg, claim=evaluate(make(), ids, ground.table, cfg), effort=SAMPLED)
    assert report.ok, report


def test_near_copies_are_told_and_a_training_set_made_of_them_fails(ground):
    val, stream = ground.dataset.val_ids(), ground.train_ids
    honest = referee.check_disjoint([stream], val)
    assert honest[0] == "pass" and "32-token runs in the training data" in honest[1]
    copies = val.clone()
    for lo, hi in document_spans(val).tolist(): copies[(lo + hi) // 2] = 5 + (copies[(lo + hi) // 2] == 5)
    verdict, evidence = referee.check_disjoint([stream, copies], val)
    assert verdict == "fail" and "in the training data with changes" in evidence


@pytest.mark.parametrize("name", with_slow(("documents", "document lora", "all", "n-gram over sgd", "full"), LONG))
def test_honest_scores_of_long_streams_pass_the_sampled_audit(ground, name):
    options, cfg = HONEST[name]
    make = lambda: build_predictor(ground.model, **options)
    report = audit(make, ground.ids, ground.table, cfg, claim=evaluate(make(), ground.ids, ground.table, cfg), effort=SAMPLED)
    assert report.ok and report["rescored"].verdict == "pass", report


def test_a_score_shaved_evenly_fails(ground):
    make = lambda: ModelPredictor(ground.model)
    score = evaluate(make(), ground.ids, ground.table, SLIDING)
    shaved = score.to_json() | {"nats": score.nats - 0.019} | sums(score.nats - 0.019, score.nbytes)
    for effort in (SAMPLED, replace(SAMPLED, positions=768)):
        report = audit(make, ground.ids, ground.table, SLIDING, claim=shaved, effort=effort)
        assert report.failed == ["rescored"] and "on average" in report["rescored"].evidence, report


def test_both_names_of_a_figure_must_agree(ground):
    score = evaluate(ModelPredictor(ground.model), ground.ids, ground.table, SLIDING)
    said = referee.as_claim(score)
    check = lambda **more: referee.check_claim(said | more, ground.ids, ground.table)[0]
    assert check() == check(val_bpb=score.bpb, val_loss=score.loss) == "pass"
    assert check(val_bpb=0.5) == check(val_loss=0.5) == "fail"
    report = audit(ModelPredictor(ground.model), ground.ids, ground.table, SLIDING, claim=score)
    assert report.to_json()["claimed_bpb"] == score.bpb and f"{score.bpb:.6f} bits per byte claimed" in repr(report)


# --- cheats

def test_the_gallery_holds_what_really_happened():
    happened = [c.name for c in CHEATS.values() if c.where]
    assert len(happened) == 16 and len(CHEATS) >= 26
    assert {c.rule for c in CHEATS.values()} <= set(RULES)


@pytest.mark.parametrize("name", with_slow(CHEATS, LONG_CHEATS))
def test_every_cheat_is_caught_by_its_rule(ground, name):
    cheat = CHEATS[name]
    staged, report = try_cheat(cheat, ground)   # at places nobody chose
    assert cheat.rule in report.failed, f"seed {report.facts['seed']}\n{report}"
    assert not report.ok and not any(f.verdict == "error" for f in report.findings), report
    if name != "tail booked repeatedly": assert staged.gain > 0, staged.gain # what the tail is worth depends on the tail
    assert report["stamps"].verdict == "pass", "caught by what it does, not by a mark it carries"


def test_the_tail_is_booked_as_in_the_scripts(golden):
    for n in (999, 1000):
        theirs = json.loads((golden / "windows.json").read_text())[f"pr761.sliding.{n + 1}"]
        windows = tail_windows(n, 128, 16)
        assert [[w, lo, hi - 1] for w, lo, hi in windows.tolist()] == theirs["windows"]
        assert int((windows[:, 2] - windows[:, 1]).sum()) == theirs["n_scored"] > n


# --- honest predictors

@pytest.mark.parametrize("name", with_slow(HONEST, LONG))
def test_no_honest_predictor_is_failed(ground, name):
    options, cfg = HONEST[name]
    make = lambda: build_predictor(ground.model, **options)
    report = audit(make, ground.ids, ground.table, cfg, claim=evaluate(make(), ground.ids, ground.table, cfg), decode=referee.decoder_of(ground.dataset.tokenizer),
                   train_ids=[ground.train_ids], isolated=name in ("documents", "document lora"), effort=replace(GALLERY_EFFORT, replays=8))
    bad = set() if name != "lanes" else {"rescored"}
    assert report.ok, report
    for rule in {"causal", "distribution", "target", "order", "once", "hidden", "repeatable", "round trip", "bytes", "rescored", "claim", "files", "disjoint"} - bad:
        assert report[rule].verdict == "pass", report[rule]
    learns = "ways" in options
    assert report["learns"].verdict == ("pass" if learns else "not applicable")
    if cfg.cut == "documents": assert report["document end"].verdict == "pass"


@pytest.mark.slow
@pytest.mark.parametrize("name, n", [("sliding", 2000), *[(name, 1000) for name in ("streaming", "sgd", "document lora", "n-gram over sgd")]])
def test_thousands_of_tokens_survive_the_round_trip(ground, name, n):
    options, cfg = HONEST[name]
    val = ground.dataset.val_ids()
    ids = torch.cat([val[lo:lo + 260] for lo, _ in document_spans(val).tolist()])[:n + 1]
    assert len(ids) == n + 1
    case, _ = make_case(lambda: build_predictor(ground.model, **options), ids, ground.table, replace(cfg, chunk_tokens=n // 4), 0)
    verdict, evidence = round_trip(case, n)
    assert verdict == "pass" and evidence.startswith(f"{n:,} tokens decoded exactly"), evidence


# --- the report

def test_a_check_that_broke_is_no_pass():
    finding = judge(Rule("bytes", "origin", "a check that breaks", "", lambda: 1 / 0), Facts())
    assert finding.verdict == "error" and "ZeroDivisionError" in finding.evidence
    assert not AuditReport("x", [finding]).ok
    with pytest.raises(ValueError, match="none of"): Finding("bytes", "probably", "")


def test_every_rule_is_in_every_report_and_says_why_it_did_not_run(ground, finished):
    run, dataset = finished
    for report in (audit(ModelPredictor(ground.model), ground.ids, ground.table, SLIDING), audit_run(run, dataset), audit_folder(run.parent / "tokenizers", None)):
        assert [f.rule for f in report.findings] == list(RULES)
        assert all(f.evidence for f in report.findings) and report.to_json()["failed"] == report.failed
    assert audit(ModelPredictor(ground.model), ground.ids, ground.table, SLIDING)["independence"].verdict == "skipped"
    assert all(f.verdict == "skipped" for f in report.findings)


def test_a_predictor_that_cannot_answer_fails_nothing_in_silence(ground):
    class Breaks(ModelPredictor):
        def log_probs(self, query): raise RuntimeError("out of order")
    report = audit(Breaks(ground.model), ground.ids, ground.table, SLIDING)
    assert report.failed == ["once"] and "out of order" in report["once"].evidence
    assert not {f.rule for f in report.findings if f.verdict == "pass"} & {"causal", "distribution", "target", "hidden", "repeatable", "round trip", "learns"}


def test_a_learner_that_had_nothing_to_learn_is_said_so(ground):
    lazy = lambda: build_predictor(ground.model, (replace(TOY_TTT, chunk_tokens=100_000),))
    assert audit(lazy, ground.ids, ground.table, EvalConfig(seq_len=64, stride=16))["learns"].verdict == "skipped"


# --- rules on a model and on clocks

def test_a_parameter_without_gradient_and_a_second_forward_are_found(ground):
    class Odd(GPT):
        def forward(self, ids, **more): return super().forward(ids, **more) * (1.01 if self.training else 1.0)
    odd = Odd(ground.model.cfg)
    odd.load_state_dict(ground.model.state_dict())
    odd.register_parameter("hidden_table", torch.nn.Parameter(torch.ones(3, 3)))
    report = audit(ModelPredictor(odd), ground.ids, ground.table, SLIDING)
    assert report["gradients"].verdict == "fail" and "hidden_table" in report["gradients"].evidence
    assert report["forwards"].verdict == "fail" and "training" in report["forwards"].evidence


def test_a_model_is_checked_in_float_on_the_cpu_wherever_it_predicted(ground):
    model = copy.deepcopy(ground.model).bfloat16().train()
    assert [check(model, ground.ids[:65]).verdict for check in (check_gradients, check_forwards)] == ["pass", "pass"]
    assert model.training and all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_clocks():
    h100 = "NVIDIA H100 80GB HBM3"
    assert check_clock({"training": 588.0, "packing": 11.0}, h100, 8)[0] == "pass"
    assert check_clock({"training": 588.0, "packing": 13.0}, h100, 8)[0] == "fail"
    assert check_clock({"training": 588.0, "packing": None}, h100, 8)[0] == "skipped"
    assert check_clock({"training": 5.0}, h100, 1)[0] == check_clock({"training": 5.0}, "x86_64", 8)[0] == "not applicable"
    assert check_clock({"training": None}, h100, 8)[0] == "skipped"


# --- files, runs, the command

def test_a_run_passes_and_a_touched_score_fails(finished, tmp_path, capsys):
    run, dataset = finished
    words = ["--data", str(dataset.train[0].parent)]
    assert audit_main([str(run), *words]) == 0
    said, saved = capsys.readouterr().out, json.loads((run / "audit.json").read_text())
    assert "no rule is broken" in said and saved["ok"] and saved["failed"] == [] and len(saved["findings"]) == len(RULES)
    assert {f["rule"]: f["verdict"] for f in saved["findings"]}["independence"] == "skipped"
    touched = shutil.copytree(run, tmp_path / "run")
    with np.load(run / "positions.npz") as each: arrays = dict(each)
    arrays["nats"] = np.minimum(arrays["nats"], 5.0)   # somebody was disappointed
    np.savez_compressed(touched / "positions.npz", **arrays)
    score = json.loads((run / "score.json").read_text())
    score["loss"] = float(arrays["nats"].astype(np.float64).mean())
    score["bpb"] = score["loss"] * score["tokens"] / np.log(2) / score["bytes"]
    (touched / "score.json").write_text(json.dumps(score | {"val_loss": score["loss"], "val_bpb": score["bpb"]}))
    assert audit_main([str(touched), *words, "--thorough", "--json", str(tmp_path / "j.json")]) == 1
    thorough = json.loads((tmp_path / "j.json").read_text())
    assert thorough["failed"] == ["rescored"]
    trip = next(f for f in thorough["findings"] if f["rule"] == "round trip")
    assert "that is the whole text, decoded in a locked process" in trip["evidence"], trip


def test_an_artifact_goes_through_the_cage(finished, capsys):
    run, dataset = finished
    assert audit_main([str(run / "model.pgolf"), "--data", str(dataset.train[0].parent), "--json", str(run / "x.json")]) == 0
    said = {f["rule"]: f for f in json.loads((run / "x.json").read_text())["findings"]}
    assert said["cage"]["verdict"] == "pass" and "opened model.pgolf and nothing else" in said["cage"]["evidence"]
    assert said["round trip"]["verdict"] == "pass" and said["claim"]["verdict"] == "skipped"


def test_a_submission_folder_is_counted_whole(finished, tmp_path):
    run, dataset = finished
    folder = tmp_path / "submission"
    folder.mkdir()
    shutil.copy(run / "model.pgolf", folder)
    (folder / "train_gpt.py").write_text("print()\n")
    (folder / "README.md").write_text("x" * 100_000)
    assert "train_gpt.py 8" in audit_folder(folder, dataset)["size"].evidence
    (folder / "tables.bin").write_bytes(bytes(16_000_000))
    report = audit_folder(folder, dataset)
    assert report.failed == ["size"] and "tables.bin 16,000,000" in report["size"].evidence


def test_a_folder_where_nothing_can_be_checked_is_no_pass(finished, tmp_path, capsys):
    folder = tmp_path / "submission"
    folder.mkdir()
    (folder / "train_gpt.py").write_text("print()\n")
    assert audit_main([str(folder)]) == 2 and "nothing could be checked" in capsys.readouterr().out
    (folder / "tables.bin").write_bytes(bytes(17_000_000))
    assert audit_main([str(folder)]) == 1
    (folder / "tables.bin").unlink()
    (folder / "submission.json").write_text(json.dumps({"bytes_model": 15_999_000}))
    assert audit_main([str(folder)]) == 2 # bytes alone, as its author says they are, are no verdict on a score
    assert "nothing behind the score could be checked" in capsys.readouterr().out
    shutil.copy(finished[0] / "model.pgolf", folder / "weights.bin") # an artifact by another name
    assert audit_main([str(folder), "--data", str(finished[1].train[0].parent)]) == 0
    assert json.loads((folder / "audit.json").read_text())["sha256"]


def test_code_and_side_files_are_counted(tmp_path):
    assert referee.check_size({"model.pgolf": 9})[0] == "skipped" and referee.check_size({"model.pgolf": 17_000_000})[0] == "fail"
    assert referee.check_size({"model.pgolf": 9, "train_gpt.py": 9})[0] == "pass"
    (tmp_path / ".cache").mkdir()
    for name, data in ((".cache/t.bin", bytes(5)), ("tables.log", b"\xff\xfe"), ("license", b"a" * 2_000_000), ("seed1.log", b"step 1"), ("README.md", b"hello")):
        (tmp_path / name).write_bytes(data)
    assert referee.shipped_parts(tmp_path) == {".cache/t.bin": 5, "license": 2_000_000, "tables.log": 2}
    for i in range(3): (tmp_path / f"seed{i}.log").write_bytes(b"a" * 900_000)
    assert referee.shipped_parts(tmp_path)["seed2.log"] == 900_000, "so many logs are no logs"
    (tmp_path / "more").symlink_to(tmp_path.parent)
    with pytest.raises(ValueError, match="is a link"):
        referee.shipped_parts(tmp_path)


def test_a_tokenizer_counts_as_what_ships_unless_everybody_has_it(finished, tmp_path, monkeypatch):
    run, dataset = finished
    own, size = dataset.tokenizer, dataset.tokenizer.stat().st_size
    shutil.copy(run / "model.pgolf", tmp_path)
    counted = lambda: referee.audit_artifact(tmp_path / "model.pgolf", dataset, cage=False)["size"].evidence
    assert f"tokenizer {own.name} {size:,}" in counted()
    assert tokenizer_part(own, {f"data/{own.name}": size}) == {f"data/{own.name}": size}, "once, where it lies in the folder"
    monkeypatch.setitem(KNOWN_MODELS, sha256_file(own), "a published one")
    assert "tokenizer" not in counted()


def test_what_a_submission_says_of_its_score_is_checked(finished, tmp_path):
    run, dataset = finished
    shutil.copy(run / "model.pgolf", tmp_path)
    (tmp_path / "train_gpt.py").write_text("print()\n")
    score = json.loads((run / "score.json").read_text())
    said = {"val_bpb": score["val_bpb"], "val_loss": score["val_loss"], "tokens": score["tokens"], "bytes_scored": score["bytes"]}
    for figures, verdict in ((said, "pass"), (said | {"val_bpb": 0.5}, "fail"), (said | {"tokens": said["tokens"] + 1}, "fail")):
        (tmp_path / "submission.json").write_text(json.dumps(figures))
        report = audit_folder(tmp_path, dataset)
        assert report["claim"].verdict == verdict and report["rescored"].verdict == "skipped"
    (tmp_path / "submission.json").write_text(json.dumps(said | {"val_bpb": said["val_bpb"] / 2, "val_loss": said["val_loss"] / 2}))
    assert audit_folder(tmp_path, dataset)["claim"].verdict == "pass" # the sums agree: only scoring again can tell
    assert audit_folder(tmp_path, dataset, thorough=True)["rescored"].verdict == "fail"


def test_a_clock_that_is_over_already_fails_whatever_is_missing():
    assert check_clock({"training": 5000.0, "packing": None}, "NVIDIA H100", 8)[0] == "fail" and check_clock({"training": 5.0, "packing": None}, "NVIDIA H100", 8)[0] == "skipped"


def test_files_beside_the_libraries_are_seen(tmp_path):
    home = Path(referee.__file__).parent
    assert of_the_library(str(home / "audit.py")) and not of_the_library(str(home / "table.bin")) and not of_the_library(str(Path(np.__file__).parent / "t.npy"))
    with referee.noted_files(opened := []):
        for path in ("/dev/null", "/dev/shm"):
            try: os.close(os.open(path, os.O_RDONLY))
            except OSError: pass
    assert opened == [os.path.realpath("/dev/shm")]


def test_bytes_of_cut_text_are_compared(ground):
    decode, ids = referee.decoder_of(ground.dataset.tokenizer), ground.dataset.val_ids()[:200]
    wrong = replace(ground.table, nbytes=ground.table.nbytes * 3)
    for part in (ids, ids[20:], ids[20:60]):
        assert referee.check_bytes(part, ground.table, decode)[0] == "pass", referee.check_bytes(part, ground.table, decode)
        assert referee.check_bytes(part, wrong, decode)[0] == "fail"
    assert referee.check_bytes(torch.tensor([1, 1]), ground.table, decode)[0] == "skipped"


def test_shared_documents_are_found_across_shards():
    val, other = torch.tensor([1, *range(5, 25), 1, *range(40, 60)]), torch.tensor([1, *range(70, 90)])
    split = [torch.cat([other, val[:8]]), torch.cat([val[8:21], other])]
    assert referee.check_disjoint(split, val)[0] == "fail" and referee.check_disjoint([other], val)[0] == "pass"
    assert referee.check_disjoint([other[1:]], val)[0] == referee.check_disjoint([other], val[1:15])[0] == "skipped"
    picked = {tuple(referee.some_shards(range(9), 2, seed)) for seed in range(60)}
    assert picked == {(i, i + 1) for i in range(8)} and referee.some_shards(range(9), 0, 1) == list(range(9))


def test_a_cage_that_died_says_nothing_about_the_predictor(ground):
    case, _ = make_case(lambda: ModelPredictor(ground.model), ground.ids[:65], ground.table, SLIDING, 0)
    caged = lambda said, carried=0: Caged([CodedPiece(None, case.ids[:33], 0)], None, 1e-6, carried, said).round_trip(case, 32)
    assert caged({"error": "no answer in 600 s", "died": True})[0] == "pass"
    assert caged({"error": "RuntimeError: out of memory"})[0] == "error" and caged({"error": "ValueError: bad"})[0] == "fail"
    for lost in ({"error": "no answer in 600 s", "died": True}, {"unmade": "it cannot be made again there"}):
        verdict, evidence = caged(lost, carried=5)
        assert verdict == "skipped" and evidence.startswith("not decidable here"), "a stranger's predictor is not believed for want of a process"


def test_what_is_scored_outside_the_evaluation_is_on_the_clock(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"event": "start", "hardware": "NVIDIA H100 80GB HBM3", "ranks": 8}) + "\n")
    (tmp_path / "run.json").write_text(json.dumps({"seconds": {"score": 700.0}}))
    clock = lambda total: check_evaluation_clock(run_clocks(tmp_path, get("tiny"), {"seconds": {"total": total}})).verdict
    assert clock(300.0) == "fail"
    (tmp_path / "run.json").write_text("{}")
    assert clock(300.0) == "pass"


def test_damage_is_said_in_a_sentence(finished, tmp_path, capsys, monkeypatch):
    run, dataset = finished
    touched = shutil.copytree(run, tmp_path / "run")
    (touched / "positions.npz").write_bytes((run / "positions.npz").read_bytes()[:100])
    assert audit_main([str(touched), "--data", str(dataset.train[0].parent)]) == 2 and "is damaged" in capsys.readouterr().err
    for name, text in (("positions.npz", None), ("score.json", "[]"), ("score.json", "{"), ("score.json", '{"tokens": null}'), ("run.json", "[]"), ("recipe.json", "[]")):
        shutil.rmtree(touched)
        shutil.copytree(run, touched)
        (touched / name).unlink(missing_ok=True)
        if text is not None: (touched / name).write_text(text)
        assert audit_main([str(touched), "--data", str(dataset.train[0].parent)]) == 2, name
        said = capsys.readouterr().err
        assert said.startswith("pgolf_audit: ") and name in said and said.count("\n") == 1, said
    def stop(*_, **__): raise TrainError("no room")
    monkeypatch.setattr(command, "audit_subject", stop)
    assert audit_main(["tiny"]) == 2 and capsys.readouterr().err == "pgolf_audit: no room\n"


CAGED = """
import pathlib, socket, subprocess, sys
from pgolf.referee.cage import leave_network, shut_cage
opened = []
pathlib.Path(sys.argv[1]).write_text("x")
leave_network()
shut_cage({sys.argv[1]}, opened)
open(sys.argv[1]).read()
import colorsys
for attempt in (lambda: socket.socket(), lambda: socket.getaddrinfo("localhost", 80), lambda: subprocess.run(["true"]), lambda: open(sys.argv[2]),
                lambda: open(sys.argv[1], "w"), lambda: open(sys.argv[1] + "2", "w"), lambda: pathlib.Path(sys.argv[1]).unlink()):
    try: attempt(); print("went through")
    except PermissionError: print("refused")
print(len(opened))
"""


def test_the_cage_refuses_sockets_processes_and_other_files(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", CAGED, str(tmp_path / "mine"), "/etc/hostname"], env=env, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == ["refused"] * 7 + ["4"], done.stdout + done.stderr
    assert (tmp_path / "mine").read_text() == "x"


@pytest.mark.parametrize("words, said", [(["no/such/thing"], "is no file, no folder and no recipe"), (["tinny"], "no recipe")])
def test_what_is_no_subject_is_refused(words, said, capsys):
    assert audit_main(words) == 2 and said in capsys.readouterr().err


def test_help_has_an_example_and_bad_usage_is_two(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop: audit_main(["--help"])
    assert stop.value.code == 0 and "pgolf_audit out/tiny-seed1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop: audit_main([])
    assert stop.value.code == 2
    (tmp_path / "noise.pgolf").write_bytes(b"noise")
    assert audit_main([str(tmp_path / "noise.pgolf")]) == 2


@pytest.mark.slow
def test_the_recipe_that_met_the_validation_set_is_found(finished):
    _, dataset = finished
    small = dict(vocab=512, steps=2, dim=16, layers=4)
    dirty = audit_recipe(faithful("pr1992", "smoke", **small), dataset, effort=Effort(positions=128, tokens=24))
    assert set(dirty.failed) == {"stamps", "independence"}, dirty
    clean = audit_recipe(get("pr1992", "smoke", **small), dataset, effort=Effort(positions=128, tokens=24))
    assert clean.ok and clean["independence"].verdict == "pass" and clean["learns"].verdict == "pass", clean


def test_a_copy_is_made_of_what_is_handed_over(ground):
    model = copy.deepcopy(ground.model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert audit(build_predictor(model, (TOY_TTT,)), ground.ids, ground.table, SLIDING).ok
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert brief_training(copy.deepcopy(model), ground.train_ids, 1) is not model


@pytest.mark.slow
def test_the_referee_notebook_runs_and_keeps_its_record(bench, tmp_path):
    out = tmp_path / "referee"
    words = [w for name, value in {"out": str(out), "quick": "True"}.items() for w in ("-p", name, value)]
    command = [sys.executable, "-m", "pgolf.lab.execute", "nbs/runs/referee.ipynb", str(tmp_path / "done.ipynb"), "--no-progress-bar", *words]
    done = subprocess.run(command, cwd=bench, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((out / "referee.json").read_text())
    assert record["cheats"] and all(c["caught"] for c in record["cheats"]) and all(h["ok"] for h in record["honest"])
    assert {r["name"]: r["broken"] for r in record["recipes"]}["pr1992"] == ["independence", "stamps"]
    pr761 = next(r["conditions"] for r in record["recipes"] if r["name"] == "pr761")
    assert {pr761[c] for c in ("causal", "full distribution", "score before update", "one pass")} == {"breaks"}
    assert (out / "referee.png").read_bytes()[:4] == b"\x89PNG"
