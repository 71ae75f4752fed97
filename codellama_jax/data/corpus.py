"""A prepared corpus: a folder of documents with their token counts and a manifest.

    DIR/manifest.json                                   written last: without it there is no corpus
    DIR/<name>/{train,heldout}-00000-of-00003.array_record    documents, JSON, random access
    DIR/<name>/{train,heldout}.lengths.npy              uint32: tokens of every document

DIR may be in a remote store, as gs://bucket/corpus (storage.py).

A record is {"text" or "dialog", "path", "part", "language", "source", "licence"}, with
"chunk_tokens" for a long text (see tokens.py). Files are written under a temporary name and then
renamed. Which documents are held out depends on the path of their file alone: all parts of a file
go together, in every corpus, and none is ever trained on.
"""

import concurrent.futures
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from codellama_jax.data import storage

FORMAT = 1  # of the folder; a change makes older folders unreadable
SPLITS = ("train", "heldout")
ASKED_AT_ONCE = 32  # files whose sizes are looked up
NAMES = (  # of the corpora that preparing knows of; an input may name others
    "code",
    "python",
    "code_files",
    "python_files",
    "code_language",
    "language",
    "dialogues",
)
PACKAGES = (  # that decide its bytes
    "codellama_jax",
    "array_record",
    "rensa",
    "sentencepiece",
    "detect_secrets",
)


class Split:
    """The documents of one corpus that are trained on, or those held out.

    entry: of the manifest. A corpus that is a part of another has its records, and an index.
    """

    def __init__(self, folder: Path, entry: dict):
        files, lengths = entry["records"], entry["lengths"]
        self._name = f"{folder / files[0]} and its fellows" if files[1:] else str(folder / files[0])
        self.lengths = _array(folder / lengths)
        try:
            self._records = record_source([folder / file for file in files])
        except RuntimeError as error:  # the end of a file says what it holds
            raise ValueError(
                f"{self._name} is damaged ({error}); prepare the corpus again"
            ) from None
        self._index = _array(folder / entry["index"]) if "index" in entry else None
        self._paths = _array(folder / entry["paths"]) if "paths" in entry else None
        count = len(self._records if self._index is None else self._index)
        if count != len(self.lengths):
            raise ValueError(
                f"{self._name} has {count} documents, but {lengths} has "
                f"{len(self.lengths)} lengths; prepare the corpus again"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def record(self, number: int) -> dict:
        """Document `number`. Raises ValueError where the file is damaged."""
        place = number if self._index is None else int(self._index[number])
        try:
            return json.loads(self._records[place])
        except (RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"document {number} of {self._name} cannot be read ({error}); "
                "prepare the corpus again"
            ) from None

    def find(self, path: str) -> list[int]:
        """Numbers of the documents of a file."""
        if self._paths is None:  # a small corpus
            numbers = range(len(self))
        else:
            numbers = np.flatnonzero(self._paths == np.uint64(path_hash(path))).tolist()
        return [number for number in numbers if self.record(number)["path"] == path]


@dataclass(frozen=True)
class Corpus:
    """An opened folder. names: its corpora, e.g. code, python, language."""

    folder: Path
    manifest: dict

    @property
    def names(self) -> list[str]:
        return list(self.manifest["corpora"])

    @property
    def fingerprint(self) -> str:
        """Changes when any document or length does."""
        return hashlib.sha256(json.dumps(self.manifest["files"]).encode()).hexdigest()

    def split(self, name: str, which: str) -> Split:
        """which: "train" or "heldout". Raises ValueError for a name that is not there."""
        if name not in self.names:
            raise ValueError(
                f"{self.folder} has no corpus {name!r}; it has {', '.join(self.names)}"
            )
        return Split(self.folder, self.manifest["corpora"][name][which])

    def texts(self, names: list[str], which: str = "train") -> Iterator[str]:
        """The texts of some corpora, in order."""
        for name in names:
            split = self.split(name, which)
            yield from (split.record(i)["text"] for i in range(len(split)))


# -- writing ----------------------------------------------------------------------------------


def write_shard(path: Path, lines: list[bytes]) -> None:
    with storage.writing(path) as temporary:
        writer = Writer(temporary)
        for line in lines:
            writer.write(line)
        writer.close()


class Writer:
    """Writes an ArrayRecord file whose records are read one by one. Close it in every case."""

    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path = path
        self._writer = ArrayRecordWriter(str(path), "group_size:1")

    def write(self, line: bytes) -> None:
        self._try(lambda: self._writer.write(line))

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except RuntimeError as error:  # a full disk, for one
            raise OSError(f"{self._path} could not be written: {error}") from None


def record_source(files: list[Path]):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([storage.records(file) for file in files])


def reader(path: Path):
    """Reads many records of one file at a time; to be closed."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(storage.records(path), "readahead_buffer_size:0,max_parallelism:0")


def path_hash(path: str) -> int:
    """What a corpus keeps of every path, so that a document is found without reading them all."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(path: Path, data: bytes) -> None:
    with storage.writing(path) as temporary:
        temporary.write_bytes(data)


def checksum(path: Path) -> dict:
    path = storage.local(path)
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


# -- opening ----------------------------------------------------------------------------------


def open(folder: str | Path, tokenizer=None, *, verify: bool = False) -> Corpus:
    """Opens a prepared corpus; with a tokenizer, checks that it was prepared for it.

    Sizes of all files are checked, and with `verify` their checksums too. Raises ValueError where
    anything is missing or differs.
    """
    folder = storage.path(folder)
    path = folder / "manifest.json"
    if not path.exists():
        raise ValueError(
            f"{folder} is not a prepared corpus (it has no manifest.json); "
            "make one with tools/prepare_corpus.py"
        )
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: {error}; prepare the corpus again") from None
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')}, this code reads {FORMAT}; "
            "prepare the corpus again"
        )
    for name, size in _sizes(folder, list(manifest["files"])):
        file, entry = folder / name, manifest["files"][name]
        if size != entry["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes, not {entry['bytes']}"
            raise ValueError(f"{file} {state}; prepare the corpus again")
        if verify and checksum(file) != entry:
            raise ValueError(f"{file} differs from its checksum; prepare the corpus again")
    ours = manifest["asked"]["tokenizer"]
    if tokenizer is not None and tokenizer.fingerprint != ours:
        raise ValueError(
            f"{folder} was prepared for another tokenizer (fingerprint {ours[:12]}, not "
            f"{tokenizer.fingerprint[:12]} as {tokenizer.path}); use that one, or prepare anew"
        )
    return Corpus(folder, manifest)


def _sizes(folder: Path, names: list[str]) -> Iterator[tuple[str, int | None]]:
    """Bytes of every file, None where it is missing; many at once, as a remote store is slow."""
    with concurrent.futures.ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
        sizes = threads.map(lambda name: storage.size(folder / name), names)
        yield from zip(names, sizes, strict=True)


def _array(path: Path) -> np.ndarray:
    return np.load(storage.local(path), mmap_mode="r")
