"""Documents, and the files they come from: trees of source code, or what every Python brings.

What cannot be used is not an error: it is left out, counted, and named in a Tally, which ends up in
the corpus's manifest.
"""

import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from codellama_jax.data import storage

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
THIS_PYTHON = "this Python"  # names the library, headers and reference prose of this installation
PYTHON_SKIPPED = {"test", "tests", "idle_test", "lib2to3", "pydoc_data"}
PYTHON_LICENCE = "PSF-2.0"
EXAMPLES = 3


@dataclass(frozen=True)
class Document:
    text: str  # of a dialogue: its messages, one below the other
    path: str  # of the file, relative to its source; decides what is held out
    language: str
    source: str  # the tree or collection
    licence: str = "unknown"
    part: str = ""  # which part of the file, where a document is less than all of it
    corpus: str = ""  # where it goes
    dialog: tuple[tuple[str, str], ...] = ()  # (role, message), where it is a dialogue


@dataclass
class Tally:
    """What was left out and why: documents, bytes, languages, up to three examples per reason."""

    removed: dict[str, dict] = field(default_factory=dict)

    def add(self, reason: str, name: str, num_bytes: int, language: str = "") -> None:
        empty = {"documents": 0, "bytes": 0, "examples": [], "languages": Counter()}
        entry = self.removed.setdefault(reason, empty)
        entry["documents"] += 1
        entry["bytes"] += num_bytes
        entry["languages"][language or "unknown"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(name)


@dataclass(frozen=True)
class Tree:
    """A folder of source files."""

    root: Path
    source: str
    licence: str = "unknown"
    skipped: frozenset[str] = frozenset()


def trees(path: str) -> list[Tree]:
    """The folders that a path stands for; those of THIS_PYTHON are its library and its headers."""
    if path != THIS_PYTHON:
        root = storage.path(path)
        return [Tree(root, root.name if storage.is_remote(path) else root.resolve().name)]
    roots = ((kind, Path(sysconfig.get_path(kind))) for kind in ("stdlib", "include"))
    return [
        Tree(root, f"{_python()}-{kind}", PYTHON_LICENCE, frozenset(PYTHON_SKIPPED))
        for kind, root in roots
        if root.is_dir()
    ]


def python_topics() -> Iterator[Document]:
    """Python's reference prose, as help() shows it."""
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items()):
        source = f"{_python()}-topics"
        yield Document(text.strip() + "\n", f"topics/{name}", "prose", source, PYTHON_LICENCE)


def _python() -> str:
    return f"python-{sys.version_info.major}.{sys.version_info.minor}"


def source_files(tree: Tree) -> Iterator[Path]:
    """Files with a known ending, in a fixed order; hidden folders and links are not entered."""
    skipped = SKIPPED_FOLDERS | tree.skipped
    remote = storage.is_remote(tree.root)
    for folder, folders, names in tree.root.walk() if remote else os.walk(tree.root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in skipped and not name.startswith((".", "config-"))
        )
        folder = _with_scheme(folder, tree.root) if remote else Path(folder)
        for name in sorted(names):
            path = folder / name
            if path.suffix.lower() in LANGUAGES:
                if remote or path.is_file() and not path.is_symlink():
                    yield path


def _with_scheme(folder, root):
    """epath's walk leaves out gs://."""
    scheme = str(root).split("://")[0] + "://"
    return storage.path(scheme + str(folder).removeprefix(scheme))


def stamp(path: Path) -> tuple[int, float]:
    """Size and time of change of a file; nothing where it is none."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    if storage.is_remote(path):
        return status.length, status.mtime
    return status.st_size, status.st_mtime_ns


def name_below(root: Path, path: Path) -> str:
    return str(path)[len(str(root)) :].lstrip("/")
