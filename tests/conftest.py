"Shared by all tests: where the repository is, and one core per test process"
import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def root():
    "Root of the repository"
    return Path(__file__).resolve().parents[1]
