"""Dialogue rows: whole dialogues side by side, the loss on the answers only.

A dialogue is never cut. Which lengths share a row is the best fit for the corpus's lengths, the
same every epoch; which of the dialogues of equal length stands where, and the order of the rows, is
shuffled anew. So every epoch has as many rows, and a row is a pure function of its index.
"""

import functools

import numpy as np

from codellama_jax import prompts
from codellama_jax.data import damage, fitting, shuffle
from codellama_jax.data.rows import STAND_INS, Piece, Row, pack


class DialogueRows:
    """Rows of whole dialogues; the same face as rows.Rows. `skipped`: dialogues beyond a row."""

    def __init__(self, documents, tokenizer, *, name: str, seed: int, seq_len: int):
        self.documents, self.tokenizer = documents, tokenizer
        self.name, self.seed, self.capacity = name, seed, seq_len + 1
        lengths = np.asarray(documents.lengths, np.int64)
        self._fitting = np.flatnonzero(lengths <= self.capacity)
        self.skipped = len(lengths) - len(self._fitting)
        if len(self._fitting) == 0:
            raise ValueError(
                f"none of the {len(lengths)} dialogues of corpus {name!r} fits into a row of "
                f"{self.capacity} tokens; use a longer seq_len"
            )
        # Longest first: what best fit needs.
        self._fitting = self._fitting[np.argsort(-lengths[self._fitting], kind="stable")]
        self._lengths = lengths[self._fitting]
        self.damage = damage.Damage(name, len(lengths))
        self._rows = fitting.best_fit(self._lengths.tolist(), self.capacity)
        self.rows_per_epoch = len(self._rows)
        self._epoch_order = functools.lru_cache(maxsize=2)(self._shuffle_epoch)

    def row(self, index: int) -> Row:
        """Row `index` counted over all epochs, as the model reads it."""
        pieces = self.describe(index)
        targets = [
            prompts.chat_example(self.tokenizer, piece.record["dialog"])[1] for piece in pieces
        ]
        return pack([piece.tokens for piece in pieces], capacity=self.capacity, targets=targets)

    def describe(self, index: int) -> list[Piece]:
        """The same row as a list of its dialogues."""
        epoch, number = divmod(index, self.rows_per_epoch)
        dialogues, row_order = self._epoch_order(epoch)
        return [self._read(epoch, int(dialogues[i])) for i in self._rows[row_order[number]]]

    def rows_of(self, epoch: int, document: int) -> list[int]:
        """The row of `epoch`, counted over all, that holds a dialogue; none if it is long."""
        dialogues, row_order = self._epoch_order(epoch)
        place = np.flatnonzero(dialogues == document)
        if not place.size:
            return []
        number = next(n for n, row in enumerate(self._rows) if place[0] in row)
        return [epoch * self.rows_per_epoch + int(np.flatnonzero(row_order == number)[0])]

    def _read(self, epoch: int, document: int) -> Piece:
        """A dialogue; where it is damaged, the next shorter or equally long one in its place."""
        read = functools.partial(self._read_dialogue, epoch)

        def others():
            place = int(np.flatnonzero(self._fitting == document)[0])
            for other in self._fitting[place + 1 : place + 1 + STAND_INS].tolist():
                yield other, functools.partial(read, other)

        return self.damage.read(document, functools.partial(read, document), others())

    def _read_dialogue(self, epoch: int, document: int) -> Piece:
        record = self.documents.record(document)
        ids, _ = prompts.chat_example(self.tokenizer, record["dialog"])
        length = int(self.documents.lengths[document])
        if len(ids) != length:
            raise ValueError(
                f"dialogue {document} of corpus {self.name!r} ({record['path']}) has other tokens "
                "than when it was prepared; prepare the corpus again"
            )
        return Piece(document, epoch, 0, length, length, ids, "dialogue", None, record)

    def _shuffle_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Dialogues, longest first, equal lengths in random order; and the order of the rows."""
        count = len(self._fitting)
        key = shuffle.hash64(self.seed, self.name, epoch, "order")
        rank = shuffle.permute(np.arange(count), count=count, key=key)
        dialogues = self._fitting[np.lexsort((rank, -self._lengths))]
        rows = np.arange(self.rows_per_epoch)
        return dialogues, shuffle.permute(rows, count=len(rows), key=key)
