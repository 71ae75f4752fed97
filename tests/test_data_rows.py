"""data/rows.py: every document once an epoch, whole or in pieces, and what the model sees of it."""

import random
from collections import defaultdict

import corpus_fixture
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import infilling, rows, tokens
from codellama_jax.data.rows import ROOM, Plan, Rows

WORDS = ["tree", "line", "x =", "\n", "\n    ", "Größe", "😀", "return", "(1)", "\t", "\r\n"]


class Texts:
    """Documents in memory."""

    def __init__(self, texts: list[str], tokenizer):
        self.texts = texts
        self.counts = [tokens.count(tokenizer, text) for text in texts]
        self.lengths = np.array([sum(count) + 2 for count in self.counts], np.uint32)

    def record(self, number: int) -> dict:
        return {"text": self.texts[number], "path": "a", "chunk_tokens": self.counts[number]}


def texts(num: int, *, seed: int = 0, longest: int = 60) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(num)]


def make_rows(documents, *, rate=0.9, seq_len=64, seed=0, name="code") -> Rows:
    return Rows(
        documents,
        corpus_fixture.tokenizer(),
        name=name,
        seed=seed,
        seq_len=seq_len,
        rates=infilling.Rates(rate),
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 40), st.integers(0, 99), st.sampled_from([0.0, 0.9]), st.integers(1, 90))
def test_an_epoch_has_every_document_once_and_whole(num, seed, rate, seq_len):
    documents = Texts(texts(num, seed=seed), corpus_fixture.tokenizer())
    some = make_rows(documents, rate=rate, seq_len=seq_len, seed=seed)
    for epoch in (0, 3):
        parts = defaultdict(list)
        for number in range(some.rows_per_epoch):
            for piece in some.describe(epoch * some.rows_per_epoch + number):
                assert piece.epoch == epoch
                parts[piece.document].append(piece)
        assert sorted(parts) == list(range(num))
        for document, pieces in parts.items():
            text = documents.texts[document]
            if any(piece.cuts for piece in pieces):
                assert len(pieces) == 1 and pieces[0].whole  # what is cut is never infilled
                continue
            pieces.sort(key=lambda piece: piece.start)
            joined = [token for piece in pieces for token in piece.tokens]
            assert joined == tokens.encode(corpus_fixture.tokenizer(), text)


def test_a_row_holds_the_tokens_that_its_description_says():
    documents = Texts(texts(200), corpus_fixture.tokenizer())
    some = make_rows(documents)
    for index in range(some.rows_per_epoch):
        row = some.row(index)
        assert {name: (x.dtype, x.shape) for name, x in row.items()} == {
            "tokens": (np.int32, (65,)),
            "loss_mask": (np.bool_, (65,)),
            "segments": (np.int32, (65,)),
            "positions": (np.int32, (65,)),
        }
        for number, piece in enumerate(some.describe(index), 1):
            inside = row["segments"] == number
            assert row["tokens"][inside].tolist() == piece.tokens
            assert row["positions"][inside].tolist() == list(range(len(piece.tokens)))


def test_no_loss_on_padding_on_the_first_token_and_on_begins_of_documents():
    tokenizer = corpus_fixture.tokenizer()
    some = make_rows(Texts(texts(200), tokenizer))
    for index in range(some.rows_per_epoch):
        row = some.row(index)
        padding = row["segments"] == 0
        assert not row["loss_mask"][padding].any() and not row["loss_mask"][0]
        assert (np.diff(padding.astype(int)) >= 0).all()  # at the end of the row only
        assert not row["loss_mask"][row["tokens"] == tokenizer.bos_id].any()
        counted = ~padding & (row["positions"] > 0)
        assert (row["loss_mask"] == counted).all()


def test_whole_documents_are_infilled_at_the_rate():
    some = make_rows(Texts(texts(1_500), corpus_fixture.tokenizer()), seq_len=256)
    pieces = [p for i in range(some.rows_per_epoch) for p in some.describe(i)]
    whole = [piece for piece in pieces if piece.whole]
    assert len(whole) > 0.9 * len(pieces)
    assert np.mean([piece.mode != "plain" for piece in whole]) == pytest.approx(0.9, abs=0.03)
    spm = [piece.mode == "spm" for piece in whole if piece.cuts]
    assert np.mean(spm) == pytest.approx(0.5, abs=0.05)
    assert max(len(p.tokens) - p.length for p in whole) <= ROOM


def test_epochs_and_corpora_differ_in_order_and_cuts_but_not_in_rows():
    documents = Texts(texts(60), corpus_fixture.tokenizer())
    some = make_rows(documents)

    def epoch(rows_, number):
        first = number * rows_.rows_per_epoch
        return [p for i in range(rows_.rows_per_epoch) for p in rows_.describe(first + i)]

    orders, cuts = [], []
    for pieces in (epoch(some, 0), epoch(some, 1), epoch(make_rows(documents, name="b"), 0)):
        orders.append([piece.document for piece in pieces])
        cuts.append({piece.document: piece.cuts for piece in pieces if piece.cuts})
    assert orders[0] != orders[1] != orders[2] != orders[0]
    for a, b in ((0, 1), (0, 2)):
        common = cuts[a].keys() & cuts[b].keys()
        assert sum(cuts[a][d] == cuts[b][d] for d in common) < 0.2 * len(common)


def test_slices_of_a_long_file_are_not_read_one_after_another():
    plan = Plan(np.array([100 * 64] + [40] * 2_000), name="code", seed=0, capacity=64, room=0)
    for epoch in (0, 1):
        rows_of_file = plan.rows_of(epoch, 0)
        assert len(rows_of_file) in (100, 101)
        assert np.mean(np.diff(rows_of_file) == 1) < 0.2


def test_rows_are_shuffled_in_windows_so_that_what_was_read_is_a_stretch_of_the_line():
    lengths = np.random.default_rng(0).integers(3, 30, 5_000)
    plan = Plan(lengths, name="code", seed=0, capacity=8, room=0)
    windows = -(-plan.rows_per_epoch // rows.WINDOW)
    assert windows > 2
    read = [set() for _ in range(windows)]
    for number in range(plan.rows_per_epoch):
        read[number // rows.WINDOW] |= {span.document for span in plan.spans(0, number)}
    for a in range(windows):  # a border cuts one document at most
        assert sum(len(read[a] & read[b]) for b in range(a + 1, windows)) <= 1


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 300), st.integers(0, 9), st.integers(4, 40))
def test_the_rows_of_a_document_are_those_that_it_is_found_in(num, seed, capacity):
    lengths = np.random.default_rng(seed).integers(3, 100, num)
    plan = Plan(lengths, name="code", seed=seed, capacity=capacity, room=0)
    found = defaultdict(list)
    for number in range(plan.rows_per_epoch):
        for span in plan.spans(2, number):
            found[span.document].append(number)
    assert all(plan.rows_of(2, document) == found[document] for document in range(num))


def test_rows_are_read_in_any_order():
    documents = Texts(texts(100), corpus_fixture.tokenizer())
    forward = make_rows(documents)
    indices = list(range(2 * forward.rows_per_epoch))
    expected = [forward.row(i) for i in indices]
    other = make_rows(documents)
    random.Random(1).shuffle(indices)
    for i in indices:
        row = other.row(i)
        assert all((row[name] == expected[i][name]).all() for name in row)


def test_a_document_longer_than_a_row_is_cut_and_never_infilled():
    long = "x = tree\n" * 3_000
    documents = Texts([long, *texts(20)], corpus_fixture.tokenizer())
    some = make_rows(documents, rate=1.0)
    pieces = [p for i in range(some.rows_per_epoch) for p in some.describe(i)]
    of_long = [piece for piece in pieces if piece.document == 0]
    assert len(of_long) > 100 and all(piece.mode == "plain" for piece in of_long)


def test_texts_that_changed_since_the_corpus_was_prepared_are_refused():
    documents = Texts(texts(5), corpus_fixture.tokenizer())
    documents.texts[3] += "more text than was counted"
    some = make_rows(documents, rate=0.0)
    with pytest.raises(ValueError, match="prepare the corpus again"):
        for i in range(some.rows_per_epoch):
            some.row(i)


def test_an_empty_corpus_is_refused():
    with pytest.raises(ValueError, match="corpus 'x' has no documents"):
        Plan(np.array([], np.uint32), name="x", seed=0, capacity=9, room=0)


def test_a_plan_of_a_million_documents_keeps_little():
    lengths = np.random.default_rng(0).integers(3, 3_000, 1_000_000).astype(np.uint32)
    plan = Plan(lengths, name="code", seed=0, capacity=4_097, room=ROOM)
    spans = plan.spans(0, plan.rows_per_epoch // 2)
    assert sum(span.slots for span in spans) == 4_097
    assert plan._block_starts(0).nbytes <= 8 * (1 + 1_000_000 / rows.BLOCK)
    assert plan.rows_per_epoch == -(-(int(lengths.sum()) + ROOM * 1_000_000) // 4_097)


def test_a_large_plan_is_counted_once_and_then_found(tmp_path, monkeypatch):
    lengths = np.random.default_rng(0).integers(3, 3_000, 1_000_000).astype(np.uint32)

    def spans(epoch, keep=tmp_path / "plans"):
        plan = Plan(lengths, name="code", seed=0, capacity=4_097, room=ROOM, keep=keep)
        return plan.spans(epoch, plan.rows_per_epoch // 2)

    expected = [spans(epoch, keep=None) for epoch in (0, 1)]
    assert not (tmp_path / "plans").exists()
    assert [spans(epoch) for epoch in (0, 1)] == expected
    kept = sorted((tmp_path / "plans").iterdir())
    assert len(kept) == 2 and all(path.suffix == ".npy" for path in kept)
    kept[0].write_bytes(kept[0].read_bytes()[:-50])  # a damaged one is made anew
    assert [spans(epoch) for epoch in (0, 1)] == expected
    monkeypatch.setattr(Plan, "_count_block_starts", None)
    assert [spans(epoch) for epoch in (0, 1)] == expected
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.undo()
    assert spans(0, keep=tmp_path / "file") == expected[0]  # where nothing can be written
