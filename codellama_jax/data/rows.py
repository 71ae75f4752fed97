"""Rows: which tokens of which documents stand in row i, known before any text is read.

    token lengths --shuffle by epoch--> documents end to end --cut every T+1 tokens--> slices
      --shuffle in windows--> row i

From the lengths alone it is known which documents lie whole inside a row and which are cut by its
border; each 1,024 documents are put in an order that cuts few. The paper infills only documents
that are not cut (section 2.3): exactly the whole ones are, when the row is read, with random
numbers that depend on the seed, the corpus, the epoch and the document. An infilled document has a
few more tokens than a plain one, so each is given room for 8 more; what is left over becomes
padding at the end of the row, outside the loss.

A row is a pure function of (seed, corpus, index): any host reads any row, and nothing is kept but
one number per 1,024 documents. For large corpora these numbers are kept in a file, too: whoever
opens the same epoch later, to go on or to look at a step, has them at once.
"""

import contextlib
import functools
import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codellama_jax.data import damage, fitting, infilling, shuffle, tokens

# Tokens that an infilled document may have more than a plain one: 5 on average with the vocabulary
# of Code Llama or of the nano recipe; 1 in 100 draws of library code needs more than 8.
ROOM = 8
BLOCK = 1_024  # documents whose common length is kept
# Rows that are shuffled among themselves. A long file fills many slices of the line, which would be
# read one after another: small batches would learn that file, and not to read what stands before.
WINDOW = 4_096
LARGE = 1_000_000  # documents from which on these are kept in a file: a tenth of a second's work
STAND_INS = 8  # other documents that are tried in the place of a damaged one

Row = dict[str, np.ndarray]  # tokens, loss_mask, segments, positions, each [T+1]


@dataclass(frozen=True)
class Span:
    """A place in a row: document's planned tokens from `start` on fill `slots` of the row."""

    document: int
    start: int
    slots: int


@dataclass(frozen=True)
class Piece:
    """What a row holds of one document, for people to read."""

    document: int  # its number in the corpus
    epoch: int
    start: int  # which of the plain document's tokens: [start, end)
    end: int
    length: int  # tokens of the whole plain document
    tokens: list[int]  # as they stand in the row
    mode: str  # "plain", "psm", "spm" or "dialogue"
    cuts: tuple[int, int] | None  # first and last character of the middle
    record: dict  # text or dialog, path, part, language, source, licence

    @property
    def whole(self) -> bool:
        return self.end - self.start == self.length


class Plan:
    """Where every document lies in every epoch: lengths in, spans out; reads no text."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        name: str,
        seed: int,
        capacity: int,
        room: int,
        keep: Path | None = None,
    ):
        """lengths: uint32 [documents], may be memory-mapped. capacity: tokens of a row, T+1.

        keep: a folder for what is costly to count; it belongs to these lengths alone.
        """
        if len(lengths) == 0:
            raise ValueError(f"corpus {name!r} has no documents to make rows of")
        self.name, self.seed, self.capacity, self.room = name, seed, capacity, room
        self.lengths, self._keep = lengths, keep if len(lengths) >= LARGE else None
        self.line_length = int(lengths.sum(dtype=np.int64)) + room * len(lengths)
        self.rows_per_epoch = -(-self.line_length // capacity)
        self._lock = threading.Lock()
        self._block_starts = functools.lru_cache(maxsize=2)(self._find_block_starts)
        self._block = functools.lru_cache(maxsize=256)(self._lay_block)  # those of a window
        self._window = functools.lru_cache(maxsize=4)(self._shuffle_window)

    def spans(self, epoch: int, number: int) -> list[Span]:
        """What lies in row `number` of `epoch`, in order."""
        with self._lock:  # a plan of many documents is laid once, not by every reading thread
            starts = self._block_starts(epoch)
        window, place = divmod(number, WINDOW)
        slice_number = window * WINDOW + int(self._window(epoch, window)[place])
        first, last = slice_number * self.capacity, (slice_number + 1) * self.capacity
        block = int(np.searchsorted(starts, first, side="right")) - 1
        spans = []
        while block < len(starts) and starts[block] < last:
            documents, bounds = self._block(epoch, block)
            inside = slice(
                max(int(np.searchsorted(bounds, first, side="right")) - 1, 0),
                int(np.searchsorted(bounds[:-1], last, side="left")),
            )
            for document, begin, end in zip(
                documents[inside], bounds[:-1][inside], bounds[1:][inside], strict=True
            ):
                start = max(first - int(begin), 0)
                if start < self.lengths[document]:  # else only its room reaches into this row
                    spans.append(
                        Span(int(document), start, min(int(end), last) - int(begin) - start)
                    )
            block += 1
        return spans

    def rows_of(self, epoch: int, document: int) -> list[int]:
        """The rows of `epoch` in which a document lies: one, or more where it is cut."""
        key = shuffle.hash64(self.seed, self.name, epoch, "order")
        place = shuffle.place_of(document, count=len(self.lengths), key=key)
        documents, bounds = self._block(epoch, place // BLOCK)
        start = int(bounds[np.flatnonzero(documents == document)[0]])
        end = start + int(self.lengths[document])
        slices = range(start // self.capacity, (end - 1) // self.capacity + 1)
        return sorted(self._row_of(epoch, number) for number in slices)

    def _row_of(self, epoch: int, slice_number: int) -> int:
        window, place = divmod(slice_number, WINDOW)
        return window * WINDOW + int(np.flatnonzero(self._window(epoch, window) == place)[0])

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        """The slices of a window of the line in the order in which they are read: int64 [rows]."""
        count = min(WINDOW, self.rows_per_epoch - window * WINDOW)
        key = shuffle.hash64(self.seed, self.name, epoch, "rows", window)
        return shuffle.permute(np.arange(count), count=count, key=key)

    def _order(self, epoch: int, places: np.ndarray) -> np.ndarray:
        key = shuffle.hash64(self.seed, self.name, epoch, "order")
        return shuffle.permute(places, count=len(self.lengths), key=key)

    def _lay_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """A block's documents in order, and where each begins on the line (and the last ends)."""
        places = np.arange(block * BLOCK, min((block + 1) * BLOCK, len(self.lengths)))
        documents = self._order(epoch, places)
        start = self._block_starts(epoch)[block]
        sizes = self.lengths[documents].astype(np.int64) + self.room
        order = fitting.order_with_few_cuts(
            sizes.tolist(), room=self.capacity - int(start) % self.capacity, capacity=self.capacity
        )
        documents, sizes = documents[order], sizes[order]
        return documents, np.concatenate([[start], start + np.cumsum(sizes)])

    def _find_block_starts(self, epoch: int) -> np.ndarray:
        """Where every block begins on the epoch's line: int64 [blocks]."""
        if self._keep is None:
            return self._count_block_starts(epoch)
        key = shuffle.hash64(self.seed, self.name, epoch, "starts", self.room, self.line_length)
        path = self._keep / f"{key:016x}.npy"
        with contextlib.suppress(OSError, ValueError):  # not there, or not whole
            starts = np.load(path)
            if starts.shape == (-(-len(self.lengths) // BLOCK),):
                return starts
        starts = self._count_block_starts(epoch)
        with contextlib.suppress(OSError):  # it may be a folder that only others may write to
            self._keep.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._keep, delete=False) as file:
                np.save(file, starts)
            os.chmod(file.name, 0o644)  # others may read the corpus, too
            os.replace(file.name, path)
        return starts

    def _count_block_starts(self, epoch: int) -> np.ndarray:
        sums = []
        for first in range(0, len(self.lengths), 64 * BLOCK):  # a part that stays in the cache
            places = np.arange(first, min(first + 64 * BLOCK, len(self.lengths)))
            sizes = self.lengths[self._order(epoch, places)].astype(np.int64) + self.room
            sums.append(np.add.reduceat(sizes, np.arange(0, len(sizes), BLOCK)))
        ends = np.cumsum(np.concatenate(sums))
        return np.concatenate([[0], ends[:-1]])


class Rows:
    """Rows of documents laid end to end. `documents` has .lengths and .record(i)."""

    def __init__(
        self,
        documents,
        tokenizer,
        *,
        name: str,
        seed: int,
        seq_len: int,
        rates: infilling.Rates,
        keep: Path | None = None,
    ):
        if rates.infilling > 0 and tokenizer.middle_id is None:
            raise ValueError(
                f"infilling_rate={rates.infilling} needs a tokenizer with infilling pieces; "
                f"{tokenizer.path} has none: use another, or set infilling_rate to 0"
            )
        self.documents, self.tokenizer, self.rates = documents, tokenizer, rates
        self.name, self.seed, self.capacity = name, seed, seq_len + 1
        room = ROOM if rates.infilling > 0 else 0
        self.plan = Plan(
            documents.lengths, name=name, seed=seed, capacity=self.capacity, room=room, keep=keep
        )
        self.rows_per_epoch = self.plan.rows_per_epoch
        self.damage = damage.Damage(name, len(documents.lengths))

    def row(self, index: int) -> Row:
        """Row `index` counted over all epochs, as the model reads it."""
        return pack([piece.tokens for piece in self.describe(index)], capacity=self.capacity)

    def describe(self, index: int) -> list[Piece]:
        """The same row as a list of its documents."""
        epoch, number = divmod(index, self.rows_per_epoch)
        return [self._read(epoch, span) for span in self.plan.spans(epoch, number)]

    def rows_of(self, epoch: int, document: int) -> list[int]:
        """The rows of `epoch`, counted over all epochs, that hold some of a document."""
        first = epoch * self.rows_per_epoch
        return [first + number for number in self.plan.rows_of(epoch, document)]

    def _read(self, epoch: int, span: Span) -> Piece:
        """The document of a span; where it is damaged, the beginning of another in its place.

        Which one depends on the seed, the corpus and the damaged document alone, so every host puts
        in the same. Raises ValueError where too many are damaged.
        """

        def others():
            for attempt in range(STAND_INS):
                key = shuffle.hash64(self.seed, self.name, span.document, "instead", attempt)
                other = key % len(self.plan.lengths)
                there = Span(other, 0, min(span.slots, int(self.plan.lengths[other])))
                yield other, functools.partial(self._read_document, epoch, there, plain=True)

        return self.damage.read(
            span.document, functools.partial(self._read_document, epoch, span), others()
        )

    def _read_document(self, epoch: int, span: Span, *, plain: bool = False) -> Piece:
        record = self.documents.record(span.document)
        length = int(self.documents.lengths[span.document])
        end = min(span.start + span.slots, length)
        infilled = None
        if not plain and self.rates.infilling > 0 and span.start == 0 and end == length:
            rng = shuffle.draws(self.seed, self.name, epoch, span.document)
            infilled = infilling.infill(
                record["text"], self.tokenizer, rng, rates=self.rates, max_tokens=span.slots
            )
        if infilled:
            ids, mode, cuts = infilled.tokens, infilled.mode, (infilled.start, infilled.end)
        else:
            ids, mode, cuts = self._plain(record, span, length), "plain", None
        return Piece(span.document, epoch, span.start, end, length, ids, mode, cuts, record)

    def _plain(self, record: dict, span: Span, length: int) -> list[int]:
        counts = record.get("chunk_tokens", [length - 2])  # less BOS and EOS
        end = min(span.start + span.slots, length)
        try:
            return tokens.encode_slice(self.tokenizer, record["text"], counts, span.start, end)
        except ValueError as error:
            raise ValueError(
                f"document {span.document} of corpus {self.name!r} ({record['path']}): {error}; "
                "prepare the corpus again"
            ) from None


def pack(
    segments: list[list[int]], *, capacity: int, targets: list[list[bool]] | None = None
) -> Row:
    """Lays token lists one after another into a row of `capacity`, and padding behind them.

    targets says which tokens count in the loss; without it all do but the first of each segment.
    """
    row = {
        "tokens": np.zeros(capacity, np.int32),
        "loss_mask": np.zeros(capacity, bool),
        "segments": np.zeros(capacity, np.int32),
        "positions": np.zeros(capacity, np.int32),
    }
    begin = 0
    for number, ids in enumerate(segments):
        place = slice(begin, begin + len(ids))
        row["tokens"][place] = ids
        row["loss_mask"][place] = targets[number] if targets else True
        row["loss_mask"][begin] = False
        row["segments"][place] = number + 1
        row["positions"][place] = np.arange(len(ids))
        begin = place.stop
    return row
