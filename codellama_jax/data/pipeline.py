"""Preparing a corpus of any size: units of the input, read and written by processes of their own.

    read        unit -> filtered, masked documents; their digests, bands of sketches, sizes
    exact, candidates, compare        which of all documents are duplicates (duplicates.py)
    runs, common                      what held-out and training files share (heldout.py)
    cut         unit -> functions, paragraphs, docstrings, dialogues of the documents that are kept
    exact, candidates, compare        which of these are duplicates
    write       unit -> shards of what is kept, token counts, checksums

Every task writes a folder below OUT/work under a temporary name and renames it when it is whole, so
a killed run goes on with the tasks that are missing. Tasks depend on the input and the settings
alone: any number of workers gives the same bytes. In memory a task holds a block of documents
(tasks.BLOCK_BYTES, or one document) or a part of the keys (request.memory_bytes); the parent
process holds a few numbers per duplicate and one byte per document.

    code, python                files, or pieces of the size of functions (function_chars)
    code_files, python_files    whole files, where the former are pieces
    code_language               docstrings, and what inputs bring for it
    language                    prose
    dialogues                   a docstring asks, its function answers; and what inputs bring
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from codellama_jax.data import (
    clean,
    corpus,
    duplicates,
    finish,
    heldout,
    inputs,
    job,
    pieces,
    storage,
    tasks,
)
from codellama_jax.data.filters import Filters

FORMS = ("docstrings", "dialogues")
Progress = Callable[[str, int, int], None]  # name of the round, done, of how much
Engine = Callable[[job.Job, str, list[int]], None]  # does tasks of a round


@dataclass(frozen=True)
class Request:
    """What a corpus is made of, and how."""

    inputs: tuple[inputs.Input, ...]
    fill: tuple[inputs.Input, ...] = ()  # for the corpora that the inputs have nothing for
    fields: inputs.Fields = inputs.Fields()
    filters: Filters = Filters()
    function_chars: int = 0  # cut code into functions of at most so many characters, for short rows
    forms: tuple[str, ...] = FORMS  # what is made of Python's docstrings
    jaccard: float = 0.8  # similarity from which two documents are near-duplicates; 0: only exact
    evaluations: tuple[str, ...] = ()  # JSONL files of evaluation sets, to be kept out
    ngram_words: int = 30  # shared with an evaluation set: words and signs
    mask_private: bool = True  # replace keys and e-mail addresses
    heldout_rate: float = 0.01  # share of files held out for evaluation
    seed: int = 0  # of what is held out
    unit_bytes: int = 64 * 1024**2  # of input that one task reads, and so about of a shard
    memory_bytes: int = 256 * 1024**2  # of a task that looks for duplicates

    def __post_init__(self):
        if not self.inputs:
            raise ValueError("name at least one input")
        if unknown := set(self.forms) - set(FORMS):
            raise ValueError(f"forms has {min(unknown)!r}; there are {', '.join(FORMS)}")
        if self.function_chars and self.function_chars < 2 * pieces.MIN_CHARS:
            raise ValueError(
                f"function_chars={self.function_chars} must be at least {2 * pieces.MIN_CHARS}, "
                "or 0 for whole files"
            )
        if not 0 < self.heldout_rate < 1:
            raise ValueError(f"heldout_rate={self.heldout_rate} must lie between 0 and 1")
        if self.jaccard and not 0.7 <= self.jaccard <= 1:
            raise ValueError(
                f"jaccard={self.jaccard} must lie between 0.7, below which too many pairs are not "
                "found, and 1; or be 0 for exact duplicates only"
            )
        if self.ngram_words < 5:
            raise ValueError(f"ngram_words={self.ngram_words} must be at least 5")
        for name in ("unit_bytes", "memory_bytes"):
            if getattr(self, name) < 1_024:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1,024")

    def units(self) -> tuple[inputs.Unit, ...]:
        """The parts of all inputs. Raises ValueError for one that cannot be read."""
        found = [
            u for given in self.inputs for u in inputs.units(given, unit_bytes=self.unit_bytes)
        ]
        for given in self.fill:
            units = inputs.units(given, unit_bytes=self.unit_bytes)
            found += [replace(unit, fill=True) for unit in units]
        return tuple(found)

    def fingerprint(self, units: tuple[inputs.Unit, ...]) -> str:
        """Changes when the settings or the files they name change."""
        files = [inputs.fingerprint(units)]
        for path in self.evaluations:
            files.append(hashlib.sha256(storage.path(path).read_bytes()).hexdigest())
        return hashlib.sha256(json.dumps([asdict(self), files]).encode()).hexdigest()


def prepare(
    folder: str | Path,
    tokenizer,
    request: Request,
    *,
    workers: int = 1,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> corpus.Corpus:
    """Writes the corpora of `request` to `folder`, goes on where it was left, or opens them.

    engine: runs the tasks instead of processes of our own, as beam.run does.
    progress(round, done, total) in bytes of input, or in tasks. Raises ValueError for inputs that
    cannot be read, settings other than those of what lies there, and where nothing is left.
    """
    folder = storage.path(folder)
    if (folder / "manifest.json").exists():
        prepared = corpus.open(folder, tokenizer)
        _same(prepared.manifest["asked"], _asked(request, request.units()), folder)
        return prepared
    made = clean_documents(folder, request, workers=workers, engine=engine, progress=progress)
    path = folder / "work" / "tokenizer.json"
    _claim(path, {"tokenizer": tokenizer.fingerprint}, folder)
    _write(path, {"tokenizer": tokenizer.fingerprint, "path": str(tokenizer.path)})
    with _Pool(made, workers, engine, progress) as pool:
        pool.run("write", [unit.num_bytes for unit in made.units])
    asked = _asked(request, made.units) | {"tokenizer": tokenizer.fingerprint}
    return finish.finish(folder, made, asked, tokenizer)


def training_texts(
    folder: str | Path, request: Request, names: list[str], *, workers: int = 1
) -> Iterator[str]:
    """The texts of some corpora that will be trained on: what a tokenizer may be trained on.

    All of `prepare` but the counting of tokens and the writing, with which that goes on.
    """
    made = clean_documents(storage.path(folder), request, workers=workers)
    for number in range(len(made.units)):
        for document, held_out in tasks.documents(made, number):
            if document.corpus in names and not held_out:
                yield document.text


def clean_documents(
    folder: Path,
    request: Request,
    *,
    workers: int,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> job.Job:
    """All rounds up to the last, or those that are missing."""
    for path in request.evaluations:
        if not storage.path(path).exists():
            raise ValueError(f"{path}, an evaluation set, is missing")
    units = request.units()
    made = job.Job(str(folder / "work"), request, units)
    begun = (folder / "work" / "asked.json").exists()
    if not begun and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else; choose another folder")
    _claim(folder / "work" / "asked.json", _asked(request, units), folder)
    with _Pool(made, workers, engine, progress) as pool:
        _run(made, pool)
    return made


def _asked(request: Request, units: tuple[inputs.Unit, ...]) -> dict:
    return {"request": request.fingerprint(units)}


def _same(before: dict, asked: dict, folder: Path) -> None:
    if any(before.get(name) != value for name, value in asked.items()):
        raise ValueError(
            f"{folder} was prepared with other settings, another tokenizer or from files that have "
            "changed since; delete it or choose another folder"
        )


def _claim(path: Path, asked: dict, folder: Path) -> None:
    """Notes what the work is for, so that it is gone on with for nothing else."""
    if path.exists():
        _same(json.loads(path.read_text()), asked, folder)
        return
    if not storage.is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, asked)


def _write(path: Path, value: dict) -> None:
    corpus.write(path, json.dumps(value).encode())


def _run(made: job.Job, pool: "_Pool") -> None:
    """All rounds but the last."""
    sizes = [unit.num_bytes for unit in made.units]
    pool.run("read", sizes, but=made.fill)
    if not any(made.result("read", n)["documents"] for n in made.named):
        raise ValueError(f"nothing that can be used was read ({finish.reasons(made)})")
    if made.fill:
        pool.run("read", sizes)
    _leave_duplicates(made, pool, "read")
    _merge(made, "heldout", heldout.choose)
    pool.run("runs", sizes)
    _merge(made, "all_runs", heldout.merge_runs)
    pool.run("common", sizes)
    _merge(made, "all_common", heldout.merge_common)
    pool.run("cut", [0 if unit.fill else unit.num_bytes for unit in made.units], but=made.fill)
    if made.fill:  # these need to know what the others have
        pool.run("cut", sizes)
    _leave_duplicates(made, pool, "cut")


def _leave_duplicates(made: job.Job, pool: "_Pool", table: str) -> None:
    _merge(made, f"{table}_counted", job.count, table)
    num_parts = duplicates.parts(made, table)
    pool.run(f"{table}_exact", [1] * num_parts)
    _merge(made, f"{table}_gone", duplicates.merge_exact, table)
    if made.request.jaccard:
        pool.run(f"{table}_candidates", [1] * (clean.BANDS * num_parts))
        pool.run(f"{table}_compare", [unit.num_bytes for unit in made.units])
    _merge(made, f"{table}_near", duplicates.merge_near, table)


def _merge(made: job.Job, name: str, merge: Callable, *table: str) -> None:
    job.whole(made.path(name), lambda out: merge(made, *table, out))


class _Pool:
    """Runs the tasks that are not done yet: in processes, here for one worker, or by an engine."""

    def __init__(
        self, made: job.Job, workers: int, engine: Engine | None, progress: Progress | None
    ):
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        self._job, self._workers, self._engine, self._progress = made, workers, engine, progress
        self._executor = None

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind, *_) -> None:
        if self._executor:
            self._executor.shutdown(wait=True, cancel_futures=kind is not None)

    def run(self, name: str, weights: list[int], *, but: frozenset[int] = frozenset()) -> None:
        """Tasks 0 .. len(weights)-1 of a round; weights say how much of the whole each one is."""
        done, total = 0, max(sum(weights), 1)

        def tell(number: int) -> None:
            nonlocal done
            done += weights[number]
            if self._progress:
                self._progress(name, done, total)

        waiting = []
        for number in range(len(weights)):
            if job.is_done(self._job.path(name, number)):
                tell(number)
            elif number not in but:
                waiting.append(number)
        if self._engine:
            if waiting:
                self._engine(self._job, name, waiting)
            for number in waiting:
                tell(number)
            return
        if self._workers == 1 or len(waiting) < 2:
            for number in waiting:
                tasks.do(self._job, name, number)
                tell(number)
            return
        if self._executor is None:  # not forked: libraries that were used have threads
            self._executor = concurrent.futures.ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_receive,
                initargs=(self._job,),
            )
        futures = {self._executor.submit(_do_received, name, n): n for n in waiting}
        for future in concurrent.futures.as_completed(futures):
            future.result()
            tell(futures[future])


def _receive(made: job.Job) -> None:
    """In a worker process: the job comes once, not with every task."""
    global _job
    _job = made
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _do_received(name: str, number: int) -> None:
    tasks.do(_job, name, number)
