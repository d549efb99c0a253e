"""The pictures of the README: `python tools/pictures.py` draws the reported scores from the recipes and records/referee.json, and
the ablation from records/ablation.json; `python tools/pictures.py out/tiny-seed1` the loss, bytes and score of a finished run too."""
import io
import json
import sys
from pathlib import Path

import numpy as np

from pgolf.text.data import open_dataset
from pgolf.lab.pictures import Picture, bpb_picture, byte_picture, loss_picture, position_in_document
from pgolf.lab.run_record import read_events, read_run
from pgolf.lab.study import delta_picture

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "nbs" / "images"
FACTS = "facts"  # key of the text in the PNG that says what was drawn


def reported():
    "[name, reported bpb, conditions that the score breaks; None = not judged yet] of every rebuilt entry, best score first"
    from pgolf import recipes
    judged = {r["name"]: r["conditions"] for r in json.loads((ROOT / "records" / "referee.json").read_text())["recipes"]}
    rows = []
    for name in recipes.names():
        if figures := recipes.get(name).reported:
            said = judged.get(name)
            broken = None if said is None else [c for c, outcome in said.items() if outcome == "breaks"]
            rows.append([name, figures["final"], broken])
    return sorted(rows, key=lambda row: row[1])


def reported_picture(rows):
    "Reported scores, those that do not survive the referee crossed out, each with what it breaks"
    pic = Picture("reported scores and the rules that they break", size=(8.2, 0.9 + 0.33 * len(rows)))
    ax, low = pic.axes[0], 0.9
    for y, (name, bpb, broken) in enumerate(reversed(rows)):
        color, marker = ("0.6", "o") if broken is None else ("C3", "X") if broken else ("C2", "o")
        ax.plot([low, bpb], [y, y], color="0.88", lw=1, zorder=0)
        ax.plot([bpb], [y], marker, color=color, ms=9)
        said = "not in the referee's record yet" if broken is None else "breaks: " + ", ".join(broken) if broken else "none found broken"
        ax.text(bpb + 0.008, y, f"{bpb:.4f}   {said}", va="center", fontsize=8.5, color="0.2")
    ax.set(yticks=range(len(rows)), yticklabels=["PR " + row[0][2:] for row in reversed(rows)], xlim=(low, 1.3))
    ax.set_xlabel("bits per byte, as reported by the authors (lower is better)")
    return pic


def ablation():
    "Variant -> scores over the same seeds, from the record"
    return json.loads((ROOT / "records" / "ablation.json").read_text())["scores"]


DRAWN = {  # picture -> facts that it draws, and how
    "reported": (reported, reported_picture),
    "ablation": (ablation, lambda scores: delta_picture(scores, "all on", paired=True))}


def write_drawn(name):
    "A picture, with what it draws as text inside the file, so that `make readme` sees when it is old"
    find, draw = DRAWN[name]
    facts, out = find(), io.BytesIO()
    draw(facts).fig.savefig(out, format="png", dpi=110, metadata={FACTS: json.dumps(facts)})
    (IMAGES / f"{name}.png").write_bytes(out.getvalue())


def pictures(run):
    "Name -> picture, of a run folder"
    ids = open_dataset(read_run(run)["settings"]["data"]).val_ids()
    each = np.load(run / "positions.npz")
    return {"loss": loss_picture(read_events(run, "step")),
            "bytes": byte_picture(json.loads((run / "pack.json").read_text())["parts"]),
            "bpb": bpb_picture(each["nats"], each["bytes"], position_in_document(ids)[1:])}


if __name__ == "__main__":
    for name in DRAWN:
        write_drawn(name)
        print(f"nbs/images/{name}.png")
    for name, picture in pictures(Path(sys.argv[1])).items() if sys.argv[1:] else ():
        (IMAGES / f"{name}.png").write_bytes(picture.png())
        print(f"nbs/images/{name}.png")
