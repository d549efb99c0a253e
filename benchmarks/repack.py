"""The weights of one finished run under several plans of packing: bytes of the file, and what is unpacked from it scored whole.

    make run
    python -m benchmarks.repack out/tiny-seed1 --json benchmarks/results/repack_tiny.json
"""
import argparse
from pathlib import Path

from benchmarks.rate import before, with_columns
from pgolf.ground.files import write_json
from pgolf.pack.artifact import pack
from pgolf.pack.quantize import calibrate
from pgolf.pack.reading import unpack
from pgolf.recipes.phases import calibration_batches, prepare_data, read_recipe
from pgolf.recipes.stack import PRICED
from pgolf.score.evaluate import ModelPredictor, evaluate
from pgolf.train.checkpoint import load_weights

PLANS = {"steps and gains in fp16": before(PRICED), "one step a row": with_columns(PRICED, 0.0), "PRICED": PRICED,
         "columns with a trust of 1": with_columns(PRICED, 1.0)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run")
    p.add_argument("--data", default="data", help="folder of datasets and tokenizers")
    p.add_argument("--json", default="out/repack.json")
    args = p.parse_args()
    recipe, model = read_recipe(args.run), load_weights(Path(args.run) / "weights.pt")
    data = prepare_data(recipe, root=args.data, progress=False)
    ids, table = data.val_ids(), data.byte_table()
    cut = dict(seq_len=recipe.eval.seq_len, stride=recipe.eval.stride)

    def bpb(m): return evaluate(ModelPredictor(m, quick=True), ids, table, "sliding", **cut).bpb

    rows = {"weights as trained": {"bytes": None, "val_bpb": bpb(model)}}
    moments = calibrate(model, PRICED, calibration_batches(recipe, data))
    for name, plan in PLANS.items():
        file = pack(model, plan, moments)
        rows[name] = {"bytes": len(file), "val_bpb": bpb(unpack(file))}
        print(f"{name:26} {len(file):>9,} bytes  {rows[name]['val_bpb']:.4f} bits per byte", flush=True)
    write_json(args.json, {"recipe": recipe.name, "steps": recipe.train.steps, "tokens": len(ids) - 1, "plans": rows})


if __name__ == "__main__":
    main()
