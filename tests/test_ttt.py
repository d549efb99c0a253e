"Test-time training: equals slow loops, touches nothing it should not, never looks ahead"
import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.score.evaluate import EvaluationError, ModelPredictor, document_windows, evaluate, sliding_windows
from pgolf.model import (GPT, AttentionResiduals, GPTConfig, HeadGate, Lanes, Recurrence, UNetSkips, ValueEmbedding,
                         ValueResidual, XSA, token_loss)

from pgolf.score.adapt_first import train_then_score
from pgolf.score.adapters import adapter_places
from pgolf.score.backoff import BackoffCache
from pgolf.score.freezing import frozen_rows
from pgolf.score.illegal import IllegalAdaptation
from pgolf.score.lessons import ttt_lr
from pgolf.score.lora import DocumentLoRA, LoRAConfig
from pgolf.score.ngram import Mixture, NgramConfig
from pgolf.score.prequant import PREQUANT, prequant_adapt, shared_documents
from pgolf.score.ttt import TTT_TABLE, ScoreFirstTTT, TTTConfig

LOOPED = (Recurrence(1, 2, 1), UNetSkips(), ValueResidual(), XSA())


class OneByteEach:
    vocab = 48
    def count(self, previous, ids): return (ids > 1).long()


def tiny(seed=0, **changes):
    cfg = dict(vocab=48, dim=32, layers=4, heads=2, kv_heads=1, rotary_dims=8, mlp_ratio=2.0, parts=(*LOOPED, HeadGate("headwise")))
    model = GPT(GPTConfig(**(cfg | changes)), torch.Generator().manual_seed(seed)).eval()
    noise = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters(): p.data += 0.1 * torch.randn(p.shape, generator=noise)
    return model


def stream(n=500, seed=0, every=70):
    ids = torch.randint(2, 48, (n + 1,), generator=torch.Generator().manual_seed(seed))
    ids[::every] = 1
    return ids


FAST = TTTConfig("sgd", 0.05, epochs=2, chunk_tokens=128, seq_len=32, batch_seqs=3)
CUT = dict(cut="sliding", seq_len=64, stride=16)


def test_the_four_settings_are_the_records():
    row = lambda c: (c.optimizer, c.lr, c.epochs, c.chunk_tokens, c.freeze_blocks, c.schedule, c.batch_seqs, c.clip, c.seq_len)
    common = (32, 1.0, 2048)
    assert row(TTT_TABLE["pr1696"]) == ("sgd", 0.003, 3, 32_768, 1, "cosine", *common)
    assert row(TTT_TABLE["pr1232"]) == ("sgd", 0.002, 10, 32_768, 2, "warmup_cosine", *common)
    assert row(TTT_TABLE["pr1992"]) == ("sgd", 0.005, 3, 32_768, 0, "cosine", *common)
    assert row(TTT_TABLE["pr761"]) == ("adamw", 0.0001, 4, 131_072, 2, "constant", *common)
    assert all(c.momentum == 0.9 and c.weight_decay == 0 for c in TTT_TABLE.values())
    assert (PREQUANT.lr, PREQUANT.lr_end, PREQUANT.epochs, PREQUANT.freeze_blocks, PREQUANT.freeze_embed) == (5e-4, 5e-5, 21, 2, True)
    lora = LoRAConfig()
    assert (lora.rank, lora.lr, lora.betas, lora.eps, lora.weight_decay) == (96, 1e-4, (0.0, 0.999), 1e-10, 0.5)


def test_schedules():
    c = TTT_TABLE["pr1232"]
    assert [round(ttt_lr(c, i, 40), 6) for i in (0, 1)] == [0.001, 0.002] and ttt_lr(c, 39, 40) == 0
    assert ttt_lr(TTT_TABLE["pr1696"], 0, 1) == 0.003
    assert ttt_lr(PREQUANT, 20, 21) == pytest.approx(5e-5)


def test_faithful_freezing_is_the_records_count():
    model = GPT(GPTConfig(vocab=64, parts=(UNetSkips(), AttentionResiduals(), ValueEmbedding((9, 10)), XSA())))
    frozen = frozen_rows(model, TTT_TABLE["pr1696"])
    assert sum(model.get_parameter(k)[:n].numel() for k, n in frozen.items()) == 2056 and not any(k.startswith("banks") for k in frozen)


@pytest.mark.parametrize("name, layers, matrices", (("pr761", 2, True), ("pr1232", 2, True),
                                                    ("pr1696", 1, False), ("pr1992", 0, False)))
def test_what_each_record_freezes(name, layers, matrices):
    "A module per layer (PR 761, 1232): the matrices too; banks (PR 1696): the small parameters only"
    model = tiny()
    frozen = frozen_rows(model, TTT_TABLE[name])
    banks = {k for k, _ in model.named_parameters() if k.startswith("banks.")}
    assert len(banks) == 6 and set(frozen.values()) == ({layers} if layers else set())
    assert banks & frozen.keys() == (banks if matrices else set())
    assert ("q_gain" in frozen) == (layers > 0)


@pytest.mark.parametrize("optimizer", ("sgd", "adamw"))
@pytest.mark.parametrize("freeze", ("true", "faithful"))
def test_score_first_equals_the_slow_loop(optimizer, freeze):
    cfg, model, ids = replace(FAST, optimizer=optimizer, lr=0.02, freeze_blocks=2, freeze=freeze), tiny(), stream(500)
    found = evaluate(ScoreFirstTTT(model, cfg), ids, OneByteEach(), **CUT)
    learner, nats, windows = copy.deepcopy(model), torch.zeros(500), sliding_windows(500, 64, 16)
    kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    step = kind(learner.parameters(), 1.0, **(dict(momentum=0.9) if optimizer == "sgd" else {}), weight_decay=0)
    frozen = frozen_rows(learner, cfg)
    for chunk in range(4):
        for start, lo, hi in windows.tolist():
            if lo // 128 == chunk:
                with torch.no_grad(): nats[lo:hi] = token_loss(learner(ids[None, start:hi]), ids[None, start + 1:hi + 1])[0, lo - start:]
        if chunk == 3: break
        for group in step.param_groups: group["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * chunk / 3))
        rows = torch.stack([ids[chunk * 128 + i * 32:chunk * 128 + i * 32 + 33] for i in range(4)])
        for batch in (*rows.split(3), *rows.split(3)):
            step.zero_grad()
            token_loss(learner(batch[:, :-1]), batch[:, 1:]).mean().backward()
            for name, n in frozen.items():
                if learner.get_parameter(name).grad is not None: learner.get_parameter(name).grad[:n] = 0
            torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            step.step()
    assert np.abs(found.nats - nats.numpy()).max() < 1e-4


def test_weights_go_back_and_runs_repeat():
    model, ids = tiny(), stream(500)
    before, predictor = copy.deepcopy(model.state_dict()), ScoreFirstTTT(model, FAST)
    first = evaluate(predictor, ids, OneByteEach(), **CUT)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in predictor.model.state_dict().items())
    assert evaluate(predictor, ids, OneByteEach(), **CUT).loss == first.loss


PREDICTORS = {
    "plain": (lambda: ModelPredictor(tiny()), CUT | dict(chunk_tokens=128)),
    "streaming": (lambda: ModelPredictor(tiny()), dict(cut="streaming", window=32, stream_chunk=16)),
    "sgd": (lambda: ScoreFirstTTT(tiny(), FAST), CUT),
    "adamw": (lambda: ScoreFirstTTT(tiny(), replace(FAST, optimizer="adamw", lr=0.01)), CUT),
    "lora": (lambda: DocumentLoRA(tiny(), LoRAConfig(rank=2, lr=0.01)), dict(cut="documents", seq_len=48, doc_chunk=16, doc_batch=3)),
    "ngram": (lambda: Mixture(ModelPredictor(tiny()), BackoffCache(), NgramConfig(gate="learned", chunk_tokens=64, every=1)), CUT),
    "ngram over lora over sgd": (lambda: Mixture(DocumentLoRA(ScoreFirstTTT(tiny(), FAST), LoRAConfig(rank=2, lr=0.01)), BackoffCache(),
                                                 NgramConfig(gate="learned", every=1)), dict(cut="documents", seq_len=48, doc_chunk=16, doc_batch=3)),
}


def booked_rows(name, ids):
    make, cut = PREDICTORS[name]
    rows = torch.zeros(len(ids) - 1, 48)
    def keep(positions, answer): rows[positions] = answer
    evaluate(make(), ids, OneByteEach(), on_rows=keep, **cut)
    return rows


@pytest.mark.parametrize("name", PREDICTORS)
def test_what_comes_later_changes_no_earlier_row(name):
    ids = torch.cat([stream(150, every=60)] * 3)[:400] # repeats, so that caches speak
    rows = booked_rows(name, ids)
    for k in (1, 65, 128, 180, 399):
        other = ids.clone()
        later = other[k:]
        later[later > 1] = 2 + (later[later > 1] + 5) % 46 # documents stay where they are
        again = booked_rows(name, other)
        assert torch.equal(again[:k], rows[:k]), f"position {int((again[:k] != rows[:k]).any(1).nonzero()[0, 0])} changed with token {k}"
    assert not torch.equal(again, rows) or k == 399


def test_the_leak_is_caught_by_the_same_replay():
    ids, cfg = stream(400), replace(FAST, lr=0.1)
    other = ids.clone()
    other[300:] = 2 + (other[300:] + 5) % 46
    rows = []
    for s in (ids, other):
        rows.append(torch.zeros(400, 48))
        leaky = ModelPredictor(train_then_score(tiny(), s, cfg, accept_illegal=True))
        evaluate(leaky, s, OneByteEach(), on_rows=lambda p, r: rows[-1].index_copy_(0, p, r), **CUT)
    assert (rows[0] != rows[1]).any(1)[:300].all()


def slow_lora(model, ids, span, cfg, seq_len, chunk):
    "One document, one adapter at a time, a second forward for the gradient"
    generator, pairs = torch.Generator().manual_seed(cfg.seed), {}
    for place, width in adapter_places(model, cfg.sites).items():
        A = (torch.rand(cfg.rank, model.cfg.dim, generator=generator) * 2 - 1) / math.sqrt(model.cfg.dim)
        pairs[place] = (A.requires_grad_(), torch.zeros(width, cfg.rank, requires_grad=True))
    def adapters(site, v, x): return x @ pairs[site, v][0].T @ pairs[site, v][1].T if (site, v) in pairs else None
    parameters = [p for pair in pairs.values() for p in pair]
    optimizer, nats = torch.optim.AdamW(parameters, cfg.lr, cfg.betas, cfg.eps, cfg.weight_decay), []
    for start, lo, hi in document_windows(span, seq_len, chunk).tolist():
        optimizer.zero_grad()
        loss = token_loss(model(ids[None, start:hi], adapters=adapters), ids[None, start + 1:hi + 1])[0, lo - start:]
        nats.append(loss.detach())
        grads = torch.autograd.grad(loss.mean(), parameters, allow_unused=True)
        for p, g in zip(parameters, grads): p.grad = g
        optimizer.step()
    return torch.cat(nats).numpy()


@pytest.mark.parametrize("changes", ({}, dict(parts=(LOOPED[0], UNetSkips(gated=True), *LOOPED[2:], Lanes(2)))))
def test_lora_equals_the_slow_loop_and_batches_equal_singles(changes):
    model, ids, cfg = tiny(**changes), stream(420, every=130), LoRAConfig(rank=3, lr=0.01)
    cut = dict(cut="documents", seq_len=64, doc_chunk=16)
    batched = evaluate(DocumentLoRA(model, cfg), ids, OneByteEach(), doc_batch=64, **cut)
    single = evaluate(DocumentLoRA(model, cfg), ids, OneByteEach(), doc_batch=1, **cut)
    assert np.abs(batched.nats - single.nats).max() < 1e-4 and abs(batched.loss - single.loss) < 1e-5
    for span in torch.from_numpy(batched.documents):
        slow = slow_lora(model, ids, span, cfg, 64, 16)
        assert np.abs(slow - batched.nats[span[0]:span[1]]).max() < 2e-4
    plain = evaluate(ModelPredictor(model), ids, OneByteEach(), **cut)
    first = np.concatenate([np.arange(lo, min(lo + 16, hi)) for lo, hi in batched.documents])
    assert np.abs(plain.nats - batched.nats)[first].max() < 1e-5 and np.abs(plain.nats - batched.nats).max() > 1e-3


def test_lora_in_groups_is_lora_at_once():
    "Fewer logits than a batch needs: groups of documents, each made again for its gradient, give the same losses"
    model, ids, cfg = tiny(), stream(420, every=130), LoRAConfig(rank=3, lr=0.01)
    cut, held = dict(cut="documents", seq_len=64, doc_chunk=16, doc_batch=8), []
    class Counted(DocumentLoRA):
        def logits(self, rows, **more):
            held.append(rows.numel() * 48)
            return super().logits(rows, **more)
    whole = evaluate(Counted(model, cfg), ids, OneByteEach(), **cut)
    needed, bound = max(held), 64 * 48
    held.clear()
    grouped = evaluate(Counted(model, cfg, max_logits=bound), ids, OneByteEach(), **cut)
    assert max(held) <= bound < needed and np.abs(grouped.nats - whole.nats).max() < 1e-5


def test_lora_needs_documents_and_known_sites():
    with pytest.raises(EvaluationError, match="position 0: DocumentLoRA learns within documents"):
        evaluate(DocumentLoRA(tiny()), stream(100), OneByteEach(), "full", seq_len=32)
    with pytest.raises(ValueError, match="LoRAConfig.sites is .*must be some of q, k"): LoRAConfig(sites=("q", "head"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=3), min_size=1, max_size=5), st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=3), min_size=1, max_size=5))
def test_shared_documents(a, b):
    flat = lambda docs: torch.tensor([i for d in docs for i in [1, *d]] + [1])
    assert shared_documents(flat(a), flat(b)) == len({tuple(d) for d in a} & {tuple(d) for d in b})


def test_illegal_forms_need_a_word_and_leave_a_mark():
    model, ids, cfg = tiny(), stream(400), replace(PREQUANT, lr=0.01, lr_end=0.001, epochs=3, seq_len=32)
    for call in (lambda: prequant_adapt(model, ids, cfg), lambda: train_then_score(model, ids, FAST)):
        with pytest.raises(IllegalAdaptation, match="accept_illegal=True"): call()
    adapted = prequant_adapt(model, ids, cfg, accept_illegal=True)
    score = evaluate(ModelPredictor(adapted), ids, OneByteEach(), **CUT)
    assert score.loss < evaluate(ModelPredictor(model), ids, OneByteEach(), **CUT).loss
    for predictor in (ModelPredictor(adapted), ScoreFirstTTT(adapted, FAST), Mixture(ModelPredictor(adapted), BackoffCache())):
        assert "prequant_adapt" in evaluate(predictor, ids, OneByteEach(), **CUT).stamps[0]
    assert torch.equal(adapted.embed, model.embed) and torch.equal(adapted.banks["q"][:2], model.banks["q"][:2])
    assert not torch.equal(adapted.banks["q"][2:], model.banks["q"][2:])
    legal = prequant_adapt(model, ids, cfg, source="train", apart_from=stream(400, seed=9))
    assert not getattr(legal, "stamps", ())
    with pytest.raises(IllegalAdaptation, match="documents are in the stream"): prequant_adapt(model, ids, cfg, source="train", apart_from=ids)
    with pytest.raises(ValueError, match="neither"): prequant_adapt(model, ids, cfg, source="test")


@pytest.mark.parametrize("bad, message", [(dict(optimizer="adam"), "one of sgd, adamw"), (dict(epochs=0), "epochs is 0: it must be at least 1"),
                                          (dict(weight_decay=0.1, freeze_blocks=1), "move frozen layers")])
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message): TTTConfig(**bad)


def test_a_stamp_travels_with_the_artifact_into_every_score():
    "What was made illegally says so after packing and unpacking, and no meta can take the stamp off"
    from pgolf.pack.artifact import pack
    from pgolf.pack.reading import unpack
    from pgolf.score.evaluate import ModelPredictor
    from pgolf.model.gpt import GPT, GPTConfig
    from pgolf.pack.plan import Plan
    from pgolf.score.illegal import stamp_model
    model = GPT(GPTConfig(vocab=64, dim=32, layers=2, heads=2, kv_heads=1, rotary_dims=8))
    stamp_model(model, "illegal: trained on the validation text")
    back = unpack(pack(model, Plan()))
    assert back.stamps == ("illegal: trained on the validation text",) == ModelPredictor(back).stamps
    assert unpack(pack(back, Plan(), meta={"stamps": []})).stamps == back.stamps
