"""What the referee costs on top of an evaluation: the sampled audit of a tiny-size run, interleaved with its evaluation, wall clock and processor time.

    OMP_NUM_THREADS=1 python benchmarks/audit.py                      # a tiny model with a few steps of training, the embedded corpus
    OMP_NUM_THREADS=1 python benchmarks/audit.py --run out/tiny-seed1 --repeats 3
"""
import argparse
import json
import os
import resource
import statistics
import time
from pathlib import Path

import torch

from pgolf.audit import audit_run
from pgolf.recipes.phases import pack_run, prepare_data, read_recipe, score_run, write_recipe
from pgolf.recipes.recipes import get
from pgolf.train.train import train


def spent(call)->tuple[object, float, float]:
    "Result, wall seconds, processor seconds of this process and those it started"
    def cpu(): return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
    wall, busy = time.perf_counter(), cpu()
    out = call()
    return out, time.perf_counter() - wall, cpu() - busy


def briefly_trained(run:Path, root:str, steps:int):
    "A packed tiny run, made unless it is there"
    recipe = get("tiny", steps=steps)
    dataset = prepare_data(recipe, root=root)
    if not (run/"model.pgolf").exists():
        train(recipe.model, recipe.train, dataset, write_recipe(recipe, run))
        pack_run(run, dataset)
    return dataset


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", type=Path, default=Path("out/audit-bench"), help="run folder with model.pgolf; made if there is none")
    p.add_argument("--root", default="data")
    p.add_argument("--steps", type=int, default=8, help="training steps, where it must train")
    p.add_argument("--repeats", type=int, default=2)
    p.add_argument("--json", type=Path, help="also write the figures here")
    a = p.parse_args()
    dataset, rows = briefly_trained(a.run, a.root, a.steps), []
    for i in range(a.repeats):
        score, wall, cpu = spent(lambda: score_run(a.run, dataset, progress=False))
        report, audit_wall, audit_cpu = spent(lambda: audit_run(a.run, dataset))
        rows.append(dict(evaluation=[wall, cpu], audit=[audit_wall, audit_cpu], share=[audit_wall / wall, audit_cpu / cpu], ok=report.ok, failed=report.failed,
                         cage=report["cage"].verdict, load=os.getloadavg()[0]))
        print(f"{i + 1}: evaluation {wall:6.1f} s ({cpu:6.1f} s cpu), audit {audit_wall:5.1f} s ({audit_cpu:5.1f} s cpu): {audit_wall / wall:.1%} of wall, {audit_cpu / cpu:.1%} of cpu; {report.summary()}", flush=True)
    print(report)
    out = dict(recipe=read_recipe(a.run).name, tokens=score.tokens, threads=torch.get_num_threads(), runs=rows,
               median_share=dict(wall=statistics.median(r["share"][0] for r in rows), cpu=statistics.median(r["share"][1] for r in rows)))
    print(f"{score.tokens:,} targets, {out['threads']} threads: the sampled audit takes {out['median_share']['wall']:.1%} of the evaluation's wall clock, {out['median_share']['cpu']:.1%} of its processor time (medians of {a.repeats})")
    if a.json: a.json.write_text(json.dumps(out, indent=1))


if __name__ == "__main__": main()
