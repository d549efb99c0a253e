"The evaluator: cuts against the references, scores against the slow way, refusals, ranks, kills"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.ground.files import read_state
from pgolf.score.books import EventLedger
from pgolf.score.cuts import EvalConfig
from pgolf.score.documents import document_pieces, document_spans, document_windows
from pgolf.score.evaluate import evaluate
from pgolf.score.plan import eval_plan
from pgolf.score.predictor import ModelPredictor
from pgolf.score.protocol import EvaluationError
from pgolf.score.windows import full_windows, sliding_windows, window_pieces
from pgolf.model import (GPT, AttentionResiduals, BigramHash, FlowRefiner, GPTConfig, GPTJBlocks, HeadGate, Lanes, Recurrence,
                         SmearGate, UNetSkips, ValueEmbedding, ValueResidual, XSA)

MEMORY = (SmearGate(), BigramHash(32, 8))
LOOPED = (Recurrence(1, 2, 1), UNetSkips(), ValueResidual(), XSA())


ROOT = Path(__file__).parents[1]


class OneByteEach:
    "Byte table of a byte-level stream: id 1 is a boundary"
    vocab = 64
    def count(self, previous, ids): return (ids > 1).long()


def tiny(seed=0, **changes):
    cfg = dict(vocab=64, dim=32, layers=4, heads=2, kv_heads=1, rotary_dims=8, mlp_ratio=2.0, parts=(*LOOPED, HeadGate(), *MEMORY))
    model = GPT(GPTConfig(**(cfg | changes)), torch.Generator().manual_seed(seed)).eval()
    noise = torch.Generator().manual_seed(seed + 1)
    for p in model.parameters(): p.data += 0.1 * torch.randn(p.shape, generator=noise)
    return model


def stream(n=700, seed=0, every=90):
    ids = torch.randint(2, 64, (n + 1,), generator=torch.Generator().manual_seed(seed))
    ids[::every] = 1
    return ids


# --- cuts

def reference_windows(golden, key):
    found = json.loads((golden / "windows.json").read_text())[key]
    windows = torch.tensor(found["windows"])
    windows[:, 2] += 1 # theirs name the last position, ours the one past it
    return found, windows


@pytest.mark.parametrize("n", (1000, 1001))
@pytest.mark.parametrize("name, tail", [("pr1696.sliding", "full"), ("pr1696.sliding_ttt", "full"), ("pr1536.sliding", "short"),
                                        ("pr1992.sliding", "short"), ("pr1992.sliding_ttt", "short")])
def test_references_that_are_right(golden, name, tail, n):
    found, windows = reference_windows(golden, f"{name}.{n}")
    assert torch.equal(sliding_windows(found["n_targets"], 128, 16, tail), windows)


@pytest.mark.parametrize("n", (1000, 1001))
@pytest.mark.parametrize("name", ("pr761.sliding", "pr1232.sliding", "pr1232.sliding_ttt"))
def test_references_that_score_twice_are_stopped(golden, name, n):
    found, windows = reference_windows(golden, f"{name}.{n}")
    with pytest.raises(EvaluationError, match=rf"position {found['scored_more_than_once']['first']} is booked already .*once"):
        evaluate(ModelPredictor(tiny()), stream(n - 1), OneByteEach(), windows)


def test_reference_document_chunks(golden):
    theirs = next(v for k, v in json.loads((golden / "windows.json").read_text()).items() if k.startswith("prlora"))
    ours = document_windows(torch.tensor([0, 300]), 128, 16)
    assert ours.tolist() == [[start, start + offset, start + offset + count] for _, start, _, offset, count in theirs]


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 400), seq_len=st.integers(1, 70), stride=st.integers(1, 70), tail=st.sampled_from(("full", "short")))
def test_windows_score_every_position_once(n, seq_len, stride, tail):
    stride = min(stride, seq_len)
    for windows in (full_windows(n, seq_len), sliding_windows(n, seq_len, stride, tail)):
        start, lo, hi = windows.T
        assert torch.equal(torch.cat([torch.arange(a, b) for a, b in zip(lo.tolist(), hi.tolist())]), torch.arange(n))
        assert (hi - start <= seq_len).all() and (start <= lo).all() and (lo < hi).all() and start[0] == 0
    if n > seq_len and tail == "full": # every later target but those near the start has all the context it may have
        assert (windows[1:, 2] - windows[1:, 0] == seq_len).all()


@settings(max_examples=80, deadline=None)
@given(data=st.data(), n=st.integers(1, 300), world=st.integers(1, 3), cut=st.sampled_from(("full", "sliding", "documents", "streaming")))
def test_ranks_together_ask_every_position_once(data, n, world, cut):
    seq_len = data.draw(st.integers(1, 50))
    cfg = EvalConfig(cut, seq_len=seq_len, stride=data.draw(st.integers(1, seq_len)), batch_seqs=data.draw(st.integers(1, 5)),
                     max_rows=data.draw(st.integers(1, 90)), chunk_tokens=data.draw(st.integers(1, 120)), lanes=world * data.draw(st.integers(1, 3)),
                     doc_chunk=data.draw(st.integers(1, seq_len)), doc_batch=data.draw(st.integers(1, 4)), stream_chunk=data.draw(st.integers(1, 40)),
                     doc_order=data.draw(st.sampled_from(("length", "stream"))))
    ids = torch.tensor(data.draw(st.lists(st.integers(1, 4), min_size=n + 1, max_size=n + 1)))
    plans = [eval_plan(ids, cfg, None, rank, world) for rank in range(world)]
    assert len({len(p) for p in plans}) == 1
    for pieces in zip(*plans):
        asked = [(lo, hi) for p in pieces for s in p.steps() for _, lo, hi in s.windows.tolist()]
        booked = [(lo, hi) for lo, hi in pieces[0].spans.tolist()]
        assert sorted(t for a, b in asked for t in range(a, b)) == sorted(t for a, b in booked for t in range(a, b))
    assert sorted(t for p in plans[0] for a, b in p.spans.tolist() for t in range(a, b)) == list(range(n))


def test_a_query_is_bounded():
    cfg = EvalConfig("sliding", seq_len=64, stride=16, batch_seqs=32, max_rows=100, chunk_tokens=10_000)
    sizes = [int((s.windows[:, 2] - s.windows[:, 1]).sum()) for p in window_pieces(sliding_windows(5000, 64, 16), cfg) for s in p.steps()]
    assert max(sizes) <= 100 and sum(sizes) == 5000


def test_documents_of_an_awkward_stream():
    assert document_spans(torch.tensor([1, 1, 1])).tolist() == [[0, 1], [1, 2]]
    assert document_spans(torch.tensor([4, 4])).tolist() == [[0, 1]]
    cfg = EvalConfig("documents", seq_len=8, doc_chunk=4, doc_batch=2)
    first = next(document_pieces(torch.tensor([[0, 3], [3, 14], [14, 20]]), cfg)[0].steps())
    assert first.docs.tolist() == [1, 2] and first.last.tolist() == [False, False] and first.floors.tolist() == [3, 14]


# --- scores

def slow_losses(model, ids, windows, **forward):
    "One forward per position, with exactly the context its window gives"
    nats = torch.zeros(len(ids) - 1, dtype=torch.float64)
    with torch.no_grad():
        for start, lo, hi in windows.tolist():
            for t in range(lo, hi):
                nats[t] = -model(ids[None, start:t + 1], **forward)[0, -1].double().log_softmax(-1)[ids[t + 1]]
    return nats


@pytest.mark.parametrize("tail", ("full", "short"))
def test_sliding_is_the_mean_of_slow_losses(tail):
    model, ids = tiny(), stream(300)
    score = evaluate(ModelPredictor(model), ids, OneByteEach(), seq_len=64, stride=16, tail=tail, chunk_tokens=100, batch_seqs=3)
    slow = slow_losses(model, ids, sliding_windows(300, 64, 16, tail))
    assert abs(score.loss - slow.mean().item()) < 1e-6
    assert abs(score.bpb - slow.sum().item() / np.log(2) / int((ids[1:] > 1).sum())) < 1e-6


@pytest.mark.parametrize("name", ("pr761", "pr1232_flow", "pr1696", "pr1536", "pr1992"))
def test_golden_models_score_the_same_the_slow_way(golden, name):
    safetensors = pytest.importorskip("safetensors.torch")
    from pgolf.lab.upstream import load_reference
    config = json.loads((golden / name / "config.json").read_text())
    vectors = safetensors.load_file(golden / name / "vectors.safetensors")
    model = load_reference({k.removeprefix("weights/"): v for k, v in vectors.items() if k.startswith("weights/")}, config["hparams"])
    ids = torch.cat([vectors["batch/x"].flatten(), vectors["batch/y"][1, -1:]])
    table = type("Table", (), dict(vocab=model.cfg.vocab, count=lambda self, previous, ids: (ids > 1).long() * 3))()
    score = evaluate(ModelPredictor(model.eval()), ids, table, seq_len=48, stride=12, chunk_tokens=50)
    slow = slow_losses(model, ids, sliding_windows(len(ids) - 1, 48, 12))
    assert abs(score.bpb - slow.sum().item() / np.log(2) / score.bytes) < 1e-6
    whole = evaluate(ModelPredictor(model), ids, table, "full", seq_len=len(ids))
    streamed = evaluate(ModelPredictor(model), ids, table, "streaming", window=len(ids), stream_chunk=20)
    assert streamed.inputs == len(ids) - 1
    if not model.cfg.rope_train_len or len(ids) <= model.cfg.rope_train_len: assert abs(streamed.loss - whole.loss) < 1e-5


def test_documents_equal_each_alone():
    model, ids = tiny(), stream(500, every=77)
    ids[200:203] = 1
    settings = dict(cut="documents", seq_len=48, doc_chunk=16)
    score = evaluate(ModelPredictor(model), ids, OneByteEach(), doc_batch=3, **settings)
    for lo, hi in score.documents.tolist():
        if (ids[lo + 1:hi + 1] > 1).any():
            alone = evaluate(ModelPredictor(model), ids[lo:hi + 1], OneByteEach(), **settings)
            assert np.abs(alone.nats - score.nats[lo:hi]).max() < 1e-5
    slow = slow_losses(model, ids, torch.cat([document_windows(s, 48, 16) for s in document_spans(ids)]))
    assert np.abs(slow.numpy() - score.nats).max() < 1e-5


def test_isolated_windows_stop_at_a_bos():
    model, ids = tiny(parts=(*LOOPED, HeadGate(), SmearGate(reset=True), BigramHash(32, 8))), stream(200, every=30)
    packed = evaluate(ModelPredictor(model, isolate=True), ids, OneByteEach(), "full", seq_len=200)
    alone = evaluate(ModelPredictor(model), ids, OneByteEach(), "documents", seq_len=64, doc_chunk=64)
    assert np.abs(packed.nats - alone.nats).max() < 1e-4


@pytest.mark.parametrize("changes", (
    {},
    dict(parts=(*LOOPED, HeadGate("headwise"), Lanes(2), *MEMORY)),
    dict(parts=(UNetSkips(), AttentionResiduals(), ValueResidual(), XSA(), HeadGate(), *MEMORY)),
    dict(parts=(Recurrence(1, 2, 1), UNetSkips(), ValueEmbedding((1, 2), 8), ValueResidual(), XSA(), HeadGate(), GPTJBlocks(2), *MEMORY,
                FlowRefiner()))))
def test_streaming_does_not_depend_on_its_chunks(changes):
    model, ids = tiny(**changes), stream(260)
    one, many = (evaluate(ModelPredictor(model), ids, OneByteEach(), "streaming", window=64, stream_chunk=c) for c in (1, 37))
    assert np.abs(one.nats - many.nats).max() < 1e-4 and many.inputs == 260
    whole = evaluate(ModelPredictor(model), ids, OneByteEach(), "full", seq_len=260)
    wide = evaluate(ModelPredictor(model), ids, OneByteEach(), "streaming", window=300, stream_chunk=37)
    assert np.abs(wide.nats - whole.nats).max() < 1e-4


def test_streaming_computes_and_takes_a_fraction_of_sliding():
    model, ids = tiny(dim=64, rotary_dims=16), stream(4096)
    spent = {}
    for cut, fields in dict(sliding=dict(seq_len=1024, stride=64), streaming=dict(window=1024, stream_chunk=256)).items():
        began = time.process_time()
        score = evaluate(ModelPredictor(model), ids, OneByteEach(), cut, **fields)
        spent[cut] = (score.inputs, time.process_time() - began)
    assert spent["sliding"][0] > 12 * spent["streaming"][0]
    assert spent["sliding"][1] > 3 * spent["streaming"][1] # benchmarks/evaluate.py states the ratio; this catches a collapse


def test_lanes_warm_up_on_the_window_before_them():
    model, ids = tiny(layers=1, parts=(ValueResidual(), XSA(), HeadGate())), stream(256)
    one, four = (evaluate(ModelPredictor(model), ids, OneByteEach(), "streaming", window=32, stream_chunk=16, lanes=n) for n in (1, 4))
    assert np.abs(one.nats - four.nats).max() < 1e-4 # with one layer the window before is all there is to know
    assert four.inputs == 256 + 3 * 32


def test_bytes_are_those_of_the_decoded_text():
    sentencepiece = pytest.importorskip("sentencepiece")
    from pgolf.text.tokenizer import byte_table, train_tokenizer
    import tempfile
    texts = ["a brown fox, naïve café — 東京 🦊", "two  spaces\tand a tab", "x", "the end of the brown fox " * 20]
    with tempfile.TemporaryDirectory() as folder:
        model = sentencepiece.SentencePieceProcessor(model_file=str(train_tokenizer(texts * 5, Path(folder) / "t.model", vocab=300)))
    ids = torch.tensor([i for t in texts for i in [1, *model.encode(t)]])
    table = byte_table(model)
    score = evaluate(ModelPredictor(tiny(vocab=table.vocab)), ids, table, "documents", seq_len=64)
    wanted = [len(model.decode(model.encode(t)).encode()) for t in texts]
    assert score.per_document()["bytes"].tolist() == wanted and score.bytes == sum(wanted)


# --- refusals

class Uniform:
    learns = False
    def log_probs(self, query): return torch.full((len(query.rows), query.vocab), -np.log(query.vocab), dtype=torch.float32)
    def observe(self, segment): pass


def mutant(answer): return type("Mutant", (Uniform,), {"log_probs": answer})()


@pytest.mark.parametrize("answer, message", [
    (lambda s, q: Uniform.log_probs(s, q) + 0.001, r"position 0: the row sums to 1.001 \(rule: each row sums to 1 within 0.0001\)"),
    (lambda s, q: Uniform.log_probs(s, q).index_fill(0, torch.tensor([7]), float("nan")), r"position 7: the row holds NaN"),
    (lambda s, q: Uniform.log_probs(s, q).index_fill(1, torch.tensor([7]), float("inf")), r"position 0: the row sums to inf"),
    (lambda s, q: Uniform.log_probs(s, q)[:, 1:], r"position 0: log_probs returned \(64, 63\), \(64, 64\) was asked"),
    (lambda s, q: Uniform.log_probs(s, q)[1:], r"position 0: log_probs returned \(63, 64\)"),
    (lambda s, q: None, r"position 0: log_probs returned NoneType"),
    (lambda s, q: q.stream.take(q.positions + 1), r"position 63: its target was asked for before it was booked \(rule: score before update"),
])
def test_bad_answers_are_stopped(answer, message):
    with pytest.raises(EvaluationError, match=message): evaluate(mutant(answer), stream(200), OneByteEach(), "full", seq_len=64, batch_seqs=1)


def test_a_certain_row_that_is_wrong_is_stopped():
    sure = mutant(lambda s, q: torch.full((len(q.rows), q.vocab), -torch.inf).index_fill(1, torch.tensor([1]), 0.0))
    with pytest.raises(EvaluationError, match="position 0: its target got probability 0"): evaluate(sure, stream(50), OneByteEach(), "full", seq_len=64)


def test_what_waives_a_rule_is_stamped():
    loose = mutant(lambda s, q: Uniform.log_probs(s, q) + 1)
    score = evaluate(loose, stream(100), OneByteEach(), "full", seq_len=64, accept_illegal=True)
    assert score.stamps and "illegal" in json.dumps(score.to_json()["stamps"])
    with pytest.raises(EvaluationError, match="NaN"): # NaN is never waived
        evaluate(mutant(lambda s, q: Uniform.log_probs(s, q) * float("nan")), stream(100), OneByteEach(), "full", seq_len=64, accept_illegal=True)


def test_holes_and_bad_streams():
    with pytest.raises(EvaluationError, match="position 10 was never scored, nor 9 more"):
        evaluate(Uniform(), stream(20), OneByteEach(), torch.tensor([[0, 0, 10]]))
    with pytest.raises(EvaluationError, match="ids 1 to 99, the byte table covers 0 to 63"):
        evaluate(Uniform(), torch.tensor([1, 99]), OneByteEach())
    with pytest.raises(EvaluationError, match="one dimension"): evaluate(Uniform(), torch.ones(2, 3), OneByteEach())
    with pytest.raises(EvaluationError, match="two tokens"): evaluate(Uniform(), torch.ones(1), OneByteEach())
    with pytest.raises(ValueError, match="stride is 64: it must be no longer than seq_len=32"): evaluate(Uniform(), stream(20), OneByteEach(), seq_len=32)
    with pytest.raises(ValueError, match="one of full, sliding"): evaluate(Uniform(), stream(20), OneByteEach(), "slide")


def test_the_ledger_is_ordered_and_bounded():
    score = evaluate(Uniform(), stream(900), OneByteEach(), "sliding", seq_len=32, stride=8, batch_seqs=2, chunk_tokens=64)
    state, events = {}, score.ledger.events
    for number, kind, piece, lo, hi, count in events:
        if kind == "asked": assert not state.get("open")
        state["open"] = kind not in ("booked", "revealed")
        if kind == "revealed": assert hi <= state["booked"]
        if kind == "booked": state["booked"] = hi
    assert [e[0] for e in events] == list(range(score.ledger.total))
    assert score.ledger.counts == dict.fromkeys(("asked", "answered", "booked", "revealed"), 900)
    small = EventLedger(keep=10)
    for i in range(1000): small.add("asked", 0, i, i + 1, 1)
    assert len(small.events) == 10 and small.total == 1000 and small.counts["asked"] == 1000


def test_score_is_json_and_its_parts_add_up(tmp_path):
    ids = stream(400)
    score = evaluate(ModelPredictor(tiny()), ids, OneByteEach(), "full", seq_len=64, chunk_tokens=64)
    back = json.loads(json.dumps(score.to_json()))
    assert back["bpb"] == score.bpb and back["cut"]["cut"] == "full" and set(score.seconds) == {"predict", "check", "observe", "total", "processor"}
    parts = score.per_document()
    assert abs(parts["nats"].sum() / 400 - score.loss) < 1e-9 and parts["bytes"].sum() == score.bytes and parts["tokens"].sum() == 400
    assert score.running_bpb(50)[1][-1] == pytest.approx(score.bpb, rel=1e-9)
    score.save_positions(tmp_path / "positions.npz")
    assert np.load(tmp_path / "positions.npz")["nats"].sum(dtype=np.float64) / 400 == pytest.approx(score.loss)


def test_rows_reach_the_referee_and_the_bar_moves():
    rows, ticks = [], []
    evaluate(Uniform(), stream(300), OneByteEach(), "full", seq_len=64, batch_seqs=2, on_rows=lambda p, r: rows.append((p, r.shape)),
             progress=lambda done, total, bpb: ticks.append((done, total)))
    assert torch.cat([p for p, _ in rows]).tolist() == list(range(300)) and all(s[1] == 64 for _, s in rows)
    assert ticks[-1] == (300, 300) and [d for d, _ in ticks] == sorted(d for d, _ in ticks)


# --- processes

def scenarios(name):
    "(predictor, evaluation settings) by name: what the processes below run"
    from pgolf.score.backoff import BackoffCache
    from pgolf.score.lora import DocumentLoRA, LoRAConfig
    from pgolf.score.ngram import Mixture, NgramConfig
    from pgolf.score.ttt import ScoreFirstTTT, TTTConfig
    ttt = TTTConfig("adamw", 0.01, epochs=2, chunk_tokens=128, seq_len=32, batch_seqs=3)
    lora, by_document = LoRAConfig(rank=2, lr=0.01), dict(cut="documents", seq_len=48, doc_chunk=16, doc_batch=4)
    gate = NgramConfig(chunk_tokens=96, gate="learned", every=1)
    return {
        "sliding": lambda: (ModelPredictor(tiny()), dict(seq_len=64, stride=16, chunk_tokens=160)),
        "streaming": lambda: (ModelPredictor(tiny()), dict(cut="streaming", window=32, stream_chunk=16, lanes=2, chunk_tokens=128)),
        "ttt": lambda: (ScoreFirstTTT(tiny(), ttt), dict(seq_len=64, stride=16)),
        "lora": lambda: (DocumentLoRA(tiny(), lora), by_document),
        "ngram": lambda: (Mixture(ModelPredictor(tiny()), BackoffCache(), gate), dict(seq_len=64, stride=16, batch_seqs=4)),
        "all": lambda: (Mixture(DocumentLoRA(ScoreFirstTTT(tiny(), ttt), lora), BackoffCache(), gate), by_document | dict(doc_order="stream")),
    }[name]()


def adapted_embedding():
    "One number of a model whose ranks trained apart and were averaged"
    from pgolf.score.prequant import prequant_adapt
    from pgolf.score.ttt import TTTConfig
    cfg = TTTConfig("adamw", 0.01, epochs=2, seq_len=32, batch_seqs=2)
    return prequant_adapt(tiny(), repetitive(), cfg, source="train").embed.sum().item()


def repetitive(n=700): return torch.cat([stream(130, every=45)] * 6)[:n + 1]


def score_line(name, **options):
    predictor, settings = scenarios(name)
    score = evaluate(predictor, repetitive(), OneByteEach(), **settings, **options)
    return dict(name=name, loss=score.loss, bpb=score.bpb, tokens=score.tokens, bytes=score.bytes, digest=score.ledger.digest)


def run_self(*arguments, launcher=(), **options):
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.Popen([sys.executable, *launcher, __file__, *arguments], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


NAMES = ("sliding", "streaming", "ttt", "lora", "ngram", "all")


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    out = tmp_path / "scores.json"
    process = run_self("ranks", str(out), launcher=("-m", "torch.distributed.run", "--standalone", "--local_addr=localhost", "--nproc_per_node=2"))
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 0, error[-2000:]
    found = json.loads(out.read_text())
    assert found["adapted alike"] and found["adapted"]
    for found in found["scores"]:
        alone = score_line(found["name"])
        assert abs(found["loss"] - alone["loss"]) < 1e-5, found["name"]
        assert (found["tokens"], found["bytes"]) == (alone["tokens"], alone["bytes"])


@pytest.mark.parametrize("name", ("ttt", "ngram", "all", "streaming"))
def test_stopped_between_two_pieces_and_resumed(tmp_path, name):
    class Stop(Exception): pass
    def stop(done, total, bpb):
        if done > total // 2: raise Stop
    file = tmp_path / "state"
    with pytest.raises(Stop): score_line(name, resume=file, save_seconds=0, progress=stop)
    assert file.exists()
    assert score_line(name, resume=file) == score_line(name) and not file.exists()


def test_killed_process_resumes_to_the_same_score(tmp_path):
    file = tmp_path / "state"
    process = run_self("slow", str(file))
    deadline = time.time() + 120
    while not file.exists() and time.time() < deadline and process.poll() is None: time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and file.exists()
    booked = int(read_state(file)["booked"].sum())
    assert 0 < booked < 700
    assert score_line("ttt", resume=file) == score_line("ttt")


def test_a_state_of_another_evaluation_is_refused(tmp_path):
    class Stop(Exception): pass
    def stop(done, total, bpb):
        if done > 300: raise Stop
    file = tmp_path / "state"
    with pytest.raises(Stop): evaluate(Uniform(), stream(600), OneByteEach(), "full", seq_len=64, chunk_tokens=64, resume=file, save_seconds=0, progress=stop)
    with pytest.raises(EvaluationError, match="another stream, cut or predictor: remove it"):
        evaluate(Uniform(), stream(600), OneByteEach(), "full", seq_len=32, chunk_tokens=64, resume=file)
    forgetful = mutant(Uniform.log_probs)
    forgetful.learns = True
    with pytest.raises(EvaluationError, match="learns but has no state"):
        evaluate(forgetful, stream(600), OneByteEach(), "full", seq_len=64, chunk_tokens=64, resume=tmp_path / "other", save_seconds=0)


if __name__ == "__main__":
    if sys.argv[1] == "ranks":
        import torch.distributed as dist
        dist.init_process_group("gloo")
        found = [score_line(name) for name in NAMES]
        weights = [None, None]
        dist.all_gather_object(weights, adapted_embedding())
        alike, changed = weights[0] == weights[1], weights[0] != tiny().embed.sum().item()
        if dist.get_rank() == 0: Path(sys.argv[2]).write_text(json.dumps({"scores": found, "adapted alike": alike, "adapted": changed}))
        dist.destroy_process_group()
    else: score_line("ttt", resume=sys.argv[2], save_seconds=0, progress=lambda *_: time.sleep(0.3))
