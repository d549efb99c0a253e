"The five reference models, to the last digit: logits, losses, gradients, and state dicts both ways"
import json

import pytest
import torch

from pgolf.ground.settings import ConfigError
from pgolf.model.gpt import token_loss
from pgolf.lab.upstream import load_checkpoint, load_reference, reference_config, reference_names, to_reference

safetensors = pytest.importorskip("safetensors.torch")
FOLDERS = ["pr761", "pr1232", "pr1232_flow", "pr1696", "pr1536", "pr1992"]


def load(golden, name):
    config = json.loads((golden / name / "config.json").read_text())
    vectors = safetensors.load_file(golden / name / "vectors.safetensors")
    state = {key.removeprefix("weights/"): t for key, t in vectors.items() if key.startswith("weights/")}
    return config, vectors, state


def cases(vectors, config):
    "(ids, cu_seqlens, recurrent, reference logits, the slice they cover, targets, reference loss) of every golden call"
    for key in (k for k in vectors if k.startswith("logits/")):
        name, recurrent = key.removeprefix("logits/"), None
        if name.startswith("loop"):
            recurrent, name = name[4] == "1", name[5:].lstrip("_")
        cu = vectors["batch/" + name.removeprefix("packed_")] if name.startswith("packed") else None
        suffix = {"": "", "short": "", "long": "_long", "ntk": "_ntk"}.get(name, "_packed")
        part = {"_ntk": slice(-8, None), "_packed": slice(None, None, 8)}.get(suffix, slice(None))
        loss = config["losses"][(key.removeprefix("logits/") + "_loss").replace("short_", "")]
        yield vectors["batch/x" + suffix], cu, recurrent, vectors[key], part, vectors["batch/y" + suffix], loss


@pytest.mark.parametrize("name", FOLDERS)
def test_logits_and_losses(golden, name):
    config, vectors, state = load(golden, name)
    model = load_reference(state, config["hparams"])
    assert sum(p.numel() for p in model.parameters()) == config["n_params"]
    seen = 0
    with torch.no_grad():
        for x, cu, recurrent, want, part, y, loss in cases(vectors, config):
            logits = model(x, cu_seqlens=cu, recurrent=recurrent)
            assert (logits[:, part] - want).abs().max() <= 2e-5
            assert token_loss(logits, y).double().mean().item() == pytest.approx(loss, rel=1e-6)
            seen += 1
    assert seen >= 3


@pytest.mark.parametrize("name", FOLDERS)
def test_every_gradient(golden, name):
    config, vectors, state = load(golden, name)
    model = load_reference(state, config["hparams"])
    token_loss(model(vectors["batch/x"]), vectors["batch/y"]).mean().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    names = reference_names(model, model.reference_banked)
    for theirs, places in names.items():
        parts = [grads[n] if at is None else grads[n][at] for n, at in places]
        ours = torch.cat(parts) if len(parts) > 1 else parts[0]
        want = vectors["grads/" + theirs]
        assert (ours - want).norm() <= 1e-4 * want.norm() + 1e-12, theirs
    assert len(names) == sum(k.startswith("grads/") for k in vectors)


@pytest.mark.parametrize("name", FOLDERS)
def test_state_both_ways(golden, name):
    config, _, state = load(golden, name)
    model = load_reference(state, config["hparams"])
    back = to_reference(model)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    again = load_reference(back, config["hparams"])
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_rope_yarn_of_pr1536_is_the_ntk_rule(golden):
    "Up to train_seq_len nothing changes; beyond it, the base the rule gives"
    config, vectors, state = load(golden, "pr1536")
    hparams, x = config["hparams"], vectors["batch/x_long"]
    train_len, r = hparams["train_seq_len"], hparams["rope_dims"]
    base = hparams["rope_base"] * (x.shape[1] / train_len) ** (r / (r - 2))
    model = load_reference(state, hparams | {"rope_yarn": True})
    wider = load_reference(state, hparams | {"rope_base": base})
    assert model.cfg.rope_train_len == train_len < x.shape[1]
    assert reference_config(hparams).rope_train_len == 0
    with torch.no_grad():
        assert (model(vectors["batch/x"], recurrent=False) - vectors["logits/loop0"]).abs().max() <= 2e-5
        long = model(x, recurrent=False)
        assert (long - wider(x, recurrent=False)).abs().max() <= 2e-5
        assert (long - vectors["logits/loop0_long"]).abs().max() > 2e-5


def test_a_wrong_state_is_refused_by_name(golden):
    config, _, state = load(golden, "pr1696")
    with pytest.raises(ConfigError, match="lacks.*qo_bank"):
        load_reference({k: v for k, v in state.items() if k != "qo_bank"}, config["hparams"])
    with pytest.raises(ConfigError, match="holds.*stranger"):
        load_reference(state | {"stranger": torch.zeros(1)}, config["hparams"])
    with pytest.raises(ConfigError, match="kv_bank.*need"):
        load_reference(state | {"kv_bank": torch.zeros(2, 2)}, config["hparams"])
    with pytest.raises(ConfigError, match="dtg_enabled"):
        reference_config(config["hparams"] | {"dtg_enabled": True})


def test_checkpoint_file_runs_no_code(golden, tmp_path):
    config, vectors, state = load(golden, "pr1992")
    torch.save(state, tmp_path / "good.pt")
    model = load_checkpoint(tmp_path / "good.pt", config["hparams"])
    assert (model(vectors["batch/x"], recurrent=False) - vectors["logits/loop0"]).abs().max() <= 2e-5

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"a": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(ConfigError, match="bad.pt"):
        load_checkpoint(tmp_path / "bad.pt", config["hparams"])
    assert not (tmp_path / "executed").exists()
