"How a CPU computes a run: chosen once, written down, and taken up again by every phase and proof"
import json
import types

import pytest
import torch

from pgolf.pack.ledger import inspect
from pgolf.recipes import run as run_room
from pgolf.recipes.phases import packed_predictor
from pgolf.recipes.recipes import get, names
from pgolf.recipes.run import Run, begin
from pgolf.submit import prove as prove_room
from pgolf.text.data import build_dataset, python_topics
from pgolf.train.compute import EXACT, Compute

CPU = torch.device("cpu")


def precision():
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A small run of a recipe that asks for the fastest way: (run, how often it chose, precision in each phase)"
    folder, chosen, seen = tmp_path_factory.mktemp("compute"), [], []
    texts = list(python_topics())[:16]
    dataset = build_dataset(texts, folder / "data", 320, name="topics", progress=False)
    recipe = get("tiny", "smoke", steps=2, compute="auto")
    with pytest.MonkeyPatch.context() as patch:
        choose = lambda *_: chosen.append(1) or Compute("bf16")
        noted = lambda f: lambda *a, **k: seen.append(precision()) or f(*a, **k)
        patch.setattr(run_room, "choose", choose)
        patch.setattr(run_room, "train", noted(run_room.train))
        patch.setattr(run_room, "score_run", noted(run_room.score_run))
        run = Run(folder / "run")
        begin(run, recipe, dataset)
        run.train("cpu", False)
        run.pack(device="cpu")
        run.score("cpu", False)
        begin(run, recipe, dataset)       # the same again goes on, with the same choice
        run.train("cpu", False)
    return run, len(chosen), seen


def test_a_run_chooses_once_and_every_phase_computes_alike(done):
    run, chosen, seen = done
    assert chosen == 1 and seen == ["bf16"] * 3 and precision() == "none"
    assert run.facts["compute"]["products"] == "bf16"


def test_the_artifact_says_how_it_is_scored(done):
    data = (done[0].folder / "model.pgolf").read_bytes()
    assert inspect(data)["meta"]["recipe"]["compute"] == "auto"
    predictor = packed_predictor(data, None, device=CPU)[0]
    assert predictor.quick and predictor.asked_only


def test_a_proof_computes_as_the_run_did(done, tmp_path):
    run = done[0]
    finished = types.SimpleNamespace(recipe=run.recipe, start={"ranks": 1, "device": "cpu"}, seed=1, folder=run.folder)
    words = prove_room.command_line(finished, tmp_path, "", "python", ())
    assert json.loads(words[words.index("--compute") + 1]) == run.facts["compute"]
    run_room.write_json(tmp_path / "run.json", {})
    plain = types.SimpleNamespace(**vars(finished) | {"folder": tmp_path})
    assert "--compute" not in prove_room.command_line(plain, tmp_path, "", "python", ())


def test_only_the_sizes_that_people_wait_for_choose():
    assert {get(name, "smoke").compute for name in names()} == {"exact"}
    assert {get(name, "cpu").compute for name in names()} == {"auto"}
    assert {name for name in names() if get(name).compute == "auto"} == {"tiny"}


def test_exact_recipes_and_gpus_do_not_choose(tmp_path):
    run = Run(tmp_path)
    assert run_room.computed(run, get("tiny", compute="exact"), CPU) == EXACT
    assert run_room.computed(run, get("tiny"), torch.device("cuda")) == EXACT and run.facts == {}
