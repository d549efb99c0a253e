"Help, versions and slips of the pen are answered before torch is loaded, which takes seconds"
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOLD = """
import sys
from {module} import {name}
sys.argv = {words!r}
try: sys.exit({name}())
finally: print("torch", "torch" in sys.modules, file=sys.stderr)
"""


def commands():
    "Console scripts: name -> (module, function)"
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini")
    lines = settings["DEFAULT"]["console_scripts"].split()
    return {line.partition("=")[0]: line.partition("=")[2].split(":") for line in lines}


def answered(words, folder):
    "Status, output and complaint of a command line, and whether torch was loaded for it"
    module, name = commands()[words[0]]
    script, empty = folder / words[0], folder / "empty"
    script.write_text(TOLD.format(module=module, name=name, words=words))
    empty.mkdir()
    done = subprocess.run([sys.executable, script], cwd=empty, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    said, _, torch = done.stderr.rpartition("torch ")
    return done.returncode, done.stdout, said, torch.strip() == "True"


@pytest.mark.parametrize("option", ["--help", "--version"])
@pytest.mark.parametrize("name", commands())
def test_help_and_version_do_not_load_torch(name, option, tmp_path):
    status, out, said, torch = answered([name, option], tmp_path)
    assert status == 0 and out and not said and not torch


SLIPS = {
    "pgolf_train tniy": "did you mean 'tiny'?",
    "pgolf_train tiny --scale smok": "the scales are full, cpu, smoke",
    "pgolf_train tiny --nproc -1": "nproc must be at least",
    "pgolf_train tiny --set layers": "write name=value",
    "pgolf_score nowhere": "is no run folder",
    "pgolf_sample nowhere": "does not exist",
    "pgolf_data no-such-thing": "is no folder or file",
    "pgolf_audit tinny": "no file, no folder and no recipe",
    "pgolf_audit tiny --scale smok": "the scales are full, cpu, smoke",
    "pgolf_submit nowhere --out entry": "it is no run folder",
    "pgolf_submit run": "name the folder to make",
    "pgolf_upload nowhere me/tiny": "it is no run folder",
    "pgolf_runs nowhere": "does not exist",
    "pgolf_compare one": "name two or more",
}


@pytest.mark.parametrize("line", SLIPS)
def test_a_slip_is_told_without_torch(line, tmp_path):
    status, out, said, torch = answered(line.split(), tmp_path)
    assert status in (1, 2) and not out and SLIPS[line] in said and said.count("\n") == 1 and not torch, said
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_names_known_without_torch_are_those_of_the_catalogue():
    from pgolf.recipes.recipe import SCALES
    from pgolf.recipes.recipes import RECIPES
    from pgolf.recipes.words import RECIPE_NAMES, SCALE_NAMES
    assert tuple(RECIPES) == RECIPE_NAMES and tuple(SCALES) == SCALE_NAMES
