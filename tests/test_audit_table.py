"What passed when an adversary tried, on a stream of 3,000 tokens: each cheat is caught by the rule that should, each honest oddity is not failed"
import array
import copy
import gc
import os
import sys
import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from pgolf.audit import SAMPLED, THOROUGH
from pgolf.audit import audit as audit_in_the_cage
from pgolf.referee import causal
from pgolf.referee.causal import TOY_TTT
from pgolf.referee.data import check_tokenizer
from pgolf.referee.ground import SLIDING, make_ground, reported
from pgolf.score.evaluation import Evaluation
from pgolf.score.evaluate import evaluate
from pgolf.score.predictor import ModelPredictor
from pgolf.score.wrap import build_predictor

LATE = 2100
BRIEF = replace(SAMPLED, windows=6)
DEEP = replace(THOROUGH, positions=256, replays=4, probes=4, tokens=48, windows=12, builds=False)
CUT = SLIDING.replace(chunk_tokens=1024)
audit = partial(audit_in_the_cage, cage=False) # quick: what is tried here is seen in one process


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    made = make_ground(tmp_path_factory.mktemp("ground"), steps=40)
    made.ids = made.dataset.val_ids()[:3001]
    assert len(made.ids) == 3001
    return made


def judged(ground, make, cut=CUT, efforts=(BRIEF, DEEP), **more):
    "Reports of a sampled and a thorough audit, the predictor's own score as the claim"
    scored = evaluate(make(), ground.ids.clone(), ground.table, cut, accept_illegal=True)
    score = reported(scored)
    return [audit(make, ground.ids, ground.table, cut, claim=score, effort=effort, thorough=effort is DEEP, **more) for effort in efforts]


def nudged(rows, few, tokens, by=3.0):
    "Rows that lean towards some tokens, and still sum to 1"
    rows = rows.clone()
    rows[few, tokens] += by
    return torch.log_softmax(rows, 1)


class LooksAheadLate(ModelPredictor):
    def log_probs(self, query):
        few = (query.positions > LATE) & (query.cols + 1 < query.lengths[query.rows])
        return nudged(super().log_probs(query), few, query.ids[query.rows[few], query.cols[few] + 1])


class FindsTokensLate(ModelPredictor):
    "Finds the evaluator among all objects"
    def log_probs(self, query):
        rows, few = super().log_probs(query), query.positions > LATE
        if not bool(few.any()): return rows
        run = next(o for o in gc.get_objects() if type(o) is Evaluation and o.predictor is not None)
        return nudged(rows, few, run.ids[query.positions + 1][few])


class ReadsItsBatch(ModelPredictor):
    "An early window of a batch reads its targets in the later ones"
    def log_probs(self, query):
        where = {int(s) + c: int(t) for s, n, row in zip(query.starts, query.lengths, query.ids) for c, t in enumerate(row[:n].tolist())}
        hints = [where.get(p + 1, -1) if p > LATE else -1 for p in query.positions.tolist()]
        few = torch.tensor(hints) >= 0
        return nudged(super().log_probs(query), few, torch.tensor(hints)[few])


class KeepsInTheEnvironment(ModelPredictor):
    "Writes what it was shown into an environment variable, and looks it up by position the next time"
    learns = True
    def log_probs(self, query):
        known = os.environ.get("PGOLF_TEST_ANSWERS", "").split()
        hints = [int(known[p + 1]) if LATE < p < len(known) - 1 else -1 for p in query.positions.tolist()]
        few = torch.tensor(hints) >= 0
        return nudged(super().log_probs(query), few, torch.tensor(hints)[few])
    def observe(self, segment):
        if segment.stream.frontier > 2900: os.environ["PGOLF_TEST_ANSWERS"] = " ".join(map(str, segment.stream.prefix().tolist()))


class SumsToABitMore(ModelPredictor):
    def log_probs(self, query): return super().log_probs(query).double().add(7e-7).float()


class PatchesTheReferee(ModelPredictor):
    def log_probs(self, query):
        causal.altered = lambda ids, *rest: ids
        return super().log_probs(query)


CAUGHT_BY = {LooksAheadLate: "causal", FindsTokensLate: "rescored", ReadsItsBatch: "rescored", SumsToABitMore: "distribution",
             PatchesTheReferee: "distribution"}


@pytest.mark.parametrize("kind", CAUGHT_BY, ids=lambda kind: kind.__name__)
def test_a_cheat_that_waits_for_a_long_stream_is_caught(ground, kind):
    reports = judged(ground, lambda: kind(ground.model))
    for report in reports: assert CAUGHT_BY[kind] in report.failed, report
    assert [f for report in reports for f in report.of("error")] == []


def test_answers_in_the_environment_are_found(ground):
    os.environ.pop("PGOLF_TEST_ANSWERS", None)
    try:
        make = lambda: KeepsInTheEnvironment(ground.model)
        evaluate(make(), ground.ids.clone(), ground.table, CUT)
        assert len(os.environ["PGOLF_TEST_ANSWERS"].split()) > 2900
        for report in judged(ground, make): assert "repeatable" in report.failed, report
    finally: os.environ.pop("PGOLF_TEST_ANSWERS", None)


def test_weights_that_learned_the_validation_text_are_suspected(ground):
    from pgolf.referee.ground import brief_training
    met = brief_training(copy.deepcopy(ground.model), ground.ids, 60, 3e-3)
    asked = lambda model: audit(ModelPredictor(model), ground.ids, ground.table, CUT, train_ids=[ground.train_ids], effort=SAMPLED)
    assert asked(met).failed == ["familiar"] and asked(ground.model)["familiar"].verdict == "pass"


def test_a_tokenizer_of_validation_text_is_seen(ground):
    table = copy.deepcopy(ground.table)
    assert check_tokenizer(ground.ids, table, ground.train_ids).verdict == "pass"
    only_here = torch.bincount(ground.ids, minlength=512).bool() & ~torch.bincount(ground.train_ids, minlength=512).bool()
    stretched = replace(table, nbytes=torch.where(torch.arange(512) == int(ground.ids[40]), 40, table.nbytes))
    without = ground.train_ids[ground.train_ids != int(ground.ids[40])]
    assert check_tokenizer(ground.ids, stretched, without).verdict == "fail", only_here


# --- strangers: the text lies within reach of the process that judges them

def leaning(rows, query, text):
    "Rows that lean towards what follows the same eight tokens in a text; as they are where it does not hold them"
    text, rows = [int(t) for t in text], rows.clone()
    after = {tuple(text[t - 8:t]): text[t] for t in range(8, len(text))}
    for r, (row, col) in enumerate(zip(query.rows.tolist(), query.cols.tolist())):
        token = after.get(tuple(query.ids[row, max(0, col - 7):col + 1].tolist()))
        if token is not None: rows[r, token] += 3.0
    return rows.log_softmax(1)


class ReadsTheStack(ModelPredictor):
    "Takes the text from whoever called"
    def log_probs(self, query):
        frame = sys._getframe()
        while frame is not None and not hasattr(frame.f_locals.get("case"), "places"): frame = frame.f_back
        return leaning(super().log_probs(query), query, frame.f_locals["case"].ids if frame is not None else [])


class ReadsTheEnvironment(ModelPredictor):
    "Finds the text in a variable that an earlier evaluation left behind"
    def log_probs(self, query): return leaning(super().log_probs(query), query, os.environ.get("PGOLF_TEST_TEXT", "").split())


class ReadsAnOpenFile(ModelPredictor):
    "Holds nothing but the number of a file that was opened before the referee came"
    descriptor = 200
    def log_probs(self, query): return leaning(super().log_probs(query), query, os.pread(self.descriptor, 2**20, 0).split())


@pytest.fixture
def within_reach(ground, tmp_path):
    "The text in the environment, and behind a descriptor"
    text = " ".join(map(str, ground.ids.tolist()))
    (tmp_path / "text").write_text(text)
    os.environ["PGOLF_TEST_TEXT"] = text
    with (tmp_path / "text").open() as file:
        os.dup2(file.fileno(), ReadsAnOpenFile.descriptor)
    yield
    os.close(ReadsAnOpenFile.descriptor)
    del os.environ["PGOLF_TEST_TEXT"]


@pytest.mark.parametrize("kind", [ReadsTheStack, ReadsTheEnvironment, ReadsAnOpenFile])
def test_a_stranger_who_looks_around_is_believed_in_one_process_and_fails_in_the_cage(ground, within_reach, kind):
    asked = dict(ids=ground.ids, table=ground.table, cut=CUT, effort=BRIEF)
    here = audit(lambda: kind(ground.model), **asked)
    assert here.ok and here.proved, "rules of behaviour do not see it, so only the cage can"
    there = audit_in_the_cage(lambda: kind(ground.model), **asked)
    assert there.failed == ["round trip"], there
    assert "bytes carried from memory" in there["cage"].evidence or "Bad file descriptor" in there["round trip"].evidence, there


def test_a_factory_that_holds_the_text_does_not_carry_it(ground):
    held = ground.ids # in the closure of the factory, not in what it makes
    make = lambda: ModelPredictor(ground.model) if len(held) else None
    report = audit_in_the_cage(make, ground.ids, ground.table, CUT, effort=BRIEF)
    carried = int(report["cage"].evidence.partition("(")[2].partition(" bytes carried")[0].replace(",", ""))
    weights = sum(p.numel() * p.element_size() for p in ground.model.parameters())
    assert report.ok and weights < carried < weights + 8 * len(held), report


# --- honest oddities

class CountsInSlots(ModelPredictor):
    "Learns, and keeps what it learned in slots and in an array of the standard library"
    __slots__ = ("counts",)
    learns = True
    def reset(self): self.counts = array.array("d", [1.0] * 512)
    def log_probs(self, query):
        tilt = torch.from_numpy(np.array(self.counts)).log().float()
        return torch.log_softmax(super().log_probs(query) + 0.1 * tilt, 1)
    def observe(self, segment):
        for t in segment.targets.tolist(): self.counts[t] += 1


class NoiseByPosition(ModelPredictor):
    def log_probs(self, query):
        noise = [torch.rand(query.vocab, generator=torch.Generator().manual_seed(int(p))) for p in query.positions]
        return torch.log_softmax(super().log_probs(query) + 0.2 * torch.stack(noise), 1)


class LearnsFromInputs(ModelPredictor):
    "Counts inputs of earlier windows, which are booked by then, before they are revealed"
    learns = True
    def reset(self): self.counts, self.seen = torch.ones(512), 0
    def log_probs(self, query):
        rows = torch.log_softmax(super().log_probs(query) + 0.1 * self.counts.log(), 1)
        first = int(query.positions.min()) + 1
        if first > self.seen:
            self.counts += torch.bincount(query.stream.take(torch.arange(self.seen, first)), minlength=512)
            self.seen = first
        return rows
    def observe(self, segment): pass


@pytest.mark.parametrize("kind", [CountsInSlots, NoiseByPosition, LearnsFromInputs])
def test_an_honest_oddity_is_not_failed(ground, kind):
    cut = CUT.replace(chunk_tokens=64) if kind is CountsInSlots else CUT
    for report in judged(ground, lambda: kind(ground.model), cut, cage=True):
        assert not report.failed and report["cage"].verdict == "pass", report


@pytest.mark.parametrize("held", [threading.Lock(), (i for i in range(9))], ids=("lock", "generator"))
def test_what_cannot_be_copied_is_an_error_and_no_fail(ground, held):
    predictor = ModelPredictor(ground.model)
    predictor.held = held
    for subject in (predictor, lambda: predictor):
        report = audit(subject, ground.ids, ground.table, CUT, effort=SAMPLED)
        assert not report.failed and not report.ok and "cannot be copied" in report.headline(), report


def test_a_learner_is_judged_elsewhere_too(ground):
    for report in judged(ground, lambda: build_predictor(ground.model, (replace(TOY_TTT, chunk_tokens=1024),)), efforts=(BRIEF,)):
        assert report.ok and "in the slice at" in report["causal"].evidence, report
