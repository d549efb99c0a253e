"""What an order of rows saves on the codes of a finished run: under brotli, columns first as the records pack, and under our coder.

    papermill nbs/runs/record.ipynb out/record-pr2135-cpu.ipynb -p recipe pr2135 -p scale cpu
    python -m benchmarks.row_order out/pr2135-seed1-cpu --json benchmarks/results/row_order.json

The rows of `banks.up` are hidden units: their order is free. Every other order has to be stored beside the codes.
"""
import argparse
import math
from pathlib import Path

import brotli
import numpy as np
import torch

from benchmarks.quantize import environment
from pgolf.ground.files import write_json
from pgolf.ground.progress import progress_bar
from pgolf.lab.tables import Table
from pgolf.pack.ans import ans_encode
from pgolf.pack.grid import Codes
from pgolf.pack.quantize import calibrate, quantize_model
from pgolf.pack.row_order import similar_order
from pgolf.pack.spread_fit import choose_spread
from pgolf.recipes.phases import calibration_batches, read_recipe
from pgolf.recipes.run import Run
from pgolf.train.checkpoint import load_weights

FREE = "banks.up"


def columns_first(q):
    "Bytes under brotli, matrix by matrix"
    return sum(len(brotli.compress(m.T.tobytes(), quality=11, lgwin=24)) for m in q)


def ours(q):
    "Bytes under the coder of weights"
    return len(ans_encode(q, choose_spread(q)))


def ordered(q):
    "Every matrix with similar rows side by side"
    return np.stack([m[similar_order(torch.from_numpy(m)).numpy()] for m in q])


def saved(name, q):
    "Bytes as the rows lie and in the new order, and what the order itself takes"
    other, layers, rows = ordered(q), *q.shape[:2]
    least = layers * math.lgamma(rows + 1) / math.log(2) / 8
    order = [0, 0] if name == FREE else [2 * layers * rows, round(least)]
    return {"codes": q.size, "brotli": [columns_first(q), columns_first(other)], "ours": [ours(q), ours(other)], "order": order}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="finished run folder")
    p.add_argument("--json", default="out/row_order.json")
    args = p.parse_args()
    recipe, run, model = read_recipe(args.run), Run(args.run), load_weights(Path(args.run) / "weights.pt")
    state = quantize_model(model, recipe.quant, calibrate(model, recipe.quant, calibration_batches(recipe, run.dataset)))
    coded = {n: v.codes.numpy() for n, v in state.items() if isinstance(v, Codes)}
    coded = {n: q.reshape(-1, *q.shape[-2:]) for n, q in coded.items() if q.shape[-2] > 1}
    found = {n: saved(n, q) for n, q in progress_bar(coded.items(), "matrices")}
    lines = [[n, *f["brotli"], *f["ours"], f["order"][1]] for n, f in found.items()]
    print(Table(lines, head=["matrices", "brotli", "ordered", "ours", "ordered", "order, least"]))
    write_json(args.json, {"recipe": recipe.name, "steps": recipe.train.steps, "made_with": environment(), "matrices": found})


if __name__ == "__main__":
    main()
