"""Does every notebook run, and does it still print what it keeps? `make test` asks this.

Each notebook runs as `nbdev_test` runs it, in a process of its own. A cell that keeps no output may print anything.
The texts of a cell that keeps some are compared word by word; numbers and pictures have a small tolerance, because the
last bits of a product and fonts differ between machines.

  python tools/check_outputs.py                       every notebook
  python tools/check_outputs.py nbs/2_model           those of a folder, or one notebook
  python tools/check_outputs.py --fix nbs/2_model     and write what they print now into the cells that keep outputs
"""
import argparse
import base64
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SKIPPED_FLAGS = {"slow", "gpu"}  # as in settings.ini
FIELD_DIFFERS = 0.12             # difference of two fields of a picture that is seen; black against white is 1
PICTURE_TOLERANCE = 0.004        # share of a picture's 64 x 64 fields that may differ
NUMBER_TOLERANCE = 4e-3          # relative; what training on another processor moves. One unit of the last place is free
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?")
ADDRESS = re.compile(r"0x[0-9a-f]{6,}")


def notebooks(paths):
    "Notebooks named by files and folders; the run notebooks are left to pytest, which runs them smaller"
    paths = [Path(p).resolve() for p in paths] or [ROOT / "nbs"]
    found = [p for path in paths for p in ([path] if path.suffix else path.rglob("*.ipynb"))]
    left_out = {"runs", ".ipynb_checkpoints"}
    return sorted(p for p in found if not left_out & set(p.parts))


def runs(source):
    "Is a code cell one that nbdev_test executes?"
    if "nbdev_export(" in source or re.search(r"^#\|\s*eval:\s*false", source, re.MULTILINE):
        return False
    return not any(re.search(rf"^#\|\s*{flag}\b", source, re.MULTILINE) for flag in SKIPPED_FLAGS)


def plain_text(text):
    "Text of an output without what differs each time"
    return ADDRESS.sub("0x...", text if isinstance(text, str) else "".join(text))


def same_number(was, now):
    "Are two numbers equal as far as another machine's last bits allow?"
    a, b = (float(n.replace(",", "")) for n in (was, now))
    decimals = len(was.partition(".")[2].partition("e")[0])
    unit = 10.0**-decimals if "." in was and "e" not in was else 0
    return abs(a - b) <= max(1.001 * unit, NUMBER_TOLERANCE * abs(a) if "." in was or abs(a) > 1000 else 0)


def same_text(was, now):
    "Are two texts the same, word by word?"
    if NUMBER.sub("", was).split() != NUMBER.sub("", now).split():
        return False
    old, new = NUMBER.findall(was), NUMBER.findall(now)
    return len(old) == len(new) and all(same_number(a, b) for a, b in zip(old, new))


def texts(outputs):
    "What a cell printed, and the text of what it displayed"
    printed = "".join(plain_text(o["text"]) for o in outputs if o.get("name") == "stdout")
    displayed = [o["data"] for o in outputs if "data" in o]
    shown = [plain_text(d.get("text/html", d.get("text/plain", ""))) for d in displayed if "image/png" not in d]
    return printed.strip(), "\n".join(s.strip() for s in shown)


def pictures(outputs):
    "Pictures of a cell as arrays of grey, 0 to 1"
    from PIL import Image
    for o in outputs:
        if "image/png" in o.get("data", {}):
            data = o["data"]["image/png"]
            png = base64.b64decode(data if isinstance(data, str) else "".join(data))
            yield np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float) / 255


def small(picture):
    "A picture brought to 64 x 64 cells, so that a shift by a pixel is no difference"
    from PIL import Image
    return np.asarray(Image.fromarray((picture * 255).astype("uint8")).resize((64, 64), Image.BOX), dtype=float) / 255


def differs(kept, now):
    "How the outputs of a cell differ from those it keeps, in a sentence; '' where they do not"
    for was, fresh, what in zip(texts(kept), texts(now), ("prints", "shows")):
        if not same_text(was, fresh):
            return f"{what} {str(fresh)[:300]!r}, keeps {str(was)[:300]!r}"
    old, new = list(pictures(kept)), list(pictures(now))
    if len(old) != len(new):
        return f"draws {len(new)} pictures, keeps {len(old)}"
    shares = [(np.abs(small(a) - small(b)) > FIELD_DIFFERS).mean() for a, b in zip(old, new)]
    worst = max(shares, default=0)
    return f"draws another picture ({worst:.1%} of it differs)" if worst > PICTURE_TOLERANCE else ""


def execute(path):
    "(cells with fresh outputs, what went wrong, seconds)"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    os.environ["IN_TEST"] = "1"
    began = time.monotonic()
    os.chdir(path.parent)
    shell, nb = CaptureShell(path, mpl_format="png"), read_nb(path)
    try:
        shell.run_all(nb, exc_stop=True, preproc=lambda cell: cell.cell_type != "code" or not runs(cell.source))
        wrong = ""
    except BaseException:
        wrong = re.sub(r"\x1b\[[0-9;]*m", "", shell.prettytb(fname=path))
    outputs = {cell.id: [dict(o) for o in cell.get("outputs", [])] for cell in nb.cells if cell.cell_type == "code"}
    return json.loads(json.dumps(outputs)), wrong, time.monotonic() - began


def load_what_pages_need():
    "Load once what takes each notebook seconds: a fork finds it loaded"
    import gc

    import matplotlib.pyplot, scipy.stats, torch._dynamo  # noqa: E401, F401
    from execnb.shell import CaptureShell
    CaptureShell(ROOT / "nbs" / "index.ipynb", mpl_format="png")
    gc.freeze()


def execute_all(paths, workers):
    """(path, what `execute` says) of every notebook, several at once, each in a fork of this process.

    Only the main thread forks, so that no child inherits a lock that another thread holds."""
    fork = multiprocessing.get_context("fork")
    waiting, running = list(paths), {}
    while waiting or running:
        while waiting and len(running) < workers:
            path = waiting.pop(0)
            reader, writer = fork.Pipe(duplex=False)
            process = fork.Process(target=lambda path, writer: writer.send(execute(path)), args=(path, writer))
            process.start()
            writer.close()
            running[reader] = path, process
        for reader in multiprocessing.connection.wait(list(running)):
            path, process = running.pop(reader)
            try:
                found = reader.recv()
            except EOFError:
                found = {}, f"{short(path)}: its process died", 0.0
            process.join()
            yield path, *found


def short(path):
    "A path as it is read best"
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def compare(path, outputs):
    "Sentences on the cells of a notebook that print something else than they keep"
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf8"))["cells"]):
        if cell.get("outputs") and runs("".join(cell["source"])):
            if said := differs(cell["outputs"], outputs[cell["id"]]):
                yield f"{short(path)} cell {i} {said}"


def store(path, outputs):
    "Writes fresh outputs into the cells that keep some"
    nb = json.loads(path.read_text(encoding="utf8"))
    for cell in nb["cells"]:
        if cell.get("outputs") and differs(cell["outputs"], outputs[cell["id"]]):
            cell["outputs"] = outputs[cell["id"]]
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf8")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="*", help="notebooks or folders; default: all")
    p.add_argument("--fix", action="store_true", help="store what is printed now")
    p.add_argument("--times", action="store_true", help="print the seconds of every notebook")
    p.add_argument("--workers", type=int, default=2, help="processes at once (default 2)")
    a = p.parse_args()
    failures, slow, pages = [], [], notebooks(a.paths)
    if len(pages) > 1:
        load_what_pages_need()
    for path, outputs, wrong, seconds in execute_all(pages, a.workers):
        if wrong:
            said = [wrong]
        elif a.fix:
            store(path, outputs)
            said = []
        else:
            said = list(compare(path, outputs))
        print("\n".join(said) or ".", end="\n" if said else "", flush=True)
        failures += said
        slow.append((seconds, short(path)))
    print("\nslowest:", ", ".join(f"{name} {s:.0f} s" for s, name in sorted(slow, reverse=True)[:None if a.times else 6]))
    print(f"{len(slow)} notebooks run and print what they keep" if not failures else
          f"{len(failures)} faults; where the notebook is right: python tools/check_outputs.py --fix PATH")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
