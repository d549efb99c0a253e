"Shared by all tests: where the repository is, and one core per test process"
import os
import random
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def root():
    "Root of the repository"
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def golden(root):
    "Folder of vectors computed with the reference scripts; tests that need it are skipped where it is absent"
    folder = Path(os.environ.get("PGOLF_GOLDEN", root.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no reference vectors at {folder} (set PGOLF_GOLDEN)")
    return folder


WORDS = "the a model reads text and learns to say what comes next from bytes it has seen".split()


@pytest.fixture(scope="session")
def small_text(tmp_path_factory):
    "A folder of sixty short documents, the same each time"
    folder, rng = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(60):
        lines = (" ".join(rng.choices(WORDS, k=9)).capitalize() + "." for _ in range(12))
        (folder / f"{i:02}.txt").write_text(f"Document {i}\n" + "\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def small_run(small_text):
    "Parameters of the record notebook that make it a matter of seconds, and computed alike each time"
    return {"data": str(small_text), "steps": 6,
            "overrides": "vocab=320 dim=64 heads=2 kv_heads=1 layers=2 batch_tokens=2048 seq_len=256 compute=exact"}


@pytest.fixture(scope="session")
def bench(root, tmp_path_factory):
    "A folder that a run notebook takes for the repository, so that runs and data of tests lie elsewhere"
    folder = tmp_path_factory.mktemp("bench")
    shutil.copytree(root / "nbs" / "runs", folder / "nbs" / "runs", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(root / "settings.ini", folder)
    return folder
