"""Attention in row blocks against PyTorch's fused kernel on one CPU core: forward and backward, in turn.

    OMP_NUM_THREADS=1 python benchmarks/attention_cpu.py --out benchmarks/results/attention_cpu.json

Shapes are those of training `tiny` and the recipes at the cpu scale. Errors are relative, against fp64.
"""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from pgolf.model.kernels import causal_sdpa
from pgolf.model.row_blocks import row_blocks
from pgolf.train.compute import processor

SHAPES = {"tiny": (3, 704, 3, 1, 64), "cpu scale": (4, 256, 4, 2, 32), "cpu scale, small batches": (1, 256, 4, 2, 32)} # B, T, H, G, K


def fused(q, k, v):
    "PyTorch's kernel, which `causal_sdpa` would not choose here"
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def milliseconds(attend, leaves, g):
    "Of a forward with its backward"
    began = time.perf_counter()
    torch.autograd.grad(attend(*leaves), leaves, g)
    return 1e3 * (time.perf_counter() - began)


def compare(shape, dtype, rounds):
    "Medians, their ratio pair by pair, and errors"
    B, T, H, G, K = shape
    draw = torch.Generator().manual_seed(0)
    rand = lambda heads: torch.randn(B, T, heads, K, generator=draw).to(dtype)
    leaves, g = [rand(heads).requires_grad_() for heads in (H, G, G)], rand(H)
    ways = {"fused": fused, "row blocks": row_blocks}
    for attend in ways.values(): milliseconds(attend, leaves, g)
    pairs = [{name: milliseconds(attend, leaves, g) for name, attend in ways.items()} for _ in range(rounds)]
    with torch.no_grad(): exact = causal_sdpa(*(t.double() for t in leaves))
    error = {name: ((attend(*leaves).double() - exact).norm() / exact.norm()).item() for name, attend in ways.items()}
    return {"milliseconds": {name: round(statistics.median(p[name] for p in pairs), 2) for name in ways},
            "ratio": round(statistics.median(p["row blocks"] / p["fused"] for p in pairs), 3), "error": error}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    record = {"processor": processor(), "threads": torch.get_num_threads(), "rows": {}}
    for name, shape in SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            row = record["rows"][f"{name}, {str(dtype)[6:]}"] = compare(shape, dtype, a.rounds)
            print(f"{name:25} {str(dtype)[6:]:9} x{row['ratio']} of the fused kernel's time {row['milliseconds']}", flush=True)
    if a.out: a.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
