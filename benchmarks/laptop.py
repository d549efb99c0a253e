"""A training step and a sliding evaluation on CPU cores, this checkout against another one, taken in turn.

    git worktree add ../base 91d2f0a
    python benchmarks/laptop.py --base ../base --out benchmarks/results/laptop.json
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/laptop.py --base ../base

Each side is a process of its own; they answer one after the other, so that whatever else the machine does slows both.
Ratios are medians of the pairs: by processor time on one thread, by wall clock on several.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ["tiny:full", "tiny:full:dim=512:heads=8:kv_heads=4", *(f"{name}:cpu" for name in ("pr761", "pr1232", "pr1696", "pr1536", "pr1992"))]
WORKER = '''
import importlib.util, json, sys, time
import torch
name, scale, threads, root, windows = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
scale, *changes = scale.split(":")
changes = {key: int(value) for key, value in (change.split("=") for change in changes)}
torch.set_num_threads(threads)
if importlib.util.find_spec("pgolf.ground"):
    from pgolf.recipes.phases import prepare_data
    from pgolf.recipes.recipes import get
    from pgolf.score.evaluate import ModelPredictor, evaluate
    from pgolf.train.compute import EXACT, choose, computing
    from pgolf.train.trainer import Trainer, train_step
    r = get(name, scale, **changes)
    auto = r.compute == "auto"
    how = choose(r.model, r.train.batch_tokens) if auto else EXACT
    step_block, score_block, options = lambda: computing(how, training=True), lambda: computing(how), dict(quick=auto)
    chosen = f"{how.products}{', training in bf16' if how.half else ''}, {how.threads or threads} threads"
else:
    from pgolf.recipes import get, prepare_data
    from pgolf.evaluate import ModelPredictor, evaluate
    from pgolf.train import Trainer, train_step
    from contextlib import nullcontext
    r, options, chosen = get(name, scale, **changes), {}, "fp32"
    step_block = score_block = nullcontext
data = prepare_data(r, root=root, progress=False)
t = Trainer(r.model, r.train, data)
ids, table = data.val_ids(), data.byte_table()
ids = ids[:r.eval.seq_len + windows * r.eval.stride + 1]
cut = dict(seq_len=r.eval.seq_len, stride=r.eval.stride)
def step():
    with step_block(): return float(train_step(t).stats[0])
def score():
    with score_block(): return evaluate(ModelPredictor(t.model, **options), ids, table, "sliding", **cut).bpb
tasks = {"step": step, "score": score}
print(json.dumps({"chosen": chosen}), flush=True)
for line in sys.stdin:
    wall, cpu = time.perf_counter(), time.process_time()
    value = tasks[line.strip()]()
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "value": value}), flush=True)
t.loader.close()
'''


class Side:
    "One checkout at work in a process of its own"
    def __init__(self, folder:Path, words:list):
        env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(words[2])}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, *map(str, words)], env=env, text=True, stdin=pipe, stdout=pipe, cwd=folder)
        self.chosen = json.loads(self.process.stdout.readline())["chosen"]

    def ask(self, task:str)->dict:
        "Seconds of a task, and what it found"
        print(task, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def compare(base:Path, name:str, scale:str, threads:int, root:str, rounds:int, windows:int)->dict:
    "Ratios of this checkout to the base, pair by pair"
    words = [name, scale, threads]
    place = lambda side: [f"{root}/{side}", windows] # each builds its own dataset, in its own format
    sides = {"base": Side(base, words + place("base")), "now": Side(ROOT, words + place("now"))}
    out = {"recipe": name, "scale": scale, "threads": threads, "chosen": sides["now"].chosen}
    clock = "cpu" if threads == 1 else "wall"
    for task in ("step", "score"):
        for side in sides.values(): side.ask(task)
        pairs = [{key: side.ask(task) for key, side in sides.items()} for _ in range(rounds)]
        ratios = [pair["now"][clock] / pair["base"][clock] for pair in pairs]
        seconds = {key: round(statistics.median(pair[key][clock] for pair in pairs), 4) for key in sides}
        values = {key: pairs[-1][key]["value"] for key in sides}
        out[task] = {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios], "clock": clock,
                     "seconds": seconds, "last": values}
    for side in sides.values(): side.close()
    return out


def machine()->dict:
    "The processor, what it was told to be, and how busy it is"
    from pgolf.train.compute import processor
    told = {name: os.environ[name] for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA") if name in os.environ}
    return {"processor": processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "told": told, "python": platform.python_version()}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", type=Path, required=True, help="another checkout of this repository, of either house")
    p.add_argument("--recipes", nargs="+", default=DEFAULT, help="NAME:SCALE, and changes, as in tiny:full:dim=512")
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--rounds", type=int, default=7, help="pairs of each task")
    p.add_argument("--windows", type=int, default=40, help="windows of an evaluation")
    p.add_argument("--root", default="out/laptop", help="where datasets are built")
    p.add_argument("--out", type=Path, help="JSON to write")
    a = p.parse_args()
    record = {"machine": machine(), "rows": []}
    for recipe in a.recipes:
        for threads in a.threads:
            row = compare(a.base.resolve(), *recipe.split(":", 1), threads, str(Path(a.root).resolve()), a.rounds, a.windows)
            record["rows"].append(row)
            print(f"{recipe:37} {threads} threads: step x{row['step']['ratio']}, sliding x{row['score']['ratio']} ({row['chosen']})", flush=True)
            if a.out: a.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
