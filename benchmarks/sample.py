"""How fast a packed model writes, on one core: tokens per second, with the cache and without.

    python benchmarks/sample.py out/tiny-seed1 --json benchmarks/results/sample_tiny.json
"""
import argparse
import json
import time
from pathlib import Path

import torch

from pgolf.lab.sample import load_voice, written
from pgolf.lab.speak import pick


def timed(call, tokens:int)->dict:
    "Tokens per second of wall clock and of processor time"
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"tokens_per_s": round(tokens / (time.perf_counter() - wall), 1),
            "tokens_per_cpu_s": round(tokens / (time.process_time() - cpu), 1)}


@torch.inference_mode()
def without_cache(voice, tokens:int):
    "The whole text again for every token"
    ids, generator = voice.encode("The for statement"), torch.Generator().manual_seed(0)
    for _ in range(tokens):
        ids.append(pick(voice.model(torch.tensor([ids[-voice.window:]]))[0, -1], generator, 0.8, 0.95))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="run folder, packed")
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", type=Path, help="also write the figures here")
    a = p.parse_args()
    torch.set_num_threads(1)
    voice = load_voice(a.run)
    texts = set()
    rounds = [timed(lambda: texts.add("".join(written(voice, "The for statement", a.tokens, stop=False))), a.tokens)
              for _ in range(a.rounds)]
    assert len(texts) == 1, "one seed wrote two texts"
    slow = timed(lambda: without_cache(voice, a.tokens), a.tokens)
    best = max(rounds, key=lambda r: r["tokens_per_cpu_s"])
    middle = sorted(r["tokens_per_cpu_s"] for r in rounds)[a.rounds // 2]
    facts = {"run": Path(a.run).name, "parameters": sum(p.numel() for p in voice.model.parameters()), "tokens": a.tokens,
             "threads": 1, "torch": torch.__version__, "median_tokens_per_cpu_s": middle, "best": best, "without_cache": slow, "rounds": rounds}
    print(json.dumps(facts, indent=1))
    if a.json: a.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
