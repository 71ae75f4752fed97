"""What the tasks of preparing share: a job, and folders that are whole or absent.

A task fills a folder below the job's: `read-00003` is that of task 3 of the round "read". In it lie
result.json, and columns of numbers beside its records, which others map into memory.

A table is what the tasks of one round make of all units: "read" has the documents that were read
and not filtered, "cut" the pieces they were cut into. A row's number is its place in a table, in
the order of the units: `offsets` says where each unit's begin.
"""

import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codellama_jax.data import clean, corpus, inputs, storage
from codellama_jax.data.sources import Document, Tally

READ_AT_ONCE = 32  # records
DONE = "done"  # the last file of a remote folder


@dataclass(frozen=True)
class Job:
    """What every task needs to know; request: a pipeline.Request."""

    work: str
    request: object
    units: tuple[inputs.Unit, ...]

    @property
    def fill(self) -> frozenset[int]:
        """Numbers of the units that are only for corpora that others have nothing for."""
        return frozenset(n for n, unit in enumerate(self.units) if unit.fill)

    @property
    def named(self) -> list[int]:
        """Numbers of the others, that the user named."""
        return [n for n, unit in enumerate(self.units) if not unit.fill]

    def path(self, name: str, number: int | None = None) -> Path:
        return storage.path(self.work) / (name if number is None else f"{name}-{number:05d}")

    def result(self, name: str, number: int | None = None) -> dict:
        return json.loads(storage.local(self.path(name, number) / "result.json").read_text())

    def array(self, column: str, name: str, number: int | None = None) -> np.ndarray:
        file = storage.local(self.path(name, number) / f"{column}.npy")
        return np.load(file, mmap_mode="r")

    def offsets(self, table: str) -> np.ndarray:
        """Number of the first row of every unit, and of all: int64 [units + 1]."""
        return self.array("offsets", f"{table}_counted")


def is_done(path: Path) -> bool:
    return storage.again((path / DONE).exists if storage.is_remote(path) else path.exists)


def whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder that is there only once `fill` has filled it, a local folder.

    A local one is renamed in the end; a remote store has no such thing, so a file tells.
    """
    if is_done(path):
        return
    if storage.is_remote(path):
        with tempfile.TemporaryDirectory(prefix="codellama-") as folder:
            fill(Path(folder))
            storage.send_all(Path(folder), path)
            (Path(folder) / DONE).touch()
            storage.send(Path(folder) / DONE, path / DONE)
        return
    temporary = Path(tempfile.mkdtemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent))
    fill(temporary)
    temporary.chmod(0o755)
    try:
        os.replace(temporary, path)
    except OSError:  # an engine may run a task twice at once
        if not path.exists():
            raise
        shutil.rmtree(temporary)


def write_result(out: Path, result: dict) -> None:
    (out / "result.json").write_text(json.dumps(result))


def count(job: Job, table: str, out: Path) -> None:
    """What `offsets` reads."""
    counts = [job.result(table, n)["documents"] for n in range(len(job.units))]
    np.save(out / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


class Table:
    """Writes a unit's part of a table: records, and columns of what later tasks compare.

    digest, bands: equal for equal texts, and (one of them) for similar ones; chars; rank: the
    smallest are held out; last: not kept if there is another; corpus: number of a name in result().
    """

    COLUMNS = {  # shape of a row, type
        "digest": ((2,), np.uint64),
        "bands": ((clean.BANDS,), np.uint64),
        "chars": ((), np.uint32),
        "rank": ((), np.uint64),
        "last": ((), bool),
        "corpus": ((), np.uint16),
    }

    def __init__(self, out: Path):
        self._out = out
        self._records = corpus.Writer(out / "records")
        self._columns: dict[str, list] = {name: [] for name in self.COLUMNS}
        self._corpora: dict[str, int] = {}

    def add(self, documents: list[Document], bands, *, ranks, last, salts=0) -> None:
        """Arrays [documents, ...]. salts: rows with different ones are no duplicates."""
        digests = [hashlib.blake2b(d.text.encode(), digest_size=16).digest() for d in documents]
        salts = np.broadcast_to(np.asarray(salts, np.uint64), len(documents))[:, None]
        names = [self._corpora.setdefault(d.corpus, len(self._corpora)) for d in documents]
        rows = {
            "digest": np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2) ^ salts,
            "bands": bands ^ salts,
            "chars": [len(d.text) for d in documents],
            "rank": ranks,
            "last": np.broadcast_to(last, len(documents)),
            "corpus": names,
        }
        for name, values in rows.items():
            self._columns[name].append(np.asarray(values, self.COLUMNS[name][1]))
        for document in documents:
            self._records.write(json.dumps(vars(document), ensure_ascii=False).encode())

    def save(self) -> dict:
        """Writes the columns; returns what belongs into the result."""
        for name, blocks in self._columns.items():
            shape, dtype = self.COLUMNS[name]
            column = np.concatenate([np.zeros((0, *shape), dtype), *blocks])
            column = np.ascontiguousarray(column.T) if name == "bands" else column
            np.save(self._out / f"{name}.npy", column)
        return {"documents": sum(map(len, self._columns["chars"])), "corpora": [*self._corpora]}

    def close(self) -> None:
        """To be called in every case: a writer's destructor must not find it open."""
        self._records.close()


class Records:
    """The documents of a table, by row."""

    def __init__(self, job: Job, table: str):
        self._job, self._table, self._starts = job, table, job.offsets(table)
        self._open = functools.lru_cache(maxsize=16)(self._open_unit)

    def _open_unit(self, unit: int):
        return corpus.record_source([self._job.path(self._table, unit) / "records"])

    def __getitem__(self, row: int) -> Document:
        unit = int(np.searchsorted(self._starts, row, side="right")) - 1
        return _document(self._open(unit)[int(row - self._starts[unit])])

    def of_unit(self, unit: int, places: np.ndarray) -> Iterator[Document]:
        """Those of a unit, in order of their places in it."""
        reader = corpus.reader(self._job.path(self._table, unit) / "records")
        for first in range(0, len(places), READ_AT_ONCE):
            yield from map(_document, reader.read(places[first : first + READ_AT_ONCE].tolist()))
        reader.close()


def _document(line: bytes) -> Document:
    record = json.loads(line)
    record["dialog"] = tuple((role, message) for role, message in record["dialog"])
    return Document(**record)


class Left:
    """What a task leaves out: counted, and listed one JSON line each."""

    def __init__(self, out: Path):
        self._files, self._pieces = Tally(), Tally()
        self._list = (out / "removed.jsonl").open("w", encoding="utf-8")

    def add(self, reason: str, item: Document | inputs.Left, **about) -> None:
        is_document = isinstance(item, Document)
        size = len(item.text.encode(errors="replace")) if is_document else item.num_bytes
        name = f"{item.path} {item.part}".strip() if is_document else item.path
        tally = self._pieces if is_document and item.part else self._files
        tally.add(reason, name, size, item.language)
        line = {"reason": reason, "path": item.path, "bytes": size, "language": item.language}
        if is_document:
            line |= {"source": item.source} | ({"part": item.part} if item.part else {})
        self._list.write(json.dumps(line | about, ensure_ascii=False) + "\n")

    def close(self) -> dict:
        self._list.close()
        return {"removed": self._files.removed, "removed_pieces": self._pieces.removed}
