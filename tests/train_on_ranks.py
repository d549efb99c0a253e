"Run under torchrun: trains a small relative of every recipe, folder by folder"
import sys
import tempfile
from pathlib import Path

from pgolf.train.ranks import joined_ranks, leave
from pgolf.train.train import train
from train_tools import RECIPES, TINY, TIMED, recipe, toy_dataset, travelling

out, data = Path(sys.argv[1]), Path(sys.argv[2])
with joined_ranks("cpu") as (ranks, device):
    dataset = toy_dataset(tempfile.mkdtemp() if ranks.rank else data)
    train(TINY, TIMED, dataset, out / "timed", device=device, progress=False)
    train(TINY, travelling(), dataset, out / "travelling", device=device, progress=False)
    for name in RECIPES: train(*recipe(name, ranks.world), dataset, out / name, device=device, progress=False)
leave(0)
