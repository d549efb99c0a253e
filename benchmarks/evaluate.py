"""Sliding against streaming: model tokens computed, seconds, bits per byte.

    python benchmarks/evaluate.py                                # trains the tiny recipe at length 1024 first (about 10 minutes on two cores)
    python benchmarks/evaluate.py --run out/tiny-long --data data/datasets/embedded_sp1024 --tokens 16000
"""
import argparse
import json
import time
from pathlib import Path

import torch

from pgolf.text.data import open_dataset
from pgolf.score.evaluate import evaluate
from pgolf.score.predictor import ModelPredictor
from pgolf.recipes.phases import prepare_data, write_recipe
from pgolf.recipes.recipes import get
from pgolf.train.checkpoint import load_weights
from pgolf.train.train import train


def trained(run:Path, seq_len:int, steps:int, root:str):
    "A tiny run folder at this length, trained unless it is there"
    recipe = get("tiny", train__seq_len=seq_len, eval__seq_len=seq_len, steps=steps)
    dataset = prepare_data(recipe, root=root)
    if not (run/"weights.pt").exists(): train(recipe.model, recipe.train, dataset, write_recipe(recipe, run))
    return dataset


def measure(model, ids, table, **settings)->dict:
    "One evaluation, by wall clock and by processor time"
    wall, cpu = time.perf_counter(), time.process_time()
    score = evaluate(ModelPredictor(model), ids, table, **settings)
    return dict(inputs=score.inputs, wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, bpb=score.bpb, tokens=score.tokens)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("out/tiny-long"), help="run folder with weights.pt; trained if there is none")
    p.add_argument("--data", type=Path, help="dataset folder; default: the embedded corpus")
    p.add_argument("--seq-len", type=int, default=1024, help="window of both, and the trained length")
    p.add_argument("--stride", type=int, default=64)
    p.add_argument("--chunks", type=int, nargs="+", default=[128, 256, 512], help="tokens streamed at once")
    p.add_argument("--steps", type=int, default=500, help="training steps, where it must train")
    p.add_argument("--tokens", type=int, default=0, help="score only the first so many; 0 = all")
    p.add_argument("--root", default="data")
    p.add_argument("--json", type=Path, help="also write the figures here")
    a = p.parse_args()
    dataset = open_dataset(a.data) if a.data else trained(a.run, a.seq_len, a.steps, a.root)
    model, ids, table = load_weights(a.run/"weights.pt").eval(), dataset.val_ids(), dataset.byte_table()
    if a.tokens: ids = ids[:a.tokens + 1]
    rows = {f"sliding, stride {a.stride}": measure(model, ids, table, cut="sliding", seq_len=a.seq_len, stride=a.stride)}
    for c in a.chunks: rows[f"streaming, chunk {c}"] = measure(model, ids, table, cut="streaming", window=a.seq_len, stream_chunk=c)
    rows["full"] = measure(model, ids, table, cut="full", seq_len=a.seq_len)
    base = rows[f"sliding, stride {a.stride}"]
    print(f"window {a.seq_len}, {base['tokens']:,} targets, {torch.get_num_threads()} threads; streaming: each token attends to the last {a.seq_len} at every layer")
    for name, r in rows.items():
        print(f"{name:22} {r['inputs']:9,} model tokens ({base['inputs'] / r['inputs']:5.1f}x fewer)  {r['wall']:7.1f} s, {r['cpu']:7.1f} s cpu "
              f"({base['cpu'] / r['cpu']:4.1f}x)  {r['bpb']:.4f} bpb ({r['bpb'] - base['bpb']:+.4f})")
    if a.json: a.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__": main()
