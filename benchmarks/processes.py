"""One process with all cores, or one for each core: seconds of a training step of every recipe at the size of a laptop, in turn.

    python -m benchmarks.processes --rounds 3
"""
import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.quantize import RESULTS
from pgolf.lab.processes import cuts_here, step_seconds
from pgolf.recipes.phases import prepare_data
from pgolf.recipes.recipes import get
from pgolf.train.compute import processor

NAMES = "pr761", "pr1232", "pr1696", "pr1536", "pr1992", "pr2135", "best"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--names", nargs="+", default=NAMES)
    a = p.parse_args()
    out = {"machine": f"{processor()}, {os.cpu_count()} cores", "rounds": a.rounds, "recipes": {}, "whole": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in a.names:
            recipe = get(name, "cpu")
            dataset = prepare_data(recipe, root=Path(folder), progress=False)
            if cuts_here(recipe) == [1]:
                out["whole"].append(name)
                continue
            one, several = cuts_here(recipe)
            found = [{n: step_seconds(recipe, dataset, n) for n in (one, several)} for _ in range(a.rounds)]
            ratios = [round(row[several] / row[one], 3) for row in found]
            out["recipes"][name] = {
                "processes": several,
                "ratio": statistics.median(ratios),
                "ratios": ratios,
                "seconds": {n: round(statistics.median(row[n] for row in found), 4) for n in (one, several)}}
            print(name, out["recipes"][name], flush=True)
    (RESULTS/"processes.json").write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__": main()
