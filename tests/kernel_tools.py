"What tests of Triton kernels share: a process of their own, and the modules of a script served from memory"
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
triton_only = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed (pip install triton; it needs no GPU)")


def run(code, *args, **env):
    "What a program prints, in a process of its own: the interpreter is chosen when a kernel is made"
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": paths, **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CARRIED = """
import sys
from pathlib import Path

def carried(folder):
    "The modules of a script, served from memory"
    from pgolf.submit.memory import serve
    sources = {str(p.relative_to(folder)).removesuffix(".py").replace("/", "."): p.read_text() for p in Path(folder).rglob("*.py")}
    for name in [n for n in sys.modules if n.partition(".")[0] == "pgolf"]: del sys.modules[name]
    serve(sources, "/nowhere/train_gpt.py")

carried(sys.argv[1])
"""
