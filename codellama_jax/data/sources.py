"""Where documents come from: a tree of source files, or what every Python machine has.

A Document is one text and where it is from. What cannot be used is not an error: it is left out,
counted, and named in a Tally, which ends up in the corpus's manifest.
"""

import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_ENDINGS = {
    "python": ".py .pyi",
    "cython": ".pyx",
    "c": ".c .h",
    "cpp": ".cc .cpp .cxx .hpp .hh",
    "cuda": ".cu",
    "java": ".java",
    "kotlin": ".kt",
    "scala": ".scala",
    "javascript": ".js .mjs .jsx",
    "typescript": ".ts .tsx",
    "go": ".go",
    "rust": ".rs",
    "ruby": ".rb",
    "php": ".php",
    "csharp": ".cs",
    "swift": ".swift",
    "objective-c": ".m",
    "shell": ".sh .bash",
    "powershell": ".ps1",
    "perl": ".pl .pm",
    "lua": ".lua",
    "r": ".r",
    "julia": ".jl",
    "haskell": ".hs",
    "ocaml": ".ml .mli",
    "erlang": ".erl",
    "elixir": ".ex .exs",
    "clojure": ".clj",
    "lisp": ".lisp .el",
    "scheme": ".scm",
    "fortran": ".f90 .f",
    "d": ".d",
    "zig": ".zig",
    "nim": ".nim",
    "dart": ".dart",
    "sql": ".sql",
    "html": ".html",
    "css": ".css .scss",
    "vue": ".vue",
    "tex": ".tex",
    "cmake": ".cmake",
    "protobuf": ".proto",
    "verilog": ".v",
    "vhdl": ".vhd",
    "assembly": ".s",
    "prose": ".md .rst .txt",
}
LANGUAGES = {ending: name for name, endings in _ENDINGS.items() for ending in endings.split()}
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "site-packages", "dist-packages"}
PYTHON_LICENCE = "PSF-2.0"
EXAMPLES = 3


@dataclass(frozen=True)
class Document:
    text: str
    path: str  # of the file, relative to its source; decides what is held out
    language: str
    source: str  # the tree or collection
    licence: str = "unknown"
    part: str = ""  # which part of the file, where a document is less than all of it


@dataclass
class Tally:
    """What was left out and why: documents, bytes and up to three examples per reason."""

    removed: dict[str, dict] = field(default_factory=dict)

    def add(self, reason: str, name: str, num_bytes: int) -> None:
        entry = self.removed.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += num_bytes
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(name)


@dataclass(frozen=True)
class Limits:
    file_bytes: int = 1_000_000  # larger files are data
    line_chars: int = 1_000  # longer lines are minified or data


def code_tree(folder: str | Path, *, limits: Limits, tally: Tally) -> list[Document]:
    """All source files below `folder` whose ending is known, in order of path.

    Texts are kept as they are, CRLF included. Raises ValueError for a folder that is missing or has
    no file that can be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is not a directory; name a directory of source files")
    documents = [
        document
        for path in source_files(root)
        if (document := _read(path, root, root.resolve().name, "unknown", limits, tally))
    ]
    if not documents:
        reasons = ", ".join(f"{e['documents']} {why}" for why, e in tally.removed.items())
        raise ValueError(
            f"{root} has no text that can be used ({reasons or 'no file with a known ending'})"
        )
    return documents


def python_installation(*, limits: Limits, tally: Tally) -> list[Document]:
    """The standard library's modules, the C headers, and the prose that comes with Python."""
    source = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    documents = []
    for kind in ("stdlib", "include"):
        root = Path(sysconfig.get_path(kind))
        if not root.is_dir():
            continue
        for path in source_files(
            root, skipped={"test", "tests", "idle_test", "lib2to3", "pydoc_data"}
        ):
            document = _read(path, root, f"{source}-{kind}", PYTHON_LICENCE, limits, tally)
            if document:
                documents.append(document)
    return documents + list(_topics(f"{source}-topics"))


def listing(folders: list[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of every file that would be read: they tell a change."""
    entries = []
    for root in folders:
        for path in source_files(root):
            status = path.stat()
            entries.append((str(path), status.st_size, status.st_mtime_ns))
    return entries


def _topics(source: str) -> Iterator[Document]:
    """Python's reference prose, as help() shows it."""
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        yield Document(text.strip() + "\n", f"topics/{name}", "prose", source, PYTHON_LICENCE)


def source_files(root: Path, *, skipped: set[str] = frozenset()) -> Iterator[Path]:
    """Files with a known ending, in a fixed order; hidden folders and links are not entered."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in SKIPPED_FOLDERS | skipped and not name.startswith((".", "config-"))
        )
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in LANGUAGES and path.is_file() and not path.is_symlink():
                yield path


def _read(
    path: Path, root: Path, source: str, licence: str, limits: Limits, tally: Tally
) -> Document | None:
    name = path.relative_to(root).as_posix().encode(errors="replace").decode()
    try:
        size = path.stat().st_size
        if size > limits.file_bytes:
            tally.add(f"larger than {limits.file_bytes:,} bytes", name, size)
            return None
        data = path.read_bytes()
    except OSError:
        tally.add("unreadable", name, 0)
        return None
    reason, text = _decode(data, limits)
    if reason:
        tally.add(reason, name, len(data))
        return None
    return Document(text, name, LANGUAGES[path.suffix.lower()], source, licence)


def _decode(data: bytes, limits: Limits) -> tuple[str | None, str]:
    """The text, or the reason why there is none."""
    if not data.strip():
        return "empty", ""
    if b"\0" in data:
        return "binary (NUL bytes)", ""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8", ""
    if max(map(len, text.split("\n"))) > limits.line_chars:
        return f"a line longer than {limits.line_chars:,} characters", ""
    return None, text
