"A toy dataset, small models of every recipe's kind, and torchrun, for the tests of training"
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pgolf.data import Dataset, write_shard
from pgolf.model import GPTConfig
from pgolf.train import TrainConfig

VOCAB = 32
TINY = GPTConfig(vocab=VOCAB, dim=16, layers=2, heads=2, kv_heads=1, rotary_dims=4, mlp_ratio=2, embed_std=.02)
QUICK = TrainConfig(steps=12, batch_tokens=128, seq_len=32, accum=2, warmup_steps=0, warmdown_iters=6, muon_momentum_steps=6,
                    ema_decay=.8, swa_every=2, swa_start=.8, checkpoint_seconds=0.)

TIMED = TrainConfig(steps=10**6, max_seconds=1., batch_tokens=256, seq_len=32, accum=1, warmup_steps=0, schedule="frac", averaging="none")


def travelling(**kw):
    "A run that may go on with another number of ranks: eight micro-batches a step over all of them"
    return TrainConfig(**dict(steps=12, batch_tokens=256, seq_len=32, warmup_steps=0, warmdown_iters=6, muon_momentum_steps=6, clip=.3, checkpoint_seconds=0.) | kw)


def toy_dataset(folder, tokens=8000, shards=1, seed=0):
    "Tokens that mostly follow from the one before, with a document's start now and then; no tokenizer"
    rng = np.random.default_rng(seed)
    follow, ids = rng.permutation(np.arange(2, VOCAB)), [1]
    for noise in rng.random(tokens):
        ids.append(1 if noise < .01 else int(2 + noise * 10 * (VOCAB - 2)) if noise < .1 else int(follow[max(ids[-1] - 2, 0)]))
    train = [write_shard(Path(folder) / f"toy_train_{i:06}.bin", part) for i, part in enumerate(np.array_split(ids, shards))]
    return Dataset("toy", VOCAB, tuple(train), (write_shard(Path(folder) / "toy_val_000000.bin", ids[:500]),), Path(folder) / "none.model")


# the optimizers and the parameters they meet in the five recipes, on three layers (padded to four on two and four ranks)
RECIPES = {
    "pr761": (dict(bigram_buckets=64, bigram_dim=8, smear=True, value_residual=True, gate="linear"),
              dict(proj_group="matrix", schedule="iters", warmdown_iters=10)),
    "pr1232_flow": (dict(bigram_buckets=64, bigram_dim=8, smear=True, value_residual=True, gate="linear", flow=True, flow_latent=8, flow_hidden=12),
                    dict(proj_group="matrix", schedule="iters", warmdown_iters=15)),
    "pr1696": (dict(value_embed_layers=(1, 2), value_embed_dim=8, attn_res_blocks=2),
               dict(proj_group="scalar", schedule="iters", warmdown_iters=10, qat="late", qat_start=.5)),
    "pr1536": (dict(mlp_ratio=4, skips="gated", loop_start=1, loop_end=2, loops=1, parallel="lanes", parallel_from=2),
               dict(order="packed", schedule="frac", muon_row_norm=True, muon_lr=.022, muon_momentum=.97, muon_wd=.095, embed_lr=.03,
                    embed_wd=.095, scalar_lr=.02, scalar_wd=.02, recur_at=.35)),
    "pr1992": (dict(mlp_ratio=4, gate="headwise", skips="gated", loop_start=1, loop_end=2, loops=1, parallel="gptj", parallel_from=2),
               dict(order="shuffled", schedule="frac", warmdown_frac=.72, muon_row_norm=True, muon_lr=.022, muon_wd=.095, embed_lr=.03,
                    embed_wd=.085, scalar_lr=.02, scalar_wd=.02, recur_at=.35, ns="polar")),
}


def recipe(name, world=1, **kw):
    "Model and training config of a small relative of a recipe, four micro-batches a step over all ranks"
    model, train = RECIPES[name]
    base = dict(vocab=VOCAB, dim=16, layers=3, heads=2, kv_heads=1, rotary_dims=4, mlp_ratio=2, embed_std=.02)
    return GPTConfig(**base | model), TrainConfig(**dict(
        steps=20, batch_tokens=512, seq_len=64, accum=4 // world, warmup_steps=0, muon_momentum_steps=15, clip=.3,
        checkpoint_seconds=0.) | train | kw)


def write_recipe(run, model, train):
    Path(run).mkdir(parents=True, exist_ok=True)
    (Path(run) / "recipe.json").write_text(json.dumps({"name": "toy", "model": asdict(model), "train": asdict(train)}))


def environment(): return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])}


def run_python(*args, timeout=180): return subprocess.run([sys.executable, *map(str, args)], env=environment(), capture_output=True, text=True, timeout=timeout)


def run_ranks(world, *args, timeout=240):
    return run_python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", *args, timeout=timeout)
