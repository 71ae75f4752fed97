"""Where a large corpus comes from: files of many formats, cut into units that workers read alone.

    a directory of source files          units of whole files
    "this Python"                        units of the files that came with it
    .jsonl, .json, .ndjson               byte ranges; .gz and .zst are one unit each
    .parquet                             row groups
    .array_record, JSON records          record ranges
    a TensorFlow Datasets name or folder record ranges (extra `tfds`; TensorFlow is not needed)

All of them may be in a remote store, as gs://bucket/code.parquet (storage.py).
Which units there are depends on the input alone, never on the number of workers. A unit is read as
a stream: what it holds is in memory one document at a time.
"""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from codellama_jax.data import corpus, sources, storage
from codellama_jax.data.sources import Document

JSON_LINES = (".jsonl", ".ndjson", ".json")
PACKED = (".gz", ".zst")
DATA_ENDINGS = (*JSON_LINES, *PACKED, ".parquet", ".array_record", ".arrayrecord")
ALIASES = {  # names that data sets give to languages
    "c++": "cpp",
    "c#": "csharp",
    "objectivec": "objective-c",
    "emacs lisp": "lisp",
    "common lisp": "lisp",
    "bash": "shell",
    "jsx": "javascript",
    "tsx": "typescript",
    "markdown": "prose",
    "restructuredtext": "prose",
    "text": "prose",
    "nl": "prose",
    "en": "prose",
    "english": "prose",
}


@dataclass(frozen=True)
class Fields:
    """Names that a record's fields may have; the first that is there counts."""

    text: tuple[str, ...] = ("text", "content", "code")
    dialog: tuple[str, ...] = ("dialog", "messages")  # [{"role", "content"}, ...] instead of text
    path: tuple[str, ...] = ("path", "file_path", "max_stars_repo_path", "url", "id")
    language: tuple[str, ...] = ("language", "lang", "programming_language")
    licence: tuple[str, ...] = ("licence", "license", "detected_licenses", "licenses")
    source: tuple[str, ...] = ("source", "repo", "repo_name", "max_stars_repo_name")


@dataclass(frozen=True)
class Input:
    """One thing that was named: [CORPUS=]PATH."""

    path: str
    corpus: str = ""  # none: "language" for prose, "dialogues", "code" for the rest

    @classmethod
    def parse(cls, text: str) -> "Input":
        name, _, path = text.partition("=")
        return cls(path, name) if path and "/" not in name else cls(text)


@dataclass(frozen=True)
class Unit:
    """A part of an input that one worker reads."""

    kind: str  # files, topics, json, packed, parquet, array_record, tfds
    path: str
    given: Input
    num_bytes: int  # about
    start: int = 0
    end: int = 0
    files: tuple[tuple[str, tuple], ...] = field(default=(), repr=False)  # with size and time
    tree: sources.Tree | None = None  # that these files are from
    split: str = ""  # of a TensorFlow data set
    fill: bool = False  # only for corpora that other inputs have nothing for


@dataclass(frozen=True)
class Left:
    """What could not even become a document."""

    reason: str
    path: str
    num_bytes: int
    language: str = ""


def units(given: Input, *, unit_bytes: int) -> list[Unit]:
    """The parts of an input, in order.

    Raises ValueError for what is missing, empty, or of an unknown format.
    """
    if given.path == sources.THIS_PYTHON:
        topics = Unit(
            "topics", given.path, given, sum(len(d.text) for d in sources.python_topics())
        )
        return [*_tree_units(given, unit_bytes), topics]
    path = storage.path(given.path)
    if path.is_dir() and not (path / "dataset_info.json").exists():
        data = sorted(p for p in path.iterdir() if _is_data(p))
        if not data:
            return list(_tree_units(given, unit_bytes))
        return [unit for p in data for unit in _data_units(p, given, unit_bytes)]
    if path.is_file():
        return list(_data_units(path, given, unit_bytes))
    return list(_tfds_units(given, unit_bytes))


def _is_data(path: Path) -> bool:
    """Whether a directory that holds this file is one of data, not of source code."""
    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    endings = (".jsonl", ".ndjson", ".parquet", ".array_record")
    return plain.endswith(endings) and path.is_file()


def read(unit: Unit, fields: Fields, *, file_bytes: int) -> Iterator[Document | Left]:
    """The documents of a unit, in order; what cannot be used comes as a Left.

    Raises ValueError where a file is damaged.
    """
    for item in _read(unit, fields, file_bytes):
        if isinstance(item, Document):
            item = replace(item, corpus=unit.given.corpus or _corpus(item))
        yield item


def _corpus(document: Document) -> str:
    if document.dialog:
        return "dialogues"
    return "language" if document.language == "prose" else "code"


def _read(unit: Unit, fields: Fields, file_bytes: int) -> Iterator[Document | Left]:
    if unit.kind == "files":
        yield from _read_files(unit, file_bytes)
        return
    if unit.kind == "topics":
        yield from sources.python_topics()
        return
    try:
        for number, record in enumerate(_RECORDS[unit.kind](unit), unit.start):
            yield _document(record, unit, number, fields)
    except (OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"{unit.path} cannot be read: {error}") from None


def fingerprint(units: list[Unit]) -> list:
    """Names, sizes and times of change of all that is read: they tell a change."""
    files = {}
    for unit in units:
        if unit.tree:
            files |= {str(unit.tree.root / name): stamp for name, stamp in unit.files}
        elif unit.path not in files:
            files[unit.path] = sources.stamp(storage.path(unit.path))
    return list(files.items())


# -- directories of source files --------------------------------------------------------------


def _tree_units(given: Input, unit_bytes: int) -> Iterator[Unit]:
    found = False
    for tree in sources.trees(given.path):
        files, size = [], 0
        for path in sources.source_files(tree):
            found = True
            stamp = sources.stamp(path)
            files.append((sources.name_below(tree.root, path), stamp))
            size += stamp[0]
            if size >= unit_bytes:
                yield Unit("files", given.path, given, size, files=tuple(files), tree=tree)
                files, size = [], 0
        if files:
            yield Unit("files", given.path, given, size, files=tuple(files), tree=tree)
    if not found:
        raise ValueError(
            f"{given.path} has no source file (by ending) and no {', '.join(DATA_ENDINGS)} file"
        )


def _read_files(unit: Unit, file_bytes: int) -> Iterator[Document | Left]:
    tree = unit.tree
    for name, (size, _) in unit.files:
        path = tree.root / name
        shown = name.encode(errors="replace").decode()
        language = sources.LANGUAGES[path.suffix.lower()]
        try:
            if file_bytes and size > file_bytes:
                yield Left(f"larger than {file_bytes:,} bytes", shown, size, language)
                continue
            text = storage.again(path.read_bytes).decode("utf-8")
        except OSError:
            yield Left("unreadable", shown, size, language)
        except UnicodeDecodeError:
            yield Left("not UTF-8", shown, size, language)
        else:
            yield Document(text, shown, language, tree.source, tree.licence)


# -- records ----------------------------------------------------------------------------------


def _data_units(path: Path, given: Input, unit_bytes: int) -> Iterator[Unit]:
    size = storage.size(path)
    suffix = path.suffix.lower()
    if suffix in PACKED:
        yield Unit("packed", str(path), given, size)
    elif suffix in JSON_LINES:
        for start in range(0, size, unit_bytes):
            end = min(start + unit_bytes, size)
            yield Unit("json", str(path), given, end - start, start, end)
    elif suffix == ".parquet":
        yield from _parquet_units(path, given, unit_bytes)
    elif suffix in (".array_record", ".arrayrecord"):
        count = len(_array_record(str(path)))
        yield from _ranges("array_record", path, given, count, size, unit_bytes)
    else:
        raise ValueError(
            f"{path} has an unknown format; known are directories of source files and "
            f"{', '.join(DATA_ENDINGS)}"
        )


def _ranges(kind: str, path, given: Input, count: int, size: int, unit_bytes: int, split: str = ""):
    """Units of equal numbers of records, about unit_bytes each."""
    num_units = max(-(-size // unit_bytes), 1)
    step = max(-(-count // num_units), 1)
    for start in range(0, count, step):
        end = min(start + step, count)
        part = size * (end - start) // count
        yield Unit(kind, str(path), given, part, start, end, split=split)


def _parquet_units(path: Path, given: Input, unit_bytes: int) -> Iterator[Unit]:
    with path.open("rb") as file:
        metadata = _pyarrow().ParquetFile(file).metadata
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= unit_bytes or group == metadata.num_row_groups - 1:
            yield Unit("parquet", str(path), given, size, start, group + 1)
            start, size = group + 1, 0


def _tfds_units(given: Input, unit_bytes: int) -> Iterator[Unit]:
    builder = _tfds_builder(given.path)
    for name, split in sorted(builder.info.splits.items()):
        yield from _ranges(
            "tfds", given.path, given, split.num_examples, split.num_bytes, unit_bytes, name
        )


def _read_json(unit: Unit) -> Iterator[dict | bytes]:
    """The lines that begin in [start, end)."""
    with storage.path(unit.path).open("rb") as file:
        if unit.start:
            file.seek(unit.start - 1)
            file.readline()
        while file.tell() < unit.end and (line := file.readline()):
            if line.strip():
                yield _parse(line)


def _read_packed(unit: Unit) -> Iterator[dict | bytes]:
    packed = storage.path(unit.path).open("rb")
    if unit.path.endswith(".gz"):
        file = gzip.GzipFile(fileobj=packed)
    else:
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{unit.path} needs the package zstandard; install it") from None
        unpacked = zstandard.ZstdDecompressor().stream_reader(packed)
        file = io.BufferedReader(unpacked, 1 << 20)
    with packed, file:
        try:
            for line in file:
                if line.strip():
                    yield _parse(line)
        except Exception as error:  # gzip, zlib and zstandard have errors of their own
            raise ValueError(f"{unit.path} is damaged: {error}") from None


def _read_parquet(unit: Unit) -> Iterator[dict]:
    with storage.path(unit.path).open("rb") as opened:
        file = _pyarrow().ParquetFile(opened)
        for batch in file.iter_batches(256, row_groups=range(unit.start, unit.end)):
            yield from batch.to_pylist()


def _read_array_record(unit: Unit) -> Iterator[dict | bytes]:
    records = _array_record(unit.path)
    for number in range(unit.start, unit.end):
        yield _parse(records[number])


def _read_tfds(unit: Unit) -> Iterator[dict]:
    records = _tfds_builder(unit.path).as_data_source(split=unit.split)
    for number in range(unit.start, unit.end):
        yield records[number]


_RECORDS = {
    "json": _read_json,
    "packed": _read_packed,
    "parquet": _read_parquet,
    "array_record": _read_array_record,
    "tfds": _read_tfds,
}


def _parse(line: bytes) -> dict | bytes:
    """The record, or the line itself where it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return line
    return record if isinstance(record, dict) else line


def _document(record: dict | bytes, unit: Unit, number: int, fields: Fields) -> Document | Left:
    name = f"{Path(unit.path).name}#{number}"
    if isinstance(record, bytes):
        return Left("not a JSON record", name, len(record))
    path = str(_text(_first(record, fields.path)) or name)
    dialog = _dialog(_first(record, fields.dialog))
    raw = "\n".join(message for _, message in dialog) or _first(record, fields.text)
    if not isinstance(raw, str | bytes):
        return Left(f"no text under {' or '.join(fields.text)}", path, 0)
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
        text.encode()
    except UnicodeError:  # half of a surrogate pair, written as an escape, is no text either
        return Left("not UTF-8", path.encode(errors="replace").decode(), len(raw))
    language = str(_text(_first(record, fields.language)) or "").lower()
    language = ALIASES.get(language, language)
    language = language or sources.LANGUAGES.get(Path(path).suffix.lower(), "prose")
    licence = _first(record, fields.licence)
    licence = " AND ".join(map(str, licence)) if isinstance(licence, list) else _text(licence)
    source = _text(_first(record, fields.source)) or Path(unit.path).name
    shown = path.encode(errors="replace").decode()
    licence = str(licence or "unknown")
    return Document(text, shown, language, str(source), licence, dialog=dialog)


def _dialog(messages) -> tuple[tuple[str, str], ...]:
    """(role, message) of a record's dialogue; none where it is not written as one."""
    try:
        return tuple((str(_text(m["role"])), str(_text(m["content"]))) for m in messages or ())
    except (TypeError, KeyError):
        return ()


def _first(record: dict, names: tuple[str, ...]):
    return next((record[name] for name in names if record.get(name) is not None), None)


def _text(value):
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _array_record(path: str):
    return corpus.record_source([storage.path(path)])


def _pyarrow():
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("Parquet files need the package pyarrow; install it") from None
    return pyarrow.parquet


def _tfds_builder(name: str):
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise ValueError(
            f"{name} is neither a file nor a directory; for the name of a TensorFlow data set "
            "install the package tensorflow-datasets (TensorFlow is not needed)"
        ) from None
    try:
        if storage.path(name).is_dir():
            return tfds.builder_from_directory(name)
        builder = tfds.builder(name, file_format="array_record")
        if not builder.is_prepared():
            builder.download_and_prepare()
        return builder
    except (ValueError, OSError, tfds.core.registered.DatasetNotFoundError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{name} is neither a file nor a directory, nor a TensorFlow data set ({first})"
        ) from None
