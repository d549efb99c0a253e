"""What the model's features cost, and what packed attention saves.

Every round times each contender once (`benchmarks.train.interleave`); on one thread it counts CPU seconds of the process, which
sharing the machine hardly changes. A ratio is the median over rounds.

    OMP_NUM_THREADS=1 python -m benchmarks.model    # about three minutes of one core
"""
import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.train import PlainGPT, interleave, plain_pass, ratio
from pgolf.model.attention import attend
from pgolf.model import (GPT, AttentionResiduals, BigramHash, FlowRefiner, GPTJBlocks, HeadGate, Lanes, Recurrence, SmearGate,
                         UNetSkips, ValueEmbedding, ValueResidual, XSA, token_loss)
from pgolf.recipes.recipes import get

CPU = torch.device("cpu")


def one_pass(cfg, x, y):
    "Forward and backward of a model made from a config"
    model = GPT(cfg, torch.Generator().manual_seed(0))

    def step():
        model.zero_grad()
        token_loss(model(x), y).mean().backward()
    return step


def features(rounds):
    "The tiny recipe, with one thing added to or taken from a bare stack of its size, over the bare stack"
    tiny = get("tiny").model
    bare = replace(tiny, parts=())
    more = {
        "XSA": XSA(), "U-Net skips": UNetSkips(), "gated skips": UNetSkips(gated=True), "value residual": ValueResidual(),
        "linear gate": HeadGate(), "headwise gate": HeadGate("headwise"), "BigramHash": BigramHash(2048, 64),
        "SmearGate": SmearGate(), "value embedding": ValueEmbedding((3, 4), 64),
        "block attention residuals": AttentionResiduals(), "GPT-J parallel": GPTJBlocks(3), "two lanes": Lanes(3),
        "FlowRefiner": FlowRefiner(), "loop of one layer, once more": Recurrence(2, 2, 1),
    }
    configs = {name: replace(bare, parts=(part,)) for name, part in more.items()} | {"SwiGLU": replace(bare, mlp="swiglu")}
    x, y = torch.randint(0, tiny.vocab, (2, 4, 512), generator=torch.Generator().manual_seed(1))
    cases = {"bare": one_pass(bare, x, y), "plain torch layers": plain_pass(PlainGPT(bare, 512, range(bare.layers)), x, y), "tiny": one_pass(tiny, x, y)}
    times = interleave(cases | {name: one_pass(cfg, x, y) for name, cfg in configs.items()}, rounds, CPU)
    return {name: round(ratio(t, times["bare"]), 3) for name, t in times.items()}


def masked(q, k, v, cu):
    "Packed attention the obvious way: dense attention under a T x T mask of documents"
    at = torch.arange(q.shape[1])
    doc = torch.bucketize(at, cu[1:], right=True)
    mask = (at[:, None] >= at) & (doc[:, None] == doc)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def packed(rounds):
    "Attention of packed rows, forward and backward: documents in groups of like length over a mask"
    out, g = {}, torch.Generator().manual_seed(0)
    for T, mean in ((1024, 128), (4096, 512), (8192, 700)):
        cuts = torch.randint(1, 2 * mean, (4 * T // mean,), generator=g).cumsum(0)
        cu = torch.cat((torch.tensor([0]), cuts[cuts < T], torch.tensor([T]))).int()
        leaves = [torch.randn(1, T, n, 64, generator=g, requires_grad=True) for n in (8, 4, 4)]
        run = lambda attention: lambda: torch.autograd.grad(attention(*leaves, cu).square().sum(), leaves)
        assert torch.allclose(attend(*leaves, cu), masked(*leaves, cu), atol=1e-4)
        times = interleave({"documents": run(attend), "mask": run(masked)}, max(3, rounds // 2), CPU)
        out[f"{T} tokens, {len(cu) - 1} documents"] = round(ratio(times["mask"], times["documents"]), 2)
    return out


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=9)
    a = p.parse_args()
    result = {"machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
              "pass_over_bare": features(a.rounds), "mask_over_documents": packed(a.rounds)}
    for part in ("pass_over_bare", "mask_over_documents"):
        for name, value in result[part].items():
            print(f"{part.replace('_', ' '):22} {name:34} x{value}")
    out = Path(__file__).parent / "results" / "model.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
