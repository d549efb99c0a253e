"A quantiser and a predictor that no room of the house has heard of go through a whole run by one word each"
import json
import math

import pytest
import torch

from pgolf import recipes
from pgolf.audit import Effort, audit_run
from pgolf.ground.settings import setting
from pgolf.lab.study import ablations
from pgolf.pack.artifact import pack
from pgolf.pack.budget import fit_budget
from pgolf.pack.grid import Codes
from pgolf.pack.ledger import inspect
from pgolf.pack.plan import Plan
from pgolf.pack.quantiser import Quantiser
from pgolf.pack.reading import unpack
from pgolf.pack.rounding import Rows
from pgolf.score.evaluate import evaluate
from pgolf.score.predictor import ModelPredictor
from pgolf.score.wrap import Predictor
from pgolf.text.data import build_dataset, folder_documents
from pgolf.train.checkpoint import load_weights


class Ternary(Quantiser, kind="ternary", source="https://arxiv.org/abs/1605.04711"):
    "Three values a row: -s, 0 and s, with the threshold and the scale of ternary weight networks"
    makes_codes = True
    threshold: float = setting(0.7, "weights below this share of the row's mean magnitude become 0", low=0.0)

    def store(self, w, name, hessian=None, sensitivity=None):
        size = w.detach().float().abs()
        kept = size > self.threshold * size.mean(-1, keepdim=True)
        scale = (size * kept).sum(-1) / kept.sum(-1).clamp_min(1)
        return Codes((w.sign() * kept).to(torch.int8), scale.half(), 2)

    def sketch(self, w, name, sensitivity=None):
        return self.store(w, name)

    def coarser(self, by):
        return self.replace(threshold=self.threshold * by)


class Counted:
    "A predictor mixed with how often each token was seen so far"
    learns = True

    def __init__(self, inner, cfg):
        self.inner, self.cfg, self.chunk_tokens = inner, cfg, cfg.chunk_tokens
        self.reset()

    def reset(self):
        self.counts = torch.ones(self.cfg.vocab)

    def log_probs(self, query):
        seen = self.counts / self.counts.sum()
        return torch.logaddexp(self.inner.log_probs(query) + math.log1p(-self.cfg.share), seen.log() + math.log(self.cfg.share))

    def observe(self, segment):
        self.inner.observe(segment)
        self.counts += torch.bincount(segment.targets, minlength=self.cfg.vocab)


class Unigram(Predictor, kind="unigram", title="unigram counts"):
    "Rows lean to tokens that were frequent so far"
    share: float = setting(0.1, "weight of the counts", low=0.0, high=1.0)
    vocab: int = setting(320, "V", low=1)
    chunk_tokens: int = setting(64, "positions between two reveals", low=1)

    def wrap(self, inner, **options):
        return Counted(inner, self)

    def reveal_every(self):
        return self.chunk_tokens


@pytest.fixture(scope="module")
def words(small_text, tmp_path_factory):
    return build_dataset(folder_documents(small_text), tmp_path_factory.mktemp("data"), 320, name="words")


@pytest.fixture(scope="module")
def ternary(words, tmp_path_factory):
    "A run whose banks are ternary"
    folder = tmp_path_factory.mktemp("runs") / "ternary"
    recipe = recipes.get("tiny", "smoke", seed=1, quant__small=0, quant__bank="ternary")
    recipes.run_recipe(recipe, folder, words, progress=False)
    return folder


def test_a_new_quantiser_is_packed_read_back_and_scored(ternary):
    trained, packed = load_weights(ternary / "weights.pt"), unpack((ternary / "model.pgolf").read_bytes())
    want = Ternary().store(trained.banks["up"], "banks.up").dequantize()
    torch.testing.assert_close(packed.banks["up"].detach(), want)
    assert len(packed.banks["up"][0, 0].unique()) <= 3 and json.loads((ternary / "score.json").read_text())["val_bpb"] > 0


def test_a_new_quantiser_is_part_of_the_recipe_in_the_run(ternary):
    recipe = recipes.read_recipe(ternary)
    assert recipe.quant.bank == Ternary() and recipes.Recipe.from_json(recipe.to_json()) == recipe


def test_a_new_quantiser_is_forecast_and_searched_for_room(ternary):
    model = load_weights(ternary / "weights.pt")
    plan = Plan(bank=Ternary(), embed=Rows(bits=8), small=0)
    size = len(pack(model, plan))
    assert sum(b["bytes"] for b in inspect(pack(model, plan))["blobs"] if b["name"].startswith("banks.")) > 0
    fit = fit_budget(model, plan, size - 400)
    assert fit.fits and len(fit.data) <= size - 400 and fit.plan != plan
    alone = Plan(bank=Ternary(), embed="fp16", small=0)
    fit = fit_budget(model, alone, len(pack(model, alone)) - 400)
    assert fit.fits and fit.plan != alone, "here only the new quantiser can give way"


@pytest.fixture(scope="module")
def unigram(words, tmp_path_factory):
    "A run that is scored with the counts"
    folder = tmp_path_factory.mktemp("runs") / "unigram"
    recipe = recipes.get("tiny", "smoke", seed=1, unigram="on")
    recipes.run_recipe(recipe, folder, words, progress=False)
    return folder


def test_a_new_predictor_scores_what_is_in_the_artifact(unigram, words):
    score, data = json.loads((unigram / "score.json").read_text()), (unigram / "model.pgolf").read_bytes()
    plain = evaluate(ModelPredictor(unpack(data)), words.val_ids(), words.byte_table(), recipes.get("tiny", "smoke").eval)
    assert recipes.read_recipe(unigram).predict == (Unigram(),)
    assert 0 < abs(score["val_bpb"] - plain.bpb) < 1


def test_a_new_predictor_is_ablated_and_referred_to_by_its_name(unigram):
    recipe = recipes.read_recipe(unigram)
    assert recipes.override(recipe, ablations(recipe)["unigram counts"]).predict == ()
    assert recipes.get("tiny", "smoke", unigram__share=0.3).predict == (Unigram(share=0.3),)


def test_the_referee_judges_a_new_predictor_like_any_other(unigram, words):
    report = audit_run(unigram, words, effort=Effort(positions=128, tokens=24))
    assert not report.failed, report
    assert {report[rule].verdict for rule in ("causal", "distribution")} == {"pass"}
