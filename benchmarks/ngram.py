"""The exact n-gram cache: tokens per second of counting and of looking up on one core, memory, and what hashing would sum to.

    OMP_NUM_THREADS=1 python benchmarks/ngram.py                          # the embedded corpus
    OMP_NUM_THREADS=1 python benchmarks/ngram.py --data DATASET_FOLDER    # any tokenised text
    OMP_NUM_THREADS=1 python benchmarks/ngram.py --run out/tiny-seed1     # and what it is worth to a trained model
"""
import argparse
import json
import time
from pathlib import Path

import numpy as np

from pgolf.text.data import open_dataset, read_shard
from pgolf.score.evaluate import evaluate
from pgolf.score.backoff import BackoffCache, continuations, match_contexts
from pgolf.score.hashed_ngram import HashedCache
from pgolf.score.ngram import NgramConfig
from pgolf.score.wrap import build_predictor
from pgolf.recipes.phases import prepare_data
from pgolf.recipes.recipes import get
from pgolf.train.checkpoint import load_weights


def real_tokens(dataset, count:int)->np.ndarray:
    "Training then validation tokens, as they come; a short text is continued with its own reversal"
    ids = np.concatenate([read_shard(p) for p in (*dataset.train, *dataset.val)]).astype(np.int64)
    return np.concatenate([ids, ids[::-1]])[:count + 1]


def contexts(ids:np.ndarray, at:np.ndarray, width:int)->np.ndarray:
    index = at[:, None] + np.arange(1 - width, 1)
    return np.where(index >= 0, ids[np.maximum(index, 0)], -1)


def measure(ids:np.ndarray, chunk:int)->dict:
    "Chunk by chunk, as under the evaluator: look up, then count; processor seconds"
    cache, spent, entries, matched = BackoffCache(), dict(match=0.0, rows=0.0, count=0.0), 0, 0
    def timed(phase, call, *args):
        began = time.process_time()
        out = call(*args)
        spent[phase] += time.process_time() - began
        return out
    n = len(ids) - 1
    for lo in range(0, n, chunk):
        at = np.arange(lo, min(lo + chunk, n))
        node, order = timed("match", match_contexts, cache, contexts(ids, at, cache.width))
        rows, _, _ = timed("rows", continuations, cache, node)
        entries, matched = entries + len(rows), matched + int((order > 0).sum())
        timed("count", cache.extend, ids[cache.size:at[-1] + 2])
    return dict(chunk=chunk, tokens=n, **spent, rate=n / sum(spent.values()), rate_without_rows=n / (spent["match"] + spent["count"]),
                matched=matched / n, per_row=entries / max(matched, 1), mbytes=cache.nbytes / 2**20, contexts=cache.next_node - cache.first_node)


def hashed_sums(ids:np.ndarray, vocab:int, buckets:int, some:int=500)->np.ndarray:
    "Row sums of the hashed form after all the text, at random positions"
    cache = HashedCache(buckets=buckets)
    cache.extend(ids)
    at = np.random.default_rng(0).integers(100, len(ids) - 1, some)
    found = cache.look_up(contexts(ids, at, cache.width), vocab)
    return np.bincount(found.rows, found.probs, minlength=some)[found.order > 0]


def gains(run:Path, dataset, seq_len:int)->dict[str,float]:
    "Bits per byte of a trained model on the validation text, alone and with each weight of the cache"
    model, ids, table = load_weights(run/"weights.pt").eval(), dataset.val_ids(), dataset.byte_table()
    ways = {"alone": None, "record's weight": NgramConfig(), "learned weight": NgramConfig(gate="learned")}
    return {name: evaluate(build_predictor(model, (n,) if n else ()), ids, table, "full", seq_len=seq_len, chunk_tokens=2048).bpb for name, n in ways.items()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="dataset folder; default: the embedded corpus")
    p.add_argument("--tokens", type=int, default=1_000_000)
    p.add_argument("--chunks", type=int, nargs="+", default=[2048, 16_384, 65_536])
    p.add_argument("--run", type=Path, help="run folder with weights.pt: also score its model with the cache")
    p.add_argument("--seq-len", type=int, default=256, help="window for that")
    p.add_argument("--root", default="data")
    p.add_argument("--json", type=Path, help="also write the figures here")
    a = p.parse_args()
    dataset = open_dataset(a.data) if a.data else prepare_data(get("tiny"), root=a.root)
    ids = real_tokens(dataset, a.tokens)
    print(f"{len(ids) - 1:,} tokens of {dataset.name}, vocabulary {dataset.vocab}, orders 2 to 7, one core, processor time")
    found = [measure(ids, c) for c in a.chunks]
    for r in found:
        print(f"chunks of {r['chunk']:6,}: {r['rate']:9,.0f} tokens/s counted and looked up with rows ({r['rate_without_rows']:,.0f} without); "
              f"{r['matched']:.1%} matched, {r['per_row']:.0f} continuations a row; {r['contexts']:,} contexts, {r['mbytes']:.0f} MiB")
    sums = {f"2^{b}": hashed_sums(ids, dataset.vocab, 2**b) for b in (22, 19)}
    for name, s in sums.items(): print(f"hashed, {name} buckets: a row sums to {s.mean():.1f} on average, {np.median(s):.1f} in the middle, {s.max():.0f} at most")
    worth = gains(a.run, dataset, a.seq_len) if a.run else {}
    for name, bpb in worth.items(): print(f"{name:16} {bpb:.4f} bits per byte ({bpb - worth['alone']:+.4f})")
    if a.json: a.json.write_text(json.dumps(dict(speed=found, bpb=worth, sums={k: dict(mean=float(v.mean()), max=float(v.max())) for k, v in sums.items()}), indent=1))


if __name__ == "__main__": main()
