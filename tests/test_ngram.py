"The n-gram cache: exact whatever the order of arrival, rows that sum to 1, fast and small enough, and the hashed form kept out"
import json
import time
from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.score.evaluate import EvalConfig, EvaluationError, evaluate
from pgolf.score.backoff import BackoffCache, Match
from pgolf.score.gates import LearnedGate, entropy_weight, match_features, row_entropy
from pgolf.score.hashed_ngram import HASH_PRIMES, HashedCache
from pgolf.score.key_table import KeyTable
from pgolf.score.lora import LoRAConfig
from pgolf.score.ngram import Mixture, NgramConfig, mix_rows
from pgolf.score.ttt import TTTConfig
from pgolf.score.wrap import build_predictor


class OneByteEach:
    vocab = 40
    def count(self, previous, ids): return torch.ones_like(ids)


class Bigram:
    "A fixed model: rows that depend on the last token only"
    learns = False
    def __init__(self, vocab=40): self.rows = torch.log_softmax(2 * torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0)), 1)
    def log_probs(self, query): return self.rows[query.ids[query.rows, query.cols]]
    def observe(self, segment): pass


def repetitive(n=3000, seed=0, vocab=40, kinds=30):
    "Phrases that come again and again, with noise between them"
    rng, out, size = np.random.default_rng(seed), [], 0
    phrases = [rng.integers(0, vocab, rng.integers(2, 12)) for _ in range(kinds)]
    while size <= n:
        out.append(phrases[rng.integers(kinds)] if rng.random() < .8 else rng.integers(0, vocab, 5))
        size += len(out[-1])
    return torch.from_numpy(np.concatenate(out)[:n + 1])


def slow_distribution(seen, context, orders, min_count):
    for n in sorted(orders, reverse=True):
        tail = context[len(context) - n + 1:]
        if -1 in tail: continue
        follow = Counter(seen[t] for t in range(n - 1, len(seen)) if seen[t - n + 1:t] == tail)
        if follow.total() >= min_count: return n, {y: c / follow.total() for y, c in follow.items()}
    return 0, {}


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.integers(0, 3), min_size=2, max_size=80), orders=st.sets(st.integers(2, 6), min_size=1), min_count=st.integers(2, 4),
       cuts=st.lists(st.integers(0, 80), max_size=6), probe=st.lists(st.integers(0, 3), min_size=5, max_size=5), holes=st.integers(0, 5))
def test_counts_are_exact_however_the_text_arrives(text, orders, min_count, cuts, probe, holes):
    cache = BackoffCache(orders, min_count)
    for part in np.split(np.array(text), sorted(min(c, len(text)) for c in cuts)): cache.extend(part)
    context = ([-1] * holes + probe[holes:])[-cache.width:]
    found = cache.look_up(np.array([context, text[-cache.width:] if len(text) >= cache.width else context]))
    for i, row in enumerate((context, text[-cache.width:] if len(text) >= cache.width else context)):
        order, probs = slow_distribution(text, row, orders, min_count)
        mine = found.rows == i
        assert order == found.order[i]
        assert {t: round(p, 12) for t, p in zip(found.tokens[mine].tolist(), found.probs[mine].tolist())} == {t: round(p, 12) for t, p in probs.items()}


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.lists(st.integers(0, 2**40), max_size=40), max_size=8))
def test_key_table_is_a_dictionary(parts):
    table, numbers = KeyTable(bits=2), {}
    for part in parts:
        values, first = table.add(np.array(part, np.int64), len(numbers))
        assert [part[i] for i in first] == list(dict.fromkeys(k for k in part if k not in numbers))
        for k in part: numbers.setdefault(k, len(numbers))
        assert values.tolist() == [numbers[k] for k in part]
    assert table.find(np.array([2**41, *numbers], np.int64)).tolist() == [-1, *numbers.values()]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), M=st.integers(1, 6), V=st.integers(2, 12))
def test_a_mixture_is_the_dense_formula(seed, M, V):
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    rows, dense = torch.log_softmax(4 * torch.randn(M, V, generator=g), 1), np.zeros((M, V))
    for i in range(M):
        if rng.random() < .7:
            some = rng.choice(V, rng.integers(1, V + 1), replace=False)
            dense[i, some] = rng.dirichlet(np.ones(len(some)))
    r, t = np.nonzero(dense)
    matched = dense.sum(1) > 0
    match = Match(np.arange(M), matched * 2, matched * 5, r, t, dense[r, t])
    alpha = torch.where(torch.from_numpy(matched), entropy_weight(row_entropy(rows), NgramConfig()), 0.0)
    mixed = mix_rows(rows, alpha, match).double().exp()
    slow = (1 - alpha[:, None]).double() * rows.double().exp() + alpha[:, None].double() * torch.from_numpy(dense)
    assert (mixed - slow).abs().max() < 1e-6 and (mixed.sum(1) - 1).abs().max() < 1e-6
    assert torch.equal(mix_rows(rows, alpha, match)[~torch.from_numpy(matched)], rows[~torch.from_numpy(matched)])


def test_entropy_weight_is_the_records():
    uniform = torch.full((1, 1000), -np.log(1000.0))
    H = row_entropy(uniform)
    assert H.item() == pytest.approx(np.log(1000), rel=1e-5)
    assert entropy_weight(H, NgramConfig()).item() == pytest.approx(0.05 + 0.55 / (1 + np.exp(-2 * (np.log(1000) - 4))), rel=1e-5)
    sure = torch.log(torch.tensor([[1.0, 0.0]]))
    assert row_entropy(sure).item() == 0 # no NaN from a token of probability 0


@pytest.mark.parametrize("gate", ("entropy", "learned"))
def test_rows_sum_to_one_at_a_thousand_positions(gate):
    sums, ids = [], repetitive(3000)
    score = evaluate(Mixture(Bigram(), BackoffCache(), NgramConfig(gate=gate, chunk_tokens=100)), ids, OneByteEach(), "full", seq_len=50,
                     on_rows=lambda positions, rows: sums.append((rows.double().exp().sum(1) - 1).abs()))
    assert len(torch.cat(sums)) == 3000 and torch.cat(sums).max() < 1e-6
    assert score.loss < evaluate(Bigram(), ids, OneByteEach(), "full", seq_len=50).loss - .2 and not score.stamps


def test_losses_are_the_slow_formula():
    "The whole predictor against counters, chunk by chunk"
    ids, cfg = repetitive(400), NgramConfig(chunk_tokens=64)
    found = evaluate(Mixture(Bigram(), BackoffCache((2, 3, 5)), cfg), ids, OneByteEach(), "full", seq_len=32)
    text, model = ids.tolist(), Bigram()
    for t in range(400):
        seen = text[:t // 64 * 64 + 1] if t >= 64 else []
        context = ([-1] * 4 + text[:t + 1])[-4:]
        p = model.rows[text[t]].double().exp()
        order, probs = slow_distribution(seen, context, (2, 3, 5), 2)
        if order:
            H = -(p * p.log()).sum()
            alpha = 0.05 + 0.55 * torch.sigmoid(2 * (H - 4))
            p = (1 - alpha) * p
            for y, share in probs.items(): p[y] += alpha * share
        assert abs(-p[text[t + 1]].log().item() - found.nats[t]) < 1e-5


def test_the_learned_weight_beats_the_formula_and_learns_from_the_past_only():
    ids = repetitive(6000)
    scores = [evaluate(Mixture(Bigram(), BackoffCache(), NgramConfig(gate=g, chunk_tokens=128)), ids, OneByteEach(), "full", seq_len=64).loss for g in ("entropy", "learned")]
    assert scores[1] < scores[0] - .02
    gate = LearnedGate(NgramConfig())
    before = gate.theta.copy()
    gate.learn(np.empty((0, 14)))
    assert np.array_equal(gate.theta, before)


def test_caches_stack_and_settings_survive_json():
    ids = repetitive(2000)
    inner = lambda: Mixture(Bigram(), BackoffCache((2, 3)), NgramConfig(chunk_tokens=128))
    twice = evaluate(Mixture(inner(), BackoffCache((5, 6)), NgramConfig(gate="learned")), ids, OneByteEach(), "full", seq_len=64)
    assert twice.loss < evaluate(inner(), ids, OneByteEach(), "full", seq_len=64).loss
    for cfg in (NgramConfig(orders=(2, 4)), LoRAConfig(rank=3), TTTConfig("adamw"), EvalConfig("documents")):
        assert type(cfg)(**json.loads(json.dumps(asdict(cfg)))) == cfg
    assert build_predictor(None, (NgramConfig(orders=(2, 4), min_count=3),)).cache.orders == (2, 4)


def test_features_know_nothing_of_the_target():
    match = Match(np.array([5, -1]), np.array([3, 0]), np.array([4, 0]), np.array([0, 0]), np.array([7, 9]), np.array([.75, .25]))
    features = match_features(match, np.array([2.0, 3.0]))
    assert features[0].tolist() == [1, 0, 1, 0, 0, 0, 0, 0, np.log(4), 2.0, .75, .5] and not features[1].any()


def test_hashed_rows_are_refused_without_the_flag():
    ids = repetitive(2000)
    hashed = lambda **kind: Mixture(Bigram(), HashedCache(buckets=2**9, **kind), NgramConfig(chunk_tokens=256))
    with pytest.raises(EvaluationError, match=r"position \d+: the row sums to .* \(rule: each row sums to 1"):
        evaluate(hashed(), ids, OneByteEach(), "full", seq_len=64)
    waived = evaluate(hashed(), ids, OneByteEach(), "full", seq_len=64, accept_illegal=True)
    assert len(waived.stamps) == 2 and all("illegal" in s for s in waived.stamps)
    divided = evaluate(hashed(normalise=True), ids, OneByteEach(), "full", seq_len=64)
    assert divided.loss > waived.loss + .1 and not divided.stamps


def test_hashed_keys_are_the_records():
    cache = HashedCache((3,), buckets=2**22)
    cache.extend(np.array([11, 12, 13]))
    context = (11 * 36313) ^ (12 * 27191) # the oldest token takes the first prime
    assert cache.context[3][context % 2**22] == 1 and cache.context[3].sum() == 1
    assert cache.full[3][(context ^ (13 * 51647)) % 2**22] == 1
    assert HASH_PRIMES == (36313, 27191, 51647, 81929, 131071, 175447, 209591)


def test_hashed_buckets_are_fixed_numbers():
    "Order 7 reaches the last prime; tokens 1 to 6, then 7"
    cache = HashedCache((7,), buckets=2**22)
    cache.extend(np.arange(1, 8))
    assert np.flatnonzero(cache.context[7]).tolist() == [2026335]
    assert np.flatnonzero(cache.full[7]).tolist() == [559198]
    assert HashedCache((7,))._hash(np.arange(1, 7)[None, ::-1]).item() != 2026335


@pytest.mark.parametrize("make, message", [(lambda: BackoffCache(min_count=1), "min_count=1 must be 2"), (lambda: BackoffCache((1, 2)), "must be 2 or more"),
                                           (lambda: BackoffCache(()), "must be 2 or more"), (lambda: HashedCache(buckets=1000), "power of two"),
                                           (lambda: NgramConfig(gate="x"), "one of entropy, learned"), (lambda: NgramConfig(alpha_span=1.0), r"stays in \[0, 1\)"),
                                           (lambda: Mixture(Bigram(), HashedCache(), NgramConfig(gate="learned")), "needs exact counts")])
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message): make()


@pytest.mark.slow
def test_a_million_tokens_are_counted_and_looked_up_in_time_and_memory():
    ids = repetitive(1_000_000, vocab=1024, kinds=20_000).numpy()
    cache, began = BackoffCache(), time.process_time()
    for lo in range(0, 1_000_000, 16_384):
        at = np.arange(lo, min(lo + 16_384, 1_000_000))
        index = at[:, None] + np.arange(1 - cache.width, 1)
        cache.look_up(np.where(index >= 0, ids[np.maximum(index, 0)], -1))
        cache.extend(ids[cache.size:at[-1] + 2])
    rate = 1_000_000 / (time.process_time() - began)
    assert cache.size == 1_000_001 and cache.nbytes < 1.5 * 2**30
    assert rate > 100_000, f"{rate:,.0f} tokens per second of processor time" # the benchmark states the rate; this catches a collapse
