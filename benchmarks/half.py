"""Training in bf16 against training in fp32 on a CPU: bits per byte of the trained weights, seed by seed.

    OMP_NUM_THREADS=1 python -m benchmarks.half --steps 200 --seeds 1 2 3 4 --out benchmarks/results/half.json

Scores are computed in fp32, over whole windows of the validation split. Pairs that are in the file already are not made again.
"""
import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from pgolf.ground.files import write_json
from pgolf.model.gpt import token_loss
from pgolf.recipes.phases import prepare_data
from pgolf.recipes.recipes import get
from pgolf.train.checkpoint import load_weights
from pgolf.train.compute import Compute, computing, processor
from pgolf.train.train import train


@torch.no_grad()
def bits_per_byte(model, dataset, length):
    "Of whole windows"
    ids = dataset.val_ids()
    n = (len(ids) - 1) // length
    x, y = (ids[at:length * n + at].view(n, length) for at in (0, 1))
    nats = sum(token_loss(model(a), b).double().sum().item() for a, b in zip(x.split(8), y.split(8)))
    return nats / math.log(2) / dataset.byte_table().count(x, y).sum().item()


def ended(recipe, dataset, half):
    "What a training ends with, and how long it takes"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        with computing(Compute(half=half), training=True):
            train(recipe.model, recipe.train, dataset, folder, device=torch.device("cpu"), progress=False)
        seconds = round(time.perf_counter() - began, 1)
        return {"bits_per_byte": bits_per_byte(load_weights(Path(folder) / "weights.pt"), dataset, recipe.train.seq_len), "seconds": seconds}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", default="tiny")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    p.add_argument("--data", default="data", help="folder of datasets and tokenizers")
    p.add_argument("--out", type=Path, default=Path("out/half.json"))
    a = p.parse_args()
    dataset = prepare_data(get(a.recipe), root=a.data, progress=False)
    pairs = json.loads(a.out.read_text())["pairs"] if a.out.exists() else {}
    for seed in a.seeds:
        recipe = get(a.recipe, seed=seed, steps=a.steps)
        if str(seed) not in pairs: pairs[str(seed)] = {word: ended(recipe, dataset, word == "bf16") for word in ("fp32", "bf16")}
        worse = [pair["bf16"]["bits_per_byte"] - pair["fp32"]["bits_per_byte"] for pair in pairs.values()]
        error = statistics.stdev(worse) / len(worse) ** 0.5 if len(worse) > 1 else None
        about = {"recipe": a.recipe, "steps": a.steps, "processor": processor(), "threads": torch.get_num_threads()}
        write_json(a.out, about | {"worse_by": statistics.mean(worse), "error": error, "pairs": pairs})
        print(f"seed {seed}: bf16 worse by {worse[-1]:+.4f}; mean of {len(worse)} {statistics.mean(worse):+.4f}", flush=True)


if __name__ == "__main__":
    main()
