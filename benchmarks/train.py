"""Training speed against a plain GPT of the same size, and Muon on banks against a loop over matrices.

On a CPU (default) the five recipes run at full size on short batches, beside a plain GPT with the same width, depth, heads
and hidden size written with torch's own layers. Every round times each contender once, so that a busy machine hurts all
alike, and on one thread it counts CPU seconds of the process. Ratios are given twice: the median over rounds of ours / plain of
the same round, and the ratio of the least times. The optimizers are timed apart from forward and backward, because
their cost does not grow with the batch; whole steps of a record run's share (98,304 tokens) are computed from both.

    OMP_NUM_THREADS=1 python -m benchmarks.train    # on a CPU, about five minutes of one core
    python -m benchmarks.train --full               # on a GPU: ms per step at 98,304 tokens, eager and compiled, memory, MFU
"""
import argparse
import json
import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from pgolf.model.gpt import GPT, token_loss
from pgolf.train.muon import aspect_scale, muon_step
from pgolf.train.optimizers import make_optimizers
from pgolf.recipes.recipes import get
from pgolf.train.qat import FakeQuant

FIVE = ("pr761", "pr1232", "pr1696", "pr1536", "pr1992")
RANK_TOKENS = 98_304  # one rank's share of a record run's step
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bf16 of the SXM parts, for model FLOPs utilisation


class PlainBlock(nn.Module):
    "Pre-norm attention and MLP from nn.Linear, nn.RMSNorm and SDPA"
    def __init__(self, dim, heads, kv_heads, hidden):
        super().__init__()
        self.heads, self.kv_heads, d = heads, kv_heads, dim // heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, n, bias=False) for n in (dim, kv_heads * d, kv_heads * d, dim))
        self.up, self.down = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.norms = nn.ModuleList([nn.RMSNorm(dim), nn.RMSNorm(dim)])

    def forward(self, x):
        split = lambda t, n: t.view(*t.shape[:2], n, -1).transpose(1, 2)
        h = self.norms[0](x)
        y = F.scaled_dot_product_attention(split(self.q(h), self.heads), split(self.k(h), self.kv_heads), split(self.v(h), self.kv_heads),
                                           is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class PlainGPT(nn.Module):
    "Embedding with learned positions, blocks in the given order (a repeated one shares its weights), tied head"
    def __init__(self, cfg, seq_len, order):
        super().__init__()
        self.embed, self.positions, self.order = nn.Embedding(cfg.vocab, cfg.dim), nn.Embedding(seq_len, cfg.dim), order
        self.blocks = nn.ModuleList([PlainBlock(cfg.dim, cfg.heads, cfg.kv_heads, cfg.hidden) for _ in range(cfg.layers)])
        self.norm = nn.RMSNorm(cfg.dim)

    def forward(self, ids):
        x = self.embed(ids) + self.positions.weight[:ids.shape[1]]
        for i in self.order: x = self.blocks[i](x)
        return F.linear(self.norm(x), self.embed.weight)


def timed(step, device):
    "Seconds of one call: of the clock on a GPU, of the process on one CPU thread"
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda": torch.cuda.synchronize()
    begun = clock()
    step()
    if device.type == "cuda": torch.cuda.synchronize()
    return clock() - begun


def interleave(contenders, rounds, device):
    "Seconds of every contender in every round, after one round to warm up"
    for step in contenders.values(): step()
    times = {n: [] for n in contenders}
    for r in range(rounds):
        names = list(contenders)
        for n in names[r % len(names):] + names[:r % len(names)]: times[n].append(timed(contenders[n], device))
    return times


def ratio(ours, theirs):
    "Median over rounds, and of the least times: the second is what a quiet machine would show"
    return {"median": round(statistics.median(a / b for a, b in zip(ours, theirs)), 3), "least": round(min(ours) / min(theirs), 3)}


def our_pass(model, cfg, x, y, opt, compiled=False):
    "Forward and backward of ours: all that the recipe's model does, recurrence on"
    through = FakeQuant(cfg).at(0.)
    cuts = dict(cu_seqlens=torch.arange(0, x.numel() + 1, cfg.seq_len, dtype=torch.int32, device=x.device), max_seqlen=cfg.seq_len) if cfg.order == "packed" else {}
    def loss_of():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return token_loss(model(x, through=through, **cuts), y).mean()
    loss_of = torch.compile(loss_of) if compiled else loss_of
    def step():
        opt.zero_grad()
        loss_of().backward()
    return step


def plain_pass(model, x, y):
    "Forward and backward of the plain model"
    def step():
        model.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    return step


def plain_optimizers(model):
    "What torch has for the plain model: AdamW on all, or its Muon on the blocks' matrices and AdamW on the rest; clipping"
    inside = [p for p in model.blocks.parameters() if p.ndim == 2]
    adamw = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    muon = torch.optim.Muon(inside, 1e-4)
    rest = torch.optim.AdamW([p for p in model.parameters() if all(p is not q for q in inside)], 1e-4, fused=True)
    clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.)
    return (lambda: (clip(), adamw.step())), (lambda: (clip(), muon.step(), rest.step()))


def on_cpu(rounds, rows, seq_len, names=FIVE):
    "Recipes beside plain GPTs: forward and backward, optimizers, and whole steps computed from both"
    out, device = {}, torch.device("cpu")
    for name in names:
        r = get(name)
        cfg, gen = replace(r.train, seq_len=seq_len), torch.Generator().manual_seed(0)
        x, y = torch.randint(0, r.model.vocab, (2, rows, seq_len), generator=gen)
        ours = GPT(r.model, gen)
        plain = PlainGPT(r.model, seq_len, ours.order())
        opt = make_optimizers(dict(ours.named_parameters()), ours.roles(), cfg)
        shape = (1, -1) if cfg.order == "packed" else (rows, seq_len)
        adamw, muon = plain_optimizers(plain)
        passes = interleave({"plain": plain_pass(plain, x, y), "ours": our_pass(ours, cfg, x.view(shape), y.view(shape), opt)}, rounds, device)
        steps = interleave({"AdamW": adamw, "torch Muon": muon, "ours": lambda: opt.step(1., .95, cfg.clip)}, max(2, rounds // 2), device)
        out[name] = summary(passes, steps, rows * seq_len) | {"passes": len(ours.order()), "parameters": {
            "ours": sum(p.numel() for p in ours.parameters()), "plain": sum(p.numel() for p in plain.parameters())}}
        o = out[name]
        print(f"{name:8} {len(ours.order())} layer passes; forward+backward: plain {o['tokens_per_s']['plain']:,} tokens/s, ours {o['tokens_per_s']['ours']:,}: "
              f"{o['forward_backward_ratio']}; optimizer ms: {o['optimizer_ms']}; step of {RANK_TOKENS:,} tokens {o['rank_step_ratio']}", flush=True)
    return out


def summary(passes, steps, tokens):
    "Least times of one recipe, and ratios"
    ms = lambda times: {k: round(1e3 * min(v), 1) for k, v in times.items()}
    whole = lambda p, o: ms(passes)[p] * RANK_TOKENS / tokens + ms(steps)[o]
    return {"tokens": tokens, "forward_backward_ms": ms(passes), "tokens_per_s": {k: round(1e3 * tokens / v) for k, v in ms(passes).items()},
            "forward_backward_ratio": ratio(passes["ours"], passes["plain"]), "optimizer_ms": ms(steps),
            "rank_step_ratio": {"to AdamW": round(whole("ours", "ours") / whole("plain", "AdamW"), 3),
                                "to torch Muon": round(whole("ours", "ours") / whole("plain", "torch Muon"), 3)}}


def per_matrix(u, steps=5):
    "Newton-Schulz of one matrix, as one writes it first"
    a, b, c = 3.4445, -4.7750, 2.0315
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def muon_loop(ws, gs, bufs, lr=.02, mu=.95):
    "A Muon step matrix by matrix"
    for w, g, buf in zip(ws, gs, bufs):
        buf.mul_(mu).add_(g)
        w.add_(per_matrix(g.add(buf, alpha=mu)), alpha=-lr * aspect_scale(*w.shape))


def banks_against_loop(rounds, device):
    "Muon over six banks of eleven layers, at several widths"
    out = {}
    for dim in (64, 128, 256, 512):
        gen = torch.Generator(device).manual_seed(0)
        shapes = [(11, dim, dim), (11, dim // 2, dim), (11, dim // 2, dim), (11, dim, dim), (11, 3 * dim, dim), (11, dim, 3 * dim)]
        ws, gs = ([torch.randn(s, generator=gen, device=device) for s in shapes] for _ in range(2))
        bufs = [torch.zeros_like(w) for w in ws]
        flat = [[m.clone() for t in ts for m in t] for ts in (ws, gs, bufs)]
        def banks():
            for i, (w, g, b) in enumerate(zip(ws, gs, bufs)): ws[i], bufs[i] = muon_step(w, g, b, .02, .95)
        times = interleave({"banks": banks, "loop": lambda: muon_loop(*flat)}, rounds if dim < 512 else max(3, rounds // 3), device)
        out[dim] = {k: round(1e3 * min(v), 2) for k, v in times.items()} | {"loop_over_banks": ratio(times["loop"], times["banks"])}
        print(f"Muon, width {dim}: banks {out[dim]['banks']} ms, loop over matrices {out[dim]['loop']} ms, {out[dim]['loop_over_banks']}", flush=True)
    return out


def flops_per_token(cfg, seq_len, order):
    "Of forward and backward: 6 per weight used, recurrence counted, and causal attention's half square"
    d, kv = cfg.dim, cfg.kv_heads * cfg.head_dim
    layer = d * cfg.q_rows + 2 * d * kv + d * d + 2 * d * cfg.hidden
    return 6 * (len(order) * layer + cfg.vocab * d) + 6 * len(order) * seq_len * d


def full_size(device, tokens, rounds, names=FIVE):
    "Full-size recipes: ms per step of one rank's share, memory and utilisation, eager and compiled"
    out, peak = {}, next((t for n, t in PEAK_TFLOPS.items() if device.type == "cuda" and n in torch.cuda.get_device_name(device)), None)
    for name in names:
        r = get(name)
        seq_len = min(r.train.seq_len, tokens)
        rows = (1, tokens) if r.train.order == "packed" else (tokens // seq_len, seq_len)
        for compiled in (False, True):
            torch._dynamo.reset()
            model = GPT(r.model, torch.Generator().manual_seed(0)).to(device)
            x, y = torch.randint(0, r.model.vocab, (2, *rows), device=device)
            opt = make_optimizers(dict(model.named_parameters()), model.roles(), r.train)
            passed = our_pass(model, replace(r.train, seq_len=seq_len), x, y, opt, compiled)
            def step(): passed(); opt.step(1., .95, r.train.clip)
            for _ in range(3): step()
            if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
            ms = 1e3 * statistics.median(timed(step, device) for _ in range(rounds))
            fields = {"ms": round(ms, 2), "tokens_per_s": round(1e3 * tokens / ms)}
            if device.type == "cuda": fields["peak_mib"] = torch.cuda.max_memory_allocated() // 2**20
            if peak: fields["mfu"] = round(flops_per_token(r.model, seq_len, model.order()) * tokens / (ms / 1e3) / (peak * 1e12), 4)
            out.setdefault(name, {})["compiled" if compiled else "eager"] = fields
            print(name, "compiled" if compiled else "eager", fields, flush=True)
    return out


def facts(device):
    "Where the numbers come from"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    return {"hardware": hardware, "threads": torch.get_num_threads(), "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the recipes alone at a record run's batch, with and without compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=2, help="sequences of a batch on a CPU")
    parser.add_argument("--seq-len", type=int, default=512, help="their length")
    parser.add_argument("--tokens", type=int, default=RANK_TOKENS, help="per step of --full")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON")
    args = parser.parse_args()
    device = torch.device("cuda" if args.full and torch.cuda.is_available() else "cpu")
    record = {"about": facts(device), "settings": {k: v for k, v in vars(args).items() if k != "out"}}
    if args.full: record["full_size"] = full_size(device, args.tokens, args.rounds)
    else: record |= {"recipes_beside_plain": on_cpu(args.rounds, args.rows, args.seq_len), "muon_banks_against_loop": banks_against_loop(args.rounds, device)}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"train_{'full_' if args.full else ''}{device.type}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)


if __name__ == "__main__": main()
