"Properties of the model over its whole configuration space, and what compiled graphs and streams must keep"
import math
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgolf.ground.settings import ConfigError, from_plain, to_plain
from pgolf.model import (GPT, AsymSoftcap, AttentionResiduals, BigramHash, FlowRefiner, GPTConfig, GPTJBlocks, HeadGate, Lanes,
                         MixedLanes, Recurrence, SmearGate, SparseGate, StreamCache, UNetSkips, ValueEmbedding, ValueResidual,
                         WindowSmear, XSA, token_loss)
from pgolf.model.mlp import ACTIVATIONS

VOCAB = 40
quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def configs(draw):
    "Any buildable architecture, small"
    heads, kv = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3)]))
    width, layers = draw(st.sampled_from([4, 8])), draw(st.integers(1, 6))
    some = lambda: tuple(sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1, max_size=2))))
    start = draw(st.integers(0, layers - 1))
    blocks = [n for n in (2, 3) if layers >= 3 and math.ceil(layers / n) < layers]
    first = draw(st.integers(0, layers - 1))
    choices = [
        (None, Recurrence(start, draw(st.integers(start, layers - 1)), draw(st.integers(1, 2)))),
        (None, UNetSkips(), UNetSkips(gated=True)),
        (None, GPTJBlocks(first), Lanes(first), MixedLanes(first)),
        (None, *map(AttentionResiduals, blocks)),
        (None, ValueEmbedding(some(), draw(st.sampled_from([5, kv * width])))),
        (None, ValueResidual()),
        (None, XSA(draw(st.integers(0, layers)), draw(st.booleans()))),
        (None, *map(HeadGate, ("linear", "headwise", "elementwise")), SparseGate(3)),
        (None, SmearGate(), SmearGate(reset=True), WindowSmear(3)),
        (None, AsymSoftcap(), AsymSoftcap(learn=True)),
        (None, BigramHash(17, 6)),
        (None, FlowRefiner(4, 8)),
    ]
    parts = [part for options in choices if (part := draw(st.sampled_from(options)))]
    return GPTConfig(
        vocab=VOCAB, dim=heads * width, layers=layers, heads=heads, kv_heads=kv,
        mlp_ratio=draw(st.sampled_from([1.0, 2.5])), mlp=draw(st.sampled_from(list(ACTIVATIONS))),
        rotary_dims=draw(st.sampled_from([0, 4, width])), rope_train_len=draw(st.sampled_from([0, 8, 64])),
        qk_gain=draw(st.sampled_from([1.0, 5.0])), ln_scale=draw(st.booleans()), parts=parts,
    )


def lively(cfg, seed=0):
    "A model whose every parameter is non-trivial: zero initial values would hide paths"
    g = torch.Generator().manual_seed(seed)
    model = GPT(cfg, g)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def tokens(n, seed=1, rows=1):
    return torch.randint(2, VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


@quick
@given(configs(), st.integers(0, 11), st.booleans())
def test_causal(cfg, t, recurrent):
    model, ids = lively(cfg), tokens(12)
    other = ids.clone()
    other[0, t] = 1 if t % 2 else (ids[0, t] + 1) % VOCAB
    with torch.no_grad():
        a, b = model(ids, recurrent=recurrent), model(other, recurrent=recurrent)
    torch.testing.assert_close(a[:, :t], b[:, :t], atol=1e-6, rtol=0)


@quick
@given(configs(), st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any))
def test_packed_rows_equal_separate_documents(cfg, lengths):
    model, ids = lively(cfg), tokens(sum(lengths))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    with torch.no_grad():
        packed = model(ids, cu_seqlens=cu)
        alone = torch.cat([model(part) for part in ids.split(lengths, 1) if part.numel()], 1)
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)


@quick
@given(configs())
def test_one_packed_document_is_a_dense_row(cfg):
    "Also when the row is longer than the rotary was trained for: one rule for both"
    model, ids = lively(replace(cfg, rope_train_len=8)), tokens(20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, cu_seqlens=torch.tensor([0, 20], dtype=torch.int32)), model(ids), atol=1e-4, rtol=1e-4)


@quick
@given(configs())
def test_smear_with_reset_stays_inside_documents(cfg):
    others = cfg.without("smear_gate").without("window_smear").without("bigram_hash").parts
    cfg = replace(cfg, parts=(*others, SmearGate(reset=True)))
    model = lively(cfg)
    a, b = tokens(6), tokens(6)
    a[0, 3] = b[0, 3] = 1
    b[0, 2] = (a[0, 2] + 1) % VOCAB
    seen = []
    with torch.no_grad():
        for ids in (a, b):
            model(ids, tap=lambda name, t: seen.append(t) if name == "x0" else None)
    assert torch.equal(seen[0][:, 3:], seen[1][:, 3:]) and not torch.equal(seen[0][:, 2], seen[1][:, 2])


@quick
@given(configs(), st.booleans())
def test_every_parameter_learns_or_is_listed(cfg, recurrent):
    model = lively(cfg)
    token_loss(model(tokens(12, rows=2), recurrent=recurrent), tokens(12, seed=2, rows=2)).mean().backward()
    idle = model.unused(recurrent=recurrent)
    for name, p in model.named_parameters():
        dead = p.grad is None or bool((p.grad == 0).all())
        assert dead == (idle.get(name, ("",))[0] == "whole"), name
    for name, (what, why) in idle.items():
        assert why and (what == "whole" or (model.get_parameter(name).grad[what] == 0).all())


@quick
@given(configs())
def test_state_round_trip_and_config_as_json(cfg):
    model, again = lively(cfg), GPT(from_plain(GPTConfig, to_plain(cfg)), torch.Generator().manual_seed(5))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens(5)), again(tokens(5)))
    assert model.roles().keys() == dict(model.named_parameters()).keys()


@quick
@given(configs())
def test_bf16_is_near_fp32(cfg):
    model, ids, targets = lively(replace(cfg, qk_gain=1.5), seed=3), tokens(24, rows=2), tokens(24, rows=2, seed=4)
    with torch.no_grad():
        exact = token_loss(model(ids), targets)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(ids)
    assert rough.dtype == torch.float32
    assert (token_loss(rough, targets) - exact).abs().mean() < 0.15


@quick
@given(configs(), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 9))
def test_a_stream_equals_a_banded_row(cfg, chunks, window):
    "Chunk by chunk through a cache, or all at once through one: the same logits; and with a wide window, the dense row's"
    cfg, n = replace(cfg, rope_train_len=0), sum(chunks)
    model, ids = lively(cfg), tokens(n)
    with torch.no_grad():
        cache, whole = StreamCache(window), model(ids, cache=StreamCache(window))
        parts = torch.cat([model(part, cache=cache) for part in ids.split(chunks, 1)], 1)
        torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(ids, cache=StreamCache(n)), model(ids), atol=1e-4, rtol=1e-4)


@quick
@given(configs())
def test_adapters_of_nothing_change_nothing_and_every_site_is_asked(cfg):
    model, ids, asked = lively(cfg), tokens(6), set()
    with torch.no_grad():
        plain = model(ids)
        zero = lambda site, p, x: asked.add((site, p))
        assert torch.equal(model(ids, adapters=zero), plain)
        assert torch.equal(model(ids, through=lambda name, bank: bank * 1.0), plain)
    n = len(model.order())
    assert asked == {(site, p) for site in "q k v o mlp".split() for p in range(n)} | {("logits", n)}


@pytest.mark.slow
@pytest.mark.parametrize("extra", [
    dict(parts=(UNetSkips(), ValueResidual(), XSA(), HeadGate(), SmearGate(), BigramHash(32, 8)), rope_train_len=16),
    dict(parts=(UNetSkips(), AttentionResiduals(), ValueEmbedding((2, 3), 8), XSA(), FlowRefiner(4, 8))),
    dict(parts=(Recurrence(1, 2, 1), UNetSkips(gated=True), XSA(), HeadGate("headwise"), GPTJBlocks(2))),
    dict(parts=(Recurrence(1, 2, 1), UNetSkips(gated=True), XSA(), Lanes(2))),
    dict(parts=(Recurrence(1, 2, 1), MixedLanes(2), UNetSkips(gated=True), XSA(gated=True), SparseGate(), WindowSmear(stop="bos"), AsymSoftcap())),
], ids=["pr1232", "pr1696", "pr1992", "pr1536", "pr2135"])
def test_compiles_whole_and_once(extra):
    "fullgraph, recurrence off and on, packed rows with a different number of documents each step"
    cfg = GPTConfig(vocab=VOCAB, dim=32, layers=4, heads=2, kv_heads=1, rotary_dims=8, **extra)
    model = lively(cfg)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    packed, loops = (cfg.part("parallel_lanes") or cfg.part("mixed_lanes")) is not None, cfg.part("recurrence") is not None
    for step, cuts in enumerate([(5,), (3, 9), (2, 2, 7, 11), (1, 4, 8), (6, 7, 9, 10, 13)] if packed else range(4)):
        ids = tokens(16, seed=step, rows=1 if packed else 2)
        cu = torch.tensor([0, *cuts, 16], dtype=torch.int32) if packed else None
        for recurrent in (False, True) if loops else (None,):
            args, results = dict(cu_seqlens=cu, recurrent=recurrent, max_seqlen=16 if packed else 0), []
            for run in (compiled, model):
                model.zero_grad()
                loss = token_loss(run(ids, **args), ids.flip(1)).mean()
                loss.backward()
                results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)
    assert counter.frame_count <= (2 if loops else 1) * (2 if packed else 1)


@pytest.mark.parametrize("name", ["fa2", "fa3"])
def test_flash_attention_is_called_as_it_wants_and_compiles(monkeypatch, name):
    "A stand-in with the real calling convention, keywords after q, k, v; in a whole graph no module is imported"
    from pgolf.model import attention

    def dense(q, k, v, *, causal):
        assert causal and q.shape[1:2] == k.shape[1:2]
        return attention.causal_sdpa(q, k, v)

    def packed(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert causal and q.dim() == 3 and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        y = attention.blocked_sdpa(q[None], k[None], v[None], cu_seqlens_q, max_seqlen_q)[0]
        return (y, None) if name == "fa3" else y

    stub = types.ModuleType("stub")
    stub.flash_attn_func, stub.flash_attn_varlen_func = dense, packed
    monkeypatch.setitem(sys.modules, {"fa2": "flash_attn", "fa3": "flash_attn_interface"}[name], stub)
    monkeypatch.setattr(attention, "backend_missing", lambda *a: "")
    attention._pick_backend.cache_clear()
    torch._dynamo.reset()
    model, ids = lively(GPTConfig(vocab=VOCAB, dim=32, layers=2, heads=4, kv_heads=2, rotary_dims=8)), tokens(16)
    model.backend, forced = "sdpa", GPT(model.cfg, backend=name)
    forced.load_state_dict(model.state_dict())
    compiled = torch.compile(forced, backend="eager", fullgraph=True)
    with torch.no_grad():
        for cu in (None, torch.tensor([0, 5, 9, 16], dtype=torch.int32)):
            args = {} if cu is None else dict(cu_seqlens=cu, max_seqlen=8)
            want = model(ids, **args)
            torch.testing.assert_close(forced(ids, **args), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(compiled(ids, **args), want, atol=1e-5, rtol=1e-5)
    attention._pick_backend.cache_clear()


def test_an_adapter_is_the_same_as_changing_the_weight():
    model, ids = lively(GPTConfig(vocab=VOCAB, dim=32, layers=2, heads=4, kv_heads=2, rotary_dims=8)), tokens(9)
    delta = torch.randn(32, 32, generator=torch.Generator().manual_seed(5)) * 0.1
    with torch.no_grad():
        adapted = model(ids, adapters=lambda site, p, x: x @ delta.T if (site, p) == ("q", 1) else None)
        model.banks["q"][1] += delta
        torch.testing.assert_close(adapted, model(ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="adapter of o at position 0 returned .*expected"):
        model(ids, adapters=lambda site, p, x: torch.ones(1) if site == "o" else None)


@pytest.mark.parametrize("ids, more, words", [
    (torch.tensor([[1, VOCAB]]), {}, "40 pieces"), (torch.tensor([[-1, 2]]), {}, "run from -1"), (torch.tensor([1, 2]), {}, "batch, time"),
    (torch.zeros(1, 0, dtype=torch.int64), {}, "at least one"), (torch.ones(1, 3), {}, "int64"),
    (torch.ones(2, 4, dtype=torch.int64), dict(cu_seqlens=torch.tensor([0, 4])), "one at a time"),
    (torch.ones(1, 4, dtype=torch.int64), dict(cu_seqlens=torch.tensor([0, 2, 7])), "rise from 0"),
    (torch.ones(1, 4, dtype=torch.int64), dict(cu_seqlens=torch.tensor([0, 1, 4]), max_seqlen=2), "more than max_seqlen"),
    (torch.ones(1, 4, dtype=torch.int64), dict(cu_seqlens=torch.tensor([0, 4]), cache=StreamCache(4)), "without a cache"),
])
def test_bad_input_gets_a_sentence(ids, more, words):
    model = GPT(GPTConfig(vocab=VOCAB, dim=16, layers=1, heads=2, kv_heads=1, rotary_dims=4))
    with pytest.raises(ValueError, match=words):
        model(ids, **more)


def test_a_cache_refuses_another_stream():
    model = GPT(GPTConfig(vocab=VOCAB, dim=16, layers=3, heads=2, kv_heads=1, rotary_dims=4, parts=(Recurrence(1, 1, 1),)))
    cache = StreamCache(8)
    model(tokens(4), cache=cache, recurrent=True)
    assert not any(t.requires_grad for pair in cache.kept.values() for t in pair)
    for ids, recurrent in ((tokens(4), False), (tokens(4, rows=2), True)):
        with pytest.raises(ValueError, match="use a new StreamCache"):
            model(ids, cache=cache, recurrent=recurrent)


def test_attention_makes_no_square_of_the_row():
    "Memory of a long row grows with its length, dense and packed: no T x T tensor per head"
    cfg = GPTConfig(vocab=VOCAB, dim=16, layers=1, heads=4, kv_heads=2, rotary_dims=4)
    model, biggest = GPT(cfg), 0
    T = 2048

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                biggest = max(biggest, t.numel() if isinstance(t, torch.Tensor) else 0)
            return out

    with torch.no_grad(), Watch():
        model(tokens(T))
        model(tokens(T), cu_seqlens=torch.tensor([0, 700, T], dtype=torch.int32))
    assert biggest <= T * max(cfg.hidden, VOCAB, cfg.dim) * 2 < T * T


@pytest.mark.parametrize("bad", [
    dict(heads=3), dict(kv_heads=3), dict(rotary_dims=5), dict(rotary_dims=128), dict(mlp="gelu"), dict(vocab=0), dict(layers=0),
    dict(softcap=0.0), dict(dim="512"), dict(parts=(XSA(), XSA())), dict(parts=(GPTJBlocks(), Lanes())), dict(parts=("xsa",)),
])
def test_bad_configs_name_the_field(bad):
    with pytest.raises(ConfigError) as error:
        GPTConfig(**bad)
    assert any(f"GPTConfig.{name}" in str(error.value) for name in bad) and "must be" in str(error.value)


@pytest.mark.parametrize("part, field", [
    (lambda: HeadGate("soft"), "HeadGate.form"), (lambda: Recurrence(9, 11, 1), "Recurrence.last"), (lambda: Recurrence(5, 3, 1), "Recurrence.last"),
    (lambda: Recurrence(11, 11, 1), "Recurrence.first"), (lambda: Recurrence(0, 1, 0), "Recurrence.loops"),
    (lambda: AttentionResiduals(1), "AttentionResiduals.blocks"), (lambda: AttentionResiduals(11), ""), (lambda: ValueEmbedding((11,)), "ValueEmbedding.layers"),
    (lambda: AttentionResiduals(temperature=0.0), "AttentionResiduals.temperature"), (lambda: ValueEmbedding(()), "ValueEmbedding.layers"),
    (lambda: ValueEmbedding((-1,)), "ValueEmbedding.layers"), (lambda: Lanes(11), "Lanes.first"), (lambda: GPTJBlocks(11), "GPTJBlocks.first"),
    (lambda: MixedLanes(11), "MixedLanes.first"), (lambda: MixedLanes(merge="sum"), "MixedLanes.merge"), (lambda: SparseGate(513), "SparseGate.channels"),
    (lambda: WindowSmear(513), "WindowSmear.channels"), (lambda: WindowSmear(stop="never"), "WindowSmear.stop"),
    (lambda: BigramHash(1), "BigramHash.buckets"), (lambda: XSA(12), "XSA.last"), (lambda: ValueEmbedding((9, 9)), "ValueEmbedding.layers"),
])
def test_bad_parts_name_the_field(part, field):
    if not field:
        assert GPTConfig(parts=(part(),))
        return
    with pytest.raises(ConfigError) as error:
        GPTConfig(parts=(part(),))
    assert field in str(error.value) and "must be" in str(error.value)


@pytest.mark.parametrize("count, parts, vocab", [
    (27_137_223, (UNetSkips(), ValueResidual(), XSA(), HeadGate(), SmearGate(), BigramHash()), 1024),
    (27_235_848, (UNetSkips(), ValueResidual(), XSA(), HeadGate(), SmearGate(), BigramHash(), FlowRefiner()), 1024),
    (26_668_123, (UNetSkips(), AttentionResiduals(), ValueEmbedding(), XSA()), 1024),
    (35_944_537, (Recurrence(), UNetSkips(gated=True), XSA(), Lanes()), 8192),
    (35_945_673, (Recurrence(), MixedLanes(), UNetSkips(gated=True), XSA(), SparseGate(), WindowSmear(), AsymSoftcap()), 8192),
    (35_989_592, (Recurrence(), UNetSkips(gated=True), XSA(), HeadGate("headwise"), GPTJBlocks()), 8192),
])
def test_parameters_as_the_records_logged_them(count, parts, vocab):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab=vocab, mlp_ratio=3.0 if vocab == 1024 else 4.0, parts=parts))
    assert sum(p.numel() for p in model.parameters()) == count


def test_parameters_are_registered_in_the_order_that_seeds_and_files_rely_on():
    cfg = GPTConfig(vocab=VOCAB, dim=32, layers=4, heads=2, kv_heads=1, rotary_dims=8, parts=(
        UNetSkips(gated=True), ValueResidual(), XSA(), HeadGate(), Lanes(2), AttentionResiduals(), SmearGate(), BigramHash(17, 8),
        ValueEmbedding((1,), 8), FlowRefiner(4, 8)))
    assert [name for name, _ in GPT(cfg).named_parameters()] == """
        embed q_gain attn_scale mlp_scale resid_mix skip_w skip_g vr_lambda gate_w gate_b lane_merge res_query smear_gate bigram_scale ve_scale
        ve_layer_scale bigram_table bigram_proj ve_table ve_proj banks.down banks.k banks.o banks.q banks.up banks.v
        flow.down flow.up flow.w1 flow.b1 flow.w2 flow.b2 flow.gate""".split()


def seen_by(model, ids):
    seen = {}
    with torch.no_grad():
        model(ids, tap=seen.__setitem__)
    return seen


def test_xsa_last_counts_from_the_end_exactly():
    model = lively(GPTConfig(vocab=VOCAB, dim=32, layers=5, heads=2, kv_heads=1, rotary_dims=8, parts=(XSA(last=2),)))
    seen = seen_by(model, tokens(12))
    changed = [not torch.equal(seen[f"y.{i}"].flatten(2), seen[f"attn_out.{i}"]) for i in range(5)]
    assert changed == [False, False, False, True, True]


def test_gptj_blocks_begin_at_their_first_layer_exactly():
    model = lively(GPTConfig(vocab=VOCAB, dim=32, layers=5, heads=2, kv_heads=1, rotary_dims=8, parts=(GPTJBlocks(3),)))
    seen = seen_by(model, tokens(12))
    assert [torch.equal(seen[f"attn_in.{i}"], seen[f"mlp_in.{i}"]) for i in range(5)] == [False, False, False, True, True]


def test_ln_scale_goes_by_the_layer_not_the_virtual_position():
    "A normed vector has mean square 1, so what a layer reads has mean square 1/(layer+1), in every pass of a loop"
    model = lively(GPTConfig(vocab=VOCAB, dim=64, layers=4, heads=2, kv_heads=1, rotary_dims=8, parts=(Recurrence(1, 2, 2),)))
    size = {}
    with torch.no_grad():
        model(tokens(12), tap=lambda name, t: size.setdefault(name, []).append(t.square().mean().item()))
    for i, passes in enumerate((1, 3, 3, 1)):
        for name in ("attn_in", "mlp_in"):
            assert size[f"{name}.{i}"] == pytest.approx([1 / (i + 1)] * passes, rel=1e-3)


def test_snapshots_of_attention_residuals_carry_no_gradient():
    "With all of the stream replaced by snapshots, what lies below them cannot learn; the embedding learns as output only"
    cfg = GPTConfig(vocab=VOCAB, dim=32, layers=4, heads=2, kv_heads=1, rotary_dims=8, parts=(AttentionResiduals(2, mix=1.0),))
    model, ids = lively(cfg), tokens(12)
    model.resid_mix.data[:, 1] = 0
    token_loss(model(ids), ids.flip(1)).mean().backward()
    assert not model.banks["up"].grad[:2].any() and not model.banks["v"].grad[:2].any() and model.banks["up"].grad[2:].any()


@pytest.mark.parametrize("part", [
    BigramHash(17, 8), ValueEmbedding((1, 3), 8), AttentionResiduals(2, mix=0.0), Recurrence(1, 2, 1), UNetSkips(gated=True), HeadGate(),
    ValueResidual(), XSA(), SmearGate(), GPTJBlocks(2), Lanes(2), FlowRefiner(4, 8), SparseGate(), WindowSmear(), MixedLanes(2), AsymSoftcap(),
    XSA(gated=True)], ids=lambda part: part.kind)
def test_what_a_part_says_of_itself_is_true(part):
    "Weights have roles, layered ones a row a layer; shrinking keeps the kind; the walk shows each of its sites; JSON keeps it"
    from pgolf.model.part import hooks_of
    cfg = GPTConfig(vocab=VOCAB, dim=32, layers=4, heads=2, kv_heads=1, rotary_dims=8, parts=(part,))
    model = GPT(cfg, torch.Generator().manual_seed(0))
    own = part.weights(cfg, torch.Generator().manual_seed(0))
    assert own.keys() <= dict(model.named_parameters()).keys() and {w.role for w in own.values()} <= {"control", "table", "proj"}
    assert all(len(model.get_parameter(name)) == cfg.layers for name in model.layered())
    smaller = cfg.shrink(types.SimpleNamespace(dim=16, heads=2, layers=3, vocab=20, seq_len=64))
    assert [p.kind for p in smaller.parts] == [part.kind] and GPT(smaller)(torch.ones(1, 4, dtype=torch.int64)).shape == (1, 4, 20)
    assert from_plain(GPTConfig, to_plain(cfg)) == cfg and part.title
    from pgolf.model.walk import walk_lines
    lines = walk_lines(model)
    assert all(any(part.kind in line and hook in line for line in lines) for hook in hooks_of(part))


def test_a_model_without_numbers_needs_no_compiler():
    "Artifacts are opened on the meta device; whatever imports torch's compiler there costs every process seconds"
    code = ("import sys, torch; from pgolf import recipes; from pgolf.model import GPT\n"
            "with torch.device('meta'): made = [GPT(recipes.get(name).model) for name in recipes.names()]\n"
            "print(len(made), 'torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    count, imported = done.stdout.split() or ("0", done.stderr)
    assert int(count) >= 7 and imported == "False", imported
