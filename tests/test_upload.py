"A finished run on its way to the hub: the hub's real client against a local server that takes files, and refuses them"
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pgolf import recipes
from pgolf.lab.sample import load_voice, written
from pgolf.submit.upload import SENT, pgolf_upload
from pgolf.text.build import build_dataset
from pgolf.text.corpus import folder_documents

from hub_server import serve

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dataset(small_text, tmp_path_factory):
    return build_dataset(folder_documents(small_text), tmp_path_factory.mktemp("data"), 320, name="words", progress=False)


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "tiny"
    recipes.run_recipe(recipes.get("tiny", scale="smoke", steps=2), run, dataset, progress=False)
    return run


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("time.sleep", lambda s: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with serve({}) as hub:
        hub.writers["hf_mine"] = "me"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def upload(dataset, capsys):
    "Types the command; its status and what it said"
    def typed(run, repo="me/tiny", **options):
        try: pgolf_upload(run, repo, **{"data": str(dataset.train[0].parent), **options})
        except SystemExit as e: return e.code, capsys.readouterr().err
        return 0, capsys.readouterr().out
    return typed


def posts(hub):
    return [line for line in hub.log if line[0] in ("POST", "PUT")]


def test_what_arrives_is_what_was_made_in_one_commit(hub, upload, run, dataset):
    status, said = upload(run)
    assert status == 0 and "/me/tiny/commit/" in said, said
    files = hub.repos["me/tiny"]
    assert set(files) == set(SENT) and [c[0] for c in hub.commits] == ["me/tiny"]
    assert files["tokenizer.model"] == dataset.tokenizer.read_bytes()
    for name in ("model.pgolf", "recipe.json", "score.json"): assert files[name] == (run / name).read_bytes(), name
    card = ModelCard(files["README.md"].decode())
    assert "smoke-scale" in card.data.tags and "its score means nothing" in card.text and "not audited" in card.text
    assert all(str(place).encode() not in data for place in (run.parent, Path.home()) for data in files.values() if place != Path("/"))


def test_the_lines_of_the_card_work_for_who_has_nothing_else(hub, upload, run, dataset, tmp_path):
    assert upload(run)[0] == 0
    lines = re.search(r"```python\n(.*?)```", hub.repos["me/tiny"]["README.md"].decode(), re.S)[1]
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    here = load_voice(run, str(dataset.train[0].parent))
    assert done.stdout == "".join(written(here, "The", 50)) + "\n"


def test_a_dry_run_asks_nobody_and_shows_what_would_go(hub, upload, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    status, said = upload(run, dry=True)
    assert status == 0 and hub.log == [] and {p.name for p in (run / "hub").iterdir()} == set(SENT)
    assert all(str(run / "hub" / name) in said for name in SENT) and f"hf upload me/tiny {run / 'hub'}" in said


def test_again_is_another_commit_and_the_runs_files_are_left_alone(hub, upload, run):
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    for _ in range(2):
        status, said = upload(run)
        assert status == 0, said
    assert len(hub.commits) == 2
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_a_repository_is_private_only_where_that_is_asked(hub, upload, run):
    assert upload(run, "me/open")[0] == upload(run, "me/closed", private=True)[0] == 0
    made = {repo: how for what, repo, how in hub.log if what == "visibility"}
    assert made == {"me/open": None, "me/closed": "private"}


PORTAL = (200, {"Content-Type": "text/html"}, b"<html>log in to the wireless network</html>")


@pytest.mark.parametrize("what, answer, says", [
    ("create", (401, {}, b"{}"), "hf auth login"), ("create", (403, {}, b"{}"), "may not write to me"),
    ("create", (429, {"Retry-After": "900"}, b"{}"), "wait 900 s"), ("validate-yaml", PORTAL, "proxy or a login page"),
    ("preupload", (404, {"X-Error-Code": "RepoNotFound"}, b"{}"), "may not write to me"), ("PUT", (403, {}, b"{}"), "may not write to me"),
    ("commit", (403, {}, b"{}"), "may not write to me"), ("commit", (418, {}, b"{}"), "check the name and the connection")])
def test_each_refusal_is_a_sentence_and_no_file_is_there(hub, upload, run, what, answer, says):
    hub.refusals[what] = answer
    status, said = upload(run)
    assert status == 1 and said.startswith("pgolf_upload: me/tiny: ") and says in said and said.count("\n") == 1, said
    assert hub.commits == [] and not hub.repos.get("me/tiny")


def test_a_busy_hub_is_waited_for(hub, upload, run, monkeypatch):
    waits = []
    def slept(seconds):
        waits.append(seconds)
        hub.refusals.clear()
    hub.refusals["create"] = (429, {"Retry-After": "7"}, b"{}")
    monkeypatch.setattr("pgolf.text.remote.time.sleep", slept)
    assert upload(run)[0] == 0 and waits == [7] and len(hub.commits) == 1


def test_somebody_elses_account_and_no_account(hub, upload, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    status, said = upload(run)
    assert status == 1 and "log in first" in said and hub.log == [] and not (run / "hub").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    status, said = upload(run)
    assert status == 1 and "does not know this token (401)" in said
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    status, said = upload(run, "them/tiny")
    assert status == 1 and "may not write to them (403)" in said and "them/tiny" not in hub.repos


def test_no_hub_at_all(upload, run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, said = upload(run)
    assert status == 1 and "check the name and the connection" in said and said.count("\n") == 1


def test_a_client_that_is_told_to_stay_offline_says_so(upload, run, dataset, tmp_path):
    (tmp_path / "pgolf_upload").write_text("import sys\nfrom pgolf.submit.upload import pgolf_upload\nsys.exit(pgolf_upload())\n")
    words = [sys.executable, tmp_path / "pgolf_upload", run, "me/tiny", "--data", dataset.train[0].parent]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_mine"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("repo", ["tiny", "me/my model", "https://huggingface.co/me/tiny", "me/tiny.git", "me//tiny", ""])
def test_a_name_the_hub_does_not_take_is_told_before_anything(hub, upload, run, repo):
    status, said = upload(run, repo)
    assert status == 1 and "write OWNER/NAME" in said and hub.log == [] and not (run / "hub").exists()


@pytest.mark.parametrize("hurt, says", [
    (lambda run: (run / "score.json").unlink(), "has no score.json"), (lambda run: (run / "positions.npz").unlink(), "score it again"),
    (lambda run: (run / "model.pgolf").write_bytes(b"PGOLF"), "model.pgolf"), (lambda run: (run / "recipe.json").unlink(), "no run folder"),
    (lambda run: (run / "score.json").write_text((run / "score.json").read_text().replace('"val_bpb": ', '"val_bpb": 1')), "score it again")])
def test_a_run_that_is_not_whole_goes_nowhere(hub, upload, run, hurt, says):
    hurt(run)
    status, said = upload(run)
    assert status == 1 and says in said and said.count("\n") == 1 and posts(hub) == [] and not (run / "hub").exists(), said


def test_a_score_of_other_text_goes_nowhere(hub, upload, run, small_text, tmp_path):
    other = build_dataset([(n, t.upper()) for n, t in folder_documents(small_text)], tmp_path / "other", 320, name="words", progress=False)
    status, said = upload(run, data=str(other.train[0].parent))
    assert status == 1 and "score the run again" in said and posts(hub) == []


def test_the_referees_findings_are_on_the_card_when_it_is_asked(hub, upload, run):
    assert upload(run, dry=True, audit=True)[0] == 0
    page = (run / "hub" / "README.md").read_text()
    assert "| rule | verdict | evidence |" in page and "not audited" not in page and "| causal | pass |" in page
    assert str(run.parent) not in page


def test_a_card_never_quotes_what_somebody_wrote_into_the_folder(hub, upload, run):
    (run / "audit.json").write_text('{"ok": true, "failed": [], "proved": true, "findings": [{"rule": "causal", "verdict": "pass", "evidence": "trust me"}]}')
    assert upload(run, dry=True)[0] == 0
    assert "trust me" not in (run / "hub" / "README.md").read_text()
