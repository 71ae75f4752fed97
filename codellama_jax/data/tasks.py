"""The tasks of pipeline.py that read, cut and write documents: functions of (job, number, folder).

read    unit -> filtered, masked documents
cut     the documents of a unit that are kept -> functions, paragraphs, docstrings, dialogues
write   both, as far as they are kept -> shards, token counts, checksums
"""

import functools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from codellama_jax import prompts
from codellama_jax.data import (
    clean,
    corpus,
    duplicates,
    filters,
    heldout,
    inputs,
    overlap,
    pieces,
    private,
    shuffle,
    tokens,
)
from codellama_jax.data.job import Job, Left, Records, Table, whole, write_result
from codellama_jax.data.sources import Document

BLOCK_DOCUMENTS, BLOCK_BYTES = 256, 8 * 1024**2  # at once in memory
WHOLE = 10**9  # characters: longer than any document
ANSWER_CHARS = 4_000  # longest answer of a dialogue
MADE = ("code_language", "dialogues")  # corpora of docstrings and of what they ask
PARTS = {"code": "python", "code_files": "python_files"}  # corpora that are a part of another


def do(job: Job, name: str, number: int) -> None:
    whole(job.path(name, number), lambda out: _TASKS[name](job, number=number, out=out))


# -- read -------------------------------------------------------------------------------------


def read(job: Job, number: int, out: Path) -> None:
    """Filters and masks the documents of a unit; notes what later tasks compare."""
    request, unit = job.request, job.units[number]
    left, masked, table = Left(out), Counter(), Table(out)
    seen: dict[str, Counter] = {}
    stream = inputs.read(unit, request.fields, file_bytes=request.filters.file_bytes)
    try:
        for block in _blocks(stream):
            documents = []
            for item in block:
                seen.setdefault(item.language or "unknown", Counter())["documents"] += 1
                reason = item.reason if isinstance(item, inputs.Left) else None
                if reason := reason or filters.reason(item, request.filters):
                    left.add(reason, item)
                    continue
                documents.append(_masked(item, masked) if request.mask_private else item)
            documents, bands = _examine(documents, request, left)
            ranks = [heldout.rank(request.seed, document) for document in documents]
            table.add(documents, bands, ranks=ranks, last=unit.fill)
    finally:
        table.close()
    write_result(out, table.save() | {"read": seen, "masked": masked} | left.close())


def _blocks(stream: Iterator) -> Iterator[list]:
    block, size = [], 0
    for item in stream:
        block.append(item)
        size += len(item.text) if isinstance(item, Document) else 0
        if len(block) == BLOCK_DOCUMENTS or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _masked(document: Document, masked: Counter) -> Document:
    messages = [message for _, message in document.dialog] or [document.text]
    found = [private.mask(message) for message in messages]
    for _, counts in found:
        masked.update(counts)
    messages = [message for message, _ in found]
    dialog = tuple((role, m) for (role, _), m in zip(document.dialog, messages, strict=False))
    return replace(document, text="\n".join(messages), dialog=dialog)


def _examine(documents: list[Document], request, left: Left) -> tuple[list[Document], np.ndarray]:
    """The documents that share nothing with an evaluation set, and the bands of their sketches."""
    if not documents:
        return [], np.zeros((0, clean.BANDS), np.uint64)
    words, sizes = clean.word_hashes([d.text for d in documents], least=clean.SHINGLE_WORDS)
    found = np.full(len(documents), -1)
    if request.evaluations:
        sets = overlap.load(request.evaluations, request.ngram_words)
        runs, inside = clean.run_hashes(words, sizes, request.ngram_words)
        found = overlap.find(runs, inside, sizes, sets)
    for document, number in zip(documents, found, strict=True):
        if number >= 0:
            left.add(f"shares text with {Path(request.evaluations[number]).name}", document)
    kept = np.flatnonzero(found < 0)
    bands = np.zeros((len(documents), clean.BANDS), np.uint64)
    if request.jaccard:
        shingles, inside = clean.run_hashes(words, sizes, clean.SHINGLE_WORDS)
        starts = np.concatenate([[0], np.cumsum(sizes - (clean.SHINGLE_WORDS - 1))])
        bands = clean.band_keys(clean.sketches(shingles[inside], starts))
    return [documents[i] for i in kept], bands[kept]


# -- cut --------------------------------------------------------------------------------------


def cut(job: Job, number: int, out: Path) -> None:
    """The forms that are made of a unit's documents, and in which corpora it has something."""
    request, fill = job.request, job.units[number].fill
    table, corpora = Table(out), set()
    taken = _taken(job) if fill else frozenset()

    def made() -> Iterator[Document]:
        for document in _kept(job, "read", number):
            if (whole_file := _file(document, request, taken)) is not None:
                corpora.update(_names(whole_file))
            yield from _pieces(document, request, taken)

    try:
        for documents in _blocks(made()):
            corpora.update(name for document in documents for name in _names(document))
            _, bands = _examine(documents, replace(request, evaluations=()), None)
            salts = [shuffle.hash64(d.corpus) if d.corpus in MADE else 0 for d in documents]
            ranks = np.array([heldout.rank(request.seed, d) for d in documents], np.uint64)
            last = heldout.of_ranks(job, ranks)
            table.add(documents, bands, ranks=ranks, last=last, salts=salts)
    finally:
        table.close()
    write_result(out, table.save() | {"has": sorted(corpora)})


def _kept(job: Job, table: str, unit: int) -> Iterator[Document]:
    places = np.flatnonzero(duplicates.kept(job, table, unit))
    yield from Records(job, table).of_unit(unit, places)


def _taken(job: Job) -> frozenset[str]:
    """The corpora that inputs other than those that only fill have something for."""
    units = [n for n, unit in enumerate(job.units) if not unit.fill]
    return frozenset(name for n in units for name in job.result("cut", n)["has"])


def _names(document: Document) -> tuple[str, ...]:
    """The corpora that a document is in."""
    part = PARTS.get(document.corpus)
    is_part = part and document.language == "python"
    return (document.corpus, part) if is_part else (document.corpus,)


def _file(document: Document, request, taken: frozenset[str]) -> Document | None:
    """The whole document in its corpus; None where it goes into none."""
    if request.function_chars and not document.dialog:
        if not filters.is_code(document):
            return None  # cut into paragraphs
        document = replace(document, corpus=f"{document.corpus}_files")
    return _where_free(document, taken)


def _where_free(document: Document, taken: frozenset[str]) -> Document | None:
    free = [name for name in _names(document) if name not in taken]
    return replace(document, corpus=free[0]) if free else None


def _pieces(document: Document, request, taken: frozenset[str]) -> Iterator[Document]:
    if document.dialog:
        return
    size = request.function_chars or WHOLE
    if request.function_chars:
        make = pieces.functions if filters.is_code(document) else pieces.paragraphs
        found = make(document, max_chars=size)
    else:
        found = []
    if "docstrings" in request.forms:
        found += [replace(d, corpus=MADE[0]) for d in pieces.docstrings(document, max_chars=size)]
    if "dialogues" in request.forms:
        size = min(size, ANSWER_CHARS)
        found += [replace(d, corpus=MADE[1]) for d in pieces.dialogues(document, max_chars=size)]
    for piece in found:
        if (piece := _where_free(piece, taken)) is not None:
            yield piece


# -- write ------------------------------------------------------------------------------------


def documents(job: Job, number: int, left: Left | None = None) -> Iterator[tuple[Document, bool]]:
    """All of a unit that is kept, and whether it is held out: whole documents, then pieces."""
    taken = _taken(job) if job.units[number].fill else frozenset()
    common = heldout.Common(job)
    for table in ("read", "cut"):
        records, flags = Records(job, table), heldout.flags(job, table, number)
        dropped = duplicates.of_unit(job, table, number)
        places = np.arange(len(flags))
        for place, document in zip(places.tolist(), records.of_unit(number, places), strict=True):
            held_out = bool(flags[place])
            if place in dropped:
                reason, kept = dropped[place]
                if left:
                    left.add(reason, document, kept=records[kept].path)
                continue
            if table == "read" and (document := _file(document, job.request, taken)) is None:
                continue
            if held_out and common.has_most_of(document):
                if left:
                    left.add(heldout.LEAK, document)
                continue
            yield document, held_out


def write(job: Job, number: int, out: Path) -> None:
    """The documents of a unit that are kept: shards, tokens, and the counts for the manifest."""
    from codellama_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer(json.loads(job.path("tokenizer.json").read_text())["path"])
    left, splits = Left(out), {}
    sources: dict[str, Counter] = {}
    try:
        for document, held_out in documents(job, number, left):
            stem = f"{document.corpus}/{'heldout' if held_out else 'train'}"
            try:
                record, length = _record(document, tokenizer)
            except ValueError:  # of roles out of order, or text that spells the chat's own marks
                left.add("not a dialogue that ends with an answer", document)
                continue
            if stem not in splits:
                splits[stem] = _Split(out, stem)
            counted = splits[stem].add(record, length, len(document.text.encode()))
            if not document.part:
                sources.setdefault(document.source, Counter()).update(counted)
    finally:
        for split in splits.values():
            split.close()
    files = {stem: split.result() for stem, split in sorted(splits.items())}
    write_result(out, {"splits": files, "sources": sources} | left.close())


def _record(document: Document, tokenizer) -> tuple[dict, int]:
    """What is written of a document, and its tokens."""
    record = {**vars(document)}
    del record["corpus"]
    if document.dialog:
        dialog = [{"role": role, "content": text} for role, text in document.dialog]
        del record["text"]
        return record | {"dialog": dialog}, len(prompts.chat_example(tokenizer, dialog)[0])
    del record["dialog"]
    counts = tokens.count(tokenizer, document.text)
    chunks = {"chunk_tokens": counts} if len(counts) > 1 else {}
    return record | chunks, sum(counts) + 2  # BOS and EOS


class _Split:
    """One split of one corpus, as far as it comes from one unit."""

    def __init__(self, out: Path, stem: str):
        self._stem = out / stem.replace("/", "-")
        self._writer = corpus.Writer(self._stem.with_suffix(".array_record"))
        self._lengths: list[int] = []
        self._paths: list[int] = []
        self._python: list[tuple[int, int]] = []  # number and length of the Python documents
        self._languages: dict[str, Counter] = {}
        self._dialogues = 0

    def add(self, record: dict, length: int, num_bytes: int) -> dict:
        if record["language"] == "python":
            self._python.append((len(self._lengths), length))
        self._dialogues += "dialog" in record
        self._lengths.append(length)
        self._paths.append(corpus.path_hash(record["path"]))
        self._writer.write(json.dumps(record, ensure_ascii=False).encode())
        counted = {"documents": 1, "bytes": num_bytes, "tokens": length}
        self._languages.setdefault(record["language"], Counter()).update(counted)
        return counted

    def close(self) -> None:
        self._writer.close()

    def result(self) -> dict:
        """Writes the columns of numbers; returns what the manifest needs."""
        np.save(f"{self._stem}.lengths.npy", np.array(self._lengths, np.uint32))
        np.save(f"{self._stem}.paths.npy", np.array(self._paths, np.uint64))
        python = np.array(self._python, np.int64).reshape(-1, 2)
        np.save(f"{self._stem}.python.npy", np.ascontiguousarray(python.T))
        return {
            "documents": len(self._lengths),
            "dialogues": self._dialogues,
            "languages": self._languages,
            "file": corpus.checksum(self._stem.with_suffix(".array_record")),
        }


_TASKS = {"read": read, "cut": cut, "runs": heldout.runs, "common": heldout.common, "write": write}
for _table in ("read", "cut"):
    for _round in (duplicates.exact, duplicates.candidates, duplicates.compare):
        _TASKS[f"{_table}_{_round.__name__}"] = functools.partial(_round, table=_table)
