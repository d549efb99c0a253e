"Kernels of our own: in Triton's interpreter, built for an H100 without one, and in whole models that take them"
import re
from contextlib import nullcontext

import pytest
import torch

from kernel_tools import CARRIED, run, triton_only
from pgolf.lab.dry_steps import with_triton
from pgolf.model import gpu_kernels
from pgolf.model.gpt import GPT, token_loss
from pgolf.recipes.recipes import get
from pgolf.submit.script import recipe_load

RECIPES = "pr761", "pr1232", "pr1536", "pr1696", "pr1992", "pr1855", "pr2135", "pr2014", "best", "tiny"


# ---- the kernels

MLP = """
import torch
from pgolf.model.gpu_kernels import relative
from pgolf.model.mlp import leaky_relu2
from pgolf.model.mlp_kernel import gradient_by_triton, packed_signs, slope_of, up_by_triton
g = torch.Generator().manual_seed(0)
for N, D, H in ((1, 1, 1), (5, 7, 9), (129, 65, 130), (64, 128, 256)):
    for dtype in (torch.float32, torch.bfloat16):
        for slope in (0.5, 0.3, 0.0):
            x, up, down, dy = (torch.randn(*s, generator=g).to(dtype) for s in ((N, D), (H, D), (D, H), (N, D)))
            a, signs = up_by_triton(x, up, slope)
            z = x.double() @ up.double().T
            clear = z.abs() > 1e-4 # a sign next to zero is the luck of rounding
            assert ((packed_signs(z)[..., None] >> torch.arange(8) & 1).flatten(1)[:, :H][clear]
                    == (signs[..., None] >> torch.arange(8) & 1).flatten(1)[:, :H][clear]).all()
            dz = gradient_by_triton(dy, down, a, signs, slope)
            right = (dy.double() @ down.double()) * slope_of(leaky_relu2(z, slope=slope), packed_signs(z), slope)
            print(dtype, relative([a, dz], [leaky_relu2(z, slope=slope), right]))
"""

XSA = """
import torch
from pgolf.model.gpu_kernels import relative
from pgolf.model.xsa_kernel import exclude_by_formula, exclude_by_triton, gradients_by_formula, gradients_by_triton
g = torch.Generator().manual_seed(0)
for N, G, R, K in ((1, 1, 1, 1), (33, 2, 3, 7), (65, 4, 2, 64)):
    for dtype in (torch.float32, torch.bfloat16):
        y, dz = (torch.randn(N, G * R, K, generator=g).to(dtype) for _ in range(2))
        v = torch.randn(N, 3 * G * K, generator=g).to(dtype)[:, G * K:2 * G * K].unflatten(1, (G, K))
        groups = lambda t: t.double().unflatten(1, (G, R))
        dy, dv = gradients_by_formula(groups(dz), groups(y), v.double())
        right = [exclude_by_formula(groups(y), v.double()).flatten(1, 2), dy.flatten(1, 2), dv]
        found = [exclude_by_triton(y, v), *gradients_by_triton(dz, y, v)]
        if K == 1: # nothing is left of a head with one channel
            assert max(t.abs().max() for t in found) < 1e-5
            found = right = [torch.ones(1)]
        print(dtype, relative(found, right))
"""


@triton_only
@pytest.mark.parametrize("code,lines", [(MLP, 24), (XSA, 6)], ids=("mlp", "xsa"))
def test_a_kernel_agrees_with_its_formula_in_the_interpreter(code, lines):
    found = [line.split() for line in run(code, TRITON_INTERPRET="1").splitlines()]
    assert len(found) == lines
    for dtype, off in found: assert float(off) < (1e-5 if dtype == "torch.float32" else 2e-2), (dtype, off)


BUILT = """
import subprocess, sys, tempfile, torch, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from pgolf.model import mlp_kernel, xsa_kernel
tl = triton.language

class NoCard:
    "A driver that names a card and has none"
    get_current_device = get_current_stream = lambda self, *device: 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(NoCard())
tool = Path(triton.__file__).parent/"backends"/"nvidia"/"bin"/"cuobjdump"
half = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16)

def told(name, built):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout if tool.exists() else ""
    print(name, ".target sm_90" in built.asm["ptx"], "wgmma" in built.asm["ptx"], " ".join(said.split()))

N, D, H = 98_304, 512, 1536
up, gradient = mlp_kernel._kernels()
sizes = {name: tl.constexpr(size) for name, size in {**mlp_kernel.TILE, "WIDE": False}.items()}
how = dict(**sizes, num_warps=mlp_kernel.WARPS, num_stages=mlp_kernel.STAGES, grid=(1,))
signs = torch.empty(2, 2, dtype=torch.uint8)
told("up", up.warmup(half(2, 2), half(2, 2), half(2, 2), signs, N, H, D, 0.25, **how))
told("gradient", gradient.warmup(half(2, 2), half(2, 2), half(2, 2), signs, half(2, 2), N, H, D, 0.5, **how))
forward, backward = xsa_kernel._kernels()
sizes = dict(R=tl.constexpr(2), BN=tl.constexpr(xsa_kernel.TOKENS), BK=tl.constexpr(64))
told("exclude", forward.warmup(half(2), half(2), half(2), N, 1024, 64, 8, 64, 1e-12, **sizes, num_warps=4, grid=(1,)))
told("exclude_backward", backward.warmup(half(2), half(2), half(2), half(2), half(2), N, 1024, 64, 8, 4, 64, 1e-12, **sizes,
                                         num_warps=4, grid=(1,)))
"""


@triton_only
def test_the_kernels_are_built_for_an_h100_use_its_tensor_cores_and_spill_nothing(tmp_path):
    lines = run(BUILT, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) == 4
    for line in lines:
        print(line)
        name, built, multiplies = line.split()[:3]
        assert built == "True" and multiplies == str(name in ("up", "gradient")), line
        spilled = re.search(r"STACK:(\d+)", line) # registers that ran over lie on a thread's stack
        if spilled: assert int(spilled[1]) == 0, line


# ---- whole models that take them

def losses(name, kernels, dtype=torch.float32):
    "Loss and gradients of a recipe's small model, every parameter away from where it starts"
    r = get(name, "smoke")
    g = torch.Generator().manual_seed(0)
    model = GPT(r.model, g).to(dtype)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g).to(dtype) * 0.05)
    ids = torch.randint(0, r.model.vocab, (2, 48), generator=g)
    with with_triton() if kernels else nullcontext():
        loss = token_loss(model(ids[:, :-1]), ids[:, 1:]).mean()
        loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", RECIPES)
def test_a_model_with_kernels_and_joined_products_is_the_same_function(name):
    (plain, right), (fused, found) = (losses(name, kernels, torch.float64) for kernels in (False, True))
    assert abs(fused - plain) < 1e-10
    assert found.keys() == right.keys()
    for key in right: assert torch.allclose(found[key], right[key], rtol=1e-6, atol=1e-9), key


def test_a_compiler_sees_one_graph_with_the_kernels():
    r = get("pr1696", "smoke")
    model = GPT(r.model, torch.Generator().manual_seed(0))
    ids = torch.randint(0, r.model.vocab, (2, 32), generator=torch.Generator().manual_seed(0))
    seen = []
    def look(module, _):
        seen.append(module)
        return module.forward
    torch._dynamo.reset()
    with with_triton(): torch.compile(lambda ids: model(ids).sum(), backend=look, fullgraph=True)(ids).backward()
    names = {str(n.target) for n in seen[0].graph.nodes}
    assert len(seen) == 1 and {"pgolf.leaky_mlp.default", "pgolf.exclude_self.default"} <= names


def test_a_tap_or_an_adapter_is_not_passed_over():
    r = get("pr1696", "smoke")
    g = torch.Generator().manual_seed(0)
    model = GPT(r.model, g)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn(p.shape, generator=g) * 0.05)
    ids = torch.randint(0, r.model.vocab, (1, 32), generator=g)
    widths = model.sites()
    adapters = lambda site, position, x: torch.ones(*x.shape[:2], widths[site]) * 0.1
    plain = model(ids, adapters=adapters)
    with with_triton():
        assert torch.allclose(model(ids, adapters=adapters), plain, atol=1e-4)
        seen = []
        model(ids, tap=lambda name, value: seen.append(name))
    assert "mlp_act.0" in seen


def test_a_kernel_whose_trial_fails_is_left_out_with_its_reason(monkeypatch):
    assert set(gpu_kernels.TRIALS) == {"MLP kernel", "XSA kernel"}
    monkeypatch.setitem(gpu_kernels.TRIALS, "MLP kernel", lambda: 0.5)
    assert gpu_kernels._tried("MLP kernel") == "a trial call was off by 50.0%"


# ---- in a script

REPEAT = CARRIED + """
import torch
from pgolf.model import mlp_kernel, xsa_kernel
assert mlp_kernel.__spec__.origin.startswith("/nowhere/")
x, up, down = torch.randn(4, 8), torch.randn(12, 8), torch.randn(8, 12)
z = x @ up.T
y = mlp_kernel.leaky_mlp(x[None], up, down, 0.5)[0]
assert torch.allclose(y, (z * torch.where(z < 0, 0.25 * z, z)) @ down.T, atol=1e-4)
if sys.argv[2] == "kernel":
    a, signs = mlp_kernel.up_by_triton(x, up, 0.5)
    assert torch.allclose(a, z * torch.where(z < 0, 0.25 * z, z), atol=1e-4)
    heads, values = torch.randn(4, 2, 8), torch.randn(4, 1, 8)
    right = xsa_kernel.exclude_by_formula(heads[:, None], values).flatten(1, 2)
    assert torch.allclose(xsa_kernel.exclude_by_triton(heads, values), right, atol=1e-5)
print("done")
"""


@pytest.mark.parametrize("minify", (False, True))
@pytest.mark.parametrize("way", ("without", pytest.param("kernel", marks=triton_only)))
def test_a_script_carries_the_kernels_and_works_with_and_without_triton(tmp_path, minify, way):
    from pgolf.submit.script import minified
    sources = recipe_load(get("tiny", "smoke")).sources
    for key, text in sources.items():
        path = tmp_path / f"{key.replace('.', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(minified(text) if minify and "kernel" in key else text)
    assert run(REPEAT, str(tmp_path), way, TRITON_INTERPRET="1").strip() == "done"
