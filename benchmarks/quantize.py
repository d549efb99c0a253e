"""GPTQ against the column-by-column routine, and what rounding costs a trained model.

    python -m benchmarks.quantize                        # speed, interleaved
    python -m benchmarks.quantize RUN --data DATASET     # and bits per byte of a finished run under several plans
"""
import argparse
import copy
import json
import math
import os
import platform
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from pgolf.ground.bits import bits_per_byte
from pgolf.ground.settings import to_plain
from pgolf.text.data import open_dataset
from pgolf.model.gpt import token_loss
from pgolf.pack.damage import output_error
from pgolf.pack.floats import Fp16
from pgolf.pack.gptq import GPTQ, gptq
from pgolf.pack.grid import Codes, top_code
from pgolf.pack.plan import Plan
from pgolf.pack.quantize import calibrate, dequantize_state, quantize_model
from pgolf.pack.rounding import Rows, round_rows, row_scale
from pgolf.recipes.phases import calibration_batches, read_recipe
from pgolf.train.checkpoint import load_weights

RESULTS = Path(__file__).parent / 'results'


def environment():
    "Where a number was measured"
    return {'cpu': platform.processor() or platform.machine(), 'cores': os.cpu_count(), 'threads': torch.get_num_threads(), 'load': round(os.getloadavg()[0], 1),
            'torch': torch.__version__, 'python': platform.python_version()}


def save(name, record):
    "Print, and keep beside the benchmark"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f'{name}.json').write_text(json.dumps(record, indent=1) + '\n')
    print(json.dumps(record, indent=1))


def column_by_column(w, H, bits, k, block=128, damp=0.01):
    "The reference's GPTQ: invert, factor again, one column at a time with lazy blocks"
    top, H, dead = top_code(bits), H.clone(), H.diag() == 0
    H[dead, dead] = 1
    H.diagonal().add_(damp * H.diag().mean())
    perm = H.diag().argsort(descending=True)
    W, H = w.masked_fill(dead, 0)[:, perm], H[perm][:, perm]
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    scale = row_scale(w, bits, f'sigma {k}')
    s, Q = scale.float(), torch.zeros_like(W)
    for a in range(0, W.shape[1], block):
        b = min(a + block, W.shape[1])
        X, E = W[:, a:b].clone(), torch.zeros(len(W), b - a)
        for j in range(b - a):
            Q[:, a + j] = (X[:, j] / s).round().clamp(-top, top)
            E[:, j] = (X[:, j] - Q[:, a + j] * s) / U[a + j, a + j]
            X[:, j:] -= E[:, j, None] * U[a + j, a + j:b]
        W[:, b:] -= E @ U[a:b, b:]
    return Codes(Q[:, perm.argsort()].to(torch.int8), scale, bits)


def speed(rounds=7, rows=512, cols=2048):
    "Both routines on one matrix, in turns; CPU seconds, which a busy machine stretches least"
    g = torch.Generator().manual_seed(0)
    w = torch.randn(rows, cols, generator=g) * 0.05
    x = torch.randn(4 * cols, cols, generator=g) @ (torch.eye(cols) + 0.02 * torch.randn(cols, cols, generator=g))
    H, times = x.T @ x, {'column by column': [], 'ours': []}
    for _ in range(rounds):
        for name, f in (('column by column', column_by_column), ('ours', gptq)):
            t = time.process_time()
            c = f(w, H, 6, 12.85, block=128)
            times[name].append(time.process_time() - t)
            if name == 'ours': ours = c
            else: slow = c
    seconds = {k: round(median(v), 4) for k, v in times.items()}
    return {'shape': [rows, cols], 'block': 128, 'rounds': rounds, 'median_cpu_seconds': seconds,
            'speedup': round(seconds['column by column'] / seconds['ours'], 2),
            'speedup_of_best': round(min(times['column by column']) / min(times['ours']), 2),
            'equal_codes': (slow.codes == ours.codes).float().mean().item(),
            'error_against_rounding': (output_error(w, ours, H) / output_error(w, round_rows(w, 6, 'sigma 12.85'), H)).item()}


@torch.no_grad()
def bpb(model, dataset, tokens=65_536, T=256):
    "Bits per byte of non-overlapping rows at the start of the validation split"
    ids, table = dataset.val_ids()[:tokens + 1], dataset.byte_table()
    n = (len(ids) - 1) // T * T
    x, y = ids[:n].view(-1, T), ids[1:n + 1].view(-1, T)
    nats = torch.cat([token_loss(model(a), b) for a, b in zip(x.split(16), y.split(16))])
    return bits_per_byte(nats, table.count(x, y))


@torch.no_grad()
def paired(model, recipe, dataset, hessians, plans, batches=14):
    "Loss of each plan on training text after the calibration's, and of the first over the second with its standard error: the validation split is short"
    more = list(calibration_batches(replace(recipe, calibration=recipe.calibration + batches), dataset))[recipe.calibration:]
    x, y = torch.cat([b[:, :-1] for b in more]), torch.cat([b[:, 1:] for b in more])
    bits = lambda m: torch.cat([token_loss(m(a), b) for a, b in zip(x.split(16), y.split(16))]).double().sum(1) / math.log(2)
    base, total, lost = bits(model), dataset.byte_table().count(x, y).sum().item(), {}
    for name in plans:
        other = copy.deepcopy(model)
        other.load_state_dict(dequantize_state(quantize_model(model, PLANS[name], hessians)))
        lost[name] = bits(other) - base
    more = lost[plans[0]] - lost[plans[1]]
    return {'tokens': y.numel(), 'lost_bits_per_byte': {k: round(v.sum().item() / total, 6) for k, v in lost.items()},
            'difference': round(more.sum().item() / total, 6), 'standard_error': round(more.std().item() * len(more)**0.5 / total, 6)}


METHODS = {'rows': Rows, 'gptq': GPTQ}
BANKS = {'fp16': Fp16()} | {
    f'int{b} max, {m}': made(bits=b) for b in (3, 4, 5, 6, 8) for m, made in METHODS.items()} | {
    'int6 max with the reference floor, rows': Rows(faithful=True),
    'int6 best row, rows': Rows(clip='best row'),
    'int6 best matrix, rows': Rows(clip='best matrix')} | {
    f'int6 sigma {k}, {m}': made(clip=f'sigma {k}') for k in (12.85, 25) for m, made in METHODS.items()} | {
    f'fisher 3e-4, {m}': made(bits=8, clip='fisher 3e-4') for m, made in METHODS.items()}
PLANS = {name: Plan(bank=bank, embed=Fp16()) for name, bank in BANKS.items()}


def quality(run, data):
    "Output error of every matrix and bits per byte of every plan, on a trained run"
    recipe, dataset = read_recipe(run), open_dataset(data)
    model = load_weights(Path(run) / 'weights.pt')
    hessians = calibrate(model, PLANS['fisher 3e-4, gptq'], calibration_batches(recipe, dataset))
    ratios = {}
    for name, H in hessians.items():
        if name == 'sensitivity': continue
        w = dict(model.named_parameters())[name]
        ratios[name] = (output_error(w, gptq(w, H, 6, 12.85, name=name), H) / output_error(w, round_rows(w, 6, 'sigma 12.85'), H)).flatten().tolist()
    base, lost = bpb(model, dataset), {}
    for name, plan in PLANS.items():
        other = copy.deepcopy(model)
        other.load_state_dict(dequantize_state(quantize_model(model, plan, hessians)))
        lost[name] = round(bpb(other, dataset) - base, 6)
    return {'run': recipe.name, 'parameters': sum(p.numel() for p in model.parameters()), 'model': to_plain(recipe.model),
            'bits_per_byte': round(base, 5), 'lost_bits_per_byte': lost,
            'int6_on_training_text': paired(model, recipe, dataset, hessians, ['int6 max, rows', 'int6 max, gptq']),
            'gptq_over_rounding_output_error': {k: [round(x, 4) for x in v] for k, v in ratios.items()},
            'worst_ratio': max(x for v in ratios.values() for x in v)}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', nargs='?')
    parser.add_argument('--data')
    parser.add_argument('--name', default='')
    a = parser.parse_args()
    if a.run: save(f"quantize_{a.name or Path(a.run).name}", quality(a.run, a.data) | {'environment': environment()})
    else: save('gptq_speed', speed() | {'environment': environment()})
