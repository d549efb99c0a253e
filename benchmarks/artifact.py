"""What the coders make of a trained model's codes, and what it takes to pack full-size models.

    python -m benchmarks.artifact coders RUN [RUN ...] --data DATASET # sizes beside the entropy, decoding speed, on finished runs
    python -m benchmarks.artifact trade RUN [RUN ...] --data DATASET  # bytes of the codes against lost bits per byte, plan by plan
    python -m benchmarks.artifact full [RECIPE ...]           # time, memory and the budget search at full size, initialised weights
"""
import argparse
import copy
import lzma
import resource
import time
from pathlib import Path

import brotli
import numpy as np
import torch

from benchmarks.quantize import bpb, environment, save
from pgolf.pack.ans import Ans, ans_decode, ans_encode
from pgolf.pack.artifact import pack_state
from pgolf.pack.auto import Auto
from pgolf.pack.budget import fit_budget
from pgolf.pack.damage import group_sensitivity
from pgolf.pack.gptq import GPTQ
from pgolf.pack.grid import Codes
from pgolf.pack.hessians import collect_hessians
from pgolf.pack.ledger import inspect
from pgolf.pack.plan import Plan
from pgolf.pack.reading import unpack
from pgolf.pack.rounding import Rows
from pgolf.pack.spread_fit import choose_spread
from pgolf.text.data import open_dataset
from pgolf.model.gpt import GPT, token_loss
from pgolf.pack.quantize import calibrate, dequantize_state, quantize_model
from pgolf.recipes.phases import calibration_batches, read_recipe
from pgolf.recipes.recipes import get, names
from pgolf.train.checkpoint import load_weights


def byte_shuffle(raw, stride=2):
    "The planes of PR 1992's packer: every second byte first"
    a = np.frombuffer(raw, np.uint8)
    return b''.join(a[i::stride].tobytes() for i in range(stride))


def entropy_bytes(q):
    "Bytes of a coder that knows the histogram of the tensor for free"
    n = np.bincount(q.ravel().astype(int) + 128)
    n = n[n > 0]
    return float(-(n * np.log2(n / n.sum())).sum() / 8)


GENERAL = {'brotli 11 + byte-shuffle': lambda raw: brotli.compress(byte_shuffle(raw), quality=11, lgwin=24),
           'brotli 11': lambda raw: brotli.compress(raw, quality=11, lgwin=24),
           'lzma 9': lambda raw: lzma.compress(raw, preset=9)}


def priced(x, **other):
    "GPTQ with one price for every weight (clip `fisher`)"
    clip = f'fisher {x}'
    banks = GPTQ(bits=8, clip=clip)
    return Plan(bank=banks, embed=banks, table=Rows(bits=8, clip=clip), **other)


def sdclip(k, **other):
    "GPTQ with SDClip, the embedding as in PR 1536"
    others = dict(embed=GPTQ(bits=8, clip='sigma 20'), table=Rows(bits=8, clip='sigma 20')) | other
    return Plan(bank=GPTQ(clip=f'sigma {k}'), **others)


CODED = {'fisher 3e-4 (GPTQ, one price for every weight)': priced(3e-4),
         'sigma 12.85 (GPTQ, SDClip), embedding sigma 20 at 8 bits': sdclip(12.85),
         'max (int6 rows), embedding 8 bits': Plan()}
ROWS8 = dict(embed=Plan().embed, table=Plan().table)
TRADES = {f'fisher {x}': priced(x) for x in (2e-4, 3e-4, 5e-4, 1e-3)} | {
    f'sigma {k}, embedding int8 rows': sdclip(k, **ROWS8) for k in (8, 12.85, 20)} | {
    f'int{b} max, embedding int8 rows': Plan(bank=GPTQ(bits=b)) for b in (4, 5, 6)} | {'int6 max, rounded plainly': Plan()}


class Trained:
    "A finished run, its calibration, and what a plan makes of it"
    def __init__(self, run, data):
        recipe, self.dataset = read_recipe(run), open_dataset(data)
        self.model = load_weights(Path(run) / 'weights.pt')
        t = time.process_time()
        self.moments = calibrate(self.model, priced(1e-3), calibration_batches(recipe, self.dataset))
        self.calibration_seconds, self.base = round(time.process_time() - t, 1), bpb(self.model, self.dataset)

    def store(self, plan):
        "Codes by tensor [L, R, C], and the bits per byte lost"
        state, other = quantize_model(self.model, plan, self.moments), copy.deepcopy(self.model)
        other.load_state_dict(dequantize_state(state))
        codes = {k: v.codes.numpy() for k, v in state.items() if isinstance(v, Codes)}
        return {k: q.reshape((-1,) + q.shape[-2:]) for k, q in codes.items()}, round(bpb(other, self.dataset) - self.base, 5)

    @property
    def about(self):
        "What was trained"
        return {'parameters': sum(p.numel() for p in self.model.parameters()), 'bits_per_byte': round(self.base, 5),
                'calibration_cpu_seconds': self.calibration_seconds}


def coders(runs, data):
    "All coders on the same codes, tensor by tensor"
    out = {}
    for run in runs:
        trained = Trained(run, data)
        out[Path(run).name] = trained.about
        for label, plan in CODED.items():
            state, lost = trained.store(plan)
            sizes = {k: {name: len(f(q.tobytes())) for name, f in GENERAL.items()} for k, q in state.items()}
            seconds = 0.0
            for k, q in state.items():
                stream = ans_encode(q, choose_spread(q))
                t = time.process_time()
                assert (ans_decode(stream, q.shape) == q).all()
                seconds += time.process_time() - t
                sizes[k] |= {'ours': len(stream), 'entropy of the histogram': round(entropy_bytes(q))}
            total = {name: sum(s[name] for s in sizes.values()) for name in next(iter(sizes.values()))}
            weights = sum(q.size for q in state.values())
            whole = b''.join(q.tobytes() for q in state.values())
            one = {name: len(f(whole)) for name, f in GENERAL.items()}  # all tensors in one stream, as the references pack
            best = {name: min(total[name], one[name]) for name in GENERAL}  # whichever of the two is better for the other coder
            out[Path(run).name][label] = {
                'coded_weights': weights, 'lost_bits_per_byte': lost,
                'bytes': total, 'bytes_in_one_stream': one, 'bits_per_weight': {k: round(8 * v / weights, 4) for k, v in total.items()},
                'ours_over': {k: round(total['ours'] / v, 4) for k, v in best.items()},
                'ours_over_entropy': round(total['ours'] / total['entropy of the histogram'], 4),
                'decoded_weights_per_cpu_second': round(weights / seconds), 'per_tensor': sizes}
    return out


def trade(runs, data):
    "What each plan's codes take and lose"
    out = {}
    for run in runs:
        trained = Trained(run, data)
        out[Path(run).name] = trained.about
        for label, plan in TRADES.items():
            state, lost = trained.store(plan)
            size = sum(len(ans_encode(q, choose_spread(q))) for q in state.values())
            out[Path(run).name][label] = {'bytes': size, 'bits_per_weight': round(8 * size / sum(q.size for q in state.values()), 3), 'lost_bits_per_byte': lost}
    return out


def lively(name):
    "A recipe's full-size model with every zero matrix filled: codes of an initialised model, not of a trained one"
    torch.manual_seed(0)
    model = GPT(get(name).model)
    for p in model.parameters():
        if p.ndim > 1 and not p.any(): p.data.normal_(0, 0.02)
    return model


def full(name):
    "Quantise and pack one recipe's model, then fit it into 16,000,000 bytes less 100 KB of code"
    plan, model = get(name).quant, lively(name)
    needs, spent = any(q.needs_hessian for q in (plan.bank, plan.embed)), time.process_time
    hessians = collect_hessians(model, [torch.randint(0, model.cfg.vocab, (1, 256)) for _ in range(4)]) if needs else None
    x = torch.randint(0, model.cfg.vocab, (2, 2049))
    record = {'weights': 'initialised, zero matrices drawn from N(0, 0.02); not trained', 'parameters': sum(p.numel() for p in model.parameters()),
              'plan': f"banks {plan.bank.kind} {plan.bank.bits} bits {plan.bank.clip}, embedding {plan.embed.bits} bits {plan.embed.clip}"}
    t = spent()
    state = quantize_model(model, plan, hessians)
    record['quantise_cpu_seconds'] = round(spent() - t, 1)
    for coder in dict.fromkeys((plan.coder, Auto())):
        t = spent()
        data = pack_state(model.cfg, state, coder)
        record[f'coder {coder.word}'] = {'bytes': len(data), 'cpu_seconds': round(spent() - t, 1)}
    t = spent()
    back = unpack(data)
    record['unpack_cpu_seconds'] = round(spent() - t, 2)
    assert sum(p.numel() for p in back.parameters()) == record['parameters']
    record['ledger'] = repr(inspect(data)).splitlines()
    del state, back, data
    t, began = spent(), time.monotonic()
    fit = fit_budget(model, plan.replace(coder=Ans()), 16_000_000, hessians, spent=100_000, # prices as `pack_run` asks for them: 4,096 tokens
                     weights=lambda: group_sensitivity(model, lambda m: token_loss(m(x[:, :-1]), x[:, 1:]).mean().item(), hessians))
    record['search'] = {'cpu_seconds': round(spent() - t, 1), 'seconds': round(time.monotonic() - began, 1), 'bytes': len(fit.data), 'fits': fit.fits, 'steps': repr(fit).splitlines()}
    record['peak_memory_GiB'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return record


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['coders', 'trade', 'full'])
    parser.add_argument('names', nargs='*')
    parser.add_argument('--data')
    a = parser.parse_args()
    if a.what == 'coders': save('artifact_coders', coders(a.names, a.data) | {'environment': environment()})
    elif a.what == 'trade': save('artifact_trade', trade(a.names, a.data) | {'environment': environment()})
    else:
        for name in a.names or [n for n in names() if n.startswith('pr')]: save(f'artifact_full_{name}', full(name) | {'environment': environment()})
