"The loss in one kernel: in Triton's interpreter, built for an H100 without one, in a script, and who takes it"
import re
import subprocess

import pytest
import torch

from kernel_tools import CARRIED, ROOT, run, triton_only
from pgolf.lab.fake_cuda import stub_missing
from pgolf.model.gpt import GPT, token_loss
from pgolf.recipes.recipes import get
from pgolf.submit.script import recipe_load
from pgolf.text.data import Batch
from pgolf.train import softcap_loss as room
from pgolf.train.trainer import micro_loss



# ---- the kernel

AGREE = """
import torch
from pgolf.train.softcap_loss import rows_by_triton, softcap_rows
g = torch.Generator().manual_seed(0)
for N, V in ((1, 1), (5, 2), (7, 37), (3, 1000), (4, 1024), (2, 1025), (1, 8192)):
    for dtype in (torch.float32, torch.bfloat16):
        for size in (0.1, 20., 300.):
            z = (torch.randn(N, V, generator=g) * size).to(dtype)
            y = torch.randint(0, V, (N,), generator=g)
            y[0] = V - 1
            loss, grad = softcap_rows(z.double(), y, 30.)
            found = rows_by_triton(z, y, 30.)
            off = (found - loss).abs().max().item() / max(1., loss.abs().max().item())
            off_grad = (z * N - grad).norm().item() / max(grad.norm().item(), 1e-3)
            print(dtype, off, off_grad)
z = torch.zeros(3, 5)
print(*rows_by_triton(z, torch.tensor([4, 5, -100]), 30.).isnan().tolist())
"""


@triton_only
def test_the_kernel_agrees_with_the_formula_in_the_interpreter():
    *lines, wrong = run(AGREE, TRITON_INTERPRET="1").splitlines()
    assert len(lines) == 42
    for dtype, off, off_grad in map(str.split, lines):
        assert float(off) < 1e-5, (dtype, off)
        assert float(off_grad) < (1e-5 if dtype == "torch.float32" else 2e-2), (dtype, off_grad)
    assert wrong == "False True True" # a token beyond the vocabulary is not-a-number


BUILT = """
import subprocess, tempfile, torch, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from pgolf.train import softcap_loss as room

class NoCard:
    "A driver that names a card and has none"
    get_current_device = get_current_stream = lambda self, *device: 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(NoCard())
kernel = room._kernel()
tool = Path(triton.__file__).parent/"backends"/"nvidia"/"bin"/"cuobjdump"
for dtype in (torch.bfloat16, torch.float32):
    for vocab in (1000, 1024, 8191, 8192):
        block, warps = room.block_of(vocab)
        z, y, loss = torch.empty(2, vocab, dtype=dtype), torch.zeros(2, dtype=torch.int64), torch.empty(2)
        built = kernel.warmup(z, y, loss, 30., 0.5, vocab, BLOCK=room.tl.constexpr(block), num_warps=warps, grid=(2,))
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(built.asm["cubin"])
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout if tool.exists() else ""
        print(dtype, vocab, ".target sm_90" in built.asm["ptx"], " ".join(said.split()))
"""


@triton_only
def test_the_kernel_is_built_for_an_h100_and_its_bf16_rows_stay_in_registers(tmp_path):
    lines = run(BUILT, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 8
    for line in lines:
        print(line)
        assert line.split()[2] == "True"
        spilled = re.search(r"STACK:(\d+)", line) # registers that ran over lie on a thread's stack
        if spilled and "bfloat16" in line: assert int(spilled[1]) == 0, line


# ---- in a script

REPEAT = CARRIED + """
import torch
from pgolf.train import softcap_loss as room
assert room.__spec__.origin.startswith("/nowhere/")
g = torch.Generator().manual_seed(0)
x, head = (torch.randn(n, 8, generator=g, requires_grad=True) for n in (6, 37))
y = torch.randint(0, 37, (6,), generator=g)
gradients = torch.autograd.grad(room.softcap_loss(x, head, y, 30.), (x, head))
right = torch.nn.functional.cross_entropy(30 * torch.tanh(x @ head.T / 30), y)
assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, torch.autograd.grad(right, (x, head))))
if sys.argv[2] == "kernel":
    z = (x @ head.T).detach()
    loss, grad = room.softcap_rows(z, y, 30.)
    assert torch.allclose(room.rows_by_triton(z, y, 30.), loss, atol=1e-5) and torch.allclose(z * 6, grad, atol=1e-5)
elif sys.argv[2] == "without":
    sys.modules["triton"] = None
    assert "triton" in room._loss_trial()
print("done")
"""


@pytest.mark.parametrize("minify", (False, True))
@pytest.mark.parametrize("way", ("without", pytest.param("kernel", marks=triton_only)))
def test_a_script_carries_the_room_and_works_with_and_without_triton(tmp_path, minify, way):
    from pgolf.submit.script import minified
    sources = recipe_load(get("tiny", "smoke")).sources
    assert "pgolf.train.softcap_loss" in sources
    for key, text in sources.items():
        path = tmp_path / f"{key.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(minified(text) if minify and "train" in key else text)
    assert run(REPEAT, str(tmp_path), way, TRITON_INTERPRET="1").strip() == "done"


# ---- who takes it

def build(recipe):
    "Its model, seeded"
    return GPT(recipe.model, torch.Generator().manual_seed(0))


def batch_of(recipe):
    "A row of random tokens"
    x = torch.randint(0, recipe.model.vocab, (2, 32), generator=torch.Generator().manual_seed(0))
    return Batch(x, x.roll(-1), None, "here")


def test_a_cpu_computes_the_loss_from_the_logits_bit_for_bit(monkeypatch):
    r = get("tiny", "smoke")
    model, batch = build(r), batch_of(r)
    monkeypatch.setattr("pgolf.train.trainer.softcap_loss", lambda *args: pytest.fail("the kernel was taken on a CPU"))
    plain = token_loss(model(batch.x, recurrent=True), batch.y).mean()
    assert torch.equal(micro_loss(model, batch, 32, True, None), plain)


def test_a_gpu_takes_the_kernel_unless_a_part_caps_the_training_loss(monkeypatch):
    monkeypatch.setattr(room, "_loss_trial", lambda: "")
    room._loss_kernel_missing.cache_clear()
    try:
        for name, serves in (("pr1696", True), ("pr1536", True), ("pr2135", True)):
            assert room.loss_kernel_serves(build(get(name, "smoke")), "cuda") is serves
        model = build(get("pr2135", "smoke"))
        part, = model.acting["cap"]
        model.acting["cap"] = (part.replace(learn=True),)
        assert not room.loss_kernel_serves(model, "cuda") and not room.loss_kernel_serves(build(get("tiny", "smoke")), "cpu")
    finally: room._loss_kernel_missing.cache_clear()


def test_a_trial_that_fails_is_a_reason(monkeypatch):
    def broken(*args): raise RuntimeError("no such card")
    monkeypatch.setattr(torch, "ones", lambda *shape, **kwargs: torch.zeros(shape))
    real = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, **kwargs: real(data))
    monkeypatch.setattr(room, "_kernel", lambda: None)
    monkeypatch.setattr(room, "rows_by_triton", broken)
    assert room._loss_trial() == "a trial call failed: RuntimeError: no such card"
    monkeypatch.setattr(room, "rows_by_triton", lambda *args: torch.full((2,), 2.0))
    assert room._loss_trial() == "a trial call gave 2.0000 for log(3)"


COUNTED = """
from pgolf.lab.dry_steps import fake_trainer, stage, step_counts
from pgolf.recipes.recipes import get
for kernel in (True, True, False): # the first one in a process also makes what the others find made
    with stage(without=() if kernel else ("loss kernel",)) as (mode, ledger):
        t = fake_trainer(get("tiny", "smoke"), 1, mode)
        counts = step_counts(t, ledger, True)
        print(counts.kernels, counts.bytes, counts.flops, len(counts.syncs), len(counts.mixed), len(counts.slow))
"""


@pytest.mark.skipif(bool(stub_missing()), reason=stub_missing() or "a fake GPU can be made")
def test_the_dry_run_counts_the_step_with_the_kernel():
    from pgolf.lab.fake_cuda import with_fake_gpu
    done = subprocess.run(with_fake_gpu(COUNTED), capture_output=True, text=True, cwd=ROOT)
    (kernels, moved, flops, *odd), (more, most, same, *none) = (map(float, line.split()) for line in done.stdout.splitlines()[1:])
    assert kernels < more and moved < most and flops == same, done.stdout
    assert odd == none == [0, 0, 0]
