"Two runs in one folder, half a run of other code, data that changed meanwhile: each is refused, and nothing is mixed"
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pgolf.ground import code
from pgolf.ground.files import FileError
from pgolf.ground.settings import ConfigError
from pgolf.recipes.recipes import get
from pgolf.recipes.run import Run, begin, run_main
from pgolf.train.train import train
from pgolf.text.data import build_dataset, python_topics


@pytest.fixture
def little(tmp_path):
    return build_dataset(list(python_topics())[:16], tmp_path / "data", 320, name="topics", progress=False)


def phase(run, name):
    command = [sys.executable, "-m", "pgolf.recipes.run", name, str(run.folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_process_in_a_run_folder_is_refused_and_the_first_is_not_disturbed(tmp_path, little):
    run = Run(tmp_path / "run")
    begin(run, get("tiny", "smoke", steps=40), little)
    first = phase(run, "train")
    until = time.monotonic() + 60
    while not (run.folder / "train.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.1)
    first.send_signal(signal.SIGSTOP)  # holds the folder for as long as the others try
    try:
        second = phase(run, "train")
        _, said = second.communicate(timeout=120)
        assert second.returncode == 1 and "another process is at work" in said and "Traceback" not in said
        with pytest.raises(FileError, match="another process is at work"):
            begin(run, get("tiny", "smoke", steps=3), little)   # it would rename the folder under the first
    finally:
        first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=120) == 0
    steps = [json.loads(line).get("step") for line in (run.folder / "train.jsonl").read_text().splitlines()]
    assert [s for s in steps if s] == [*range(1, 41), 40], "every step once, and the end"


def test_another_recipe_moves_a_run_aside_whole(tmp_path, little):
    run = Run(tmp_path / "run")
    begin(run, get("tiny", "smoke", steps=2), little)
    run.train(progress=False)
    aside = begin(run, get("tiny", "smoke", steps=3), little)
    assert aside == tmp_path / "run.1" and (aside / "weights.pt").exists() and not (run.folder / "weights.pt").exists()
    assert run.recipe.train.steps == 3 and Run(aside).recipe.train.steps == 2


def test_an_edit_of_the_code_is_another_run(tmp_path, little, monkeypatch):
    run, recipe = Run(tmp_path / "run"), get("tiny", "smoke", steps=2)
    begin(run, recipe, little)
    run.note(finished=True)
    edited = {**code.payload_sources(), "pgolf.model.gpt": "def forward(): return 0"}
    monkeypatch.setattr(code, "payload_sources", lambda: edited)
    code.code_digest.cache_clear()
    try:
        assert begin(run, recipe, little) == tmp_path / "run.1", "finished results of other code step aside"
        run.note(settings={**run.facts["settings"], "code": "0123456789abcdef"})
        with pytest.raises(ConfigError, match="half a run of other code"):
            begin(run, recipe, little)
        assert begin(run, recipe, little, other_code=True) is None
    finally:
        monkeypatch.undo()
        code.code_digest.cache_clear()


def test_a_checkpoint_of_other_code_is_used_only_when_asked_to(tmp_path, little, monkeypatch):
    recipe = get("tiny", "smoke", steps=2)
    train(recipe.model, recipe.train, little, tmp_path, progress=False)
    weights = (tmp_path / "weights.pt").read_bytes()
    monkeypatch.setattr("pgolf.train.checkpoint.code_digest", lambda: "0123456789abcdef")
    with pytest.raises(FileError, match="its code is .* pass other_code=True"):
        train(recipe.model, recipe.train, little, tmp_path, progress=False)
    train(recipe.model, recipe.train, little, tmp_path, progress=False, other_code=True)
    assert (tmp_path / "weights.pt").read_bytes() == weights, "it was finished, and stays as it is"


def test_a_run_refuses_data_that_is_no_longer_what_it_was_begun_with(tmp_path, little):
    run = Run(tmp_path / "run")
    begin(run, get("tiny", "smoke", steps=2), little)
    shard = Path(little.val[0])
    facts = run.facts
    facts["settings"]["shards"][shard.name] += 2
    run.note(**facts)
    with pytest.raises(ConfigError, match="other data"):
        run.train(progress=False)


@pytest.mark.parametrize("part", ["train", "val", "tokenizer"])
def test_a_run_refuses_other_data_under_the_same_names_and_of_the_same_size(tmp_path, little, part):
    run = Run(tmp_path / "run")
    begin(run, get("tiny", "smoke", steps=2), little)
    path = {"train": little.train[0], "val": little.val[0], "tokenizer": little.tokenizer}[part]
    raw = bytearray(path.read_bytes())
    raw[-6], raw[-4] = raw[-4], raw[-6]   # two tokens change places; the size stays
    raw[-5] ^= part == "tokenizer"
    path.write_bytes(raw)
    (little.val[0].parent / "dataset.json").unlink()   # which would have seen the tokenizer
    with pytest.raises(ValueError, match="other data|not a SentencePiece model|did not make them") as e:
        run.train(progress=False)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b"[" * 100_000, b"\xff"])
def test_a_torn_record_is_one_sentence(tmp_path, little, torn, capsys):
    run = Run(tmp_path / "run")
    begin(run, get("tiny", "smoke", steps=2), little)
    (run.folder / "run.json").write_bytes(torn)
    assert run_main(["pack", str(run.folder)]) == 1
    said = capsys.readouterr().err
    assert "run.json" in said and len(said.strip().splitlines()) == 1
