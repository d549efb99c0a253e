"Rounding, GPTQ and plans: reference vectors, properties, refusals"
import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st

from pgolf.ground.settings import from_plain, to_plain
from pgolf.model import (GPT, AttentionResiduals, BigramHash, FlowRefiner, GPTConfig, HeadGate, Lanes, Recurrence,
                         SmearGate, UNetSkips, ValueEmbedding, ValueResidual, XSA)
from pgolf.pack.clip import COARSEST, PERCENTILES, parse_clip, percentile
from pgolf.pack.damage import group_sensitivity, output_error
from pgolf.pack.fake_rounding import fake_round, soft_round
from pgolf.pack.fisher import collect_sensitivity, repaired
from pgolf.pack.floats import Fp16, Fp32
from pgolf.pack.gptq import GPTQ, gptq
from pgolf.pack.grid import FP16_TINY, Codes, top_code
from pgolf.pack.hessians import collect_hessians
from pgolf.pack.plan import Plan, Special, quantiser_for
from pgolf.pack.quantize import calibrate, dequantize_state, quantize_model
from pgolf.pack.rounding import Rows, round_rows, row_scale
from pgolf.pack.zeroing import zero_ones, zeroing_cost

CLIPS = ['max', 'percentile 99.9', 'best matrix', 'best row', 'sigma 3', 'sigma 12.85']
LINEAGES = {'pr761/int6': (6, 'max'), 'pr1232/int6': (6, 'max'), 'pr1232/int5': (5, 'max'), 'pr1232/int8': (8, 'percentile 99.99984'),
            'pr1696/int6': (6, 'best matrix'), 'pr1696/int8': (8, 'percentile 99.99984')}


def small_model(**extra):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**dict(vocab=64, dim=32, layers=4, heads=2, kv_heads=1, rotary_dims=8, parts=PLAIN) | extra))
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def slow_gptq(w, H, bits, k, block=128, damp=0.01):
    "The reference's routine: invert, factor, and go column by column"
    top, H, dead = top_code(bits), H.clone(), H.diag() == 0
    H[dead, dead] = 1
    H.diagonal().add_(damp * H.diag().mean())
    perm = H.diag().argsort(descending=True)
    W, H = w.masked_fill(dead, 0)[:, perm], H[perm][:, perm]
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    s = row_scale(w, bits, f'sigma {k}').float()
    Q = torch.zeros_like(W)
    for a in range(0, W.shape[1], block):
        b = min(a + block, W.shape[1])
        X, E = W[:, a:b].clone(), torch.zeros(len(W), b - a)
        for j in range(b - a):
            Q[:, a + j] = (X[:, j] / s).round().clamp(-top, top)
            E[:, j] = (X[:, j] - Q[:, a + j] * s) / U[a + j, a + j]
            X[:, j:] -= E[:, j, None] * U[a + j, a + j:b]
        W[:, b:] -= E @ U[a:b, b:]
    return Q[:, perm.argsort()].to(torch.int8)


def correlated(rows, cols, seed, samples=400):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, cols, generator=g) @ (torch.eye(cols) + torch.randn(cols, cols, generator=g) / cols**0.5)
    return torch.randn(rows, cols, generator=g) * 0.05, x.T @ x


# ---- reference vectors

@pytest.mark.parametrize('lineage', LINEAGES)
def test_rows_equal_the_reference(golden, lineage):
    from safetensors.torch import load_file
    vectors = load_file(golden / 'quant_rows.safetensors')
    bits, clip = LINEAGES[lineage]
    names = [k[2:] for k in vectors if k.startswith('w.')]
    assert len(names) >= 5
    for name in names:
        w, want = vectors[f'w.{name}'], vectors[f'{lineage}.q.{name}']
        vector = w.ndim == 1  # the references keep a vector's scale unfloored and, at 8 bits, in fp32
        c = round_rows(w, bits, clip if not vector or bits == 8 else 'max', faithful=not vector)
        if vector and bits == 8:
            assert (c.codes - want).abs().max() <= 1
            assert torch.allclose(c.scale.float(), vectors[f'{lineage}.s.{name}'], rtol=1e-3)
        else:
            assert torch.equal(c.codes, want), (lineage, name)
            assert torch.equal(c.scale, vectors[f'{lineage}.s.{name}']), (lineage, name)


def test_gptq_equals_the_reference(golden):
    from safetensors.torch import load_file
    v = load_file(golden / 'gptq.safetensors')
    cases = [(b, k, name[2:]) for b, k in ((6, 12.85), (6, 2.5), (7, 15.0), (8, 20.0)) for name in v if name.startswith('w.')]
    assert len(cases) == 8
    for bits, k, name in cases:
        w, H, q, s = v[f'w.{name}'], v[f'H.{name}'], v[f'b{bits}_k{k}.q.{name}'], v[f'b{bits}_k{k}.s.{name}']
        c = gptq(w, H, bits, k)
        assert torch.equal(c.scale, s)
        assert (c.codes == q).float().mean() >= 0.999
        ours, theirs = (output_error(w, Codes(x, s, bits), H) for x in (c.codes, q))
        assert abs(ours / theirs - 1) <= 1e-3


# ---- rounding

weights = st.tuples(st.integers(1, 6), st.integers(2, 40), st.integers(0, 10**6), st.floats(1e-4, 100))


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(2, 8), st.sampled_from(CLIPS), st.booleans())
def test_rounding_is_nearest_within_the_range(shape, bits, clip, bank):
    rows, cols, seed, size = shape
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * size
    if bank: w = w.expand(3, rows, cols).contiguous()
    c = round_rows(w, bits, clip)
    step, top = c.scale.double()[..., None], top_code(bits)
    assert c.codes.dtype == torch.int8 and c.scale.dtype == torch.float16 and c.scale.shape == w.shape[:-1]
    assert int(c.codes.abs().max()) <= top and (c.scale.float() >= FP16_TINY).all()
    clipped = w.double().clamp(-step * top, step * top)
    assert ((c.codes.double() * step - clipped).abs() <= step / 2 * (1 + 1e-5)).all()


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(3, 8))
def test_choosing_per_row_is_never_worse_than_per_matrix(shape, bits):
    rows, cols, seed, size = shape
    w = torch.distributions.StudentT(2.0).sample((rows, 8 * cols)) * size if seed % 2 else torch.randn(rows, 8 * cols) * size
    error = lambda clip: (round_rows(w, bits, clip).dequantize() - w).double().square().sum()
    matrix = min(error(f'percentile {p}') for p in PERCENTILES)
    assert torch.isclose(error('best matrix'), matrix, rtol=1e-6)
    assert error('best row') <= matrix * (1 + 1e-6)


@pytest.mark.parametrize('clip', CLIPS)
def test_a_bank_is_its_matrices(clip):
    bank = torch.randn(3, 8, 50)
    whole, H = round_rows(bank, 6, clip), torch.stack([correlated(8, 50, s)[1] for s in range(3)])
    for i, m in enumerate(bank):
        assert torch.equal(whole.codes[i], round_rows(m, 6, clip).codes)
        assert torch.equal(gptq(bank, H, 6, clip).codes[i], gptq(m, H[i], 6, clip).codes)


def test_zero_rows_tiny_rows_and_dead_weights():
    w = torch.randn(6, 30)
    w[2] = 0
    w[3] *= 1e-8
    for clip in CLIPS:
        for c in (round_rows(w, 6, clip), gptq(w, correlated(6, 30, 0)[1], 6, clip)):
            out = c.dequantize()
            assert (out[2] == 0).all() and torch.isfinite(out).all()
    w *= 0.01
    kept = (round_rows(w, 6).dequantize()[0] - w[0]).norm() / w[0].norm()
    lost = (round_rows(w, 6, faithful=True).dequantize()[0] - w[0]).norm() / w[0].norm()
    assert kept < 0.05 and lost > 0.5  # the reference's floor erases rows far below 1


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_nan_and_inf_name_the_tensor(value):
    w = torch.randn(4, 8)
    w[1, 2] = value
    for attempt in (lambda: round_rows(w, 6, name='banks.up.3'), lambda: gptq(w, torch.eye(8), 6, 3.0, name='banks.up.3')):
        with pytest.raises(ValueError, match=r'banks\.up\.3: 1 of 32 weights are NaN or inf'):
            attempt()
    with pytest.raises(ValueError, match='second moments of banks.up.3'):
        gptq(torch.randn(4, 8), torch.eye(8) * value, 6, 3.0, name='banks.up.3')
    model = small_model()
    model.banks['o'].data[1, 0, 0] = value
    with pytest.raises(ValueError, match=r'banks\.o'):
        quantize_model(model, Plan())


def test_scales_beyond_fp16_are_refused():
    with pytest.raises(ValueError, match='embed: .*fp16'):
        round_rows(torch.full((2, 4), 1e9), 6, name='embed')


@pytest.mark.parametrize('clip', ['', 'sigma', 'sigma x', 'sigma -1', 'sigma nan', 'percentile 101', 'percentile 0', 'best', 'max 2', 'row', None, 3])
def test_unknown_clips_are_refused(clip):
    with pytest.raises(ValueError, match='is not one of'):
        parse_clip(clip)


@pytest.mark.parametrize('bits', [1, 9, 0, -3])
def test_widths_beyond_int8_are_refused(bits):
    with pytest.raises(ValueError, match='2 to 8'):
        round_rows(torch.randn(2, 2), bits)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), st.floats(0.01, 100), st.integers(0, 10**6))
def test_percentiles_are_torchs(rows, cols, p, seed):
    w = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(percentile(w, p), w.abs().quantile(p / 100, dim=-1))


def test_percentiles_take_any_size():
    w = torch.rand(5, 2**22)  # 21 M elements; torch.quantile refuses more than 16 M
    assert (percentile(w, 99.9) - 0.999).abs().max() < 1e-3


def test_ties_go_to_the_even_code():
    codes = round_rows(torch.tensor([[31.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5]]), 6)
    assert codes.scale.tolist() == [1.0] and codes.codes.tolist() == [[31, 0, 2, 2, 4, 0, -2, -2]]


@pytest.mark.parametrize('clip', ['max', 'best row', 'percentile 100'])
def test_scales_stop_at_the_smallest_normal_fp16(clip):
    w = torch.tensor([[1e-4, -5e-5, 2e-5], [0.0, 0.0, 0.0], [1.0, 0.5, -1.0]])
    scale = round_rows(w, 6, clip).scale
    assert scale[:2].tolist() == [2.0**-14] * 2 and scale[2] > 2.0**-14


# ---- GPTQ

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(2, 150), st.integers(0, 10**6), st.sampled_from([1, 7, 16, 64, 128]), st.sampled_from([4, 6, 8]))
def test_gptq_is_the_slow_routine(rows, cols, seed, block, bits):
    w, H = correlated(rows, cols, seed)
    if seed % 3 == 0: H[:, seed % cols] = H[seed % cols] = 0
    fast, slow = gptq(w, H, bits, 6.0, block=block).codes, slow_gptq(w, H, bits, 6.0, block=block)
    if not torch.equal(fast, slow):  # a tie may fall the other way and carry on: the damage must be the same
        c = round_rows(w, bits, 'sigma 6')
        a, b = (output_error(w, Codes(q, c.scale, bits), H) for q in (fast, slow))
        assert (fast == slow).float().mean() > 0.95 and abs(a / b - 1) < 0.02


@pytest.mark.parametrize('seed', range(8))
@pytest.mark.parametrize('bits', [4, 6, 8])
def test_gptq_beats_rounding_on_correlated_inputs(seed, bits):
    w, H = correlated(24, 64, seed)
    a, b = round_rows(w, bits, 'sigma 6'), gptq(w, H, bits, 6.0)
    assert torch.equal(a.scale, b.scale) and output_error(w, b, H) < output_error(w, a, H)


def test_gptq_is_rounding_where_inputs_are_independent():
    w = torch.randn(12, 40)
    assert torch.equal(gptq(w, torch.diag(torch.rand(40) + 0.1), 6, 4.0).codes, round_rows(w, 6, 'sigma 4').codes)


def test_dead_columns_get_zero_and_do_not_disturb_others():
    w, H = correlated(10, 40, 3)
    dead = [0, 7, 39]
    H[:, dead] = 0
    H[dead] = 0
    c = gptq(w, H, 6, 6.0)
    assert (c.codes[:, dead] == 0).all() and (c.codes != 0).any()
    live = [j for j in range(40) if j not in dead]
    assert output_error(w, c, H) < output_error(w, round_rows(w, 6, 'sigma 6'), H)
    assert len(live) == 37 and (c.codes[:, live] != 0).float().mean() > 0.5
    assert (gptq(w, torch.zeros(40, 40), 6, 6.0).codes == 0).all()  # nothing ever came in


def test_damping_grows_then_falls_back_with_a_warning():
    w, n = torch.randn(6, 32), 32
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        gptq(w, torch.ones(n, n) - 0.02 * torch.eye(n), 6, 4.0)  # not positive until damped tenfold
    with pytest.warns(UserWarning, match='banks.q: second moments are not positive definite'):
        c = gptq(w, 101 * torch.ones(n, n) - 100 * torch.eye(n), 6, 4.0, name='banks.q')
    assert torch.equal(c.codes, round_rows(w, 6, 'sigma 4').codes)


def test_gptq_refuses_moments_of_the_wrong_shape_and_leaves_its_inputs_alone():
    w, H = correlated(6, 20, 0)
    kept = w.clone(), H.clone()
    gptq(w, H, 6, 4.0)
    assert torch.equal(w, kept[0]) and torch.equal(H, kept[1])
    with pytest.raises(ValueError, match=r'need second moments \(20, 20\), got \(19, 19\)'):
        gptq(w, H[:19, :19], 6, 4.0)


# ---- plans and models

PLAIN = (UNetSkips(), XSA())
CONFIGS = dict(
    plain={}, swiglu=dict(mlp='swiglu'),
    recurrent=dict(parts=(Recurrence(1, 2, 2), UNetSkips(gated=True), XSA())),
    everything=dict(parts=(UNetSkips(), AttentionResiduals(), ValueEmbedding((1, 3)), ValueResidual(), XSA(), HeadGate(), SmearGate(),
                           BigramHash(300), FlowRefiner())),
    lanes=dict(parts=(*PLAIN, Lanes(2), HeadGate('elementwise'))))


@pytest.mark.parametrize('name', CONFIGS)
def test_hessians_are_the_inputs_of_every_matrix(name):
    model = small_model(**CONFIGS[name])
    batches, seen = [torch.randint(0, 64, (2, 24)) for _ in range(3)], {}
    hessians = collect_hessians(model, batches)
    with torch.no_grad():
        for b in batches: model(b, tap=lambda n, x: seen.setdefault(n, []).append(x.detach().flatten(0, -2)))
    pairs = dict(q='attn_in', k='attn_in', v='attn_in', o='attn_out', up='mlp_in', down='mlp_act', gate='mlp_in')
    assert hessians.keys() == {f'banks.{k}' for k in model.banks} | {'embed'}
    for bank in model.banks:
        for i in range(model.cfg.layers):
            x = torch.cat(seen[f'{pairs[bank]}.{i}'])
            assert torch.allclose(hessians[f'banks.{bank}'][i], x.T @ x, rtol=1e-3, atol=1e-4)
    x = torch.cat(seen['final'])
    assert torch.allclose(hessians['embed'], x.T @ x, rtol=1e-3, atol=1e-3)
    passes = model.order().count(1)
    assert len(torch.cat(seen['attn_in.1'])) == passes * len(torch.cat(seen['attn_in.0']))


@pytest.mark.parametrize('name', CONFIGS)
def test_quantised_models_work_and_floats_are_kept(name):
    model = small_model(**CONFIGS[name])
    batches = [torch.randint(0, 64, (2, 24)) for _ in range(4)]
    hessians = collect_hessians(model, batches)
    state = quantize_model(model, Plan(bank=GPTQ(clip='sigma 6'), small=200), hessians)
    roles = model.roles()
    assert list(state) == [k for k, _ in model.named_parameters()]
    for k, v in state.items():
        assert isinstance(v, Codes) == (roles[k] != 'control' and (roles[k] == 'bank' or dict(model.named_parameters())[k].numel() > 200)), k
    other = small_model(**CONFIGS[name])
    other.load_state_dict(dequantize_state(state))
    with torch.no_grad():
        a, b = model(batches[0]), other(batches[0])
    assert not torch.equal(a, b) and (a - b).square().mean() < 0.1 * a.square().mean()


def test_exceptions_overrule_by_name_and_by_layer():
    special = {'banks.up': Rows(bits=5), 'banks.up.2': Rows(bits=4, clip='sigma 3'), 'embed': Fp16()}
    plan = Plan(exceptions=tuple(Special(k, q) for k, q in special.items()))
    assert [quantiser_for(plan, f'banks.up.{i}', 'bank', 1).bits for i in range(3)] == [5, 5, 4]
    state = quantize_model(small_model(), plan)
    tops = [int(m.abs().max()) for m in state['banks.up'].codes]
    assert tops[2] == 7 and max(tops) == 15 and state['embed'].dtype == torch.float16 and state['banks.up'].bits == 5


@pytest.mark.parametrize('bad, said', [
    (lambda: Plan(bank='int3'), "no Quantiser 'int3'"), (lambda: Rows(bits=9), 'from 2 to 8'), (lambda: Rows(clip='sigma'), 'sigma'),
    (lambda: GPTQ(stretch=0.0), 'stretch'), (lambda: Plan(control='bf16'), 'control|bf16'), (lambda: Plan(control=Rows()), 'keeps floats'),
    (lambda: Plan(zeroed=2.0), 'zeroed'), (lambda: Plan(exceptions=({'embed': 3},)), 'exceptions'), (lambda: Plan(feedback=False), 'none to take away'),
    (lambda: Plan(exceptions=(Special('embed', Rows()), Special('embed', Fp16()))), 'several'), (lambda: Plan(coder='zip'), "no Coder 'zip'")])
def test_plans_that_cannot_be_are_refused(bad, said):
    with pytest.raises(ValueError, match=said):
        bad()


def test_a_plan_travels_as_json():
    plan = Plan(bank=GPTQ(damp=0.1), exceptions=(Special('embed', Rows(bits=7)),), zeroed=0.1, coder='brotli')
    assert from_plain(Plan, json.loads(json.dumps(to_plain(plan)))) == plan


def test_without_feedback_a_plan_rounds_plainly_on_the_same_grids():
    model, batches = small_model(), [torch.randint(0, 64, (2, 24))]
    plan = Plan(bank=GPTQ(bits=5, clip='sigma 4'), exceptions=(Special('banks.up.1', GPTQ(bits=4)),))
    plain = Plan(bank=Rows(bits=5, clip='sigma 4'), exceptions=(Special('banks.up.1', Rows(bits=4)),))
    off, want = quantize_model(model, plan.replace(feedback=False)), quantize_model(model, plain)
    on = quantize_model(model, plan, calibrate(model, plan, batches))
    for k, c in want.items():
        if isinstance(c, Codes):
            assert torch.equal(c.codes, off[k].codes) and torch.equal(c.scale, off[k].scale)
            assert torch.equal(c.scale, on[k].scale)
    assert not torch.equal(on['banks.up'].codes, off['banks.up'].codes)
    assert plan.reads_training_data() and not plan.replace(feedback=False).reads_training_data()


def test_missing_calibration_and_unknown_exceptions_are_errors():
    with pytest.raises(ValueError, match=r'banks\.\w+\.0: GPTQ needs second moments'):
        quantize_model(small_model(), Plan(bank='gptq'))
    with pytest.raises(ValueError, match='nope'):
        quantize_model(small_model(), Plan(exceptions=(Special('nope.3', Rows(bits=5)),)))
    with pytest.raises(ValueError, match='nothing to calibrate'):
        collect_hessians(small_model(), [])


# ---- one price for every weight

PRICED = Plan(bank=GPTQ(bits=8, clip='fisher 1e-2'), embed=GPTQ(bits=8, clip='fisher 1e-2'), small=0)


def exact_fisher(model, ids):
    "Every label that could have been drawn, weighted by its probability; one gradient a token and label"
    params = {k: p for k, p in model.named_parameters() if p.ndim > 1}
    found = {k: torch.zeros(p.shape[:-1]) for k, p in params.items()}
    for row in ids.split(1):
        logs = model(row)[0].log_softmax(-1)
        for t in range(logs.shape[0]):
            for label in range(logs.shape[1]):
                grads = torch.autograd.grad(logs[t, label], list(params.values()), retain_graph=True, allow_unused=True)
                for k, g in zip(params, grads):
                    if g is not None: found[k] += logs[t, label].exp().item() * g.square().mean(-1) / ids.numel()
    return found


def test_sensitivity_is_the_fisher_information():
    model, ids = small_model(vocab=12, dim=16), torch.randint(0, 12, (2, 5))
    exact = exact_fisher(model, ids)
    drawn = [collect_sensitivity(model, [ids], seed=s) for s in range(100)]
    for k in exact:
        mean = sum(d[k] for d in drawn) / len(drawn)
        if exact[k].sum() == 0: assert mean.sum() == 0; continue
        assert 0.8 < (mean.sum() / exact[k].sum()).item() < 1.25, k
        rows = torch.stack([mean.flatten(), exact[k].flatten()])
        if rows.shape[1] > 8: assert torch.corrcoef(rows)[0, 1] > 0.85, k


@pytest.mark.parametrize('name', CONFIGS)
def test_calibration_gives_what_a_plan_needs_and_leaves_no_trace(name):
    model = small_model(**CONFIGS[name])
    batches, kept, rng = [torch.randint(0, 64, (2, 24)) for _ in range(3)], {k: p.detach().clone() for k, p in model.named_parameters()}, torch.get_rng_state()
    assert calibrate(model, Plan(), batches) is None
    assert calibrate(model, Plan(bank='gptq'), iter(batches)).keys() == collect_hessians(model, batches).keys()
    with torch.no_grad(): a, b = calibrate(model, PRICED, iter(batches)), calibrate(model, PRICED, batches)
    assert a.keys() == collect_hessians(model, batches).keys() | {'sensitivity'}
    rows = a['sensitivity']
    assert rows.keys() == {k for k, p in kept.items() if p.ndim}
    for k, v in rows.items():
        assert torch.equal(v, b['sensitivity'][k]) and v.shape == kept[k].shape[:-1] and (v >= 0).all() and torch.isfinite(v).all(), k
    assert all(torch.equal(kept[k], p) and p.grad is None for k, p in model.named_parameters()) and torch.equal(rng, torch.get_rng_state())
    plain = collect_sensitivity(model, batches)
    assert torch.allclose(rows['banks.up'], plain['banks.up'] * repaired(a['banks.up'])[:, None])
    assert calibrate(model, Plan(exceptions=(Special('embed', Rows(clip='fisher 1e-3')),)), batches).keys() >= {'sensitivity'}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40), st.floats(1e-5, 10), st.floats(0.25, 4), st.integers(4, 8), st.integers(0, 10**6))
def test_every_row_pays_the_same_price_within_its_bounds(R, C, x, stretch, bits, seed):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(2, R, C, generator=g) * torch.randn(2, R, 1, generator=g).exp()
    F = torch.randn(2, R, generator=g).mul(4).exp() * (torch.rand(2, R, generator=g) > 0.1)
    c = round_rows(w, bits, f'fisher {x}', stretch=stretch, sensitivity=F)
    step, spread = c.scale.float(), w.std(-1) if C > 1 else w.abs()[..., 0]
    low, high = (w.abs().amax(-1) / top_code(bits)).clamp_min(FP16_TINY), COARSEST * spread
    assert ((c.dequantize() - w).abs() <= step[..., None] * 0.51).all()  # nothing saturates
    want = torch.minimum(x * stretch / F.sqrt(), high).maximum(low)
    assert torch.allclose(step, want, rtol=1e-3)


def test_a_price_needs_sensitivities_and_says_so():
    model, batches = small_model(), [torch.randint(0, 64, (2, 24))]
    for attempt in (lambda: quantize_model(model, PRICED, collect_hessians(model, batches)), lambda: round_rows(torch.randn(4, 8), 8, 'fisher 1e-3'),
                    lambda: fake_round(torch.randn(4, 8), 8, 'fisher 1e-3')):
        with pytest.raises(ValueError, match="clip 'fisher' needs sensitivities"): attempt()
    with pytest.raises(ValueError, match='nothing to calibrate'): collect_sensitivity(model, [])
    state = quantize_model(model, PRICED, calibrate(model, PRICED, batches))
    assert state['banks.up'].codes.abs().max() <= 127


def test_repair_is_what_feedback_leaves():
    "On a grid fine enough that errors are uniform, GPTQ leaves the share foretold, or a little less (it picks a better order of columns)"
    w, H = correlated(200, 40, 3)
    left = output_error(w, gptq(w, H, 8, 5.0), H) / output_error(w, round_rows(w, 8, 'sigma 5'), H)
    assert 0.85 < left / repaired(H) < 1.02 and repaired(H) < 0.9
    assert torch.allclose(repaired(torch.stack([H, torch.eye(40)])), torch.stack([repaired(H), torch.tensor(1.0)]))


# ---- training on the grid

@pytest.mark.parametrize('clip', CLIPS)
@pytest.mark.parametrize('bits', [4, 6, 8])
def test_fake_rounding_is_the_exporters(clip, bits):
    w = (torch.randn(2, 8, 40) * 0.05).requires_grad_()
    out = fake_round(w, bits, clip)
    assert torch.allclose(out, round_rows(w, bits, clip).dequantize(), atol=1e-7)
    assert torch.equal(torch.autograd.grad(out.sum(), w)[0], torch.ones_like(w))


@pytest.mark.parametrize('clip', ['max', 'best row', 'sigma 3'])
@pytest.mark.parametrize('alpha', [None, 4.0])
def test_fake_rounding_compiles_in_one_piece(clip, alpha):
    "A check that reads the data would cut the graph; `fullgraph` makes that an error"
    w = (torch.randn(2, 8, 40) * 0.05).requires_grad_()
    call = lambda bank: fake_round(bank, 6, clip, alpha)
    assert torch.equal(torch.compile(call, backend='eager', fullgraph=True)(w), call(w))


def test_fake_rounding_reaches_the_model():
    model, ids = small_model(), torch.randint(0, 64, (2, 16))
    through = lambda name, bank: fake_round(bank, 3)
    plain, rounded = model(ids), model(ids, through=through)
    assert not torch.equal(plain, rounded)
    rounded.square().mean().backward()
    assert all(float(b.grad.abs().sum()) > 0 for b in model.banks.values())
    state = quantize_model(model, Plan(bank=Rows(bits=3), embed=Fp32(), control=Fp32()))
    other = small_model()
    other.load_state_dict(dequantize_state(state))
    assert torch.allclose(other(ids), rounded, atol=1e-4)  # training saw what export wrote


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 30), st.integers(0, 10**6))
def test_soft_rounding(alpha, seed):
    z = torch.randn(50, generator=torch.Generator().manual_seed(seed)).mul(5).double()
    y = soft_round(z, alpha)
    assert ((y - z).abs() <= 0.5 + 1e-9).all() and torch.allclose(soft_round(z.round(), alpha), z.round())
    order = z.argsort()
    assert (y[order].diff() >= -1e-9).all()
    zz = z.clone().requires_grad_()
    slope, = torch.autograd.grad(soft_round(zz, alpha).sum(), zz)
    f = z - z.floor() - 0.5
    assert torch.allclose(slope, alpha * (1 - (alpha * f).tanh()**2) / (2 * math.tanh(alpha / 2)))


# ---- zeroing

@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_zeroing_takes_the_cheapest_ones(share, seed):
    g = torch.Generator().manual_seed(seed)
    w = {k: torch.randn(6, 50, generator=g) * s for k, s in (('a', 0.1), ('b', 0.3))}
    state = {k: round_rows(v, 5) for k, v in w.items()}
    after = zero_ones(w, state, share)
    ones = sum(int((c.codes.abs() == 1).sum()) for c in state.values())
    changed = {k: state[k].codes != after[k].codes for k in w}
    assert sum(int(m.sum()) for m in changed.values()) == int(share * ones)
    cost = {k: zeroing_cost(w[k], state[k]) for k in w}
    paid = torch.cat([cost[k][changed[k]] for k in w])
    left = torch.cat([cost[k][~changed[k] & (state[k].codes.abs() == 1)] for k in w])
    if len(paid) and len(left): assert paid.max() <= left.min()
    error = lambda s: sum((s[k].dequantize() - w[k]).square().sum().item() for k in w)
    assert math.isclose(error(after) - error(state), float(paid.sum()), rel_tol=1e-3, abs_tol=1e-4)


def test_sensitivity_restores_the_model_and_ranks_what_matters():
    model, ids = small_model(), torch.randint(0, 64, (4, 16))
    kept = {k: p.detach().clone() for k, p in model.named_parameters()}
    with torch.no_grad():
        target = model(ids)
        model.banks['k'].data.zero_()
        model.banks['k'].data[0] += 1e-6  # keys that say nothing
    kept['banks.k'] = model.banks['k'].detach().clone()
    rates = group_sensitivity(model, lambda m: (m(ids) - target).square().mean().item())
    assert all(torch.equal(kept[k], p) for k, p in model.named_parameters())
    assert rates.keys() == {'embed'} | {f'banks.{k}' for k in model.banks} and rates['embed'] > 0
