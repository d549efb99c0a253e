"Properties of the model over its whole configuration space, and what compiled graphs and streams must keep"
import math
import sys
import types
from dataclasses import asdict, replace

import pytest
import torch
import torch._dynamo.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgolf.model import GATE_KINDS, GPT, MLP_KINDS, PARALLEL_KINDS, SKIP_KINDS, ConfigError, GPTConfig, StreamCache, token_loss

VOCAB = 40
quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@st.composite
def configs(draw):
    "Any buildable architecture, small"
    heads, kv = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3)]))
    width, layers = draw(st.sampled_from([4, 8])), draw(st.integers(1, 6))
    some = lambda: tuple(sorted(draw(st.sets(st.integers(0, layers - 1), max_size=2))))
    start = draw(st.integers(0, layers - 1))
    blocks = [0] + [n for n in (2, 3) if layers >= 3 and math.ceil(layers / n) < layers]
    return GPTConfig(
        vocab=VOCAB, dim=heads * width, layers=layers, heads=heads, kv_heads=kv,
        mlp_ratio=draw(st.sampled_from([1.0, 2.5])), mlp=draw(st.sampled_from(MLP_KINDS)),
        rotary_dims=draw(st.sampled_from([0, 4, width])), rope_train_len=draw(st.sampled_from([0, 8, 64])),
        qk_gain=draw(st.sampled_from([1.0, 5.0])), xsa=draw(st.booleans()), xsa_last=draw(st.integers(0, layers)),
        value_residual=draw(st.booleans()), gate=draw(st.sampled_from(GATE_KINDS)),
        value_embed_layers=some(), value_embed_dim=draw(st.sampled_from([5, kv * width])),
        bigram_buckets=draw(st.sampled_from([0, 17])), bigram_dim=6, smear=draw(st.booleans()), smear_reset=draw(st.booleans()),
        ln_scale=draw(st.booleans()), skips=draw(st.sampled_from(SKIP_KINDS)), parallel=draw(st.sampled_from(PARALLEL_KINDS)),
        parallel_from=draw(st.integers(0, layers - 1)), loop_start=start, loop_end=draw(st.integers(start, layers - 1)),
        loops=draw(st.integers(0, 2)), attn_res_blocks=draw(st.sampled_from(blocks)), flow=draw(st.booleans()),
        flow_latent=4, flow_hidden=8,
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
    cfg = replace(cfg, smear=True, smear_reset=True, bigram_buckets=0)
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
    model, again = lively(cfg), GPT(GPTConfig(**asdict(cfg)), torch.Generator().manual_seed(5))
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
    dict(bigram_buckets=32, bigram_dim=8, smear=True, value_residual=True, gate="linear", rope_train_len=16),
    dict(value_embed_layers=(2, 3), value_embed_dim=8, attn_res_blocks=2),
    dict(skips="gated", loop_start=1, loop_end=2, loops=1, parallel="gptj", parallel_from=2, gate="headwise"),
    dict(skips="gated", loop_start=1, loop_end=2, loops=1, parallel="lanes", parallel_from=2),
], ids=["pr1232", "pr1696", "pr1992", "pr1536"])
def test_compiles_whole_and_once(extra):
    "fullgraph, recurrence off and on, packed rows with a different number of documents each step"
    cfg = GPTConfig(vocab=VOCAB, dim=32, layers=4, heads=2, kv_heads=1, rotary_dims=8, **extra)
    model = lively(cfg)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    packed = cfg.parallel == "lanes"
    for step, cuts in enumerate([(5,), (3, 9), (2, 2, 7, 11), (1, 4, 8), (6, 7, 9, 10, 13)] if packed else range(4)):
        ids = tokens(16, seed=step, rows=1 if packed else 2)
        cu = torch.tensor([0, *cuts, 16], dtype=torch.int32) if packed else None
        for recurrent in (False, True) if cfg.loops else (None,):
            args, results = dict(cu_seqlens=cu, recurrent=recurrent, max_seqlen=16 if packed else 0), []
            for run in (compiled, model):
                model.zero_grad()
                loss = token_loss(run(ids, **args), ids.flip(1)).mean()
                loss.backward()
                results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)
    assert counter.frame_count <= (2 if cfg.loops else 1) * (2 if packed else 1)


@pytest.mark.parametrize("name", ["fa2", "fa3"])
def test_flash_attention_is_called_as_it_wants_and_compiles(monkeypatch, name):
    "A stand-in with the real calling convention, keywords after q, k, v; in a whole graph no module is imported"
    from pgolf import attention

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
    model = GPT(GPTConfig(vocab=VOCAB, dim=16, layers=3, heads=2, kv_heads=1, rotary_dims=4, loop_start=1, loop_end=1, loops=1))
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
    dict(heads=3), dict(kv_heads=3), dict(rotary_dims=5), dict(rotary_dims=128), dict(gate="soft"), dict(mlp="gelu"),
    dict(skips="some"), dict(parallel="both"), dict(loops=1, loop_start=9, loop_end=11), dict(loops=1, loop_start=5, loop_end=3),
    dict(attn_res_blocks=1), dict(value_embed_layers=(11,)), dict(value_embed_layers=(-1,)), dict(vocab=0), dict(layers=0),
    dict(parallel="lanes", parallel_from=11), dict(softcap=0.0), dict(bigram_buckets=1), dict(xsa_last=12), dict(dim="512"), dict(loops=-1),
])
def test_bad_configs_name_the_field(bad):
    with pytest.raises(ConfigError) as error:
        GPTConfig(**bad)
    assert any(f"GPTConfig.{name}" in str(error.value) for name in bad) and "must be" in str(error.value)
