"""Byte accounting against decoded text, and tokenizers that must be refused."""

import hashlib, json, subprocess, sys

import pytest
import sentencepiece
import torch
from hypothesis import example, given, settings, strategies as st

from pgolf.text.tokenizer import (
    BOS,
    ByteTable,
    TokenizerError,
    byte_table,
    fit_tokenizer,
    load_tokenizer,
    rare_characters,
    train_tokenizer,
    write_atomic,
)

WORDS = "the cat sat on the mat\n    while the dog, who had a hat, lay flat: (1 + 2) == 3;\n\tcaf\u00e9 na\u00efve \u4e2d\u6587\n\n"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
PROSE = st.text(st.sampled_from("  \n\tthecasonmi.,\u00e9\u2581\u4e2d\U0001f600<0x>"), max_size=60)


def model(**kwargs):
    "A small tokenizer; keywords override how the challenge's are trained"
    import io

    out = io.BytesIO()
    settings = dict(
        model_type="bpe",
        vocab_size=300,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        minloglevel=2,
        num_threads=1,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((WORDS * 3).split("\n")), model_writer=out, **settings | kwargs
    )
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.fixture(scope="module")
def ours():
    return sentencepiece.SentencePieceProcessor(model_proto=fit_tokenizer([WORDS] * 3, 320))


def count(table, ids, prev=-1):
    ids = torch.tensor(ids, dtype=torch.long)
    return int(table.count(torch.cat([torch.tensor([prev]), ids[:-1]])[: len(ids)], ids).sum())


@settings(deadline=None, max_examples=300)
@given(text=TEXT | PROSE)
@example("")
@example(" ")
@example("  x")
@example("\n")
@example("\u2581")
@example("a\u2581\u2581b")
@example("\0")
@example("\ufeffx")
@example("<s>")
@example("<0x41>")
@example("\U0001f600\u0301")
@example(" \u2581 ")
def test_every_text_comes_back_and_is_counted_exactly(ours, text):
    ids = ours.encode(text)
    assert ours.decode(ids) == text.replace("\u2581", " ")
    assert count(byte_table(ours), [BOS] + ids) == len(ours.decode(ids).encode())
    assert count(byte_table(ours), ids) == len(
        ours.decode(ids).encode()
    )  # no BOS at the start of a stream: -1 stands for it


@settings(deadline=None, max_examples=50)
@given(texts=st.lists(TEXT | PROSE, min_size=1, max_size=5))
def test_a_stream_of_documents_counts_as_their_sum(ours, texts):
    stream = [i for t in texts for i in [BOS] + ours.encode(t)]
    assert count(byte_table(ours), stream) == sum(len(ours.decode(ours.encode(t)).encode()) for t in texts)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
        {"normalization_rule_name": "identity"},
        {"control_symbols": "<sep>"},
        {"user_defined_symbols": "cat"},
        {"bos_id": -1, "eos_id": -1, "pad_id": -1, "unk_id": 0},
    ],
)
def test_other_tokenizers_are_counted_exactly_too(kwargs):
    sp = model(**kwargs)
    for text in [WORDS, "cat", " the cat  sat ", "\u00e9\u2581x\n", ""]:
        assert count(byte_table(sp), sp.encode(text)) == len(sp.decode(sp.encode(text)).encode())


def test_byte_pieces_are_one_byte_and_controls_none(ours):
    table = byte_table(ours)
    assert table.nbytes[4:260].tolist() == [1] * 256 and not table.space[:260].any()
    assert (
        table.boundary.nonzero().flatten().tolist() == [0, 1, 2, 3] and table.nbytes[:4].tolist() == [0] * 4
    )


def test_a_tokenizer_that_counts_wrongly_is_refused(ours, tmp_path):
    path = write_atomic(
        tmp_path / "a.model",
        fit_tokenizer([WORDS], 300).replace(b"\n\x03\xe2\x96\x81", b"\n\x03\xe2\x96\x80"),
    )
    with pytest.raises(TokenizerError, match=r"no piece for a space alone \(U\+2581\)"):
        byte_table(path)
    with pytest.raises(TokenizerError, match="add_dummy_prefix"):
        byte_table(model(add_dummy_prefix=False, remove_extra_whitespaces=False))


def test_the_table_survives_json_and_nothing_else_is_read(ours):
    table = byte_table(ours)
    again = ByteTable.from_json(table.to_json())
    assert all(
        (getattr(again, k) == getattr(table, k)).all() and getattr(again, k).dtype == getattr(table, k).dtype
        for k in ("nbytes", "space", "boundary")
    )
    good = json.loads(table.to_json())
    for bad in [
        None,
        3,
        [good],
        {},
        good | {"more": 1},
        good | {"nbytes": good["nbytes"][1:]},
        good | {"space": good["space"] + "0"},
        good | {"boundary": "x" + good["boundary"][1:]},
        good | {"nbytes": [1.5] + good["nbytes"][1:]},
        good | {"nbytes": [True] + good["nbytes"][1:]},
        good | {"nbytes": [-1] + good["nbytes"][1:]},
        good | {"space": list(good["space"])},
    ]:
        with pytest.raises(TokenizerError, match="no byte table"):
            ByteTable.from_json(json.dumps(bad))
    with pytest.raises(TokenizerError, match="no byte table"):
        ByteTable.from_json(table.to_json()[:-1])


def test_ids_that_do_not_fit_are_refused(ours):
    table, t = byte_table(ours), torch.tensor
    for prev, ids in [([1], [320]), ([1], [-1]), ([320], [1]), ([-2], [1])]:
        with pytest.raises(TokenizerError, match="do not fit this tokenizer's 320 pieces"):
            table.count(t(prev), t(ids))
    assert table.count(t([], dtype=torch.long), t([], dtype=torch.long)).shape == (0,)
    assert table.count(t([[1, 5], [5, -1]]), t([[5, 5], [5, 5]])).tolist() == [[1, 1], [1, 1]]


def test_the_same_text_trains_the_same_file_in_another_process(tmp_path):
    here = train_tokenizer([WORDS], tmp_path / "here.model", 300).read_bytes()
    code = f"from pgolf.text.tokenizer import fit_tokenizer; import hashlib; print(hashlib.sha256(fit_tokenizer([{WORDS!r}], 300)).hexdigest())"
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    ).stdout.strip()
    assert hashlib.sha256(here).hexdigest() == there


def test_many_characters_leave_room_for_words():
    chinese = "".join(chr(0x4E00 + i * i % 3000) for i in range(6000))
    sp = sentencepiece.SentencePieceProcessor(model_proto=fit_tokenizer([chinese, WORDS * 50], 600))
    assert sp.vocab_size() == 600 and sp.decode(sp.encode(chinese)) == chinese
    assert sum(len(sp.id_to_piece(i)) > 1 and not sp.is_byte(i) for i in range(4, 600)) >= 150
    assert rare_characters([chinese], 600) and not rare_characters([WORDS], 600, 1.0)


@pytest.mark.parametrize(
    "texts, vocab", [([], 300), ([""], 300), (["\n"], 300), ([WORDS], 260), ([WORDS], 10), ([WORDS], 30000)]
)
def test_training_that_cannot_work_says_so(texts, vocab):
    with pytest.raises(
        TokenizerError, match=f"no tokenizer of {vocab} pieces can be trained on this text.*: give more text"
    ):
        fit_tokenizer(texts, vocab)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    for name, data in [("empty", b""), ("text", b"hello"), ("torn", fit_tokenizer([WORDS], 300)[:500])]:
        path = write_atomic(tmp_path / name, data)
        with pytest.raises(TokenizerError, match=f"{name} is not a SentencePiece model"):
            load_tokenizer(path)
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(TokenizerError, match="no tokenizer at"):
        load_tokenizer(tmp_path)


def test_writing_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = write_atomic(tmp_path / "sub" / "f", b"old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1
