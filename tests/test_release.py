"What a stranger installs: the wheel and the sdist, in an environment that has never seen the clone"
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import pgolf

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("pgolf", "nbs", "records", "setup.py", "settings.ini", "constraints.txt", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff",
          "CHANGELOG.md")


def sh(*words, **more):
    "A command's output; its own words where it fails"
    done = subprocess.run([str(w) for w in words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=500, **more)
    assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    "Scripts of a fresh environment that has the wheel, and the libraries of this one beside it"
    folder = tmp_path_factory.mktemp("release")
    source, dist = folder / "source", folder / "dist"
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    sh(sys.executable, "setup.py", "-q", "sdist", "-d", dist, cwd=source)
    archive, = dist.glob("*.tar.gz")
    with tarfile.open(archive) as tar: tar.extractall(folder / "unpacked", filter="data")
    unpacked, = (folder / "unpacked").iterdir()
    sh(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", dist, unpacked)
    sh(sys.executable, "-m", "venv", folder / "env")
    wheel, = dist.glob("*.whl")
    sh(folder / "env" / "bin" / "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    home, = (folder / "env" / "lib").glob("python3*/site-packages")
    (home / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


@pytest.mark.slow
def test_the_wheel_that_the_sdist_makes_trains_and_speaks_outside_the_clone(clean, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    bin = clean / "env" / "bin"
    where = sh(bin / "python", "-c", "import pgolf; print(pgolf.__file__)", cwd=tmp_path).strip()
    assert where.startswith(str(clean)) and (Path(where).parent / "py.typed").exists()
    for command in ("data", "train", "score", "sample", "runs", "compare", "audit", "submit", "lab"):
        assert sh(bin / f"pgolf_{command}", "--version", cwd=tmp_path).split()[-1] == pgolf.__version__
    assert "model.pgolf" in sh(bin / "pgolf_train", "tiny", "--scale", "smoke", "--steps", "8", cwd=tmp_path)
    run = "out/tiny-seed1-smoke-steps=8"
    assert "val_bpb" in sh(bin / "pgolf_score", run, cwd=tmp_path)
    assert "The for" in sh(bin / "pgolf_sample", run, "--prompt", "The for", "--tokens", "20", cwd=tmp_path)
    assert run in sh(bin / "pgolf_runs", cwd=tmp_path)


@pytest.mark.slow
def test_the_wheel_brings_its_notebooks(clean, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    bin = clean / "env" / "bin"
    said = sh(bin / "pgolf_lab", "book", cwd=tmp_path)
    there = {p.relative_to(tmp_path / "book").as_posix(): p for p in (tmp_path / "book" / "nbs").rglob("*.ipynb")}
    ours = [p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    assert said.startswith(f"{len(ours)} notebooks") and len(there) == len(ours)
    for path in ours: assert there[path.relative_to(ROOT).as_posix()].read_bytes() == path.read_bytes()
    assert (tmp_path / "book" / "records" / "tiny.json").exists()
    root = sh(bin / "python", "-c", "from pgolf.lab.run_record import repo_root; print(repo_root())", cwd=tmp_path / "book" / "nbs" / "runs")
    assert root.strip() == str(tmp_path / "book"), "a run notebook finds its root there"
    again = subprocess.run([bin / "pgolf_lab", "book"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 1 and again.stderr == "pgolf_lab: book holds nbs already: name another folder\n"
