"""`make try NB=2_model/xsa`: export one notebook, run it, and take every recipe through a run at the smoke scale.

Says in one to three minutes whether an edit still builds, trains, packs and scores in all recipes, and what it did to their
scores: the bits per byte of a smoke run mean nothing in themselves, but they are the same until something changes."""
import argparse
import importlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCORED = 4096  # validation tokens


def notebook(name):
    "The notebook that a word like 2_model/xsa names"
    found = [p for p in (ROOT / "nbs").glob("*/*.ipynb") if str(p.relative_to(ROOT / "nbs")).startswith(name.removesuffix(".ipynb"))]
    exact = [p for p in found if p.with_suffix("") == ROOT / "nbs" / name.removesuffix(".ipynb")]
    if len(exact or found) != 1:
        near = ", ".join(str(p.relative_to(ROOT / "nbs").with_suffix("")) for p in found) or "none"
        sys.exit(f"make try: NB={name} must name one notebook under nbs, such as NB=2_model/xsa; it fits {near}")
    return (exact or found)[0]


def little_data(recipe):
    "The embedded corpus with the start of its validation text only"
    from pgolf.recipes import phases
    from pgolf.text.data import Dataset

    class Little(Dataset):
        def val_ids(self): return super().val_ids()[:SCORED]

    return Little(**vars(phases.prepare_data(recipe, root=ROOT / "data" / "smoke", progress=False)))


def new_parts(path):
    "Kinds of the parts that a notebook exports and no recipe has"
    from pgolf import recipes
    from pgolf.model.part import Part
    cells = json.loads(path.read_text(encoding="utf8"))["cells"]
    exported = re.search(r"#\| default_exp (\S+)", "\n".join("".join(c["source"]) for c in cells))
    if not exported:
        return []
    module = importlib.import_module(f"pgolf.{exported[1]}")
    mine = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Part) and c.__module__ == module.__name__]
    used = {type(p) for name in recipes.names() for p in recipes.get(name).model.parts}
    return [c.kind for c in mine if c not in used]


def smoke(asked):
    "(recipe, sentence or '', bits per byte, bytes, seconds) of a run at the smoke scale; asked: a recipe, or recipe+part"
    from pgolf import recipes
    from pgolf.recipes import phases
    began = time.monotonic()
    name, _, part = asked.partition("+")
    try:
        recipe = recipes.get(name, "smoke", **({part: "on"} if part else {}))
        with tempfile.TemporaryDirectory() as folder:
            score = phases.run_recipe(recipe, folder, little_data(recipe), progress=False)
            size = (Path(folder) / "model.pgolf").stat().st_size
    except Exception as e:
        return asked, f"{type(e).__name__}: {e}", 0, 0, time.monotonic() - began
    return asked, "", score.bpb, size, time.monotonic() - began


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("notebook", help="under nbs, such as 2_model/xsa")
    path = notebook(p.parse_args().notebook)
    began, tool = time.monotonic(), ROOT / "tools"
    for command in ([Path(sys.executable).with_name("nbdev_export"), "--path", path],
                    [sys.executable, tool / "check_outputs.py", path]):
        if subprocess.run(command, cwd=ROOT).returncode:
            return 1
    import torch
    from pgolf import recipes
    torch.set_num_threads(1)
    failed, mine = False, new_parts(path)
    asked = [*(f"tiny+{part}" for part in mine), *recipes.names()]
    for part in mine:
        print(f"no recipe has {part} yet: tiny+{part} is tiny with it, the other runs are without it. Does it run at all? "
              "A run this small does not say whether it helps; an ablation does.", flush=True)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for name, wrong, bpb, size, seconds in pool.imap_unordered(smoke, asked):
            said = f"FAILS: {wrong}" if wrong else f"{bpb:.6f} bits per byte, {size:,} bytes"
            print(f"{name:12} {said}  ({seconds:.0f} s)", flush=True)
            failed |= bool(wrong)
    print(f"make try: {time.monotonic() - began:.0f} s")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
