"Shared by all tests: where the reference vectors are, if they are"
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden():
    "Folder of vectors computed with the reference scripts; tests that need it are skipped where it is absent"
    folder = Path(os.environ.get("PGOLF_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no reference vectors at {folder} (set PGOLF_GOLDEN)")
    return folder
