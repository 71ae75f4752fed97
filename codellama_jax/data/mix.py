"""Batches: rows of several corpora by their share of the tokens, a pure function of the step.

    row k of the stage --schedule--> row i of corpus c --rows--> tokens
    batch of step s = rows s*B .. s*B + B-1; process h of H takes its B/H of them, in order

All rows have T tokens, so a share of the rows is a share of the tokens, as in the paper. Nothing is
kept between steps: the state of the reader is the step, on any number of hosts and workers. Grain
reads ahead, in threads or processes.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.data import ahead, corpus, infilling, storage
from codellama_jax.data.dialogue import DialogueRows
from codellama_jax.data.rows import Piece, Row, Rows

READ_AHEAD = 4  # batches
_OPENING = (
    threading.Lock()
)  # numpy parses headers with ast, which Python 3.11 may not do in threads


def names(data: config.Data) -> list[str]:
    """The corpora of a mix, in the order of the ids in batch["corpus"]."""
    return sorted(data.mix)


@dataclass(frozen=True)
class Mixture:
    """The rows of a stage: row(k) for k = 0, 1, 2, ... without end."""

    data: config.Data
    rows: list[Rows | DialogueRows]  # by corpus id
    schedule: "Schedule"
    written: list[ahead.Ahead | None]  # by corpus id: rows tokenized ahead

    def place(self, index: int) -> tuple[int, int]:
        """The corpus of row `index` of the stage, and which of its rows that is."""
        number, own_index = self.schedule[index]
        return number, self.first(number) + own_index

    def first(self, number: int) -> int:
        """The row of a corpus that the stage begins with, behind those that were read before."""
        already = int(self.data.already.get(self.rows[number].name, 0))
        return -(-already // self.data.seq_len)

    def row(self, index: int) -> Row:
        """Row `index` of the stage, with the id of its corpus."""
        number, own_index = self.place(index)
        written = self.written[number]
        row = written.row(own_index) if written else None
        if row is None:
            row = self.rows[number].row(own_index)
        if self.data.attend_across_documents:
            row = join_documents(row)
        return {**row, "corpus": np.int32(number)}

    def describe(self, index: int) -> tuple[str, list[Piece]]:
        """The corpus of row `index` and the documents in it."""
        number, own_index = self.place(index)
        return self.rows[number].name, self.rows[number].describe(own_index)

    def steps_of(self, path: str, steps: int) -> list[tuple[int, int, str, int]]:
        """Where a file is read in `steps`: (step, row of the batch, corpus, epoch), in order."""
        found = []
        counts = self.schedule.counts(steps * self.data.rows_per_batch)
        for number, (rows, count) in enumerate(zip(self.rows, counts, strict=True)):
            first, end = self.first(number), self.first(number) + count
            for document in rows.documents.find(path) if count else []:
                for epoch in range(first // rows.rows_per_epoch, -(-end // rows.rows_per_epoch)):
                    for own_index in rows.rows_of(epoch, document):
                        if first <= own_index < end:
                            k = self.schedule.find(number, own_index - first)
                            found.append((*divmod(k, self.data.rows_per_batch), rows.name, epoch))
        return sorted(set(found))

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each corpus is read in `steps`, what was read before not counted."""
        counts = self.schedule.counts(steps * self.data.rows_per_batch)
        return {
            rows.name: count / rows.rows_per_epoch
            for rows, count in zip(self.rows, counts, strict=True)
        }


class Schedule:
    """Which corpus row k comes from, and which of its rows: exact shares, evenly spread.

    Of the first k rows the first corpus has k times its share, rounded; what is left is dealt among
    the others in the same way. (Grain's own mix rounds the shares to a hundredth of the smallest.)
    """

    def __init__(self, shares: list[float]):
        exact = [Fraction(share).limit_denominator(10**6) for share in shares]
        rest = [sum(exact[i:]) for i in range(len(exact))]
        self.parts = [share / total for share, total in zip(exact, rest, strict=True)]

    def counts(self, k: int) -> list[int]:
        """Rows of each corpus among the first k."""
        counts = []
        for part in self.parts:
            counts.append((2 * k * part.numerator + part.denominator) // (2 * part.denominator))
            k -= counts[-1]
        return counts

    def find(self, number: int, own_index: int) -> int:
        """The k whose row is row own_index of a corpus."""
        low, high = own_index, 2 * own_index + 2
        while self.counts(high)[number] <= own_index:
            low, high = high, 2 * high
        while low < high:  # the least k with more than own_index rows among the first k + 1
            middle = (low + high) // 2
            if self.counts(middle + 1)[number] > own_index:
                high = middle
            else:
                low = middle + 1
        return low

    def __getitem__(self, k: int) -> tuple[int, int]:
        before, after = self.counts(k), self.counts(k + 1)
        number = next(n for n, count in enumerate(after) if count > before[n])
        return number, before[number]


def read_by(data: config.Data, steps: int) -> dict[str, int]:
    """Tokens of each corpus that a stage has read after `steps`, and those before it."""
    counts = Schedule([data.mix[name] for name in names(data)]).counts(steps * data.rows_per_batch)
    read = dict(data.already)
    for name, count in zip(names(data), counts, strict=True):
        read[name] = int(read.get(name, 0)) + count * data.seq_len
    return read


def read_on(data: config.Data, before: config.Data, steps: int) -> config.Data:
    """`data`, each corpus going on where a stage that reads `before` leaves it after `steps`.

    To the row where both have the same seq_len and infill, or do not; else to a window of rows
    (rows.WINDOW) and about a hundredth of what was read, for rows of another length lie otherwise.
    """
    return replace(data, already=read_by(before, steps))


def open_mixture(data: config.Data, corpus_dir: str | Path, tokenizer) -> Mixture:
    """Opens the corpora of `data.mix`.

    Raises ValueError for a corpus that the folder lacks or that is smaller than its share of one
    batch, another tokenizer than the corpus was prepared for, infilling that cannot happen, and
    rows tokenized ahead that do not fit.
    """
    folder = corpus.open(corpus_dir, tokenizer)
    rows = [_open_rows(data, folder, name, tokenizer, "train") for name in names(data)]
    if data.infilling_rate > 0 and not any(isinstance(r, Rows) for r in rows):
        raise ValueError(
            f"infilling_rate={data.infilling_rate} has no effect: the mix has only dialogues"
        )
    shares = [data.mix[name] for name in names(data)]
    for one, share in zip(rows, shares, strict=True):
        needed = share * data.rows_per_batch
        if one.rows_per_epoch < needed:
            raise ValueError(
                f"corpus {one.name!r} in {corpus_dir} has {one.rows_per_epoch} rows of "
                f"{data.seq_len} tokens, fewer than the {needed:.0f} of one batch; "
                "use more text or a smaller batch_tokens"
            )
    written = [None] * len(rows)
    if data.rows is not None:
        written = ahead.open_ahead(data, folder, tokenizer, names(data))
    return Mixture(data, rows, Schedule(shares), written)


def batches(
    data: config.Data,
    corpus_dir: str | Path,
    tokenizer,
    *,
    steps: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's share of the batches of start_step .. steps-1, read ahead.

    Each is {tokens, loss_mask, segments, positions [B/process_count, T+1], corpus [B/...]}.
    """
    import grain

    if data.rows_per_batch % process_count:
        raise ValueError(
            f"a batch of {data.rows_per_batch} rows does not divide among {process_count} "
            "processes; change batch_tokens"
        )
    mixture = open_mixture(data, corpus_dir, tokenizer)  # errors come here, not in a worker
    ahead.check_code(mixture.written, mixture.rows, data.rows)
    source = _HostRows(mixture, str(corpus_dir), tokenizer, steps, process_index, process_count)
    dataset = grain.MapDataset.source(source).batch(data.rows_per_batch // process_count)
    reading = grain.ReadOptions(num_threads=2, prefetch_buffer_size=READ_AHEAD)
    dataset = dataset[start_step:].to_iter_dataset(reading)
    if data.workers:
        dataset = dataset.mp_prefetch(_multiprocessing(data.workers))
    return iter(dataset)


def heldout_rows(
    data: config.Data, corpus_dir: str | Path, tokenizer, name: str, num_rows: int
) -> dict[str, np.ndarray]:
    """The first `num_rows` rows (or all there are) of a corpus's held-out documents, no infilling.

    Returns {tokens, loss_mask, segments, positions}, each [rows, T+1].
    """
    folder = corpus.open(corpus_dir, tokenizer)
    plain = replace(data, infilling_rate=0.0, spm_rate=0.5, line_rate=0.0)
    rows = _open_rows(plain, folder, name, tokenizer, "heldout")
    chosen = [rows.row(i) for i in range(min(num_rows, rows.rows_per_epoch))]
    if data.attend_across_documents:
        chosen = [join_documents(row) for row in chosen]
    return {key: np.stack([row[key] for row in chosen]) for key in chosen[0]}


def join_documents(row: Row) -> Row:
    """The row as one segment, its positions counted through: attention crosses documents."""
    inside = row["segments"] > 0
    positions = np.where(inside, np.arange(len(inside)), 0).astype(np.int32)
    return {**row, "segments": inside.astype(np.int32), "positions": positions}


def _open_rows(
    data: config.Data, folder: corpus.Corpus, name: str, tokenizer, which: str
) -> Rows | DialogueRows:
    split = folder.split(name, which)
    if len(split) == 0:
        raise ValueError(f"corpus {name!r} in {folder.folder} has no {which} documents")
    if folder.manifest["corpora"][name]["kind"] == "dialogues":
        return DialogueRows(split, tokenizer, name=name, seed=data.seed, seq_len=data.seq_len)
    rates = infilling.Rates(data.infilling_rate, data.spm_rate, data.line_rate)
    local = which == "train" and not storage.is_remote(folder.folder)
    keep = folder.folder / "plans" if local else None
    return Rows(
        split,
        tokenizer,
        name=name,
        seed=data.seed,
        seq_len=data.seq_len,
        rates=rates,
        keep=keep,
    )


class _HostRows:
    """The rows that one process reads, in order, for Grain. A worker opens the mixture anew."""

    def __init__(
        self,
        mixture: Mixture,
        corpus_dir: str,
        tokenizer,
        steps: int,
        process_index: int,
        process_count: int,
    ):
        self.data, self.corpus_dir, self.tokenizer = mixture.data, corpus_dir, tokenizer
        self.per_process = self.data.rows_per_batch // process_count
        self.steps, self.process_index = steps, process_index
        self._mixture: Mixture | None = mixture

    def __len__(self) -> int:
        return self.steps * self.per_process

    def __getitem__(self, index: int) -> Row:
        step, place = divmod(int(index), self.per_process)
        first = step * self.data.rows_per_batch + self.process_index * self.per_process
        return self._open().row(first + place)

    def _open(self) -> Mixture:
        with _OPENING:
            if self._mixture is None:
                self._mixture = open_mixture(self.data, self.corpus_dir, self.tokenizer)
            return self._mixture

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_mixture": None}


def _multiprocessing(num_workers: int):
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's workers ask for them
    return grain.MultiprocessingOptions(num_workers=num_workers)
