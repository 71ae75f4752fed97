"""data/damage.py: what cannot be read is replaced, by the same on every host, or stops the run."""

import json
import logging

import corpus_fixture
import numpy as np
import pytest

from codellama_jax import prompts
from codellama_jax.data import corpus, damage, infilling, tokens
from codellama_jax.data.dialogue import DialogueRows
from codellama_jax.data.rows import Rows

NUM_DOCUMENTS = 2_000


class Damaged:
    """Documents of which some cannot be read."""

    def __init__(self, bad, records=None):
        tokenizer = corpus_fixture.tokenizer()
        self.bad = set(bad)
        self.records = records or [
            {"text": f"x{i} = {i}\n" * (1 + i % 3), "path": f"{i}.py"} for i in range(NUM_DOCUMENTS)
        ]
        self.lengths = np.array([self._length(tokenizer, r) for r in self.records], np.uint32)

    @staticmethod
    def _length(tokenizer, record):
        if "dialog" in record:
            return len(prompts.chat_example(tokenizer, record["dialog"])[0])
        return sum(tokens.count(tokenizer, record["text"])) + 2

    def record(self, number):
        if number in self.bad:
            raise ValueError(f"document {number} cannot be read")
        return self.records[number]


def make_rows(documents, rate=0.9):
    rates, tokenizer = infilling.Rates(rate), corpus_fixture.tokenizer()
    return Rows(documents, tokenizer, name="code", seed=0, seq_len=256, rates=rates)


def read(rows, order=1):
    numbers = range(rows.rows_per_epoch)[::order]
    return [rows.row(number)["tokens"] for number in numbers][::order]


def test_a_damaged_document_is_replaced_by_the_same_for_every_reader(caplog):
    whole, other = read(make_rows(Damaged([]))), read(make_rows(Damaged([5, 900])), -1)
    caplog.clear()
    one = make_rows(Damaged([5, 900]))
    with caplog.at_level(logging.WARNING):
        rows = read(one)
        read(one)
    assert (np.array(rows) == np.array(other)).all()
    assert 1 <= sum((a != b).any() for a, b in zip(rows, whole, strict=True)) <= 4
    assert one.damage.documents == {5, 900}
    assert len(caplog.records) == 2 and "another document is read instead" in caplog.text


def test_too_many_damaged_documents_stop_the_run():
    bad = [3, 500, 1_999]
    assert len(bad) == int(damage.MAX_SHARE * NUM_DOCUMENTS) + 1
    with pytest.raises(ValueError, match="3 documents of corpus 'code' are damaged, more than"):
        read(make_rows(Damaged(bad)))


def test_a_damaged_dialogue_is_replaced_by_one_that_fits():
    def dialog(i):
        contents = ("user", f"Say {i}."), ("assistant", f"{i} " * (1 + i % 5))
        return [{"role": role, "content": content} for role, content in contents]

    records = [{"dialog": dialog(i), "path": f"{i}"} for i in range(1_100)]

    def make(bad):
        tokenizer = corpus_fixture.tokenizer()
        documents = Damaged(bad, records)
        return DialogueRows(documents, tokenizer, name="chat", seed=0, seq_len=300)

    rows, again = make([7]), make([7])
    for number in range(rows.rows_per_epoch):
        row, other = rows.row(number), again.row(number)
        assert all((row[name] == other[name]).all() for name in row)
    assert rows.damage.documents == {7}


def test_a_damaged_record_of_a_shard_is_one_document(tmp_path):
    good = Damaged([])
    lines = [json.dumps(record).encode() for record in good.records]
    corpus.write_shard(tmp_path / "a.array_record", lines)
    np.save(tmp_path / "lengths.npy", good.lengths)
    content = bytearray((tmp_path / "a.array_record").read_bytes())
    place = len(content) // 2
    content[place : place + 8] = bytes(8)
    (tmp_path / "a.array_record").write_bytes(content)
    entry = {"records": ["a.array_record"], "lengths": "lengths.npy"}
    rows = make_rows(corpus.Split(tmp_path, entry))
    assert len(read(rows)) == rows.rows_per_epoch
    assert len(rows.damage.documents) == 1


def test_a_shard_whose_end_is_damaged_is_refused_at_the_start(tmp_path):
    corpus.write_shard(tmp_path / "a.array_record", [b"{}"] * 5_000)
    np.save(tmp_path / "lengths.npy", np.ones(5_000, np.uint32))
    content = bytearray((tmp_path / "a.array_record").read_bytes())
    content[-65_536:] = bytes(65_536)
    (tmp_path / "a.array_record").write_bytes(content)
    entry = {"records": ["a.array_record"], "lengths": "lengths.npy"}
    with pytest.raises(ValueError, match="a.array_record is damaged .* prepare the corpus again"):
        corpus.Split(tmp_path, entry)
