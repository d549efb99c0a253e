"Muon against the reference's vectors, and its properties over random shapes"
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.train.banks import BankStepper
from pgolf.train.groups import group_names
from pgolf.train.muon import Muon, aspect_scale, muon_direction, muon_step, row_normalise
from pgolf.train.newton_schulz import newton_schulz, ns_coefficients

shapes = st.tuples(st.integers(1, 3), st.integers(2, 24), st.integers(2, 24))
quick = settings(max_examples=20, deadline=None)


def seeded(shape, seed): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["plain", "row_normalised"])
def test_three_steps_of_the_reference(golden, kind):
    load_file = pytest.importorskip("safetensors.torch").load_file
    facts, vectors = json.loads((golden / "muon.json").read_text())[kind], load_file(golden / "muon.safetensors")
    get = lambda name: vectors[f"{kind}/{name}"]
    for bank in ("qo", "kv", "up"):
        w, buf = get(f"param0.{bank}"), torch.zeros_like(get(f"param0.{bank}"))
        for i, (lr, momentum) in enumerate(zip(facts["lr"], facts["momentum"]), 1):
            w, buf = muon_step(w, get(f"grad{i}.{bank}"), buf, lr, momentum, facts["weight_decay"],
                               row_norm=facts.get("row_normalize", False), steps=facts["backend_steps"])
        assert (w - get(f"param3.{bank}")).abs().max() < 1e-5
        assert (buf - get(f"mom3.{bank}")).abs().max() < 1e-5
        assert (newton_schulz(get(f"grad1.{bank}")) - get(f"ns.{bank}")).abs().max() < 1e-5


def step_by_the_paper(w, grad, buf, lr, momentum, decay, row_norm, steps=5):
    "One step of one matrix in double precision, written from the equations alone"
    buf = momentum * buf + grad
    u = grad + momentum * buf
    if row_norm: u = u / u.norm(dim=1, keepdim=True).clamp_min(1e-7)
    tall = len(u) > u.shape[1]
    x = (u.T if tall else u) / (u.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    o = x.T if tall else x
    return w * (1 - lr * decay) - lr * max(1, len(w) / w.shape[1])**.5 * o, buf


@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (12, 3)])
def test_three_steps_by_the_paper(shape, row_norm):
    "What the reference's vectors check, for those who do not have them: decay, Nesterov, aspect, rows, one after another"
    w = seeded((2, *shape), 1)
    slow, buf = list(w.double()), torch.zeros_like(w)
    bufs = [torch.zeros(shape, dtype=torch.float64)] * 2
    for i, (lr, momentum) in enumerate(((.02, .85), (.03, .9), (.01, .95))):
        grad = seeded((2, *shape), 10 + i)
        w, buf = muon_step(w, grad, buf, lr, momentum, .1, row_norm=row_norm)
        for m in range(2): slow[m], bufs[m] = step_by_the_paper(slow[m], grad[m].double(), bufs[m], lr, momentum, .1, row_norm)
    assert (w - torch.stack(slow)).abs().max() < 1e-4
    assert (buf - torch.stack(bufs)).abs().max() < 1e-5


@quick
@given(shapes, st.integers(0, 99), st.sampled_from(["classic", "polar", "polar5"]))
def test_a_bank_is_its_matrices(shape, seed, kind):
    u = seeded(shape, seed)
    assert torch.allclose(newton_schulz(u, kind=kind), torch.stack([newton_schulz(m, kind=kind) for m in u]), atol=1e-4)


@quick
@given(shapes, st.integers(0, 99), st.floats(1e-2, 1e4))
def test_transposes_and_ignores_size(shape, seed, factor):
    u = seeded(shape, seed)
    assert torch.allclose(newton_schulz(u).mT, newton_schulz(u.mT), atol=1e-4)
    assert torch.allclose(newton_schulz(u), newton_schulz(factor * u), atol=1e-3)


@quick
@given(st.integers(0, 99), st.floats(0, 2.5))
def test_singular_values_land_in_the_band(seed, decades):
    p, q = (torch.linalg.qr(seeded((24, 24), seed + i))[0] for i in (0, 1000))
    u = p * torch.logspace(0, -decades, 24) @ q
    for kind, low, high in (("classic", .3, 1.25), ("polar", .6, 1.4), ("polar5", .6, 1.4)):
        s = torch.linalg.svdvals(newton_schulz(u, kind=kind))
        assert low < s.min() and s.max() < high, (kind, s)
    exact = p @ q
    assert (newton_schulz(u, 12, "polar") - exact).abs().max() < 1e-2


def test_bfloat16_is_close_and_gives_back_the_dtype():
    u = seeded((4, 32, 64), 0)
    low = newton_schulz(u, kind="polar", dtype=torch.bfloat16)
    assert low.dtype == torch.float32 and (low - newton_schulz(u, kind="polar")).abs().max() < .03


def test_polar_triples_stay_inside_their_interval():
    "With the safety factor, a value that rounding pushed 0.9 % above the interval still does not run away"
    for top in (1., 1.009):
        s = torch.linspace(0, top, 2001, dtype=torch.float64)
        for a, b, c in ns_coefficients("polar", 8): s = a*s + b*s**3 + c*s**5
        assert s.min() >= 0 and s.max() < 1.1


@quick
@given(shapes, st.integers(0, 99))
def test_rows_of_any_scale_get_the_same_direction(shape, seed):
    u = seeded(shape, seed)
    scales = torch.logspace(-3, 3, shape[1])[:, None]
    assert torch.allclose(row_normalise(u), row_normalise(u * scales), atol=1e-5)
    a, _ = muon_direction(u, torch.zeros_like(u), .9, row_norm=True)
    b, _ = muon_direction(u * scales, torch.zeros_like(u), .9, row_norm=True)
    assert torch.allclose(a, b, atol=1e-3)


def test_aspect():
    assert [aspect_scale(*s) for s in ((64, 64), (64, 256), (256, 64))] == [1, 1, 2]


@quick
@given(st.dictionaries(st.text("abcd", min_size=1, max_size=3), st.sampled_from(["bank", "embed", "table", "proj", "control"])),
       st.sampled_from(["matrix", "scalar"]))
def test_groups_are_a_partition(roles, proj_group):
    named = {n: torch.zeros(2, 2) for n in roles}
    groups = group_names(named, roles, proj_group)
    assert sorted(n for names in groups.values() for n in names) == sorted(named)
    assert all((roles[n] == "bank" or roles[n] == "proj" and proj_group == "matrix") == (n in groups["matrix"]) for n in named)


def test_vectors_are_no_matrices():
    assert group_names({"b": torch.zeros(3)}, {"b": "proj"}, "matrix")["scalar"] == ["b"]
    with pytest.raises(ValueError, match="b: matrices or banks of them"):
        BankStepper({"b": torch.nn.Parameter(torch.zeros(3))}, Muon())
