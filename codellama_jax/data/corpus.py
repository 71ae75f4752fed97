"""A prepared corpus: a folder of documents with their token counts and a manifest.

    DIR/manifest.json                                   written last: without it there is no corpus
    DIR/<name>/{train,heldout}-00000-of-00003.array_record    documents, JSON, random access
    DIR/<name>/{train,heldout}.lengths.npy              uint32: tokens of every document

A record is {"text" or "dialog", "path", "part", "language", "source", "licence"}, with
"chunk_tokens" for a long text (see tokens.py). Files are written under a temporary name and then
renamed. Which documents are held out depends on the path of their file alone: all parts of a file
go together, in every corpus, and none is ever trained on.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from codellama_jax import prompts
from codellama_jax.data import tokens
from codellama_jax.data.gather import Gathered, Request, file_of, gather, heldout_files

FORMAT = 1  # of the folder; a change makes older folders unreadable
SHARD_BYTES = 256 * 1024**2
SPLITS = ("train", "heldout")
PACKAGES = ("codellama_jax", "array_record", "rensa", "sentencepiece")  # that decide its bytes
Progress = Callable[[str, int, int], None]  # name of the corpus, documents so far, of how many
REPORT_EVERY = 500  # documents


class Split:
    """The documents of one corpus that are trained on, or those held out.

    entry: of the manifest. A corpus that is a part of another has its records, and an index.
    """

    def __init__(self, folder: Path, entry: dict):
        files, lengths = entry["records"], entry["lengths"]
        self._name = f"{folder / files[0]} and its fellows" if files[1:] else str(folder / files[0])
        self.lengths = np.load(folder / lengths, mmap_mode="r")
        self._records = record_source([str(folder / file) for file in files])
        self._index = np.load(folder / entry["index"], mmap_mode="r") if "index" in entry else None
        self._paths = np.load(folder / entry["paths"], mmap_mode="r") if "paths" in entry else None
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


# -- preparing --------------------------------------------------------------------------------


def prepare(
    folder: str | Path,
    tokenizer,
    request: Request | None = None,
    *,
    gathered: Gathered | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Writes the corpora of `request` to `folder`, or opens them where that is already done.

    gathered: what gather(request) returned, where the caller already has it.
    Raises ValueError if the folder holds a corpus made from another request, other files or for
    another tokenizer.
    """
    folder = Path(folder)
    request = request or (gathered.request if gathered else Request())
    if gathered and gathered.request != request:
        raise ValueError("the documents handed over were gathered for another request")
    asked = {"request": request.fingerprint(), "tokenizer": tokenizer.fingerprint}
    if (folder / "manifest.json").exists():
        corpus = open(folder, tokenizer)
        if corpus.manifest["asked"] != asked:
            raise ValueError(
                f"{folder} was prepared with other settings, or its source files have changed "
                "since; delete it or choose another folder"
            )
        return corpus
    gathered = gathered or gather(request)
    folder.mkdir(parents=True, exist_ok=True)
    held_out = heldout_files(gathered)
    measure = _Measure(tokenizer)
    corpora = {}
    for name in gathered.corpora:
        corpora[name] = _write_corpus(folder, name, gathered, held_out, measure, progress)
    manifest = {
        "format": FORMAT,
        "asked": asked,
        "settings": asdict(request),
        "versions": {name: version(name) for name in PACKAGES},
        "corpora": corpora,
        "removed": gathered.tally.removed,
        "files": {
            path.relative_to(folder).as_posix(): checksum(path)
            for name in corpora
            for path in sorted((folder / name).iterdir())
        },
    }
    write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return open(folder, tokenizer)


def _write_corpus(
    folder: Path, name: str, gathered: Gathered, held_out: set, measure: "_Measure", progress
) -> dict:
    """Writes both splits of one corpus; returns its entry of the manifest."""
    (folder / name).mkdir(exist_ok=True)
    for left in (folder / name).iterdir():  # of a run that was killed
        left.unlink()
    documents = gathered.corpora[name]
    splits: dict[str, list[dict]] = {"train": [], "heldout": []}
    for document in documents:
        which = "heldout" if file_of(document) in held_out else "train"
        splits[which].append(document if isinstance(document, dict) else asdict(document))
    kind = "dialogues" if isinstance(documents[0], dict) else "documents"
    entry = {"kind": kind, "origin": gathered.origin[name]}
    done = itertools.count(1)

    def tell() -> None:
        count = next(done)
        if progress and (count % REPORT_EVERY == 0 or count == len(documents)):
            progress(name, count, len(documents))

    for which, chosen in splits.items():
        entry[which] = _write_split(folder, f"{name}/{which}", chosen, measure, tell)
    return entry


def _write_split(folder: Path, stem: str, records: list[dict], measure: "_Measure", tell) -> dict:
    lengths, languages, lines = [], {}, []
    for record in records:
        length, size = measure(record)
        lengths.append(length)
        entry = languages.setdefault(record["language"], {"documents": 0, "bytes": 0, "tokens": 0})
        for key, value in (("documents", 1), ("bytes", size), ("tokens", length)):
            entry[key] += value
        lines.append(json.dumps(record, ensure_ascii=False).encode())
        tell()
    shards = _shards(lines)
    names = [f"{stem}-{n:05d}-of-{len(shards):05d}.array_record" for n in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        write_shard(folder / file, shard)
    temporary = folder / f"{stem}.lengths.tmp.npy"
    np.save(temporary, np.array(lengths, np.uint32))
    os.replace(temporary, folder / f"{stem}.lengths.npy")
    totals = {
        key: sum(entry[key] for entry in languages.values())
        for key in ("documents", "bytes", "tokens")
    }
    return {
        **totals,
        "languages": dict(sorted(languages.items())),
        "records": names,
        "lengths": f"{stem}.lengths.npy",
    }


class _Measure:
    """Counts tokens; those of a text that stands in several corpora once."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._count = functools.cache(lambda text: tokens.count(tokenizer, text))

    def __call__(self, record: dict) -> tuple[int, int]:
        """Tokens and bytes of a record; notes the tokens of a long text's chunks in it."""
        if "dialog" in record:
            text = "".join(message["content"] for message in record["dialog"])
            ids, _ = prompts.chat_example(self._tokenizer, record["dialog"])
            return len(ids), len(text.encode())
        counts = self._count(record["text"])
        if len(counts) > 1:
            record["chunk_tokens"] = counts
        return sum(counts) + 2, len(record["text"].encode())


def _shards(lines: list[bytes]) -> list[list[bytes]]:
    """Splits records into shards of about 256 MB; at least one."""
    shards, size = [[]], 0
    for line in lines:
        if size and size + len(line) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(line)
        size += len(line)
    return shards


def write_shard(path: Path, lines: list[bytes]) -> None:
    temporary = path.with_suffix(".tmp")
    writer = Writer(temporary)
    for line in lines:
        writer.write(line)
    writer.close()
    os.replace(temporary, path)


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


def record_source(files: list[str]):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(files)


def path_hash(path: str) -> int:
    """What a corpus keeps of every path, so that a document is found without reading them all."""
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def checksum(path: Path) -> dict:
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
    folder = Path(folder)
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
    for name, entry in manifest["files"].items():
        file = folder / name
        size = file.stat().st_size if file.exists() else None
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
