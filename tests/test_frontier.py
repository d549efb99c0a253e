"The frontier's techniques against vectors of the PR 2135 lineage"
import json
import math

import pytest
import torch

from pgolf import recipes
from pgolf.lab.upstream import load_reference, reference_names, to_reference
from pgolf.model.gpt import token_loss
from pgolf.pack.awq import ProtectedGPTQ, group_saliency
from pgolf.pack.gptq import gptq
from pgolf.pack.lqer import LQER, packed_factors
from pgolf.pack.rounding import round_rows
from pgolf.pack.row_order import similar_order
from pgolf.score import adapters, phased
from pgolf.score.evaluate import evaluate
from pgolf.score.lora import LoRAConfig
from pgolf.score.phased import Phased
from pgolf.score.stream_tilt import StreamTilt
from pgolf.score.tilt import stream_hints, tilt_rows
from pgolf.score.wrap import build_predictor
from pgolf.train.averaging import Averages, AveragingSettings
from pgolf.train.growth import context_length, read_context, rewarmed
from pgolf.train.muon import muon_step
from pgolf.train.newton_schulz import newton_schulz, ns_coefficients
from pgolf.train.schedule import lr_frac

safetensors = pytest.importorskip("safetensors.torch")


@pytest.fixture(scope="module")
def frontier(golden):
    if not (golden / "frontier").is_dir():
        pytest.skip(f"no vectors of the frontier in {golden}")
    return golden / "frontier"


@pytest.fixture(scope="module")
def pr2135(frontier):
    "Its configuration, vectors and state"
    config = json.loads((frontier / "pr2135" / "config.json").read_text())
    vectors = safetensors.load_file(frontier / "pr2135" / "vectors.safetensors")
    return config, vectors, {k.removeprefix("weights/"): t for k, t in vectors.items() if k.startswith("weights/")}


def calls(vectors, group):
    "(name, ids, targets, cuts, recurrent, rows, vocabulary, logits) of every call"
    for key in (k for k in vectors if k.startswith(group + "/")):
        loop, _, rest = key.removeprefix(group + "/").partition("_")
        which = "_long" if rest == "long" else "_packed" if rest else ""
        cuts = vectors["batch/" + rest.removeprefix("packed_")] if which == "_packed" else None
        rows = slice(None, None, 8) if which == "_packed" else slice(None)
        vocab = slice(None) if vectors[key].shape[-1] == 1024 else slice(None, None, 4)
        yield key.partition("/")[2], vectors["batch/x" + which], vectors["batch/y" + which], cuts, loop == "loop1", rows, vocab, vectors[key]


# ---- the model

@pytest.mark.parametrize("group, masked", [("logits", True), ("logits_over_bos", False)])
def test_logits_and_losses(pr2135, group, masked):
    config, vectors, state = pr2135
    model = load_reference(state, config["hparams"] | {"smear_gate_bos_fix": masked})
    assert sum(p.numel() for p in model.parameters()) == config["n_params"]
    for name, x, y, cuts, recurrent, rows, vocab, want in calls(vectors, group):
        with torch.no_grad():
            logits = model(x, cu_seqlens=cuts, recurrent=recurrent)
        assert (logits[:, rows, vocab] - want).abs().max() <= 2e-5, name
        with torch.enable_grad():
            trained = model(x, cu_seqlens=cuts, recurrent=recurrent)
        if masked:
            assert token_loss(logits, y).mean().item() == pytest.approx(config["losses"][name + "_eval_loss"], rel=1e-6)
            assert token_loss(trained, y).mean().item() == pytest.approx(config["losses"][name + "_train_loss"], rel=1e-6)


def test_every_gradient_and_none_for_the_softcaps(pr2135):
    config, vectors, state = pr2135
    model = load_reference(state, config["hparams"])
    token_loss(model(vectors["batch/x"]), vectors["batch/y"]).mean().backward()
    ours = {n: p.grad for n, p in model.named_parameters()}
    for theirs, places in reference_names(model, True).items():
        if theirs.startswith("softcap"):
            assert "grads/" + theirs not in vectors and ours[places[0][0]] is None
            continue
        parts = [ours[n] if at is None else ours[n][at] for n, at in places]
        want = vectors["grads/" + theirs]
        assert (torch.cat(parts) if len(parts) > 1 else parts[0]).sub(want).norm() <= 1e-4 * want.norm() + 1e-12, theirs


def test_state_both_ways(pr2135):
    config, _, state = pr2135
    back = to_reference(load_reference(state, config["hparams"]))
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


# ---- training

def test_the_records_polar_steps(frontier):
    facts = json.loads((frontier / "muon_polar.json").read_text())
    vectors = safetensors.load_file(frontier / "muon_polar.safetensors")
    assert [list(t) for t in ns_coefficients("polar5")] == facts["coefficients"]
    for bank in facts["shapes"]:
        w, buf = vectors[f"param0.{bank}"], torch.zeros_like(vectors[f"param0.{bank}"])
        assert (newton_schulz(vectors[f"grad1.{bank}"], kind="polar5") - vectors[f"ns.{bank}"]).abs().max() <= 1e-5
        for i, (lr, momentum) in enumerate(zip(facts["lr"], facts["momentum"]), 1):
            w, buf = muon_step(w, vectors[f"grad{i}.{bank}"], buf, lr, momentum, facts["weight_decay"], row_norm=True, kind="polar5")
        assert (w - vectors[f"param3.{bank}"]).abs().max() <= 1e-5
        assert (buf - vectors[f"mom3.{bank}"]).abs().max() <= 1e-5


def test_schedules_exactly(frontier):
    facts = json.loads((frontier / "schedules.json").read_text())
    for form in facts["lr"]:
        for point in form["points"]:
            assert lr_frac(point["progress"], form["warmdown_frac"], form["min_lr"]) == pytest.approx(point["multiplier"], abs=1e-15)
    muon = recipes.get("pr1536").train.matrix
    for point in facts["muon_momentum"]:
        assert muon.momentum_at(point["step"]) == pytest.approx(point["value"], abs=1e-15)
    grow = facts["context"]
    stages, last = read_context(grow["schedule"])
    for point in grow["points"]:
        assert context_length(point["progress"], stages, last) == point["length"]
    warm = grow["rewarm"]
    for point in warm["factor"]:
        assert rewarmed(point["step"], warm["change_at_step"], warm["steps"]) == point["factor"]


def test_the_average_of_the_record(frontier):
    facts = json.loads((frontier / "schedules.json").read_text())["ema"]
    p = torch.nn.Parameter(torch.tensor(facts["start"]))
    average = Averages([p], AveragingSettings(averaging="ema", ema_decay=facts["decay"]))
    for step, (weights, want) in enumerate(zip(facts["weights"], facts["after_each"]), 1):
        p.data.copy_(torch.tensor(weights))
        average.update(step, 1.0)
        assert torch.allclose(average.ema[0], torch.tensor(want), atol=1e-6, rtol=0)


# ---- quantisation

@pytest.fixture(scope="module")
def rounded(frontier):
    "Facts, vectors, weights and their GPTQ codes"
    facts, vectors = json.loads((frontier / "lqer.json").read_text()), safetensors.load_file(frontier / "lqer.safetensors")
    params, state = {}, {}
    for name in (n for n in facts["order"] if "gate" not in n):
        kind = "embed" if name == "tok_emb.weight" else "mlp" if ".mlp." in name else "attn"
        bits = facts["bits"]["embed" if kind == "embed" else "matrix"]
        params[name] = vectors["w." + name]
        state[name] = gptq(params[name], vectors["H." + name], bits, facts["clip_sigmas"][kind + "_clip_sigmas"])
    return facts, vectors, params, state


def near(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_codes_and_gates(rounded):
    _, vectors, _, state = rounded
    for name, codes in state.items():
        assert (codes.codes == vectors["q." + name]).float().mean() >= 0.999
        assert torch.equal(codes.scale, vectors["scale." + name])
    gate = round_rows(vectors["w.blocks.0.attn.attn_gate_w"], 8)
    assert torch.equal(gate.codes, vectors["gate.q"]) and torch.equal(gate.scale, vectors["gate.scale"])


@pytest.mark.parametrize("which", [0, 1])
def test_lqer(rounded, which):
    facts, vectors, params, state = rounded
    c = facts["configs"][which]
    repair = LQER(c["lqer_rank"], c["lqer_top_k"], c["lqer_asym_group"], fit=False)
    mended = repair.after(params, state)
    assert sorted(n for n in mended if mended[n].fixes) == sorted(c["chosen"])
    for name, codes in mended.items():
        want = vectors[f"c{which}.dequantised.{name}"]
        if not codes.fixes:
            assert near(codes.dequantize(), want) <= 1e-3
            continue
        get = lambda part: vectors[f"c{which}.{part}.{name}"]
        parts = packed_factors(get("A"), get("B"), c["lqer_asym_group"])   # signs of singular vectors are free
        assert (parts["a"] == get("lqA")).float().mean() >= 0.999 and (parts["b"] == get("lqB")).float().mean() >= 0.999
        assert torch.equal(parts["a_scale"].view(()), get("lqAs")) and torch.equal(parts["b_scale"], get("lqBs"))
        fix, _ = codes.fixes[0]
        assert near(fix.apply(state[name].dequantize(), None, parts), want) <= 1e-3
        left = lambda repair: (params[name] - repair.after(params, state)[name].dequantize()).norm().item()
        assert left(repair) == pytest.approx(c["error_after"][name], rel=0.05)
        assert left(repair.replace(fit=True)) < c["error_after"][name]


def test_row_orders(frontier):
    vectors = safetensors.load_file(frontier / "lqer.safetensors")
    for name in ("a", "b"):
        assert torch.equal(similar_order(vectors[f"rows.{name}"]), vectors[f"order.{name}"].long())


def test_lqer_in_four_bits(frontier):
    vectors = safetensors.load_file(frontier / "lqer_symmetric.safetensors")
    parts = packed_factors(vectors["A"], vectors["B"], 64)
    for ours, theirs in {"a": "qA", "b": "qB", "a_scale": "sA", "b_scale": "sB"}.items():
        assert torch.equal(parts[ours], vectors[theirs])


def test_awq(frontier, rounded):
    facts, vectors = json.loads((frontier / "awq.json").read_text()), safetensors.load_file(frontier / "awq.safetensors")
    _, inputs, params, _ = rounded
    scores = {}
    for name, w in params.items():
        H = inputs["H." + name]
        count = (H.diagonal() / vectors["act_rms." + name].square()).nanmedian().item()
        for i, s in enumerate(group_saliency(w, H, count, facts["group"])):
            scores[name, i * facts["group"]] = s.item()
    best = sorted(scores, key=lambda place: -scores[place])
    for (name, start, score), place in zip(facts["order_of_scores"], best):
        assert place == (name, start) and scores[place] == pytest.approx(score, rel=1e-5)
    (name, starts), = facts["selected"].items()
    how = ProtectedGPTQ(bits=7, clip="sigma 14", start=starts[0], size=facts["group"], wide=facts["bits"])
    stored = how.store(params[name], name, inputs["H." + name])
    assert (stored.codes == vectors["q." + name]).float().mean() >= 0.999 and torch.equal(stored.scale, vectors["scale." + name])
    assert torch.equal(stored.fixes[0][1]["scale"], vectors["scale8." + name])
    assert near(stored.dequantize(), vectors["dequantised." + name]) <= 1e-3


# ---- evaluation

def test_hints_to_the_bit_and_tilted_rows(frontier):
    facts, vectors = json.loads((frontier / "tilt.json").read_text()), safetensors.load_file(frontier / "tilt.safetensors")
    for run in facts["runs"]:
        hints, shares = stream_hints(vectors["stream"].numpy(), run["order"], run["seed_token"])
        gates = torch.tensor(shares) >= run["threshold"]
        for ours, theirs in {"hint": hints, "prob": shares, "gate": gates}.items():
            assert torch.equal(torch.as_tensor(theirs), vectors[f"{ours}.{run['name']}"].to(torch.as_tensor(theirs).dtype)), run["name"]
    rows = vectors["rows.logits"].log_softmax(-1)
    for boost in (0.5, 2.625):
        tilted = tilt_rows(rows, vectors["rows.hint"], vectors["rows.gate"], boost)
        assert (tilted.exp() - vectors[f"rows.b{boost}.log_probs"].exp()).abs().max() <= 1e-6
        nll = -tilted.gather(1, vectors["rows.target"][:, None])[:, 0]
        assert (nll - vectors[f"rows.b{boost}.nll"]).abs().max() <= 1e-5


class MadeUpBytes:
    "Bytes of each target, as the vectors have them"
    vocab = 1024

    def __init__(self, nbytes):
        self.nbytes = nbytes

    def count(self, _, targets):
        return self.nbytes[1:]


def sine_pairs(model, S, cfg):
    "Adapters without chance: A as the vectors' formula has it, a row for each document of the batch"
    D, pairs = model.cfg.dim, {}
    for place, width in adapters.adapter_places(model, cfg.sites).items():
        j = torch.arange(S * cfg.rank * D, dtype=torch.float64)
        A = ((1 + 0.7 * j).sin() / math.sqrt(D)).float().view(S, cfg.rank, D)
        pairs[place] = A.requires_grad_(), torch.zeros(S, width, cfg.rank, requires_grad=True)
    return pairs


def phased_run(frontier, pr2135, monkeypatch, name, more=()):
    "(facts, Score, texts of the phases, how far the weights moved) of one run of the vectors"
    config, _, state = pr2135
    facts = json.loads((frontier / "ttt.json").read_text())["runs"][name]
    stream = safetensors.load_file(frontier / "ttt_stream.safetensors")
    s, texts, moved = facts["settings"], [], {}
    model = load_reference(state, config["hparams"])
    start = to_reference(model)

    def watched(pupil, text, cfg):
        texts.append(text.tolist())
        if s["global_ttt_epochs"]:
            learn(pupil, text, cfg)
        now = to_reference(pupil.model, banked=True)
        moved.update({k: now[k] - start[k] for k in now if k in start})

    learn = phased.lessons_on
    monkeypatch.setattr(phased, "lessons_on", watched)
    monkeypatch.setattr(adapters, "_fresh_pairs", sine_pairs)
    lora = LoRAConfig(s["ttt_lora_rank"], s["ttt_lora_lr"], (0.0, s["ttt_beta2"]), 1e-10, s["ttt_weight_decay"],
                      ("q", "v", "o", "mlp", "logits"), alpha=float(s["ttt_lora_alpha"]), warm=True)
    lessons = Phased(lr=s["global_ttt_lr"], momentum=s["global_ttt_momentum"], chunk_tokens=s["global_ttt_chunk_tokens"],
                     seq_len=s["eval_seq_len"], batch_seqs=s["global_ttt_batch_seqs"], clip=s["global_ttt_grad_clip"],
                     prefix=max(s["phased_ttt_prefix_docs"], facts["phases"]), phases=facts["phases"])
    ways = (lessons, lora) if s["phased_ttt_prefix_docs"] else (lora,)
    ids = stream["stream"].long()
    score = evaluate(build_predictor(model, ways + more, ids), ids, MadeUpBytes(stream["bytes"].long()),
                     cut="documents", doc_order="rest_first", doc_batch=s["ttt_batch_size"], doc_chunk=s["ttt_chunk_size"],
                     seq_len=s["ttt_eval_seq_len"])
    return facts, score, texts, moved


def hold_chunks(facts, score):
    "The loss of every chunk of every document"
    size = facts["settings"]["ttt_chunk_size"]
    for number, sums in facts["chunk_loss_sums"].items():
        lo, hi = score.documents[int(number)]
        ours = [score.nats[a:min(a + size, hi)].sum() for a in range(lo, hi, size)]
        assert ours == pytest.approx(sums, rel=1e-4), number
    assert score.loss == pytest.approx(facts["val_loss"], rel=1e-6) and score.bpb == pytest.approx(facts["val_bpb"], rel=1e-6)


@pytest.mark.parametrize("name", ["none", "lora_only", "one_phase", "three_phases"])
def test_phased_training(frontier, pr2135, monkeypatch, name):
    facts, score, texts, moved = phased_run(frontier, pr2135, monkeypatch, name)
    hold_chunks(facts, score)
    asked = facts["global_streams"]
    assert texts == asked[:len(texts)] and len(texts) == min(len(asked), 2)  # the third phase comes when all is scored
    if name == "one_phase":
        assert {k: moved[k].norm().item() for k in moved} == {k: pytest.approx(n, rel=1e-3, abs=1e-9) for k, n in facts["weights_moved"].items()}


def test_the_tilt_of_the_record_over_one_phase(frontier, pr2135, monkeypatch):
    facts = json.loads((frontier / "ttt.json").read_text())["runs"]["one_phase_tilt"]["tilt"]
    tilt = StreamTilt(facts["order"], facts["threshold"], facts["boost"])
    hints, shares = stream_hints(safetensors.load_file(frontier / "ttt_stream.safetensors")["stream"].numpy(), facts["order"])
    assert int((shares >= facts["threshold"]).sum()) == facts["gated"]
    facts, score, _, _ = phased_run(frontier, pr2135, monkeypatch, "one_phase_tilt", (tilt,))
    hold_chunks(facts, score)
    assert any("stream_tilt" in stamp for stamp in score.stamps)
