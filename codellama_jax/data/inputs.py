"""Where a large corpus comes from: inputs, cut into units that workers read alone, as documents.

    a directory of source files          units of whole files
    "this Python"                        units of the files that came with it
    files of records, or a directory of them, or a TensorFlow data set: see formats.py

All of them may be in a remote store, as gs://bucket/code.parquet (storage.py).
Which units there are depends on the input alone, never on the number of workers. A unit is read as
a stream: what it holds is in memory one document at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from codellama_jax.data import formats, sources, storage
from codellama_jax.data.sources import Document

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
    """A part of an input that one worker reads: records, or files of a tree, or help's topics."""

    given: Input
    num_bytes: int  # about
    part: formats.Part | None = None
    tree: sources.Tree | None = None
    files: tuple[tuple[str, tuple], ...] = field(default=(), repr=False)  # with size and time
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
        topics = Unit(given, sum(len(d.text) for d in sources.python_topics()))
        return [*_tree_units(given, unit_bytes), topics]
    path = storage.path(given.path)
    named = [given.path]
    if path.is_dir() and not formats.is_data_set(path):
        named = sorted(p for p in path.iterdir() if formats.is_data(p))
        if not named:
            return list(_tree_units(given, unit_bytes))
    parts = (part for name in named for part in formats.parts(name, part_bytes=unit_bytes))
    return [Unit(given, part.num_bytes, part) for part in parts]


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
    if unit.tree:
        yield from _read_files(unit, file_bytes)
    elif unit.part:
        file = Path(unit.part.path).name
        for number, record in enumerate(formats.read(unit.part), unit.part.start):
            yield _document(record, file, number, fields)
    else:
        yield from sources.python_topics()


def fingerprint(units: list[Unit]) -> list:
    """Names, sizes and times of change of all that is read: they tell a change."""
    files = {}
    for unit in units:
        if unit.tree:
            files |= {str(unit.tree.root / name): stamp for name, stamp in unit.files}
            continue
        path = unit.part.path if unit.part else unit.given.path
        if path not in files:
            files[path] = sources.stamp(storage.path(path))
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
                yield Unit(given, size, tree=tree, files=tuple(files))
                files, size = [], 0
        if files:
            yield Unit(given, size, tree=tree, files=tuple(files))
    if not found:
        raise ValueError(
            f"{given.path} has no source file (by ending) and no {', '.join(formats.ENDINGS)} file"
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


def _document(record: dict | bytes, file: str, number: int, fields: Fields) -> Document | Left:
    name = f"{file}#{number}"
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
    source = _text(_first(record, fields.source)) or file
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
