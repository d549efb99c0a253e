"A toy dataset, small models of every recipe's kind, and torchrun, for the tests of training"
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from pgolf.text.data import Dataset, write_shard
from pgolf.model import (AttentionResiduals, BigramHash, FlowRefiner, GPTConfig, GPTJBlocks, HeadGate, Lanes, Recurrence,
                         SmearGate, UNetSkips, ValueEmbedding, ValueResidual, XSA)
from pgolf.ground.settings import to_plain
from pgolf.train.config import TrainConfig
from pgolf.train.muon import Muon

VOCAB = 32
TINY = GPTConfig(vocab=VOCAB, dim=16, layers=2, heads=2, kv_heads=1, rotary_dims=4, mlp_ratio=2, embed_std=.02,
                 parts=(UNetSkips(), XSA()))
QUICK = TrainConfig(steps=12, batch_tokens=128, seq_len=32, accum=2, warmup_steps=0, warmdown_iters=6, matrix=Muon(momentum_steps=6),
                    ema_decay=.8, swa_every=2, swa_start=.8, checkpoint_seconds=0.)

TIMED = TrainConfig(steps=10**6, max_seconds=1., batch_tokens=256, seq_len=32, accum=1, warmup_steps=0, schedule="frac", averaging="none")


def travelling(**kw):
    "A run that may go on with another number of ranks: eight micro-batches a step over all of them"
    base = dict(steps=12, batch_tokens=256, seq_len=32, warmup_steps=0, warmdown_iters=6, matrix=Muon(momentum_steps=6), clip=.3, checkpoint_seconds=0.)
    return TrainConfig(**base | kw)


def toy_dataset(folder, tokens=8000, shards=1, seed=0):
    "Tokens that mostly follow from the one before, with a document's start now and then; no tokenizer"
    rng = np.random.default_rng(seed)
    follow, ids = rng.permutation(np.arange(2, VOCAB)), [1]
    for noise in rng.random(tokens):
        ids.append(1 if noise < .01 else int(2 + noise * 10 * (VOCAB - 2)) if noise < .1 else int(follow[max(ids[-1] - 2, 0)]))
    train = [write_shard(Path(folder) / f"toy_train_{i:06}.bin", part) for i, part in enumerate(np.array_split(ids, shards))]
    return Dataset("toy", VOCAB, tuple(train), (write_shard(Path(folder) / "toy_val_000000.bin", ids[:500]),), Path(folder) / "none.model")


# the optimizers and the parameters they meet in the five recipes, on three layers (padded to four on two and four ranks)
SP1024 = (UNetSkips(), ValueResidual(), XSA(), HeadGate(), SmearGate(), BigramHash(64, 8))
SP8192 = (Recurrence(1, 2, 1), UNetSkips(gated=True), XSA())
RECIPES = {
    "pr761": (dict(parts=SP1024),
              dict(proj_group="matrix", schedule="iters", warmdown_iters=10)),
    "pr1232_flow": (dict(parts=(*SP1024, FlowRefiner(8, 12))),
                    dict(proj_group="matrix", schedule="iters", warmdown_iters=15)),
    "pr1696": (dict(parts=(UNetSkips(), AttentionResiduals(), ValueEmbedding((1, 2), 8), XSA())),
               dict(proj_group="scalar", schedule="iters", warmdown_iters=10, qat="late", qat_start=.5)),
    "pr1536": (dict(mlp_ratio=4, parts=(*SP8192, Lanes(2))),
               dict(order="packed", schedule="frac", matrix=Muon(row_norm=True, lr=.022, momentum=.97, wd=.095, momentum_steps=15),
                    embed_lr=.03, embed_wd=.095, scalar_lr=.02, scalar_wd=.02, recur_at=.35)),
    "pr1992": (dict(mlp_ratio=4, parts=(*SP8192, HeadGate("headwise"), GPTJBlocks(2))),
               dict(order="shuffled", schedule="frac", warmdown_frac=.72,
                    matrix=Muon(row_norm=True, lr=.022, wd=.095, ns="polar", momentum_steps=15), embed_lr=.03,
                    embed_wd=.085, scalar_lr=.02, scalar_wd=.02, recur_at=.35)),
}


def recipe(name, world=1, **kw):
    "Model and training config of a small relative of a recipe, four micro-batches a step over all ranks"
    model, train = RECIPES[name]
    base = dict(vocab=VOCAB, dim=16, layers=3, heads=2, kv_heads=1, rotary_dims=4, mlp_ratio=2, embed_std=.02)
    return GPTConfig(**base | model), TrainConfig(**dict(
        steps=20, batch_tokens=512, seq_len=64, accum=4 // world, warmup_steps=0, matrix=Muon(momentum_steps=15), clip=.3,
        checkpoint_seconds=0.) | train | kw)


def write_recipe(run, model, train):
    Path(run).mkdir(parents=True, exist_ok=True)
    (Path(run) / "recipe.json").write_text(json.dumps({"name": "toy", "model": to_plain(model), "train": to_plain(train)}))


def environment(): return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])}


def run_python(*args, timeout=500): return subprocess.run([sys.executable, *map(str, args)], env=environment(), capture_output=True, text=True, timeout=timeout)


def run_ranks(world, *args, timeout=240):
    return run_python("-m", "torch.distributed.run", "--standalone", "--local_addr=localhost", f"--nproc_per_node={world}", *args, timeout=timeout)
