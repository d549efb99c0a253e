"""One yardstick for the smallest file: bytes of the whole artifact against lost bits per byte, for the same trained weights.

    python -m benchmarks.rate RUN --data DATASET        # every plan at several steps; bytes at equal loss, loss at equal bytes
    python -m benchmarks.rate RUN --data DATASET --more # only the points that the kept record lacks

Every plan is packed into our container. PR 1536 and PR 2135 pack one stream, byte-shuffled, with brotli and with lrzip; here each tensor
is a blob of its own, under the coders named in the plan's line. Losses are counted on the validation split and on training text that the
calibration did not see. A loss moves by some 0.0005 bits a byte with the luck of single roundings, to either side; what the distributions
move (Kullback-Leibler divergence from those of the trained weights, bits a byte) does not, so plans are compared at equal moves.
"""
import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.quantize import RESULTS, environment, save
from pgolf.ground.settings import to_plain
from pgolf.model.gpt import token_loss
from pgolf.pack.ans import Ans
from pgolf.pack.artifact import pack_state
from pgolf.pack.auto import Auto
from pgolf.pack.floats import Fp16
from pgolf.pack.ledger import inspect
from pgolf.pack.levers import stretch_all
from pgolf.pack.mixing import Mixing
from pgolf.pack.quantize import calibrate, dequantize_state, quantize_model
from pgolf.pack.reading import unpack
from pgolf.pack.streams import Brotli, Lzma, Zstd
from pgolf.recipes.phases import calibration_batches, read_recipe
from pgolf.recipes.recipes import get
from pgolf.recipes.stack import PRICED
from pgolf.text.data import open_dataset
from pgolf.train.checkpoint import load_weights

OURS = "ours"
BEFORE = "ours, scales and controls in fp16"
ROWS = "ours, one step a row"
TRUSTING = "ours, steps of columns wholly as the second moments say"
GENERAL = Auto(coders=(Brotli(), Lzma(), Zstd()))


def with_steps(plan, n):
    "The plan with scales in n steps an octave; 0 = fp16"
    return plan.replace(**{role: getattr(plan, role).replace(octave=n) for role in ("bank", "embed", "table")})


def with_columns(plan, trust):
    "The plan with this trust in the second moments, for steps of columns"
    return plan.replace(bank=plan.bank.replace(columns=trust), embed=plan.embed.replace(columns=trust))


def before(plan):
    "The plan as it was: scales and controls in fp16"
    return with_steps(with_columns(plan, 0.0), 0).replace(control=Fp16(), small=65_536)


ONE_MORE = "one bit more"  # half the step, and the same reach
FINER, COARSER = (0.71, 1.0, ONE_MORE), (1.0, 1.41)
OUR_CODERS = Auto(coders=(Ans(), Mixing(), Brotli()))  # of all that `Auto` tries, those that win here
PLANS = { # -> plan, stretches of its grids
    "PR 1536 (GPTQ, SDClip; brotli)": (get("pr1536").quant, FINER),
    "PR 1696 (int6, best percentile; lzma)": (get("pr1696").quant, (1.0, 1.41, 2.0)),
    "PR 2135 (GPTQ 6/6/7, LQER; brotli, lzma or zstd)": (get("pr2135").quant.replace(coder=GENERAL), FINER),
    "PR 2135's codes, our coder": (get("pr2135").quant.replace(coder=OUR_CODERS), FINER),
    BEFORE: (before(PRICED).replace(coder=OUR_CODERS), COARSER),
    ROWS: (with_columns(PRICED, 0.0).replace(coder=OUR_CODERS), COARSER),
    OURS: (PRICED.replace(coder=OUR_CODERS), (0.71, 0.84, *COARSER, 2.0)),
    TRUSTING: (with_columns(PRICED, 1.0).replace(coder=OUR_CODERS), (1.0,))}


def changed(plan, by):
    "The plan with steps longer by a factor, or with codes of one bit more"
    if by != ONE_MORE: return stretch_all(plan, by)
    wider = lambda q: q.replace(bits=min(8, q.bits + 1))
    specials = tuple(s.replace(how=wider(s.how)) for s in plan.exceptions)
    return plan.replace(bank=wider(plan.bank), embed=wider(plan.embed), exceptions=specials)


class Yardstick:
    "Trained weights, their calibration, and text to lose bits on"
    def __init__(self, run, data, train_batches=6):
        recipe, dataset = read_recipe(run), open_dataset(data)
        self.model = load_weights(Path(run) / "weights.pt")
        self.parameters = sum(p.numel() for p in self.model.parameters())
        t = time.process_time()
        self.moments = calibrate(self.model, PRICED, calibration_batches(recipe, dataset))
        self.calibration_seconds = round(time.process_time() - t, 1)
        longer = recipe.replace(calibration=recipe.calibration + train_batches)
        more = list(calibration_batches(longer, dataset))[recipe.calibration:]
        table, ids = dataset.byte_table(), dataset.val_ids()
        rows = (len(ids) - 1) // 256
        val = ids[:256 * rows].view(rows, 256), ids[1:256 * rows + 1].view(rows, 256)
        self.texts = {"validation": val, "training": (torch.cat([b[:, :-1] for b in more]), torch.cat([b[:, 1:] for b in more]))}
        self.bytes = {name: table.count(x, y).sum().item() for name, (x, y) in self.texts.items()}
        self.base = self.bits(self.model)
        x, y = (part[:64] for part in val)
        self.moves_on, self.moves_bytes = x, table.count(x, y).sum().item()
        self.logs = self.log_probabilities(self.model)

    @torch.no_grad()
    def bits(self, model):
        "Bits of each text"
        out = {}
        for name, (x, y) in self.texts.items():
            nats = [token_loss(model(a), b).double().sum().item() for a, b in zip(x.split(16), y.split(16))]
            out[name] = sum(nats) / math.log(2)
        return out

    @torch.no_grad()
    def log_probabilities(self, model):
        "Of the first 64 rows of the validation split"
        return torch.cat([model(x).float().log_softmax(-1) for x in self.moves_on.split(16)])

    def lost(self, state):
        "Bits per byte that a quantised state moves, and loses: on all text, and on each"
        other = copy.deepcopy(self.model)
        other.load_state_dict(dequantize_state(state))
        nats = (self.logs.exp() * (self.logs - self.log_probabilities(other))).sum().item()
        more = {name: bits - self.base[name] for name, bits in self.bits(other).items()}
        each = {name: round(m / self.bytes[name], 6) for name, m in more.items()}
        return {"moved_bits_per_byte": round(nats / math.log(2) / self.moves_bytes, 6),
                "lost_bits_per_byte": round(sum(more.values()) / sum(self.bytes.values()), 6), "lost_on": each}

    def packed(self, plan):
        "What a plan's file takes and loses, and how long that takes"
        t = time.process_time()
        state = quantize_model(self.model, plan, self.moments)
        data = pack_state(self.model.cfg, state, plan.coder, {"plan": to_plain(plan)})
        made = time.process_time()
        unpack(data)
        read = time.process_time()
        ledger = inspect(data)
        banks = sum(b["bytes"] for b in ledger["blobs"] if b["name"] in dict(self.model.named_parameters()))
        return {"bytes": len(data), "bits_per_weight": round(8 * len(data) / self.parameters, 4), **self.lost(state),
                "beside_the_codes": len(data) - banks, "share_beside_the_codes": round(1 - banks / len(data), 4),
                "pack_cpu_seconds": round(made - t, 1), "unpack_cpu_seconds": round(read - made, 2)}


def between(x, at, values):
    "Value at x between the points of a curve; None outside of it"
    order = np.argsort(at)
    if not min(at) <= x <= max(at): return None
    return float(np.interp(x, np.array(at)[order], np.array(values)[order]))


def crossings(curve, moved, size):
    "Bytes at a move and move at a size, by straight lines between points in the logarithm of the move"
    logs = [math.log(p["moved_bits_per_byte"]) for p in curve.values()]
    sizes = [p["bytes"] for p in curve.values()]
    bytes_there, log_there = between(math.log(moved), logs, sizes), between(size, sizes, logs)
    return {"bytes_at_equal_move": bytes_there and round(bytes_there), "move_at_equal_bytes": log_there and round(math.exp(log_there), 6)}


def table_of(curves, moved, size):
    "Bytes at equal moves and moves at equal bytes of every plan, and ours at the move of each as it was planned"
    out = {}
    kept = ("bytes", "moved_bits_per_byte", "lost_bits_per_byte", "bits_per_weight", "share_beside_the_codes",
            "pack_cpu_seconds", "unpack_cpu_seconds")
    for name, curve in curves.items():
        planned = curve["1.0"]
        ours = crossings(curves[OURS], planned["moved_bits_per_byte"], size)["bytes_at_equal_move"]
        out[name] = crossings(curve, moved, size) | {"ours_at_its_move": ours} | {key: planned[key] for key in kept}
        if ours: out[name]["ours_over_it_as_planned"] = round(ours / planned["bytes"], 4)
    least = out[OURS]["bytes_at_equal_move"]
    for row in out.values():
        if row["bytes_at_equal_move"]: row["ours_over_it"] = round(least / row["bytes_at_equal_move"], 4)
    return out


def plans(stick, known):
    "Every plan at several steps; points that are known are not measured again"
    curves = {}
    for name, (plan, steps) in PLANS.items():
        have = known.get(name, {})
        curves[name] = {str(by): have.get(str(by)) or stick.packed(changed(plan, by)) for by in steps}
        print(name, {by: (p["bytes"], p["moved_bits_per_byte"], p["lost_bits_per_byte"]) for by, p in curves[name].items()}, flush=True)
    at = curves[BEFORE]["1.0"]
    moved = at["moved_bits_per_byte"]
    return {"equal_move": moved, "equal_bytes": at["bytes"], "table": table_of(curves, moved, at["bytes"]), "curves": curves}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data", required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("--more", action="store_true", help="measure only the points that the kept record lacks")
    a = parser.parse_args()
    stick = Yardstick(a.run, a.data)
    about = {"parameters": stick.parameters, "bytes_of_text": stick.bytes, "calibration_cpu_seconds": stick.calibration_seconds}
    name = f"rate_plans_{a.name or Path(a.run).name}"
    kept = RESULTS / f"{name}.json"
    known = json.loads(kept.read_text())["curves"] if a.more and kept.exists() else {}
    save(name, about | plans(stick, known) | {"environment": environment()})
