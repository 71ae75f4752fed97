"""Gathering: from sources to the corpora of a recipe, cleaned, in memory.

    code, python                files, or pieces of the size of functions for short rows
    code_files, python_files    whole files, where the former are pieces
    code_language               docstrings
    language                    reference prose
    dialogues                   a docstring asks, its function answers

Python is a part of code, as in the paper. A user's tree takes the place of Python's own sources; a
corpus that it has nothing for keeps Python's, and `origin` says so.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from codellama_jax.data import clean, pieces, shuffle, sources
from codellama_jax.data.sources import Document, Tally

CORPORA = (
    "code",
    "python",
    "code_files",
    "python_files",
    "code_language",
    "language",
    "dialogues",
)
WHOLE = 10**9  # characters: longer than any document
ANSWER_CHARS = 4_000  # longest answer of a dialogue


@dataclass(frozen=True)
class Request:
    """What a corpus is asked to be made of."""

    code_dirs: tuple[str, ...] = ()  # trees of source files; none: what Python itself brings
    function_chars: int = 560  # longest function-sized document; 0: whole files
    heldout_rate: float = 0.04  # share of files held out for evaluation
    jaccard: float = 0.8  # similarity from which two documents are near-duplicates
    file_bytes: int = 1_000_000  # larger files are left out
    line_chars: int = 1_000  # files with longer lines are left out
    seed: int = 0  # of what is held out

    def __post_init__(self):
        if not 0 < self.heldout_rate < 1:
            raise ValueError(f"heldout_rate={self.heldout_rate} must lie between 0 and 1")
        if not 0 < self.jaccard <= 1:
            raise ValueError(f"jaccard={self.jaccard} must lie between 0 and 1")
        if self.function_chars and self.function_chars < 2 * pieces.MIN_CHARS:
            raise ValueError(
                f"function_chars={self.function_chars} must be at least {2 * pieces.MIN_CHARS}, "
                "or 0 for whole files"
            )

    def fingerprint(self) -> str:
        """Changes when the settings or the files they name change."""
        roots = [Path(d) for d in self.code_dirs] + [Path(sysconfig.get_path("stdlib"))]
        state = json.dumps([asdict(self), sources.listing(roots)])
        return hashlib.sha256(state.encode()).hexdigest()


@dataclass
class Gathered:
    """Corpora in memory: lists of Documents (dialogues: of records), with what was left out."""

    request: Request
    corpora: dict[str, list[Document] | list[dict]] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)  # of each corpus: the trees, or python
    tally: Tally = field(default_factory=Tally)


def file_of(document: Document | dict) -> tuple[str, str]:
    """Source and path of the file that a document (or a dialogue's record) is from."""
    if isinstance(document, dict):
        return document["source"], document["path"]
    return document.source, document.path


def heldout_files(gathered: Gathered) -> set[tuple[str, str]]:
    """The files held out for evaluation, in every corpus alike: those whose path's hash is small.

    Where that holds out nothing of a corpus, or all of it, one file more or less is held out.
    """
    request = gathered.request
    files = {
        name: {file_of(document) for document in documents}
        for name, documents in gathered.corpora.items()
    }
    rank = {
        file: (shuffle.hash64(request.seed, "heldout", file[1]) / 2**64, file)
        for file in set().union(*files.values())
    }
    held_out = {file for file, (place, _) in rank.items() if place < request.heldout_rate}
    for own in files.values():
        if not own & held_out and len(own) > 1:
            held_out.add(min(own, key=rank.get))
    for own in files.values():
        if own <= held_out:
            held_out.remove(max(own, key=rank.get))
    return held_out


def training_texts(gathered: Gathered, names: list[str]) -> Iterator[str]:
    """The texts of some corpora that will be trained on: what a tokenizer may be trained on."""
    held_out = heldout_files(gathered)
    for name in names:
        yield from (d.text for d in gathered.corpora[name] if file_of(d) not in held_out)


def gather(request: Request) -> Gathered:
    """Reads, cleans and cuts the documents of every corpus.

    Raises ValueError for a folder without usable text.
    """
    limits = sources.Limits(request.file_bytes, request.line_chars)
    gathered = Gathered(request)
    trees = [
        document
        for folder in request.code_dirs
        for document in sources.code_tree(folder, limits=limits, tally=gathered.tally)
    ]
    _add(gathered, trees, origin=", ".join(request.code_dirs))
    wanted = set(CORPORA) if request.function_chars else {c for c in CORPORA if "files" not in c}
    if wanted - set(gathered.corpora):
        tally = gathered.tally if not trees else Tally()
        library = sources.python_installation(limits=limits, tally=tally)
        _add(gathered, library, origin="this Python installation")
    return gathered


def _add(gathered: Gathered, documents: list[Document], *, origin: str) -> None:
    """Makes the corpora that `documents` have something for and that are not there yet."""
    request, tally = gathered.request, gathered.tally
    documents = clean.without_duplicates(documents, threshold=request.jaccard, tally=tally)
    code = [d for d in documents if d.language != "prose"]
    prose = [d for d in documents if d.language == "prose"]
    made: dict[str, list] = {"code_language": [], "dialogues": []}
    size = request.function_chars or WHOLE
    if request.function_chars:
        made["code_files"] = code
        made["python_files"] = [d for d in code if d.language == "python"]
        made["code"] = []
        made["language"] = [d for page in prose for d in pieces.paragraphs(page, max_chars=size)]
    else:
        made["code"], made["language"] = code, prose
    for document in code:
        if request.function_chars:
            made["code"] += pieces.functions(document, max_chars=size)
        made["code_language"] += pieces.docstrings(document, max_chars=size)
        made["dialogues"] += pieces.dialogues(document, max_chars=min(size, ANSWER_CHARS))
    for name in ("code", "code_language", "language"):
        made[name] = clean.without_duplicates(made[name], threshold=request.jaccard, tally=tally)
    made["python"] = [d for d in made["code"] if d.language == "python"]
    for name in CORPORA:
        if made.get(name) and name not in gathered.corpora:
            gathered.corpora[name] = made[name]
            gathered.origin[name] = origin
