"""Building datasets: from a stream in bounded memory, killed and resumed, without copies, under names that people have."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pgolf.text.build import build_dataset
from pgolf.text.caseops import MARKS, mark_case
from pgolf.text.corpus import CorpusError, folder_documents
from pgolf.text.dataset import open_dataset
from pgolf.text.record import DATASET_RECORD, DatasetError, dataset_record
from pgolf.text.shards import read_shard, write_shard
from pgolf.text.sources import local_dataset
from pgolf.text.split import place_of
from pgolf.text.survey import survey_documents
from pgolf.text.tokenizer import BOS, TokenizerError, fit_tokenizer

WORDS = "the a model reads text and learns to say what comes next from bytes it has seen in a long stream".split()

NUMBERS = " ".join(f"{i * 7919 % 99991:x}" for i in range(5000))  # what a tokenizer of another text would learn from


def sentence(rng, n=60):
    return " ".join(rng.choice(WORDS, n)).capitalize() + "."


@pytest.fixture(scope="module")
def docs():
    rng = np.random.default_rng(0)
    return [(f"doc{i}", "\n".join(sentence(rng) for _ in range(4))) for i in range(60)]


def home(dataset):
    return dataset.val[0].parent


def named(prefix, val):
    "A name that the split puts on one side"
    return next(n for n in (f"{prefix}{i}" for i in range(999)) if (place_of(n, 0) <= 0.05) == val)


# ---- copies ----


def test_equal_documents_are_dropped_from_training_and_near_copies_too(docs, tmp_path):
    rng = np.random.default_rng(1)
    text = "\n".join(sentence(rng) for _ in range(4))
    words = text.split(" ")
    words[30] = "otherwise"
    extra = [(named("v", True), text), (named("t", False), text.replace(" ", "  ")), (named("n", False), " ".join(words))]
    said = []
    plain = build_dataset(docs + extra[:1], tmp_path / "plain", 320, name="x")
    copied = build_dataset(docs + extra, tmp_path / "copied", 320, name="x")
    assert dataset_record(home(copied))["dropped"] == {"equal": 1, "near": 1} and not said
    count = lambda d: sum(int((read_shard(p) == BOS).sum()) for p in d.train)
    assert count(copied) == count(plain)


def test_text_made_from_a_template_is_kept(tmp_path):
    text = sentence(np.random.default_rng(0), 400)
    form = [(f"form {i}", f"Number {i}. {text}") for i in range(40)]
    d = build_dataset(form, tmp_path, 320, name="forms")
    assert dataset_record(home(d))["dropped"] == {"equal": 0, "near": 0}
    assert sum(int((read_shard(p) == BOS).sum()) for p in (*d.train, *d.val)) == 40


def test_a_corpus_of_one_text_under_many_names_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="give more text"):
        build_dataset([(f"d{i}", "the same words") for i in range(40)], tmp_path, 320, name="same")


# ---- content is never overwritten ----


def test_datasets_of_one_name_and_other_content_live_side_by_side(docs, tmp_path):
    for part, chosen in (("x", docs[:30]), ("y", docs[30:])):
        (tmp_path / part / "texts").mkdir(parents=True)
        for name, text in chosen:
            (tmp_path / part / "texts" / f"{name}.txt").write_text(text)
    one, two = (local_dataset(tmp_path / part / "texts", tmp_path / "data", 320) for part in "xy")
    assert home(one) != home(two) and one.tokenizer != two.tokenizer and one.digest() != two.digest()
    for part, d in (("x", one), ("y", two)):
        assert local_dataset(tmp_path / part / "texts", tmp_path / "data", 320) == d == open_dataset(home(d))


def test_a_folder_of_text_is_not_read_again_while_its_files_stay(docs, tmp_path, monkeypatch):
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for _, t in docs))
    d = local_dataset(tmp_path / "docs.jsonl", tmp_path / "data", 320)
    assert home(d).name == "docs_sp320"
    monkeypatch.setattr("pgolf.text.build.survey_documents", lambda *a: pytest.fail("read again"))
    assert local_dataset(tmp_path / "docs.jsonl", tmp_path / "data", 320) == d


def test_shards_that_somebody_else_put_there_stay(docs, tmp_path):
    theirs = write_shard(tmp_path / "datasets" / "x_sp320" / "x_train_000000.bin", [BOS, 5])
    d = build_dataset(docs, tmp_path, 320, name="x")
    assert read_shard(theirs).tolist() == [BOS, 5] and home(d).name.startswith("x-")


@pytest.mark.parametrize("word", ["my texts", ".hid", "tëxt 日本", "a-b", "-x", "..", "%s;rm", "x" * 120])
def test_folders_of_any_name(docs, tmp_path, word):
    folder = tmp_path / "in" / ("z" + word if word == ".." else word)
    folder.mkdir(parents=True)
    for name, text in docs:
        (folder / f"{name}.txt").write_text(text)
    d = local_dataset(folder, tmp_path / "data", 320)
    assert d.name.isascii() and local_dataset(home(d), vocab=320) == d
    assert local_dataset(folder, tmp_path / "data", 320, name="mine").name == "mine"


# ---- layouts that are opened ----


def test_a_linked_dataset_is_called_as_it_was_given(docs, tmp_path):
    d = build_dataset(docs, tmp_path / "store", 320, name="inner")
    link = tmp_path / "data" / "datasets" / "outer_sp320"
    link.parent.mkdir(parents=True)
    link.symlink_to(home(d))
    assert open_dataset(link).name == "outer" and open_dataset(link).digest() == d.digest()
    other = build_dataset(docs[::-1], tmp_path / "store", 400, name="inner")
    assert open_dataset(link).tokenizer.resolve() == d.tokenizer.resolve() != other.tokenizer


def test_a_wrong_tokenizer_of_the_right_size_is_seen(docs, tmp_path):
    d = build_dataset(docs, tmp_path, 320, name="x")
    (home(d) / DATASET_RECORD).unlink()
    right = d.tokenizer.read_bytes()
    d.tokenizer.write_bytes(fit_tokenizer([NUMBERS], 320))
    with pytest.raises(DatasetError, match="would choose only .*copy or link the one that did into"):
        open_dataset(home(d))
    (home(d) / "x_320_bpe.model").write_bytes(right)  # the advice works as it is typed
    assert open_dataset(home(d)).tokenizer.parent == home(d)


def test_two_tokenizers_are_told_apart_by_the_tokens(docs, tmp_path):
    d = build_dataset(docs, tmp_path, 320, name="x")
    (home(d) / DATASET_RECORD).unlink()
    for name, model in (("a", d.tokenizer.read_bytes()), ("b", fit_tokenizer([NUMBERS], 320))):
        (d.tokenizer.parent / f"x_320_bpe_{name}.model").write_bytes(model)
    d.tokenizer.unlink()
    assert open_dataset(home(d)).tokenizer.name == "x_320_bpe_a.model"


# ---- bytes of the original ----


@pytest.fixture(params=["caseops", "caseops_fused"])
def cased(request, tmp_path):
    rng = np.random.default_rng(0)
    text = lambda: " ".join(w.title() if rng.random() < 0.2 else w.upper() if rng.random() < 0.1 else w
                            for w in rng.choice(WORDS, 200)) + " iPhone \ue001 caf\u00e9\n"
    docs = [(f"doc{i}", text()) for i in range(60)]
    d = build_dataset(docs, tmp_path, 330, name="x", transform=request.param)
    survey = survey_documents(docs)
    return d, [t for (_, t), scored in zip(docs, survey.val(0.05)) if scored]


def total(d):
    ids = d.val_ids()
    return int(d.byte_table().count(ids[:-1], ids[1:]).sum())


def test_a_marked_dataset_counts_the_bytes_of_the_original(cased):
    d, texts = cased
    assert re.fullmatch("x_caseops(_fused)?_sp330", home(d).name)
    assert d.sidecar[0].name == home(d).name.replace("_sp330", "_val_bytes_000000.bin")
    assert total(d) == sum(len(t.encode()) for t in texts) < sum(len(mark_case(t).encode()) for t in texts)
    table, ids = d.byte_table(), d.val_ids()
    assert table.count(ids[:50], ids[1:51]).tolist() == read_shard(d.sidecar[0])[1:51].tolist()


def test_without_the_sidecar_marks_count_nothing(cased):
    d, texts = cased
    d.sidecar[0].unlink()
    (home(d) / DATASET_RECORD).unlink()
    escaped = sum(3 * t.count("\ue001") for t in texts)
    assert total(open_dataset(home(d))) == sum(len(t.encode()) for t in texts) - escaped


@pytest.mark.parametrize("hurt, says", [
    ("short", "bytes of .* tokens, .* has"), ("doubled", "belongs to another text"), ("on BOS", "begins a document"),
    ("renamed", "byte sidecar .* (is missing|belongs to no)"), ("one too many", "belongs to no validation shard")])
def test_a_sidecar_is_never_left_aside(cased, hurt, says):
    d, _ = cased
    path, each = d.sidecar[0], read_shard(d.sidecar[0]).astype(int)
    (home(d) / DATASET_RECORD).unlink()
    if hurt == "short":
        write_shard(path, each[:-1])
    if hurt == "doubled":
        write_shard(path, 2 * each)
    if hurt == "on BOS":
        write_shard(path, np.where(d.val_ids() == BOS, 1, each))
    if hurt == "renamed":
        path.rename(path.with_name("other_val_bytes_000000.bin"))
    if hurt == "one too many":
        write_shard(path.with_name(path.name.replace("000000", "000001")), each)
    with pytest.raises(ValueError, match=says):
        open_dataset(home(d)).byte_table()


def test_symbols_of_no_known_transform_are_refused(docs, tmp_path):
    d = build_dataset(docs, tmp_path, 320, name="x")
    (home(d) / DATASET_RECORD).unlink()
    d.tokenizer.write_bytes(fit_tokenizer([t for _, t in docs], 320, symbols=("<cap>", *MARKS)))
    with pytest.raises(TokenizerError, match="symbols of its own .'<cap>'.*use a tokenizer without"):
        open_dataset(home(d))


# ---- a stream ----

STREAM = """
import re, sys, torch
from pgolf.text.sources import local_dataset
import pgolf.text.build as build
build.NOTE_TOKENS = int(sys.argv[3])
peak = lambda: int(re.search("VmHWM: *(\\d+)", open("/proc/self/status").read().expandtabs(1))[1]) // 1024  # of this program only
before = peak()  # a PyTorch for GPUs alone takes 300 MB more than one for CPUs
d = local_dataset(sys.argv[1], sys.argv[2], 320)
print(peak() - before)
"""


def start(source, root, note=2000):
    return subprocess.Popen([sys.executable, "-c", STREAM, str(source), str(root), str(note)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(root):
    files = [p for p in (root / "datasets").rglob("*.bin")]
    return {p.relative_to(root): p.read_bytes() for p in files}


@pytest.mark.slow
def test_a_build_that_was_killed_goes_on_and_ends_the_same(tmp_path):
    rng = np.random.default_rng(0)
    with open(tmp_path / "docs.jsonl", "w") as f:
        for _ in range(12_000):
            f.write(json.dumps({"text": sentence(rng, 40)}) + "\n")
    whole = start(tmp_path / "docs.jsonl", tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    note = tmp_path / "killed" / "datasets" / ".docs_sp320.part" / "building.json"
    resumed = []
    for _ in range(3):
        build, until = start(tmp_path / "docs.jsonl", tmp_path / "killed"), time.monotonic() + 120
        done = resumed[-1] if resumed else 0
        while time.monotonic() < until and build.poll() is None:
            if note.exists() and json.loads(note.read_text()).get("train", {}).get("done", 0) > done + 1500:
                break
            time.sleep(0.005)
        build.send_signal(signal.SIGKILL)
        build.wait()
        if note.exists():
            resumed.append(json.loads(note.read_text())["train"]["done"])
    assert len(resumed) == 3 and resumed == sorted(set(resumed)), "each went on where the one before stood"
    last = start(tmp_path / "docs.jsonl", tmp_path / "killed")
    assert last.wait(timeout=300) == 0, last.stderr.read()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert not note.parent.exists()


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    "A corpus of PGOLF_STREAM_MB megabytes, 60 where nothing is said, of repeated text with unique heads"
    size, text = int(os.environ.get("PGOLF_STREAM_MB", 60)) * 10**6, sentence(np.random.default_rng(0), 2000)
    with open(tmp_path / "docs.jsonl", "w") as f:
        i = 0
        while f.tell() < size:
            f.write(json.dumps({"text": f"Document {i}, number {i * i}.\n{text}"}) + "\n")
            i += 1
    build = start(tmp_path / "docs.jsonl", tmp_path / "data", 2_000_000)
    out, err = build.communicate(timeout=3000)
    assert build.returncode == 0, err
    assert int(out) < 300, "MB at the most"


LARGE = STREAM.replace("sys.argv[2], 320)", "sys.argv[2], 320, progress=True)")


@pytest.mark.slow
@pytest.mark.skipif("PGOLF_STREAM_MB" not in os.environ, reason="takes a minute a hundred megabytes: PGOLF_STREAM_MB=2000 asks for it")
def test_a_large_build_shows_progress_and_goes_on_after_a_kill_within_its_memory(tmp_path):
    "PGOLF_STREAM_MB megabytes of repeated text with unique heads, killed in the middle"
    size, text = int(os.environ["PGOLF_STREAM_MB"]) * 10**6, sentence(np.random.default_rng(0), 2000)
    with open(tmp_path / "docs.jsonl", "w") as f:
        count = 0
        while f.tell() < size:
            f.write(json.dumps({"text": f"Document {count}, number {count * count}.\n{text}"}) + "\n")
            count += 1
    note = tmp_path / "data" / "datasets" / ".docs_sp320.part" / "building.json"
    def begin(log):
        command = [sys.executable, "-c", LARGE, str(tmp_path / "docs.jsonl"), str(tmp_path / "data"), "2000000"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
    began, first = time.monotonic(), begin(tmp_path / "first")
    while first.poll() is None:
        time.sleep(0.1)
        try: done = json.loads(note.read_text())["train"]["done"]
        except (OSError, ValueError, KeyError): continue
        if done > count // 2: break
    assert first.poll() is None, "it is to be killed half way"
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{first.pid}/status").read_text())[1]) // 1024
    first.kill()
    first.wait()
    until = time.monotonic() - began
    second = begin(tmp_path / "second")
    out, _ = second.communicate()
    said = [(tmp_path / name).read_text() for name in ("first", "second")]
    assert second.returncode == 0, said[1]
    print(f"{size / 1e6:,.0f} MB, {count:,} documents: {until / 60:.1f} minutes to the kill, {(time.monotonic() - began) / 60:.1f} in all; "
          f"peak {peak} and {int(out)} MB")
    assert peak < 900 and int(out) < 300, "MB at the most"
    assert all("%" in text for text in said), "both show how far they are"
    assert time.monotonic() - began - until < 0.9 * until + 60, "the second went on where the first stood"
    record = json.loads(next((tmp_path / "data" / "datasets").glob("*/dataset.json")).read_text())
    assert sum(record["tokens"].values()) > size / 5


# ---- what is read ----


def test_an_unreadable_file_in_the_middle_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8b not really")
    with pytest.raises(CorpusError, match="b.jsonl.gz: cannot be read to its end"):
        list(folder_documents(tmp_path))


def test_parquet_is_read_where_pyarrow_is_there(tmp_path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        with pytest.raises(CorpusError, match="a.parquet: .*pip install pyarrow"):
            list(folder_documents(tmp_path))
        return
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two"]}), tmp_path / "a.parquet")
    assert [t for _, t in folder_documents(tmp_path)] == ["one", "two"]


# ---- the command ----


def command(*words, **env):
    program = os.path.join(os.path.dirname(sys.executable), "pgolf_data")
    return subprocess.run([program, *map(str, words)], capture_output=True, text=True, timeout=120, env=os.environ | env)


def test_the_command_builds_says_and_refuses(docs, tmp_path):
    (tmp_path / "my texts").mkdir()
    for name, text in docs:
        (tmp_path / "my texts" / f"{name}.md").write_text(text)
    (tmp_path / "my texts" / "scan.pdf").write_bytes(b"%PDF")
    done = command(tmp_path / "my texts", "--vocab", 330, "--root", tmp_path / "data", "--transform", "caseops")
    assert done.returncode == 0, done.stderr
    assert "my-texts_caseops_sp330: 330 pieces" in done.stdout and "bytes of the original in a sidecar" in done.stdout
    assert "read 60 .md; left out 1 .pdf" in done.stderr
    assert "sha256" in done.stdout.splitlines()[1]
    made = tmp_path / "data" / "datasets" / "my-texts_caseops_sp330"
    assert command(made).returncode == 0
    for words, says in [(["sp1024", "--shards", "-1"], "--shards -1: ask for 1"), (["byte260"], "choose sp1024"),
                        ([tmp_path / "gone"], "is no folder or file"), (["sp1024", "--transform", "caseops"], "leave")]:
        done = command(*words)
        assert done.returncode == 1 and says in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_a_reader_that_has_had_enough_is_no_error(docs, tmp_path):
    d = build_dataset(docs, tmp_path, 320, name="x")
    program = os.path.join(os.path.dirname(sys.executable), "pgolf_data")
    done = subprocess.run(["bash", "-c", f"set -o pipefail; '{program}' '{home(d)}' | true"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
