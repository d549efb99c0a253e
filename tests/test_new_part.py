"A technique is one room: the sparse attention gate, put into a recipe by one word, is everything that any other part is"
import json

import pytest
import torch

from pgolf import recipes
from pgolf.lab.study import ablations
from pgolf.pack.container import open_header
from pgolf.pack.reading import unpack
from pgolf.score.evaluate import ModelPredictor
from pgolf.score.freezing import frozen_rows
from pgolf.score.lessons import train_on_chunk
from pgolf.score.ttt import ScoreFirstTTT, TTTConfig
from pgolf.recipes.recipe import scaled
from pgolf.submit.finished import read_finished
from pgolf.submit.prove import prove
from pgolf.submit.script import train_gpt_script
from pgolf.text.data import build_dataset, folder_documents
from pgolf.train.checkpoint import load_weights

OWN = "sparse_gate_w"


@pytest.fixture(scope="module")
def recipe():
    return recipes.get("pr1536", "smoke", seed=1, sparse_gate="on")


@pytest.fixture(scope="module")
def words(small_text, tmp_path_factory):
    return build_dataset(folder_documents(small_text), tmp_path_factory.mktemp("data"), 320, name="words")


@pytest.fixture(scope="module")
def run(recipe, words, tmp_path_factory):
    "Trained, packed and scored"
    folder = tmp_path_factory.mktemp("runs") / "sparse"
    recipes.run_recipe(recipe, folder, words, progress=False)
    return folder


def test_it_is_trained(run):
    model = load_weights(run / "weights.pt")
    assert model.roles()[OWN] == "control" and model.get_parameter(OWN).abs().max() > 1e-3, "it started at zero"


def test_it_is_packed_and_read_back(run):
    trained, packed = load_weights(run / "weights.pt"), unpack((run / "model.pgolf").read_bytes())
    torch.testing.assert_close(packed.get_parameter(OWN), trained.get_parameter(OWN), atol=1e-3, rtol=1e-3)
    header, _ = open_header((run / "model.pgolf").read_bytes())
    assert next(row for row in header["tensors"] if row["name"] == OWN)["kind"] == "fp16"


def test_it_is_scored_with_its_gates(run, words):
    score, packed = json.loads((run / "score.json").read_text()), unpack((run / "model.pgolf").read_bytes())
    ids = words.val_ids()[None, :65]
    gated = ModelPredictor(packed).logits(ids)
    packed.get_parameter(OWN).data.zero_()
    assert score["val_bpb"] > 0 and not torch.equal(ModelPredictor(packed).logits(ids), gated)


def test_its_frozen_layers_do_not_learn(run, words):
    model = load_weights(run / "weights.pt")
    cfg = TTTConfig("sgd", 0.1, epochs=1, chunk_tokens=64, seq_len=64, freeze_blocks=1)
    learner, before = ScoreFirstTTT(model, cfg), model.get_parameter(OWN).clone()
    assert frozen_rows(model, cfg)[OWN] == 1
    train_on_chunk(learner, learner.optimizer, words.val_ids()[:65], cfg, 0.1)
    after = learner.model.get_parameter(OWN)
    assert torch.equal(after[0], before[0]) and not torch.equal(after[1], before[1])


def test_it_is_ablated_by_its_title(recipe):
    change = ablations(recipe)["sparse attention gate"]
    without = recipes.override(recipe, change)
    assert without == recipes.get("pr1536", "smoke", seed=1) and "sparse attention gate" not in ablations(without)


def test_it_comes_down_with_the_scale():
    full = recipes.get("pr1536", sparse_gate={"channels": 40})
    assert recipes.get("pr1536", "smoke", sparse_gate={"channels": 12}).model.part("sparse_gate").channels == 12
    assert scaled(full, "smoke").model.part("sparse_gate").channels == 32


def test_the_exported_script_repeats_it(run, words, tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text(train_gpt_script(read_finished(run).recipe, "words"))
    assert "class SparseGate" in script.read_text()
    assert prove(script, run, words.train[0].parent)["equal"]


def test_a_recipe_without_it_does_not_carry_it():
    assert "class SparseGate" not in train_gpt_script(recipes.get("pr1536"))
