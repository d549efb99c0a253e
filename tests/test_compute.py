"How a CPU computes a run: chosen once, written down, and taken up again by every phase and proof"
import json
import types

import pytest
import torch

from pgolf.model.gpt import GPT, GPTConfig, token_loss
from pgolf.pack.ledger import inspect
from pgolf.recipes import run as run_room
from pgolf.recipes.phases import packed_predictor
from pgolf.recipes.recipes import get, names
from pgolf.recipes.run import Run, begin
from pgolf.submit import prove as prove_room
from pgolf.text.data import build_dataset, python_topics
from pgolf.train.compute import EXACT, Compute, computing

CPU = torch.device("cpu")


def precision():
    "What oneDNN may use, and whether products are taken in bf16"
    return torch.backends.mkldnn.matmul.fp32_precision, torch.is_autocast_enabled("cpu")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "A small run of a recipe that asks for the fastest way: (run, how often it chose, precision in each phase)"
    folder, chosen, seen = tmp_path_factory.mktemp("compute"), [], []
    texts = list(python_topics())[:16]
    dataset = build_dataset(texts, folder / "data", 320, name="topics", progress=False)
    recipe = get("tiny", "smoke", steps=2, compute="auto")
    with pytest.MonkeyPatch.context() as patch:
        choose = lambda *_: chosen.append(1) or Compute("bf16", half=True)
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


def test_a_run_chooses_once_and_only_training_is_in_bf16(done):
    run, chosen, seen = done
    assert chosen == 1 and seen == [("bf16", True), ("bf16", False), ("bf16", True)] and precision() == ("none", False)
    assert run.facts["compute"]["products"] == "bf16" and run.facts["compute"]["half"]


def test_no_cast_of_a_weight_outlives_its_change():
    weight, x = torch.nn.Parameter(torch.ones(4, 8)), torch.ones(2, 8)
    with computing(Compute(half=True), training=True):
        before = torch.nn.functional.linear(x, weight)
        weight.data.mul_(2)
        assert torch.equal(torch.nn.functional.linear(x, weight), 2 * before)


def test_training_in_bf16_learns_as_in_fp32_does():
    "After twenty steps on one batch both have learned the same"
    cfg = GPTConfig(vocab=64, dim=32, layers=2, heads=2, kv_heads=1, rotary_dims=8)
    ids = torch.randint(0, 64, (2, 4, 33), generator=torch.Generator().manual_seed(1))[0]
    ended = {}
    for how in (EXACT, Compute(half=True)):
        model = GPT(cfg, torch.Generator().manual_seed(0))
        adam = torch.optim.AdamW(model.parameters(), lr=0.02)
        with computing(how, training=True):
            for _ in range(20):
                loss = token_loss(model(ids[:, :-1]), ids[:, 1:]).mean()
                loss.backward()
                adam.step()
                adam.zero_grad()
        ended[how.half] = loss.item()
    assert ended[False] < 0.5 and ended[True] == pytest.approx(ended[False], abs=0.02)


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
