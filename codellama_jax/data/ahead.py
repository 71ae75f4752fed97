"""Rows tokenized ahead: written once by the code that makes rows, read back byte for byte.

    CORPUS/<data.rows>/manifest.json                  what its rows depend on; written last
    CORPUS/<data.rows>/<name>-00007.array_record      a row a record, random access

A reader takes the rows that are there and makes the others, those of later epochs or of a damaged
record, so the stream is the same with and without. Rows depend on the documents, the tokenizer, the
seed, the row length and the infilling, not on the mix: stages of another mix read them too.
materialise.py writes them.
"""

import json
import logging
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.data import corpus, storage
from codellama_jax.data.rows import Row

FORMAT = 2  # of the folder; a change makes older folders unreadable
SETTINGS = ("seq_len", "infilling_rate", "spm_rate", "line_rate", "seed")  # that rows depend on


def depends_on(data: config.Data, folder: corpus.Corpus, tokenizer) -> dict:
    """All that decides what stands in a row of a corpus."""
    settings = {name: asdict(data)[name] for name in SETTINGS}
    return {
        "format": FORMAT,
        "corpus": folder.fingerprint,
        "tokenizer": tokenizer.fingerprint,
        **settings,
    }


# -- reading ----------------------------------------------------------------------------------


class Ahead:
    """Rows first .. first+count-1 of a corpus, from files."""

    def __init__(self, folder: Path, name: str, entry: dict, capacity: int):
        self.first, self.count = entry["first"], entry["rows"]
        self._name, self._capacity = name, capacity
        self._dtype = np.dtype(entry["dtype"])
        try:
            self._records = corpus.record_source([folder / file for file in entry["files"]])
        except RuntimeError as error:
            raise ValueError(
                f"{folder} is damaged ({error}); delete it and run tools/prepare_rows.py again"
            ) from None
        self._lock, self._told = threading.Lock(), False
        if len(self._records) != self.count:
            raise ValueError(
                f"{folder} has {len(self._records)} rows of corpus {name!r}, its manifest says "
                f"{self.count}; delete it and run tools/prepare_rows.py again"
            )

    def row(self, index: int) -> Row | None:
        """Row `index` counted over all epochs; None where it is not there or damaged."""
        if not self.first <= index < self.first + self.count:
            return None
        try:
            return decode(self._records[index - self.first], self._dtype, self._capacity)
        except (RuntimeError, ValueError) as error:
            with self._lock:
                told, self._told = self._told, True
            if not told:
                logging.getLogger(__name__).warning(
                    "row %d of corpus %r, tokenized ahead, cannot be read and is made anew: %s",
                    index, self._name, error,
                )  # fmt: skip
            return None


def open_ahead(
    data: config.Data, folder: corpus.Corpus, tokenizer, names: list[str]
) -> list[Ahead | None]:
    """The rows of data.rows, one Ahead for each of `names` that has any.

    Raises ValueError where the folder is not whole, was written for other settings, another corpus
    or another tokenizer (each difference is named), or has rows of none of the corpora.
    """
    place = storage.beside(folder.folder, data.rows)
    manifest = read_json(place / "manifest.json")
    if manifest is None:
        raise ValueError(
            f"data.rows={data.rows!r}, but {place} holds no finished rows (it has no "
            "manifest.json): run tools/prepare_rows.py, to its end, or set data.rows to none"
        )
    same(manifest["of"], depends_on(data, folder, tokenizer), place)
    for name, entry in manifest["files"].items():
        size = storage.size(place / name)
        if size != entry["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
            raise ValueError(
                f"{place / name} {state}; delete {place} and run tools/prepare_rows.py again"
            )
    written = manifest["corpora"]
    if not written.keys() & set(names):
        raise ValueError(
            f"data.rows={data.rows!r} has no effect: {place} has rows of {', '.join(written)}, "
            f"the mix is of {', '.join(names)}"
        )
    capacity = data.seq_len + 1
    return [Ahead(place, n, written[n], capacity) if n in written else None for n in names]


def check_code(ahead: list[Ahead | None], rows: list, place: str) -> None:
    """Raises ValueError where the first rows are not what this version of the code makes."""
    for written, made in zip(ahead, rows, strict=True):
        if written is None:
            continue
        before, now = written.row(written.first), made.row(written.first)
        if before and any((before[key] != now[key]).any() for key in now):
            raise ValueError(
                f"{place} has rows of corpus {made.name!r} that this version of the code would "
                "make otherwise; delete it and run tools/prepare_rows.py again"
            )


def same(before: dict, asked: dict, place: Path) -> None:
    different = [
        f"{key} is {str(before.get(key))[:12]} there, {str(asked[key])[:12]} here"
        for key in asked
        if before.get(key) != asked[key]
    ]
    if different:
        raise ValueError(
            f"{place} was written for other rows: {'; '.join(different)}; name another folder by "
            "data.rows, or delete this one and run tools/prepare_rows.py again"
        )


def read_json(path: Path) -> dict | None:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; delete its folder") from None


# -- a row in bytes ---------------------------------------------------------------------------


def encode(row: Row, dtype: np.dtype) -> bytes:
    """The lengths of its segments, the tokens, and a bit for each that counts in the loss."""
    lengths = np.bincount(row["segments"])[1:]
    used = int(lengths.sum())
    head = np.array([len(lengths), *lengths], "<u4")
    ids, counts = row["tokens"][:used].astype(dtype), np.packbits(row["loss_mask"][:used])
    return head.tobytes() + ids.tobytes() + counts.tobytes()


def decode(record: bytes, dtype: np.dtype, capacity: int) -> Row:
    """The inverse of encode, in a row of `capacity` tokens."""
    num_segments = int(np.frombuffer(record, "<u4", 1)[0])
    lengths = np.frombuffer(record, "<u4", num_segments, offset=4).astype(np.int64)
    used, start = int(lengths.sum()), 4 + 4 * num_segments
    ids = np.frombuffer(record, dtype, used, offset=start)
    counts = np.frombuffer(record, np.uint8, offset=start + used * dtype.itemsize)
    begins = np.cumsum(lengths) - lengths
    row = {
        "tokens": np.zeros(capacity, np.int32),
        "loss_mask": np.zeros(capacity, bool),
        "segments": np.zeros(capacity, np.int32),
        "positions": np.zeros(capacity, np.int32),
    }
    row["tokens"][:used] = ids
    row["loss_mask"][:used] = np.unpackbits(counts, count=used)
    row["segments"][:used] = np.repeat(np.arange(1, num_segments + 1), lengths)
    row["positions"][:used] = np.arange(used) - np.repeat(begins, lengths)
    return row
