"""Downloads with the hub's real client from a local server that breaks off, shortens and corrupts."""

import json, os, re, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

from pgolf.text.data import (
    HUB,
    HUBS,
    DATASET_RECORD,
    DatasetError,
    DownloadError,
    ShardError,
    download_dataset,
    open_dataset,
    write_shard,
)
from pgolf.text.build import build_dataset
from pgolf.text.tokenizer import BOS, fit_tokenizer

from hub_server import serve

VOCAB = 320
HERE = f"datasets/datasets/fineweb10B_sp{VOCAB}"
TRAIN = [f"{HERE}/fineweb_train_{i:06d}.bin" for i in range(4)]
VAL = [f"{HERE}/fineweb_val_{i:06d}.bin" for i in range(2)]
MODEL = f"datasets/tokenizers/fineweb_{VOCAB}_bpe.model"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "A small repository in the layout of the real ones"
    home, rng = tmp_path_factory.mktemp("published"), np.random.default_rng(0)
    files = {MODEL: fit_tokenizer([Path(__file__).read_text()], VOCAB)}
    for name in TRAIN + VAL:
        ids = np.concatenate([[BOS], rng.integers(4, VOCAB, 2000)])
        files[name] = write_shard(home / Path(name).name, ids).read_bytes()
    manifest = {"datasets": [{"name": f"fineweb10B_sp{VOCAB}", "stats": {"files_train": 4, "files_val": 2}}]}
    return files | {"datasets/manifest.json": json.dumps(manifest).encode(), "README.md": b"words"}


@pytest.fixture
def hub(published, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda s: None)  # the client waits between its attempts
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    with serve({HUB: published}) as hub:
        yield hub


def fetch(hub, root, n=2, variant=f"sp{VOCAB}", **kwargs):
    return download_dataset(variant, root, n, endpoint=hub.url, progress=False, **kwargs)


def shards(root):
    return sorted(p.name for p in Path(root).rglob("*.bin"))


def folder(root):
    return root / "datasets" / f"fineweb10B_sp{VOCAB}"


def test_a_prefix_of_train_and_the_whole_of_val(hub, published, tmp_path):
    dataset = fetch(hub, tmp_path)
    assert [p.name for p in dataset.train + dataset.val] == [Path(p).name for p in TRAIN[:2] + VAL]
    for p in dataset.train + dataset.val:
        assert p.read_bytes() == published[f"{HERE}/{p.name}"]
    assert (
        dataset.tokenizer == tmp_path / "tokenizers" / f"fineweb_{VOCAB}_bpe.model" and dataset.vocab == VOCAB
    )
    assert open_dataset(folder(tmp_path)) == dataset
    assert sorted(p.name for p in (tmp_path / "datasets").iterdir()) == [
        f".{folder(tmp_path).name}.lock",
        folder(tmp_path).name,
    ]


def test_what_is_there_is_not_fetched_again(hub, tmp_path):
    two = fetch(hub, tmp_path)
    hub.log.clear()
    assert fetch(hub, tmp_path) == two and hub.log == []  # not even asked
    assert fetch(hub, tmp_path, 1).train == two.train[:1] and hub.log == []
    four = fetch(hub, tmp_path, 4)
    assert four.train[:2] == two.train and len(four.train) == 4
    fetched = [path.split("/")[-1] for method, path, _ in hub.log if method == "GET" and ("resolve" in path or "/cdn/" in path)]
    assert fetched == ["manifest.json", "fineweb_train_000002.bin", "fineweb_train_000003.bin"]


def test_a_broken_transfer_is_resumed(hub, published, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    hub.faults[TRAIN[0]] = [("break", 1500), ("break", 700)]
    dataset = fetch(hub, tmp_path, 1)
    assert dataset.train[0].read_bytes() == published[TRAIN[0]]
    assert hub.gets(TRAIN[0]) == [None, "bytes=1500-", "bytes=2200-"]


@pytest.mark.parametrize(
    "fault", [("short", 1000), ("corrupt",), ("status", 500), ("break", 0)], ids=lambda f: f[0]
)
def test_a_bad_copy_is_fetched_anew(hub, published, tmp_path, fault):
    hub.faults[VAL[1]] = [fault]
    assert fetch(hub, tmp_path, 1).val[1].read_bytes() == published[VAL[1]]
    assert len(hub.gets(VAL[1])) == 2


@pytest.mark.parametrize(
    "fault, says",
    [(("short", 1000), "size"), (("corrupt",), "checksum"), (("status", 500), "500"), (("break", 0), "")],
    ids=["short", "corrupt", "status", "break"],
)
@pytest.mark.parametrize("name", [TRAIN[1], VAL[0], MODEL], ids=["train", "val", "tokenizer"])
def test_a_transfer_that_stays_bad_leaves_nothing_whole(hub, tmp_path, name, fault, says):
    hub.faults[name] = [fault, "forever"]
    with pytest.raises(DownloadError) as e:
        fetch(hub, tmp_path)
    message = str(e.value)
    assert name in message and says in message and "run the same again" in message and "\n" not in message
    with pytest.raises(DatasetError, match="no dataset at"):
        open_dataset(folder(tmp_path))
    assert Path(name).name not in [p.name for p in tmp_path.rglob("*") if p.is_file()]
    hub.faults.clear()
    kept = shards(tmp_path)
    hub.log.clear()
    fetch(hub, tmp_path)
    assert not [k for k in kept if hub.gets(k)]  # what was whole was not fetched again


def test_a_shard_of_another_tokenizer_is_refused_though_its_checksum_fits(hub, published, tmp_path):
    bad = write_shard(tmp_path / "bad.bin", [BOS, VOCAB]).read_bytes()
    hub.repos[HUB][TRAIN[0]] = bad
    with pytest.raises(ShardError, match=f"token {VOCAB} at 1 is not below the vocabulary size {VOCAB}"):
        fetch(hub, tmp_path / "root")
    assert not folder(tmp_path / "root").exists()


def test_a_file_spoilt_on_the_disk_is_fetched_again_when_more_is_asked_for(hub, published, tmp_path):
    first = fetch(hub, tmp_path, 1).train[0]
    first.write_bytes(first.read_bytes()[:-2])
    with pytest.raises(ShardError, match="cut short"):
        fetch(hub, tmp_path, 1)
    assert fetch(hub, tmp_path, 2).train[0].read_bytes() == published[TRAIN[0]]


def test_incomplete_repositories_are_refused(hub, tmp_path):
    del hub.repos[HUB][VAL[1]]
    with pytest.raises(DownloadError, match="has 1 validation shards of .*, its manifest counts 2"):
        fetch(hub, tmp_path)
    del hub.repos[HUB]["datasets/manifest.json"], hub.repos[HUB][TRAIN[1]]
    with pytest.raises(DownloadError, match="lacks train shard 1"):
        fetch(hub, tmp_path)
    assert len(fetch(hub, tmp_path, 1).val) == 1  # without a manifest the listing is all there is


def test_requests_that_cannot_be_met(hub, tmp_path):
    with pytest.raises(DownloadError, match=r"5 training shards .* has 4: ask for 1 to 4"):
        fetch(hub, tmp_path, 5)
    with pytest.raises(DownloadError, match="ask for 1 to 4"):
        fetch(hub, tmp_path, 0)
    with pytest.raises(DownloadError, match=f"has no sp512; it has sp{VOCAB}"):
        fetch(hub, tmp_path, variant="sp512")
    with pytest.raises(DownloadError, match="no variant 'large'"):
        fetch(hub, tmp_path, variant="large")
    with pytest.raises(DownloadError, match="nobody/nothing cannot be listed"):
        fetch(hub, tmp_path, repo="nobody/nothing")
    with pytest.raises(DownloadError, match="cannot be listed"):
        download_dataset("sp1024", tmp_path, endpoint="http://127.0.0.1:9", progress=False)


def test_a_full_disk_is_noticed_before_shards_are_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("usage", (), {"free": 10_000})())
    with pytest.raises(DownloadError, match="GB are needed"):
        fetch(hub, tmp_path)
    assert not [r for r in hub.log if r[1].endswith(".bin")]


def test_the_8192_variant_lies_elsewhere(hub, published, tmp_path):
    hub.repos[HUBS["sp8192"]] = {}
    with pytest.raises(DownloadError, match="kevclark/parameter-golf has no sp8192"):
        fetch(hub, tmp_path, variant="sp8192")


def test_hf_endpoint_is_honoured(published, tmp_path):
    with serve({HUB: published}) as hub:
        code = f"from pgolf.text.data import download_dataset as d; print(len(d('sp{VOCAB}', {str(tmp_path)!r}, 3).train))"
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.stdout.strip() == "3", done.stderr
        assert "fineweb_train_000002.bin" in done.stderr # its bar
    assert len(open_dataset(folder(tmp_path)).train) == 3 and (folder(tmp_path) / DATASET_RECORD).exists()


@pytest.mark.parametrize("at", [2, 4, 6])
def test_killed_at_any_file_then_run_again(published, tmp_path, at):
    "A download that dies while a file comes in leaves no dataset, and the next run ends in the same one"
    code = (
        "import sys, os, pgolf.text.hub as d\n"
        "real, n = d.fetch_file, [0]\n"
        "def dying(*a):\n n[0] += 1\n if n[0] == int(sys.argv[1]): os._exit(9)\n return real(*a)\n"
        f"d.fetch_file = dying; d.download_dataset('sp{VOCAB}', sys.argv[2], 2, endpoint=sys.argv[3], progress=False)"
    )
    with serve({HUB: published}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", code, str(at), str(tmp_path), hub.url], capture_output=True, timeout=120
        )
        assert done.returncode == 9 and not folder(tmp_path).exists()
        dataset = fetch(hub, tmp_path)
    for p in dataset.train + dataset.val:
        assert p.read_bytes() == published[f"{HERE}/{p.name}"]


# ---- the hub as it is ----

OTHER = {p.replace("datasets/", "other/", 1): p for p in (*TRAIN, *VAL, MODEL, "datasets/manifest.json")}


def test_two_exports_of_one_repository_never_mix(hub, published, tmp_path):
    strange = fit_tokenizer([Path(__file__).read_text()[::-1]], VOCAB)
    hub.repos[HUB] |= {new: strange if old == MODEL else published[old] for new, old in OTHER.items()}
    with pytest.raises(DownloadError, match="under datasets, other: choose one with --root_prefix"):
        fetch(hub, tmp_path)
    one = fetch(hub, tmp_path, prefix="datasets")
    assert one.tokenizer.read_bytes() == published[MODEL]
    with pytest.raises(DownloadError, match="holds root datasets/, not other/: fetch the other into another --root"):
        fetch(hub, tmp_path, 3, prefix="other")
    two = fetch(hub, tmp_path, prefix="other", name="second")
    assert two.tokenizer.read_bytes() == strange and one.tokenizer.read_bytes() == published[MODEL]
    assert two.val[0].parent.name == f"second_sp{VOCAB}" and open_dataset(two.val[0].parent) == two
    assert fetch(hub, tmp_path, 3).tokenizer == one.tokenizer  # more of the first, from its own export


def test_an_export_at_the_top_beside_another_can_be_chosen_as_the_sentence_says(hub, published, tmp_path):
    hub.repos[HUB] |= {p.removeprefix("datasets/"): published[p] for p in (*TRAIN, *VAL, MODEL, "datasets/manifest.json")}
    with pytest.raises(DownloadError, match="under /, datasets: choose one with --root_prefix"):
        fetch(hub, tmp_path)
    assert fetch(hub, tmp_path, prefix="/").val[0].read_bytes() == published[VAL[0]]


def test_other_text_of_the_same_tokenizer_is_not_taken_for_it(hub, published, tmp_path):
    hub.repos[HUB] |= {p.replace("fineweb10B", "docs"): published[TRAIN[3]] for p in (*TRAIN, *VAL)}
    assert fetch(hub, tmp_path).val[0].read_bytes() == published[VAL[0]]


def test_a_repository_without_validation_shards_says_that(hub, tmp_path):
    for name in VAL: del hub.repos[HUB][name]
    with pytest.raises(DownloadError, match="no validation shards of sp320, .* name another --repo"):
        fetch(hub, tmp_path)


def test_shards_in_folders_of_other_names_are_refused_by_name_and_the_advice_works(hub, small_text, tmp_path, monkeypatch, capsys):
    from pgolf.lab.commands import pgolf_data
    from pgolf.text.corpus import folder_documents
    made = build_dataset(folder_documents(small_text), tmp_path / "made", VOCAB, name="fineweb", progress=False)
    odd = {f"tokens/eight/{p.name}": p.read_bytes() for p in (*made.train, *made.val)} | {"bpe.model": made.tokenizer.read_bytes()}
    hub.repos[HUB] = odd
    with pytest.raises(DownloadError, match="that folder is not named") as e:
        fetch(hub, tmp_path)
    advised = str(e.value).partition("then ")[2].split()
    assert advised[:2] == ["pgolf_data", "DIR/tokens/eight"] and advised[2:] == ["--tokenizer", "MODEL"]
    for name, data in odd.items():  # what the hub's own command does
        (tmp_path / "DIR" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "DIR" / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    pgolf_data(advised[1], tokenizer="DIR/bpe.model")
    assert f"{VOCAB} pieces, 1 training and 1 validation shards" in capsys.readouterr().out
    hub.repos[HUB] = {"eight/0.bin": b"x"}
    with pytest.raises(DownloadError, match="has eight/0.bin, and no <name>_train_000000.bin .*: name another --repo"):
        fetch(hub, tmp_path)


@pytest.mark.parametrize("words, env, asked", [
    ("sp1024", {}, "willdepueoai/parameter-golf"), ("sp4096", {}, "kevclark/parameter-golf"), ("sp8192", {}, "kevclark/parameter-golf"),
    ("caseops", {}, "romeerp/parameter-golf-caseops-v1"), ("fineweb10B_sp8192_lossless_caps_caseops_v1_reserved", {}, "romeerp/parameter-golf-caseops-v1"),
    ("sp1024 --repo me/mine", {}, "me/mine"), ("sp8192", {"MATCHED_FINEWEB_REPO_ID": "you/yours"}, "you/yours"),
    ("sp8192 --repo me/mine", {"MATCHED_FINEWEB_REPO_ID": "you/yours"}, "me/mine")])
def test_each_variant_is_asked_for_where_it_lies(hub, tmp_path, words, env, asked, capsys, monkeypatch):
    from pgolf.lab.commands import pgolf_data
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("sys.argv", ["pgolf_data", *words.split(), "--root", str(tmp_path)])
    for name, value in env.items(): monkeypatch.setenv(name, value)
    hub.repos.clear()
    with pytest.raises(SystemExit) as stop:
        pgolf_data()
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.startswith(f"pgolf_data: {asked} cannot be listed") and said.count("\n") == 1, said
    assert {path for _, path, _ in hub.log if "datasets" in path} == {f"/api/datasets/{asked}"}


def test_the_command_chooses_an_export_by_its_root(hub, published, tmp_path, capsys, monkeypatch):
    from pgolf.lab.commands import pgolf_data
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    hub.repos["me/mine"] = published | {new: published[old] for new, old in OTHER.items()}
    words = ["pgolf_data", f"sp{VOCAB}", "--repo", "me/mine", "--root", str(tmp_path)]
    for more, env, root in ([], {}, ""), (["--root-prefix", "other"], {}, "other/"), ([], {"MATCHED_FINEWEB_REMOTE_ROOT_PREFIX": "datasets"}, "datasets/"):
        monkeypatch.setattr("sys.argv", [*words, *more, "--name", f"from-{root.strip('/')}"])
        with monkeypatch.context() as here:
            for name, value in env.items(): here.setenv(name, value)
            try: pgolf_data()
            except SystemExit: pass
        said = capsys.readouterr()
        if not root: assert "choose one with --root_prefix" in said.err
        else:
            made = json.loads((tmp_path / "datasets" / f"from-{root.strip('/')}_sp{VOCAB}" / DATASET_RECORD).read_text())["made"]
            assert made["root"] == root and "1 training and 2 validation shards" in said.out, said.err


def test_the_manifest_names_the_tokenizer(hub, published, tmp_path):
    manifest = json.loads(published["datasets/manifest.json"])
    manifest["datasets"][0]["tokenizer_name"] = "mine"
    manifest["tokenizers"] = [{"name": "mine", "model_path": "tokenizers/odd.model", "vocab_path": "tokenizers/odd.vocab"}]
    files = hub.repos[HUB]
    files |= {"datasets/manifest.json": json.dumps(manifest).encode(), "datasets/tokenizers/odd.model": files.pop(MODEL),
              "datasets/tokenizers/odd.vocab": b"pieces"}
    dataset = fetch(hub, tmp_path)
    assert dataset.tokenizer == tmp_path / "tokenizers" / "odd.model"
    assert (tmp_path / "tokenizers" / "odd.vocab").read_bytes() == b"pieces"
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest  # where the official downloader looks


def test_a_marked_export_comes_with_its_sidecar(hub, tmp_path):
    rng, words = np.random.default_rng(0), sorted(set(w for w in Path(__file__).read_text().split() if w.isalpha()))
    docs = [(f"doc{i}", " ".join(w.title() for w in rng.choice(words, 90))) for i in range(40)]
    made = build_dataset(docs, tmp_path / "made", VOCAB, transform="caseops")
    name = f"fineweb10B_sp{VOCAB}_lossless_caps_v1"
    top = "datasets"
    files = {f"{top}/tokenizers/fineweb_{VOCAB}_bpe_lossless_caps_v1.model": made.tokenizer.read_bytes()}
    for path in made.train + made.val + made.sidecar:
        files[f"{top}/datasets/{name}/{path.name.replace('embedded_caseops', 'fineweb')}"] = path.read_bytes()
    hub.repos["somebody/caps"] = files
    got = fetch(hub, tmp_path / "got", 1, f"sp{VOCAB}_lossless_caps_v1", repo="somebody/caps")
    ids, table = got.val_ids(), got.byte_table()
    assert len(got.sidecar) == 1 and got.name == "fineweb10B_lossless_caps_v1"
    assert table.count(ids[:-1], ids[1:]).sum() == made.byte_table().count(ids[:-1], ids[1:]).sum()
    del files[next(p for p in files if "val_bytes" in p)]
    hub.repos["somebody/caps"] = files | {f"{top}/datasets/{name}/fineweb_val_bytes_000001.bin": b"x"}
    with pytest.raises(DownloadError, match="lacks val_bytes shard 0"):
        fetch(hub, tmp_path / "again", 1, f"sp{VOCAB}_lossless_caps_v1", repo="somebody/caps")


@pytest.mark.parametrize("answer, says", [
    ((401, {"X-Error-Code": "RepoNotFound"}, b"{}"), "private or gated .401.: check the name, log in"),
    ((401, {}, b"{}"), "log in"),
    ((403, {"X-Error-Code": "GatedRepo"}, b"{}"), "accept its terms"),
    ((200, {"Content-Type": "text/html"}, b"<html>Please log in</html>"), "a web page came instead .*proxy"),
    ((429, {"Retry-After": "4000"}, b"{}"), "wait 4000 s, then run the same again")])
def test_each_refusal_of_the_hub_says_what_helps(hub, tmp_path, answer, says):
    hub.answers += [answer] * 20
    with pytest.raises(DownloadError, match=says) as e:
        fetch(hub, tmp_path)
    assert "\n" not in str(e.value) and "cannot be listed" in str(e.value)


@pytest.mark.parametrize("repo, env, says", [
    ("a b", {}, "a b cannot be listed: this is no name of a repository: write OWNER/NAME"), (HUB, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set, .*: unset it"),
    (HUB, {"HF_TOKEN": "hf_é"}, "set HF_TOKEN anew")])
def test_what_the_client_refuses_by_itself_says_what_helps(tmp_path, repo, env, says):
    code = ("import sys\nfrom pgolf.text.data import DatasetError, download_dataset\n"
            "try: download_dataset('sp1024', sys.argv[1], repo=sys.argv[2], progress=False)\nexcept DatasetError as e: print(e)")
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "PYTHONPATH": str(Path(__file__).resolve().parents[1]), **env}
    done = subprocess.run([sys.executable, "-c", code, tmp_path, repo], env=env, capture_output=True, text=True, timeout=60)
    assert re.search(says, done.stdout) and done.stdout.count("\n") == 1, done.stdout + done.stderr


def test_a_busy_hub_is_waited_for(hub, published, tmp_path, monkeypatch):
    naps = []
    monkeypatch.setattr("time.sleep", naps.append)
    hub.answers += [(429, {"Retry-After": "7"}, b"{}")] * 2
    hub.faults[VAL[0]] = [("status", 429, {"Retry-After": "2"})]
    assert fetch(hub, tmp_path, 1).val[0].read_bytes() == published[VAL[0]]
    assert naps.count(7) == 2


def test_bytes_for_tokens_are_refused_before_the_network_is_asked(hub, tmp_path):
    with pytest.raises(DownloadError, match="byte260 has bytes for tokens .* choose sp1024"):
        fetch(hub, tmp_path, variant="byte260")
    assert hub.log == []


def test_shards_without_a_header_are_refused_by_name(hub, published, tmp_path):
    hub.repos[HUB][TRAIN[0]] = published[TRAIN[0]][1024:]
    with pytest.raises(ShardError, match="fineweb_train_000000.bin: magic number .* no token shard"):
        fetch(hub, tmp_path)
