"""Shards, corpora, datasets and loaders: what files can suffer, and what ranks may see."""

import gc, hashlib, json, os, signal, subprocess, sys, threading, time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from pgolf.text.data import (
    SHARD_MAGIC,
    DATASET_RECORD,
    CorpusError,
    DatasetError,
    Loader,
    ShardError,
    build_dataset,
    document_cuts,
    embedded_dataset,
    embedded_documents,
    encode_shards,
    epoch_plan,
    folder_documents,
    make_loader,
    open_dataset,
    paragraph_key,
    paragraphs,
    read_shard,
    shard_tokens,
    split_documents,
    unique_paragraphs,
    write_shard,
)
from pgolf.text.tokenizer import BOS, fit_tokenizer, load_tokenizer

quick = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DOCS = [
    (
        f"doc{i}",
        f"Document {i} speaks of the number {i * i}.\n\n    It has an indented line, and a caf\u00e9.\n" * 3,
    )
    for i in range(40)
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_dataset(DOCS, tmp_path_factory.mktemp("root"), vocab=320, name="mine")


@pytest.fixture(scope="module")
def corpus():
    return list(embedded_documents())


def home(dataset):
    return dataset.val[0].parent


# ---- shards ----


@quick
@given(ids=st.lists(st.integers(0, 65535), min_size=1, max_size=50))
def test_a_shard_comes_back(tmp_path, ids):
    path = write_shard(tmp_path / "s.bin", ids)
    assert (
        read_shard(path).tolist() == ids
        and shard_tokens(path) == len(ids)
        and path.stat().st_size == 1024 + 2 * len(ids)
    )
    assert np.fromfile(path, "<i4", 256).tolist() == [SHARD_MAGIC, 1, len(ids)] + [0] * 253
    if max(ids) < 65535:
        read_shard(path, max(ids) + 1)
    with pytest.raises(ShardError, match=f"token {max(ids)} .*not below the vocabulary size {max(ids)}"):
        read_shard(path, max(ids))


@quick
@given(keep=st.integers(0, 1043))
def test_every_truncation_is_refused(tmp_path, keep):
    path = write_shard(tmp_path / "s.bin", range(10))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ShardError, match=f"s.bin.*{keep}.*cut short") as e:
        read_shard(path)
    assert "1024" in str(e.value) or "1044" in str(e.value)  # both numbers


@pytest.mark.parametrize(
    "word, value, says",
    [
        (0, 5, "magic number 5, not 20240520"),
        (1, 3, "version 3, only 1"),
        (2, 9, "9 tokens .* 1042 bytes.* has 1044"),
        (2, 11, "11 tokens .* 1046 bytes.* has 1044: cut short"),
        (2, 0, "0 tokens"),
        (2, 2**32 - 1, "-1 tokens"),
    ],
)
def test_every_bad_header_is_refused(tmp_path, word, value, says):
    path = write_shard(tmp_path / "s.bin", range(10))
    raw = bytearray(path.read_bytes())
    raw[4 * word : 4 * word + 4] = value.to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(ShardError, match=f"s.bin: {says}"):
        read_shard(path)


def test_what_is_no_shard_is_refused(tmp_path):
    with pytest.raises(ShardError, match="No such file"):
        read_shard(tmp_path / "gone.bin")
    with pytest.raises(ShardError, match="cannot be read"):
        read_shard(tmp_path)
    for ids in ([], [[1, 2]], [-1], [65536]):
        with pytest.raises(ShardError, match="new.bin"):
            write_shard(tmp_path / "new.bin", ids)
    assert not (tmp_path / "new.bin").exists()


# ---- corpora ----

PARAGRAPH = st.sampled_from(["one", "two  words", "two words", "three\nlines\nhere", "  indented"])


@quick
@given(
    docs=st.lists(st.lists(PARAGRAPH, max_size=6).map("\n\n".join), max_size=8),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 9),
)
def test_train_and_val_share_no_paragraph(docs, fraction, seed):
    named = [(f"d{i}", t) for i, t in enumerate(docs)]
    unique = list(unique_paragraphs(named))
    keys = [paragraph_key(p) for _, t in unique for p in paragraphs(t)]
    assert len(set(keys)) == len(keys) and set(keys) == {
        paragraph_key(p) for t in docs for p in paragraphs(t)
    }
    assert list(unique_paragraphs(unique)) == unique
    if len(unique) < 2:
        return
    train, val = split_documents(unique, fraction, seed)
    assert train and val and sorted(train + val) == sorted(t for _, t in unique)


def test_more_documents_move_none():
    _, val = split_documents(DOCS, 0.3)
    _, more = split_documents([("new", "another")] + DOCS + [("newer", "one more")], 0.3)
    assert set(val) == set(more) - {"another", "one more"}
    assert split_documents(DOCS, 0.3, seed=1) != split_documents(DOCS, 0.3)
    for bad in (0, 1, -1, float("nan")):
        with pytest.raises(CorpusError, match="between 0 and 1"):
            split_documents(DOCS, bad)


def test_the_embedded_corpus_is_the_same_in_another_process(corpus):
    code = "import hashlib, pgolf.text.data as d; print(hashlib.sha256(repr(list(d.embedded_documents())).encode()).hexdigest())"
    there = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7"},
    ).stdout
    assert there.strip() == hashlib.sha256(repr(corpus).encode()).hexdigest()
    assert (
        len({name for name, _ in corpus}) == len(corpus) > 400
        and 1.5e6 < sum(len(t.encode()) for _, t in corpus) < 3e6
    )


def test_folders_of_text(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_bytes("\ufeffwith a mark\r\n".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "one", "url": 3}\n\n{"text": "two\\nlines"}')
    (tmp_path / "c.MD").write_text("read too")
    (tmp_path / "d.pdf").write_text("not read")
    assert list(folder_documents(tmp_path)) == [
        ("a.jsonl:1", "one"),
        ("a.jsonl:3", "two\nlines"),
        ("b/z.txt", "with a mark\r\n"),
        ("c.MD", "read too"),
    ]
    assert str(folder_documents(tmp_path)).endswith("read 1 .jsonl, 1 .txt, 1 .md; left out 1 .pdf")
    assert [t for _, t in folder_documents(tmp_path / "a.jsonl")] == ["one", "two\nlines"]


@pytest.mark.parametrize(
    "line, says",
    [
        (b"{", "no JSON"),
        (b"nonsense", "no JSON"),
        (b"[]", "string"),
        (b"{}", "string"),
        (b'{"text": null}', "string"),
        (b"3", "string"),
        (b'{"text": "\\udc00"}', "surrogate"),
        (b'{"text": "\xff"}', "byte 10 is no UTF-8"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, says):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "ok"}\n\n' + line)
    with pytest.raises(CorpusError, match=f"x.jsonl, line 3: .*{says}"):
        list(folder_documents(tmp_path))


def test_folders_without_text_are_refused(tmp_path):
    with pytest.raises(CorpusError, match="no corpus at"):
        list(folder_documents(tmp_path / "gone"))
    with pytest.raises(CorpusError, match="no .txt, .md, .jsonl or .parquet file there"):
        list(folder_documents(tmp_path))
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match="x.txt: byte 3 is no UTF-8"):
        list(folder_documents(tmp_path))
    with pytest.raises(CorpusError, match="1 document with text is too few"):
        build_dataset([("a", "x"), ("b", "\n")], tmp_path / "root")


# ---- datasets ----


def test_a_dataset_holds_its_documents(built):
    train, val = split_documents(DOCS)
    root, sp = home(built).parent.parent, load_tokenizer(built.tokenizer)
    assert (
        built.tokenizer == root / "tokenizers" / "mine_320_bpe.model"
        and home(built) == root / "datasets" / "mine_sp320"
    )
    assert built.tokenizer.read_bytes() == fit_tokenizer(train, 320)  # of training documents only
    for shards, texts in ((built.train, train), (built.val, val)):
        assert read_shard(shards[0], 320).tolist() == [i for t in texts for i in [BOS] + sp.encode(t)]
    ids = built.val_ids()
    assert ids.dtype == torch.int64 and built.byte_table().count(ids[:-1], ids[1:]).sum() == sum(
        len(t.encode()) for t in val
    )
    assert open_dataset(home(built), vocab=320) == built and (built.name, built.vocab) == ("mine", 320)
    assert not [p for p in root.rglob("*") if p.name.startswith(".") and p.suffix != ".lock"]


def test_documents_run_over_the_ends_of_shards(built, tmp_path):
    texts, sp = [t for _, t in DOCS], load_tokenizer(built.tokenizer)
    sizes = encode_shards(texts, built.tokenizer, tmp_path / "x_train", size=100)
    assert list(sizes) == [f"x_train_{i:06d}.bin" for i in range(len(sizes))] and set(
        list(sizes.values())[:-1]
    ) == {100}
    assert np.concatenate([read_shard(tmp_path / n) for n in sizes]).tolist() == [
        i for t in texts for i in [BOS] + sp.encode(t)
    ]
    exact = encode_shards(["x"], built.tokenizer, tmp_path / "y_train", size=1 + len(sp.encode("x")))
    assert len(exact) == 1


def test_building_again_does_nothing_and_other_text_builds_anew(tmp_path):
    one = build_dataset(DOCS, tmp_path, vocab=320)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert build_dataset(iter(DOCS), tmp_path, vocab=320) == one
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    old = one.val_ids()
    two = build_dataset(DOCS[::-1], tmp_path, vocab=320, seed=1)
    assert home(two) != home(one) and two.val_ids().tolist() != old.tolist()
    assert open_dataset(home(two)) == two and open_dataset(home(one)) == one  # neither replaced the other
    assert build_dataset(DOCS[::-1], tmp_path, vocab=320, seed=1) == two


def test_a_named_source_is_not_read_twice(tmp_path):
    one = build_dataset(DOCS, tmp_path, vocab=320, source="docs, first edition")

    def never():
        raise AssertionError("read")
        yield

    assert build_dataset(never(), tmp_path, vocab=320, source="docs, first edition") == one
    with pytest.raises(AssertionError, match="read"):
        build_dataset(never(), tmp_path, vocab=320, source="docs, second edition")


@pytest.mark.parametrize("hurt", ["truncate", "foreign", "gone", "tokenizer", "record", "no val"])
def test_a_damaged_dataset_is_refused_and_then_built_anew(tmp_path, hurt):
    d = build_dataset(DOCS, tmp_path, vocab=320)
    whole = {p: p.read_bytes() for p in d.train + d.val}
    if hurt == "truncate":
        d.train[0].write_bytes(whole[d.train[0]][:-10])
    if hurt == "foreign":
        write_shard(d.val[0], [BOS] + [400] * (shard_tokens(d.val[0]) - 1))
    if hurt == "gone":
        write_shard(d.train[0], [BOS])
    if hurt == "tokenizer":
        d.tokenizer.write_bytes(fit_tokenizer([t for _, t in DOCS[:30]], 320))
    if hurt == "record":
        (home(d) / DATASET_RECORD).write_text("{")
    if hurt == "no val":
        d.val[0].unlink()
    with pytest.raises(ValueError, match="cut short|not below|again"):
        open_dataset(home(d))
    assert (
        build_dataset(DOCS, tmp_path, vocab=320) == d
        and {p: p.read_bytes() for p in d.train + d.val} == whole
    )


def test_opening_what_does_not_fit_is_refused(built, tmp_path):
    def no(folder, says, **kwargs):
        with pytest.raises(DatasetError, match=says):
            open_dataset(folder, **kwargs)

    no(tmp_path / "gone", "no dataset at .*build_dataset.*download_dataset")
    no(tmp_path, "no train shards")
    no(home(built), "asked for was a vocabulary of 1024 pieces, .* has 320: ask for 320, or use another", vocab=1024)
    (lone := tmp_path / "some_sp320").mkdir()
    for p in built.train + built.val:
        (lone / p.name).write_bytes(p.read_bytes())
    no(lone, "no tokenizer that fits, of the name mine_320_bpe.model, in .*: copy or link the one")
    assert open_dataset(lone, tokenizer=built.tokenizer).name == "some"
    renamed = lone.rename(tmp_path / "some_sp512")
    no(renamed, "the name of the folder says 512 pieces, .* has 320", tokenizer=built.tokenizer)
    plain = renamed.rename(tmp_path / "plain")
    assert open_dataset(plain, tokenizer=built.tokenizer).vocab == 320
    write_shard(plain / "mine_train_000002.bin", [BOS])
    no(plain, "2 train shards, but number 1 is missing", tokenizer=built.tokenizer)
    (plain / "mine_train_000002.bin").rename(plain / "other_train_000001.bin")
    no(plain, "train shards of mine and other in one folder", tokenizer=built.tokenizer)
    (plain / "other_train_000001.bin").unlink()
    write_shard(plain / "mine_val_000000.bin", [5, 6])
    no(plain, "no document in its validation shards begins with BOS", tokenizer=built.tokenizer)
    with pytest.raises(DatasetError, match="cannot be called '../x'"):
        build_dataset(DOCS, tmp_path, name="../x")


BUILD = (
    "import sys, pgolf.text.data as d\n"
    "docs = [(f'doc{i}', f'Document {i} speaks of the number {i*i}.\\n'*50) for i in range(60)]\n"
    "print('go', flush=True)\n"
    "for i in range(int(sys.argv[2])): d.build_dataset(docs, sys.argv[1], vocab=320, seed=i%2)"
)


@pytest.mark.slow
def test_builders_killed_or_at_once_leave_a_whole_dataset_or_none(tmp_path):
    "Three processes rebuild the same dataset, two are killed at random moments: at any time what can be opened is whole"
    rng, opened, refused = np.random.default_rng(0), 0, 0
    procs = [
        subprocess.Popen([sys.executable, "-c", BUILD, str(tmp_path), n], stdout=subprocess.PIPE)
        for n in ("200", "200", "8")
    ]
    try:
        for p in procs:
            p.stdout.readline()
        stops = sorted(time.monotonic() + rng.uniform(0.3, 1.5) for _ in range(2))
        while procs[2].poll() is None:
            if stops and time.monotonic() > stops[0]:
                stops.pop(0)
                procs[len(stops)].send_signal(signal.SIGKILL)
            try:
                ids = (d := open_dataset(tmp_path / "datasets" / "embedded_sp320")).val_ids()
                opened += 1
                assert ids[0] == BOS and d.vocab == 320
            except (ValueError, FileNotFoundError):
                refused += 1
    finally:
        for p in procs:
            p.kill()
            p.wait()
    assert procs[2].returncode == 0 and opened
    docs = [(f"doc{i}", f"Document {i} speaks of the number {i * i}.\n" * 50) for i in range(60)]
    final = build_dataset(docs, tmp_path, vocab=320)
    sp = load_tokenizer(final.tokenizer)
    assert read_shard(final.val[0]).tolist() == [
        i for t in split_documents(docs)[1] for i in [BOS] + sp.encode(t)
    ]


# ---- loaders ----


@st.composite
def jobs(draw):
    "Shards whose tokens say where they are, and a loader's shape"
    seq_len, rows = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5).filter(lambda s: max(s) > seq_len))
    return sizes, seq_len, rows * seq_len, draw(st.sampled_from([1, 2, 3, 4]))


def make_shards(folder, sizes):
    ends = np.cumsum(sizes)
    return [
        write_shard(folder / f"x_train_{i:06d}.bin", np.arange(end - n, end) + 10)
        for i, (n, end) in enumerate(zip(sizes, ends))
    ]


def rounds(loaders, n):
    "The next n micro-batches of every rank, in the order of their number k"
    return [loader.next() for _ in range(n) for loader in loaders]


def ranks(order, shards, tokens, seq_len, world, **kwargs):
    return [make_loader(order, shards, tokens, seq_len, rank, world, **kwargs) for rank in range(world)]


def close(loaders):
    for loader in loaders:
        loader.close()


@quick
@given(job=jobs(), order=st.sampled_from(["stream", "packed"]))
def test_the_spans_of_all_ranks_are_the_stream(tmp_path, job, order):
    sizes, seq_len, tokens, world = job
    stream = np.arange(sum(sizes)) + 10
    batches = rounds(loaders := ranks(order, make_shards(tmp_path, sizes), tokens, seq_len, world), 4)
    close(loaders)
    seen = np.concatenate([np.append(b.x.flatten(), b.y.flatten()[-1]) for b in batches])
    assert (
        seen == np.resize(stream, len(seen))
    ).all()  # disjoint, in order, nothing left out, again from the start
    for b in batches:
        assert (b.x.flatten()[1:] == b.y.flatten()[:-1]).all() and b.x.dtype == b.y.dtype == torch.int64
        assert b.x.shape == b.y.shape == ((1, tokens) if order == "packed" else (tokens // seq_len, seq_len))
        name, at = b.where.split(" at ")
        assert read_shard(tmp_path / name)[int(at)] == b.x[0, 0]


@quick
@given(job=jobs(), seed=st.integers(0, 3))
def test_shuffled_visits_every_sequence_once_an_epoch(tmp_path, job, seed):
    sizes, seq_len, tokens, world = job
    shards = make_shards(tmp_path, sizes)
    order = make_loader("shuffled", shards, tokens, seq_len, seed=seed, deal="sequences").order
    plans = [epoch_plan(sizes, seq_len, np.random.Generator(np.random.PCG64([0, seed, e]))) for e in range(2)]
    n = sum(map(len, plans))
    steps = -(-n // (world * tokens // seq_len))
    batches = rounds(
        loaders := ranks("shuffled", shards, tokens, seq_len, world, seed=seed, deal="sequences"), steps
    )
    close(loaders)
    rows = [(x, y) for b in batches for x, y in zip(b.x.tolist(), b.y.tolist())]
    for plan, epoch in zip(plans, (rows[: len(plans[0])], rows[len(plans[0]) : n])):
        starts = np.cumsum(sizes) - sizes
        assert [x[0] - 10 for x, _ in epoch] == [int(starts[s] + at) for s, at in plan]
        inputs = [t for x, _ in epoch for t in x]
        assert len(set(inputs)) == len(inputs) and all(x[1:] + [x[-1] + 1] == y for x, y in epoch)
        for s, size in enumerate(sizes):  # whole sequences from a phase on, as many as fit
            at = np.sort(plan[plan[:, 0] == s, 1])
            assert len(at) == (size - 1 - at[0]) // seq_len if len(at) else size <= 2 * seq_len
            assert not len(at) or (
                at[0] < seq_len and (np.diff(at) == seq_len).all() and at[-1] + seq_len < size
            )
    assert order.sequence(0) == tuple(plans[0][0])


@quick
@given(job=jobs().filter(lambda j: len(j[0]) >= j[3]))
def test_dealt_shards_stay_with_their_rank(tmp_path, job):
    sizes, seq_len, tokens, world = job
    shards, owner = make_shards(tmp_path, sizes), np.repeat(np.arange(len(sizes)) % world, sizes)
    for rank in range(world):
        if max(sizes[rank::world]) <= seq_len:
            with pytest.raises(ShardError, match="holds a sequence"):
                make_loader("shuffled", shards, tokens, seq_len, rank, world)
            continue
        with make_loader("shuffled", shards, tokens, seq_len, rank, world) as loader:
            for _ in range(3):
                assert set(owner[loader.next().x.flatten().numpy() - 10].tolist()) == {rank}


@quick
@given(job=jobs(), order=st.sampled_from(["stream", "packed", "shuffled"]), before=st.integers(0, 4))
def test_a_state_continues_bit_for_bit(tmp_path, job, order, before):
    sizes, seq_len, tokens, world = job
    shards = make_shards(tmp_path, sizes)
    with (
        make_loader(order, shards, tokens, seq_len, 0, world, deal="sequences") as a,
        make_loader(order, shards, tokens, seq_len, world - 1, world, deal="sequences") as b,
        make_loader(order, shards, tokens, seq_len, 0, world, deal="sequences") as c,
    ):
        for _ in range(before):
            a.next(), b.next()
        state = json.loads(json.dumps(a.state()))
        assert state == b.state()  # one state for all ranks
        if before:
            c.next()  # also from the middle of another place
        c.load_state(state)
        for _ in range(3):
            x, y = a.next(), c.next()
            assert (x.x == y.x).all() and (x.y == y.y).all() and x.where == y.where and a.state() == c.state()
            assert x.cu_seqlens is None or x.cu_seqlens.tolist() == y.cu_seqlens.tolist()


@quick
@given(job=jobs(), order=st.sampled_from(["stream", "packed", "shuffled"]))
def test_a_step_is_the_same_on_any_number_of_ranks(tmp_path, job, order):
    sizes, seq_len, tokens, _ = job
    shards = make_shards(tmp_path, sizes)

    def steps(world, accum):
        loaders = ranks(order, shards, tokens, seq_len, world, deal="sequences")
        out = [[(b.x.tolist(), b.y.tolist()) for b in rounds(loaders, accum)] for _ in range(3)]
        close(loaders)
        return out, loaders[0].state()

    assert steps(1, 4) == steps(2, 2) == steps(4, 1)


def test_a_run_goes_on_with_another_number_of_ranks(built):
    for order in ("stream", "packed", "shuffled"):
        four = ranks(order, built.train, 32, 16, 4, deal="sequences")
        rounds(four, 3)
        two = ranks(order, built.train, 32, 16, 2, deal="sequences")
        for loader in two:
            loader.load_state(four[0].state())
        assert [b.x.tolist() for b in rounds(two, 2)] == [b.x.tolist() for b in rounds(four, 1)]
        close(two + four)


@quick
@given(row=st.lists(st.sampled_from([BOS, 5, 6, 7]), min_size=1, max_size=60), seq_len=st.integers(1, 20))
def test_segments_begin_at_documents_and_are_short_enough(row, seq_len):
    cuts = document_cuts(np.array(row), seq_len).tolist()
    assert cuts[0] == 0 and cuts[-1] == len(row) and all(0 < b - a <= seq_len for a, b in zip(cuts, cuts[1:]))
    starts = {0} | {i for i, t in enumerate(row) if t == BOS}
    assert starts <= set(cuts)
    for a, b in zip(
        cuts, cuts[1:]
    ):  # a cut inside a document is made only when the segment before it is full
        if b not in starts and b != len(row):
            assert b - a == seq_len


def test_packed_batches_carry_their_cuts(built):
    with make_loader("packed", built.train, 256, 64) as loader:
        for _ in range(6):
            b = loader.next()
            assert (
                b.cu_seqlens.dtype == torch.int32
                and b.cu_seqlens.tolist() == document_cuts(b.x[0].numpy(), 64).tolist()
            )


def test_orders_that_cannot_be_served_are_refused(built, tmp_path):
    tiny = make_shards(tmp_path, [5, 4])
    for args, says in [
        (("sorted", tiny, 4, 2), "no order 'sorted': choose stream"),
        (("stream", tiny, 5, 2), "make tokens a multiple of seq_len"),
        (("stream", tiny, 0, 2), "multiple"),
        (("stream", tiny, 4, 0), "multiple"),
        (("stream", tiny, 4, 2, 2, 2), "rank 2 of 2"),
        (("stream", tiny, 9, 9), "9 tokens in 2 shards are too few for a sequence of 9"),
        (("shuffled", tiny, 5, 5), "longest of 5 tokens, holds a sequence of 5"),
        (("stream", [], 4, 2), "no shards"),
        (("stream", [tmp_path / "gone.bin"], 4, 2), "gone.bin"),
    ]:
        with pytest.raises(ValueError, match=says):
            make_loader(*args)
    with pytest.raises(ValueError, match=r"too few shards \(2\) to deal to 3 ranks"):
        make_loader("shuffled", tiny, 2, 2, 0, 3, deal="shards")
    with pytest.raises(ValueError, match="deal 'cards'"):
        make_loader("shuffled", tiny, 2, 2, deal="cards")
    with make_loader("shuffled", tiny, 2, 2) as loader:
        for state, says in [
            ({"order": "stream", "position": 0}, "order 'stream'"),
            ({}, "order None"),
            (loader.state() | {"corpus_tokens": 3}, "corpus_tokens 3, this loader has 9"),
            (loader.state() | {"seed": 1}, "seed 1"),
        ]:
            with pytest.raises(ValueError, match=says):
                loader.load_state(state)


def test_an_error_in_the_thread_comes_out_of_next(built):
    with make_loader("stream", built.train, 64, 16, vocab=300) as loader:
        for _ in range(2):
            with pytest.raises(
                ShardError, match="train_000000.bin: token .* is not below the vocabulary size 300"
            ):
                while True:
                    loader.next()
        assert loader.state()["position"] >= 0


def threads():
    return [t for t in threading.enumerate() if t.name != "MainThread" and t.is_alive()]


class Slow:
    "An order that counts how far it was read"

    identity = {"order": "slow"}

    def __init__(self):
        self.read = 0

    def __call__(self, position):
        self.read = position + 1
        return position, position + 1


def test_the_thread_stays_a_little_ahead_and_ends():
    before, loader = len(threads()), Loader(order := Slow(), ahead=3)
    assert order.read == 0 and loader.state() == {"order": "slow", "position": 0}
    assert [loader.next() for _ in range(4)] == [0, 1, 2, 3]
    time.sleep(0.1)
    assert 7 <= order.read <= 8 and loader.state()["position"] == 4 and len(threads()) == before + 1
    loader.close()
    loader.close()
    assert len(threads()) == before and loader.next() == 4  # goes on after a close
    loader.close()


def test_a_forgotten_loader_takes_its_thread_along():
    before, loader = len(threads()), Loader(Slow())
    loader.next()
    assert len(threads()) == before + 1
    del loader
    gc.collect()
    deadline = time.monotonic() + 5
    while len(threads()) > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(threads()) == before


def test_a_process_ends_with_its_loader_still_open(built):
    code = f"from pgolf.text.data import make_loader; print(make_loader('stream', [{str(built.train[0])!r}], 64, 16).next().x.shape)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "4, 16" in done.stdout and not done.stderr


def test_the_default_dataset_is_built_once(tmp_path, monkeypatch, corpus):
    read = []

    def documents(progress):
        read.append(1)
        yield from corpus

    monkeypatch.setattr("pgolf.text.build.embedded_documents", documents)
    d = embedded_dataset(tmp_path)
    assert (d.name, d.vocab) == ("embedded", 1024) and embedded_dataset(tmp_path) == d and read == [1]
    ids, val = d.val_ids(), split_documents(corpus)[1]
    assert d.byte_table().count(ids[:-1], ids[1:]).sum() == sum(len(t.encode()) for t in val) > 50_000
