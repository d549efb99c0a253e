"""Ten minutes of one GPU: does it agree with the CPU, how fast are the steps, the evaluation, the calibration, does it learn?

Stages run in order of worth, each as long as minutes are left, and the JSON is written anew after every stage, so that a run
that is cut short has told what it knows. A stage that fails says why and the next one runs. It needs no flash-attn and no data:
batches are random tokens, the training stage uses the corpus that comes with the package. Settings of the GPU stay as they are.

    python -m benchmarks.gpu --minutes 8 --json benchmarks/results/gpu_NAME.json
    python -m benchmarks.gpu --device cpu --minutes 2     # the same stages at tiny size
"""
import argparse
import json
import os
import platform
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from pgolf.model import gpu_kernels, mlp_kernel, xsa_kernel
from pgolf.model.attention import ATTENTION_BACKENDS, attend, backend_missing
from pgolf.model.gpt import GPT
from pgolf.model.mlp import leaky_relu2
from pgolf.model.xsa import exclude_self
from pgolf.pack.quantize import calibrate
from pgolf.recipes.phases import prepare_data
from pgolf.recipes.recipes import get
from pgolf.score.cuts import EvalConfig
from pgolf.score.evaluate import evaluate
from pgolf.score.wrap import build_predictor
from pgolf.text.data import Batch
from pgolf.train import softcap_loss as loss_room, trainer
from pgolf.train.ranks import Ranks
from pgolf.train.train import train

NAMES = "best", "pr1696", "pr1536", "pr1992", "pr761", "pr1232"
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bf16 of the SXM parts


class RandomTokens:
    "A loader of random tokens in the shape of its order; the documents of packed rows change from batch to batch"
    def __init__(self, order, shards, tokens, seq_len, rank, world, seed, vocab):
        self.shape = (1, tokens) if order == "packed" else (max(1, tokens // seq_len), seq_len)
        self.packed, self.vocab, self.g = order == "packed", vocab, torch.Generator().manual_seed(seed)

    def next(self):
        x = torch.randint(0, self.vocab, self.shape, generator=self.g)
        inner = torch.randint(1, x.numel(), (40,), generator=self.g) if self.packed else None
        regular = torch.arange(0, x.numel() + 1, 64) if self.packed else None
        cuts = torch.cat([inner, regular]).sort()[0].int() if self.packed else None
        return Batch(x, x.roll(-1), cuts, "random")


def wait(device):
    if device == "cuda": torch.cuda.synchronize()


def seconds_of(call, times, device):
    "Least seconds of several calls, after one that is not counted"
    call()
    found = []
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        found.append(time.perf_counter() - began)
    return min(found)


def backends_agree(device, small):
    "Each installed attention backend against float32 on the CPU: dense and packed, forward and gradients"
    T, dtype, out = 64 if small else 1024, torch.float32 if device == "cpu" else torch.bfloat16, {}
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, T, heads, 64, generator=g) for heads in (8, 4, 4)]
    cuts = torch.tensor([0, T // 4, T // 4 + 1, T], dtype=torch.int32)
    def both(name, packed, place, kind):
        q, k, v = (t.detach().to(place, kind).requires_grad_() for t in qkv)
        y = attend(q, k, v, cuts.to(place) if packed else None, T if packed else 0, name)
        return [t.float().cpu() for t in (y, *torch.autograd.grad(y.float().square().sum(), (q, k, v)))]
    for packed in (False, True):
        right = both("sdpa", packed, "cpu", torch.float32)
        for name in ATTENTION_BACKENDS:
            key = f"{name} {'packed' if packed else 'dense'}"
            if why := backend_missing(name, device, dtype): out[key] = f"missing: {why}"
            else:
                try: found = both(name, packed, device, dtype)
                except Exception as e: out[key] = f"failed: {type(e).__name__}: {str(e)[:150]}"
                else: out[key] = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, right))
    worst = max((v for v in out.values() if isinstance(v, float)), default=0.)
    return out | {"within": worst < (1e-4 if device == "cpu" else 2e-2)}


def loss_agrees(device, small):
    "The loss in one kernel against the plain loss in float64: loss and gradients, for odd vocabularies too"
    out, N, D = {}, 8 if small else 4096, 64
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for vocab in (37, 1024) if small else (1000, 1024, 8191, 8192):
        g = torch.Generator().manual_seed(0)
        x, head = (torch.randn(n, D, generator=g).to(device, dtype).requires_grad_() for n in (N, vocab))
        y = torch.randint(0, vocab, (N,), generator=g).to(device)
        right = torch.nn.functional.cross_entropy(30 * torch.tanh((x @ head.T).double() / 30), y)
        loss = loss_room.softcap_loss(x, head, y, 30.)
        pairs = zip((loss, *torch.autograd.grad(loss, (x, head))), (right, *torch.autograd.grad(right, (x, head))))
        out[f"vocabulary {vocab}"] = max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)
    return out | {"kernel": loss_room.loss_kernel_missing(device, vocab) or "taken",
                  "within": max(out.values()) < (1e-5 if device == "cpu" else 2e-2)}


def without_kernels():
    "A block in which no kernel of our own serves and products stay apart"
    stack = ExitStack()
    stack.enter_context(patch.object(loss_room, "loss_kernel_missing", lambda *question: "switched off"))
    stack.enter_context(patch.object(gpu_kernels, "_missing", lambda *question: "switched off"))
    stack.enter_context(patch.object(gpu_kernels, "FUSING", frozenset()))
    return stack


def kernels_agree(device, small):
    "MLP and XSA as one operation against the plain ones in float64, values and gradients; seconds of both, forward and backward"
    N, D, H = (33, 64, 192) if small else (98_304, 512, 1536)
    dtype, g = torch.float32 if device == "cpu" else torch.bfloat16, torch.Generator().manual_seed(0)
    drawn = lambda *shape: torch.randn(*shape, generator=g).to(device, dtype).requires_grad_()
    plain_mlp = lambda x, up, down: leaky_relu2(x @ up.T) @ down.T
    cases = {
        "MLP kernel": ([drawn(1, N, D), drawn(H, D), drawn(D, H)], plain_mlp, lambda *given: mlp_kernel.leaky_mlp(*given, 0.5)),
        "XSA kernel": ([drawn(1, N, 8, 64), drawn(1, N, 4, 64)], exclude_self, xsa_kernel.exclude_as_one)}
    out = {}
    for name, (given, plain, ours) in cases.items():
        with without_kernels(): # XSA in its room asks for its kernel
            half = given if small else [t[:, :4096] if t.dim() > 2 else t for t in given]
            exact = [t.detach().double().requires_grad_() for t in half]
            right = plain(*exact)
            pairs = [(right, ours(*half)), *zip(torch.autograd.grad(right.sum(), exact), torch.autograd.grad(ours(*half).sum(), half))]
            both = lambda f: torch.autograd.grad(f(*given).sum(), given)
            compiled = plain if small else torch.compile(plain)
            seconds = {way: seconds_of(lambda: both(f), 5, device) for way, f in (("plain", compiled), ("kernel", ours))}
        off = max(((b.double() - a).norm() / a.norm()).item() for a, b in pairs)
        out[name] = {"off": off, "served": gpu_kernels.kernel_missing(name, device) or "taken", "seconds": seconds}
    return out | {"within": all(found["off"] < (1e-5 if device == "cpu" else 2e-2) for found in out.values())}


def steps(name, device, small, compiled, kernels=True):
    "Milliseconds of a micro-batch with its optimizer step, recurrence off and on; memory and graphs"
    if not kernels:
        with without_kernels(): return steps(name, device, small, compiled)
    r = get(name, "smoke" if small else "full")
    cfg = r.train.replace(compile=compiled, warmup_steps=0, max_seconds=0., reserve_seconds=0.)
    data = SimpleNamespace(train=(), vocab=r.model.vocab)
    torch._dynamo.reset()
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    with patch.object(trainer, "make_loader", RandomTokens):
        t = trainer.Trainer(r.model, cfg, data, Ranks(0, 1), torch.device(device))
        t.accum, out, began = 1, {}, time.perf_counter()
        late = t.model.order() != t.model.order(recurrent=False)
        tokens = t.loader.next().x.numel()
        for recurrent in (False, True) if late else (True,):
            ms = 1e3 * seconds_of(lambda: trainer.train_step(t, recurrent=recurrent), 2 if small else 5, device)
            flops = 6 * tokens * sum(p.numel() for p in t.model.parameters())
            key = "recurrence on" if recurrent and late else "recurrence off" if late else "step"
            out[key] = {"ms": ms, "tokens_s": 1e3 * tokens / ms, "tflop_s": flops / ms / 1e9}
            peak = next((p for n, p in PEAK_TFLOPS.items() if device == "cuda" and n in torch.cuda.get_device_name()), None)
            if peak: out[key]["mfu_at_least"] = out[key]["tflop_s"] / peak # shared layers and attention are not counted
        out |= {"tokens": tokens, "seconds_in_all": time.perf_counter() - began}
    if device == "cuda": out["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    if compiled: out["graphs"] = dict(torch._dynamo.utils.counters["stats"])
    return out


def packed_recompiles(device, small):
    "Compiled graphs over many packed batches whose documents change"
    count, r = 3 if small else 200, get("pr1536", "smoke" if small else "full")
    graphs = []
    def kept(module, _):
        graphs.append(1)
        return module.forward
    torch._dynamo.reset()
    model = GPT(r.model, torch.Generator().manual_seed(0)).to(device)
    loss = torch.compile(trainer.micro_loss, backend=kept if small else "inductor")
    loader = RandomTokens("packed", (), 2048 if small else 32_768, r.train.seq_len, 0, 1, 0, r.model.vocab)
    began, times = time.perf_counter(), []
    for _ in range(count):
        batch = trainer._to_device(loader.next(), torch.device(device))
        loss(model, batch, r.train.seq_len, True, None).backward()
        wait(device)
        times.append(time.perf_counter() - began)
    late = [b - a for a, b in zip(times, times[1:])][5:]
    return {"batches": count, "first_s": times[0], "all_s": times[-1], "slowest_late_s": max(late, default=0.),
            "graphs": len(graphs) or dict(torch._dynamo.utils.counters["stats"])}


def scoring(name, device, small):
    "Seconds of an evaluation of random tokens with all that the recipe predicts with, and of the whole text at that pace"
    r = get(name, "smoke" if small else "full")
    n = 512 if small else 131_072
    ids = torch.randint(2, r.model.vocab, (n + 1,), generator=torch.Generator().manual_seed(0))
    ids[::500] = r.eval.bos
    one_byte = SimpleNamespace(vocab=r.model.vocab, count=lambda a, b: torch.ones_like(b))
    model = GPT(r.model, torch.Generator().manual_seed(0)).to(device)
    out = {}
    for key, ways in {"model alone": (), "as the recipe says": r.predict}.items():
        if any(way.illegal for way in ways): continue
        cfg = r.eval if not (key == "model alone" and r.eval.cut == "documents") else EvalConfig(
            cut="documents", seq_len=r.eval.seq_len, doc_chunk=r.eval.doc_chunk)
        score = evaluate(build_predictor(model, ways), ids, one_byte, cfg)
        spent = score.seconds["total"] or sum(score.seconds.values())
        out[key] = {"seconds": spent, "tokens_s": n / spent, "parts": score.seconds}
    return out


def calibration(device, small):
    "Seconds of the Hessians that GPTQ reads, per batch of eight sequences"
    r = get("pr1992", "smoke" if small else "full")
    model = GPT(r.model, torch.Generator().manual_seed(0)).to(device)
    x = torch.randint(0, r.model.vocab, (8, r.train.seq_len), generator=torch.Generator().manual_seed(0)).to(device)
    s = seconds_of(lambda: calibrate(model, r.quant, [x]), 2, device)
    return {"seconds_a_batch": s, "all": s * r.calibration}


def nccl(device, small):
    "An all_reduce of 64 MiB on one rank: that the library starts"
    import torch.distributed as dist
    if dist.is_initialized(): return {"skipped": "a process group is there already"}
    place = tempfile.mkdtemp()
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{place}/store", rank=0, world_size=1)
    try:
        x = torch.ones(2**14 if small else 2**24, device=device)
        return {"backend": backend, "ms": 1e3 * seconds_of(lambda: dist.all_reduce(x), 5, device)}
    finally: dist.destroy_process_group()


def learns(device, small, seconds):
    "A short training on the corpus of the package: the loss must fall"
    r = get("tiny", "smoke" if small else "full", compile=False, steps=8 if small else 10_000, warmup_steps=0)
    cfg = r.train if small else r.train.replace(max_seconds=max(20., seconds))
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        data = prepare_data(r, root=Path(folder)/"data", progress=False)
        keep = lambda record: losses.append(record["loss"]) if "loss" in record else None
        train(r.model, cfg, data, Path(folder)/"run", device=torch.device(device), name="bench", progress=False, on_log=keep)
    return {"records": len(losses), "first": losses[0], "last": losses[-1], "falls": losses[-1] < losses[0]}


def stages(device, small, left):
    "What is measured, most worth first: (name, call)"
    names = ("best", "pr1536") if small else NAMES
    yield "backends agree", lambda: backends_agree(device, small)
    yield "loss agrees", lambda: loss_agrees(device, small)
    yield "kernels agree", lambda: kernels_agree(device, small)
    for name in names:
        yield f"steps {name} eager", lambda: steps(name, device, small, False)
        if not small: yield f"steps {name} compiled", lambda: steps(name, device, small, True)
        yield f"steps {name} {'eager' if small else 'compiled'}, kernels off", lambda: steps(name, device, small, not small, False)
    for name in names: yield f"scoring {name}", lambda: scoring(name, device, small)
    yield "calibration", lambda: calibration(device, small)
    yield "packed batches", lambda: packed_recompiles(device, small)
    yield "collectives", lambda: nccl(device, small)
    yield "training", lambda: learns(device, small, min(120., left()))


def main(args=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    p.add_argument("--minutes", type=float, default=8)
    p.add_argument("--json", type=Path, help="written after every stage")
    a = p.parse_args(args)
    end = time.monotonic() + 60 * a.minutes
    left = lambda: end - time.monotonic()
    card = torch.cuda.get_device_name() if a.device == "cuda" else platform.processor() or platform.machine()
    out = {"device": card, "torch": torch.__version__, "cores": os.cpu_count(), "stages": {}, "not_run": []}
    for name, call in stages(a.device, a.device == "cpu", left):
        if left() <= 0:
            out["not_run"].append(name)
            continue
        began = time.monotonic()
        try: found = call()
        except Exception as e: found = {"failed": f"{type(e).__name__}: {str(e)[:300]}"}
        out["stages"][name] = found | {"took_s": round(time.monotonic() - began, 1)}
        print(f"{name}: {json.dumps(found)[:300]}", flush=True)
        if a.json: a.json.write_text(json.dumps(out, indent=1, default=str) + "\n")
        if a.device == "cuda": torch.cuda.empty_cache()
    if out["not_run"]: print("no minutes left for:", ", ".join(out["not_run"]))
    return out


if __name__ == "__main__": main()
