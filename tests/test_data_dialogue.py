"""data/dialogue.py: whole dialogues in rows."""

import random

import corpus_fixture
import numpy as np
import pytest

from codellama_jax import prompts
from codellama_jax.data.dialogue import DialogueRows


class Dialogues:
    """Dialogues in memory."""

    def __init__(self, num: int, tokenizer):
        rng = random.Random(0)
        self.records = [
            {
                "dialog": [
                    {"role": "user", "content": "count the " + "tree " * rng.randint(1, 9)},
                    {"role": "assistant", "content": "x = 1\n" * rng.randint(1, 9)},
                ],
                "path": "a",
            }
            for _ in range(num)
        ]
        self.lengths = np.array(
            [len(prompts.chat_example(tokenizer, r["dialog"])[0]) for r in self.records], np.uint32
        )

    def record(self, number: int) -> dict:
        return self.records[number]


def make_rows(documents, *, seq_len: int = 200, seed: int = 0) -> DialogueRows:
    return DialogueRows(
        documents, corpus_fixture.tokenizer(), name="dialogues", seed=seed, seq_len=seq_len
    )


def test_an_epoch_has_every_dialogue_once_and_whole():
    documents = Dialogues(70, corpus_fixture.tokenizer())
    some = make_rows(documents)
    for epoch in (0, 1):
        first = epoch * some.rows_per_epoch
        pieces = [p for i in range(some.rows_per_epoch) for p in some.describe(first + i)]
        assert sorted(piece.document for piece in pieces) == list(range(70))
        assert all(piece.whole and piece.epoch == epoch for piece in pieces)


def test_only_answers_count_in_the_loss():
    tokenizer = corpus_fixture.tokenizer()
    some = make_rows(Dialogues(30, tokenizer))
    for index in range(some.rows_per_epoch):
        row = some.row(index)
        for number, piece in enumerate(some.describe(index), 1):
            inside = row["segments"] == number
            ids, answers = prompts.chat_example(tokenizer, piece.record["dialog"])
            assert row["tokens"][inside].tolist() == ids
            assert row["loss_mask"][inside].tolist() == answers
        assert not row["loss_mask"][row["segments"] == 0].any()


def test_epochs_mix_dialogues_differently():
    some = make_rows(Dialogues(70, corpus_fixture.tokenizer()))
    orders = [
        [
            p.document
            for i in range(some.rows_per_epoch)
            for p in some.describe(epoch * some.rows_per_epoch + i)
        ]
        for epoch in range(3)
    ]
    assert len({tuple(order) for order in orders}) == 3


def test_dialogues_longer_than_a_row_are_skipped_and_counted():
    documents = Dialogues(40, corpus_fixture.tokenizer())
    limit = int(np.median(documents.lengths))
    some = make_rows(documents, seq_len=limit - 1)
    assert some.skipped == int((documents.lengths > limit).sum()) > 0
    pieces = [p for i in range(some.rows_per_epoch) for p in some.describe(i)]
    assert len(pieces) == 40 - some.skipped
    with pytest.raises(ValueError, match="none of the 40 dialogues"):
        make_rows(documents, seq_len=4)


def test_most_of_a_row_is_dialogue():
    some = make_rows(Dialogues(300, corpus_fixture.tokenizer()), seq_len=300)
    filled = [some.row(i)["segments"] > 0 for i in range(some.rows_per_epoch)]
    assert np.mean(filled) > 0.95
