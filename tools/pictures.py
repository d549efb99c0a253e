"""The pictures of the README, from a finished run: `python tools/pictures.py out/tiny-seed1`"""
import json
import sys
from pathlib import Path

import numpy as np

from pgolf.data import open_dataset
from pgolf.lab import bpb_picture, byte_picture, loss_picture, position_in_document, read_events, read_run

IMAGES = Path(__file__).resolve().parents[1] / "nbs" / "images"


def pictures(run):
    "Name -> picture, of a run folder"
    ids = open_dataset(read_run(run)["settings"]["data"]).val_ids()
    each = np.load(run / "positions.npz")
    return {"loss": loss_picture(read_events(run, "step")),
            "bytes": byte_picture(json.loads((run / "pack.json").read_text())["parts"]),
            "bpb": bpb_picture(each["nats"], each["bytes"], position_in_document(ids)[1:])}


if __name__ == "__main__":
    for name, picture in pictures(Path(sys.argv[1])).items():
        (IMAGES / f"{name}.png").write_bytes(picture.png())
        print(f"nbs/images/{name}.png")
