"""The tasks of pipeline.py: each a function of (job, number) that fills a folder of its own.

A document's number is its place among all that were read and not filtered, in the order of the
units: `offsets` says where each unit's begin. Columns of numbers lie beside the records of a unit,
memory-mapped by those who need a part of them.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from codellama_jax.data import clean, corpus, filters, inputs, overlap, private, shuffle, tokens
from codellama_jax.data.inputs import Left
from codellama_jax.data.sources import Document, Tally

BLOCK_DOCUMENTS, BLOCK_BYTES = 256, 8 * 1024**2  # read at once
COMPARED = 256  # documents whose shingles are kept while comparing
NEAR = "near-duplicate (Jaccard {:g})"


@dataclass(frozen=True)
class Job:
    """What every task needs to know; request: a pipeline.Request."""

    work: str
    request: object
    units: tuple[inputs.Unit, ...]
    tokenizer: str

    def path(self, name: str, number: int | None = None) -> Path:
        return Path(self.work) / (name if number is None else f"{name}-{number:05d}")


def whole(path: Path, fill: Callable[[Path], None]) -> None:
    """Makes a folder that is there only once `fill` has filled it."""
    if path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    fill(temporary)
    os.replace(temporary, path)


def do(job: Job, name: str, number: int) -> None:
    whole(job.path(name, number), lambda out: _TASKS[name](job, number, out))


def receive(job: Job) -> None:
    """In a worker process: the job comes once, not with every task."""
    global _job
    _job = job
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def do_received(name: str, number: int) -> None:
    do(_job, name, number)


def result(job: Job, name: str, number: int) -> dict:
    return json.loads((job.path(name, number) / "result.json").read_text())


# -- read -------------------------------------------------------------------------------------


def read(job: Job, number: int, out: Path) -> None:
    """Filters and masks the documents of a unit; notes what later tasks compare."""
    request = job.request
    left = _Left(out)
    masked: Counter = Counter()
    columns: dict[str, list] = {"digest": [], "chars": [], "rank": [], "code": [], "bands": []}
    stream = inputs.read(job.units[number], request.fields, file_bytes=request.filters.file_bytes)
    records = corpus.Writer(out / "records")
    try:
        for block in _blocks(stream):
            documents = []
            for item in block:
                reason = item.reason if isinstance(item, Left) else None
                if reason := reason or filters.reason(item, request.filters):
                    left.add(reason, item)
                    continue
                if request.mask_private:
                    text, found = private.mask(item.text)
                    masked += found
                    item = replace(item, text=text)
                documents.append(item)
            for document in _examine(documents, request, left, columns):
                records.write(json.dumps(asdict(document), ensure_ascii=False).encode())
    finally:  # its destructor must not find it open
        records.close()
    shapes = {"digest": (0, 2), "bands": (0, clean.BANDS)}
    dtypes = {"chars": np.uint32, "code": bool}
    for name, blocks in columns.items():
        empty = np.zeros(shapes.get(name, (0,)), dtypes.get(name, np.uint64))
        column = np.concatenate([empty, *blocks])
        np.save(out / f"{name}.npy", np.ascontiguousarray(column.T) if name == "bands" else column)
    count = sum(map(len, columns["chars"]))
    left.close({"documents": count, "masked": dict(masked)})


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


def _examine(documents: list[Document], request, left: "_Left", columns: dict) -> list[Document]:
    """The documents that share nothing with an evaluation set; their columns are added."""
    if not documents:
        return []
    texts = [document.text for document in documents]
    words, sizes = clean.word_hashes(texts, least=clean.SHINGLE_WORDS)
    if request.evaluations:
        sets = overlap.load(request.evaluations, request.ngram_words)
        runs, inside = clean.run_hashes(words, sizes, request.ngram_words)
        found = overlap.find(runs, inside, sizes, sets)
    else:
        found = np.full(len(documents), -1)
    for document, number in zip(documents, found, strict=True):
        if number >= 0:
            left.add(f"shares text with {Path(request.evaluations[number]).name}", document)
    kept = np.flatnonzero(found < 0)
    if request.jaccard:
        shingles, inside = clean.run_hashes(words, sizes, clean.SHINGLE_WORDS)
        starts = np.concatenate([[0], np.cumsum(sizes - (clean.SHINGLE_WORDS - 1))])
        bands = _band_keys(clean.sketches(shingles[inside], starts))[kept]
    else:
        bands = np.zeros((len(kept), clean.BANDS), np.uint64)
    documents = [documents[i] for i in kept]
    digests = [hashlib.blake2b(d.text.encode(), digest_size=16).digest() for d in documents]
    columns["digest"].append(np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2))
    columns["chars"].append(np.array([len(d.text) for d in documents], np.uint32))
    columns["rank"].append(np.array([_rank(request.seed, d.path) for d in documents], np.uint64))
    columns["code"].append(np.array([filters.is_code(d) for d in documents], bool))
    columns["bands"].append(bands)
    return documents


def _rank(seed: int, path: str) -> int:
    """The smallest are held out: as in gather.heldout_files."""
    return shuffle.hash64(seed, "heldout", path)


def _band_keys(sketches: np.ndarray) -> np.ndarray:
    """A hash of each band of each sketch: uint64 [documents, bands]."""
    rows = sketches.reshape(len(sketches), clean.BANDS, -1).astype(np.uint64)
    keys = np.zeros(rows.shape[:2], np.uint64)
    for place in range(rows.shape[2]):
        keys = (keys ^ rows[:, :, place]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    return keys


class _Left:
    """What a task leaves out: counted, and listed one JSON line each."""

    def __init__(self, out: Path):
        self._tally, self._out = Tally(), out
        self._list = (out / "removed.jsonl").open("w", encoding="utf-8")

    def add(self, reason: str, item: Document | Left, **about) -> None:
        is_document = isinstance(item, Document)
        size = len(item.text.encode(errors="replace")) if is_document else item.num_bytes
        self._tally.add(reason, item.path, size)
        line = {"reason": reason, "path": item.path, "bytes": size}
        if is_document:
            line |= {"source": item.source, "language": item.language}
        self._list.write(json.dumps(line | about, ensure_ascii=False) + "\n")

    def close(self, results: dict) -> None:
        self._list.close()
        results["removed"] = self._tally.removed
        (self._out / "result.json").write_text(json.dumps(results))


# -- duplicates -------------------------------------------------------------------------------


def count(job: Job, out: Path) -> None:
    """Number of the first document of every unit, and of all: int64 [units + 1]."""
    counts = [result(job, "read", n)["documents"] for n in range(len(job.units))]
    np.save(out / "offsets.npy", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def offsets(job: Job) -> np.ndarray:
    """What `count` found."""
    return np.load(job.path("counted") / "offsets.npy")


def parts(job: Job, count: int) -> int:
    """Into how many parts keys are split so that sorting one stays within the memory allowed."""
    return -(-count * 64 // job.request.memory_bytes)  # 24 bytes a key, and room to sort them


def exact(job: Job, number: int, out: Path) -> None:
    """Documents whose digest an earlier one has: int64 [duplicates, 2], with the earlier one."""
    starts = offsets(job)
    num_parts = parts(job, starts[-1])
    keys, ids = [], []
    for unit, start in enumerate(starts[:-1]):
        digests = _column(job, unit, "digest")
        mine = np.flatnonzero(digests[:, 0] % np.uint64(num_parts) == number)
        keys.append(digests[mine])
        ids.append(mine + start)
    keys, ids = np.concatenate(keys), np.concatenate(ids)
    order = np.lexsort((ids, keys[:, 1], keys[:, 0]))
    keys, ids = keys[order], ids[order]
    same = (keys[1:] == keys[:-1]).all(axis=1)
    heads = np.concatenate([[0], np.where(same, 0, np.arange(1, len(ids)))])[: len(ids)]
    heads = np.maximum.accumulate(heads) if len(ids) else heads
    again = np.flatnonzero(np.concatenate([[False], same])[: len(ids)])
    np.save(out / "pairs.npy", np.stack([ids[again], ids[heads[again].astype(np.int64)]], axis=1))


def merge_exact(job: Job, out: Path) -> None:
    """All exact duplicates in order, and one flag per document."""
    count = offsets(job)[-1]
    pairs = _concatenate(job, "exact", parts(job, count))
    np.save(out / "pairs.npy", pairs)
    flags = np.zeros(count, bool)
    flags[pairs[:, 0]] = True
    np.save(out / "flags.npy", flags)


def candidates(job: Job, number: int, out: Path) -> None:
    """Pairs that agree in a band, of one part of its keys: int64 [pairs, 2], sorted."""
    starts = offsets(job)
    num_parts = parts(job, starts[-1])
    band, part = divmod(number, num_parts)
    gone = np.load(job.path("gone") / "flags.npy", mmap_mode="r")
    keys, ids = [], []
    for unit, start in enumerate(starts[:-1]):
        own = _column(job, unit, "bands")[band]
        mine = np.flatnonzero(
            (own % np.uint64(num_parts) == part) & ~gone[start : start + len(own)]
        )
        keys.append(own[mine])
        ids.append(mine + start)
    ids = np.concatenate(ids)
    places = list(clean.bucket_pairs(np.concatenate(keys)))
    pairs = ids[np.array(places, np.int64).reshape(-1, 2)]
    np.save(out / "pairs.npy", pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])


def compare(job: Job, number: int, out: Path) -> None:
    """Of the pairs that begin in a unit, those that are as similar as asked: int64 [pairs, 2]."""
    starts = offsets(job)
    found = []
    for task in range(clean.BANDS * parts(job, starts[-1])):
        pairs = np.load(job.path("candidates", task) / "pairs.npy", mmap_mode="r")
        first, last = np.searchsorted(pairs[:, 0], starts[number : number + 2])
        found.append(pairs[first:last])
    pairs = np.unique(np.concatenate(found), axis=0)
    records = _Records(job, starts)

    @functools.lru_cache(maxsize=COMPARED)
    def shingles(document: int) -> np.ndarray:
        return np.unique(clean.shingle_hashes([records[document]["text"]])[0])

    root: dict[int, int] = {}

    def find(i: int) -> int:
        while root.get(i, i) != i:
            root[i] = root.get(root[i], root[i])
            i = root[i]
        return i

    near = []
    for a, b in pairs.tolist():
        if find(a) != find(b) and _similar(shingles(a), shingles(b), job.request.jaccard):
            root[max(find(a), find(b))] = min(find(a), find(b))
            near.append((a, b))
    np.save(out / "pairs.npy", np.array(near, np.int64).reshape(-1, 2))


def _similar(a: np.ndarray, b: np.ndarray, threshold: float) -> bool:
    few, many = sorted((len(a), len(b)))
    return few >= threshold * many and clean.jaccard(a, b) >= threshold


def merge_near(job: Job, out: Path) -> None:
    """Clusters, and of each all but the longest (the first of these): int64 [duplicates, 2]."""
    pairs = _concatenate(job, "compare", len(job.units) if job.request.jaccard else 0)
    np.save(out / "pairs.npy", _all_but_one(job, pairs))


def _all_but_one(job: Job, pairs: np.ndarray) -> np.ndarray:
    from scipy import sparse

    if len(pairs) == 0:
        return pairs
    documents, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(pairs.shape)
    graph = sparse.coo_matrix(
        (np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(documents),) * 2
    )
    _, cluster = sparse.csgraph.connected_components(graph, directed=False)
    starts, chars = offsets(job), np.zeros(len(documents), np.int64)
    for unit, bounds in enumerate(np.searchsorted(documents, [starts[:-1], starts[1:]]).T):
        own = documents[slice(*bounds)] - starts[unit]
        chars[slice(*bounds)] = _column(job, unit, "chars")[own]
    order = np.lexsort((documents, -chars, cluster))  # the one to keep leads its cluster
    leads = np.flatnonzero(np.diff(cluster[order], prepend=-1))
    keeper = documents[order][leads]
    dropped = np.delete(order, leads)
    found = np.stack([documents[dropped], keeper[cluster[dropped]]], axis=1)
    return found[np.argsort(found[:, 0])]


def _concatenate(job: Job, name: str, count: int) -> np.ndarray:
    """The pairs of all tasks of a round, sorted by the first document."""
    found = [np.load(job.path(name, n) / "pairs.npy") for n in range(count)]
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *found])
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


def _column(job: Job, unit: int, name: str) -> np.ndarray:
    return np.load(job.path("read", unit) / f"{name}.npy", mmap_mode="r")


class _Records:
    """What was read, by document number."""

    def __init__(self, job: Job, starts: np.ndarray):
        self._job, self._starts = job, starts
        self._open = functools.lru_cache(maxsize=16)(self._open_unit)

    def _open_unit(self, unit: int):
        return corpus.record_source([str(self._job.path("read", unit) / "records")])

    def __getitem__(self, document: int) -> dict:
        unit = int(np.searchsorted(self._starts, document, side="right")) - 1
        return json.loads(self._open(unit)[int(document - self._starts[unit])])


# -- write ------------------------------------------------------------------------------------


def choose_heldout(job: Job, out: Path) -> None:
    """Below which rank files are held out, and which are beside it.

    Where that holds out nothing of a corpus, or all of it, one file more or less is held out.
    """
    limit = int(job.request.heldout_rate * 2**64)
    starts = offsets(job)
    lowest: dict[str, int] = {}
    highest: dict[str, int] = {}
    for unit in range(len(job.units)):
        kept = np.ones(int(starts[unit + 1] - starts[unit]), bool)
        kept[list(_duplicates(job, unit, starts))] = False
        ranks, code = _column(job, unit, "rank"), _column(job, unit, "code")
        for is_code in (False, True):
            own = ranks[kept & (code == is_code)]
            if len(own):
                name = _corpus(job.units[unit], is_code)
                lowest[name] = min(lowest.get(name, 2**64), int(own.min()))
                highest[name] = max(highest.get(name, 0), int(own.max()))
    more = [rank for name, rank in lowest.items() if limit <= rank < highest[name]]
    fewer = [rank for rank in highest.values() if rank < limit]
    (out / "chosen.json").write_text(json.dumps({"limit": limit, "in": more, "out": fewer}))


def _corpus(unit: inputs.Unit, is_code: bool) -> str:
    return unit.corpus or ("code" if is_code else "language")


def _duplicates(job: Job, unit: int, starts: np.ndarray) -> dict[int, tuple[str, int]]:
    """Documents of a unit that are left out, by their place in it: the reason and the one kept."""
    found = {}
    reasons = {"gone": "exact duplicate", "near": NEAR.format(job.request.jaccard)}
    for folder, reason in reasons.items():
        pairs = np.load(job.path(folder) / "pairs.npy", mmap_mode="r")
        first, last = np.searchsorted(pairs[:, 0], starts[unit : unit + 2])
        for document, kept in pairs[first:last].tolist():
            found[document - int(starts[unit])] = (reason, kept)
    return found


def write(job: Job, number: int, out: Path) -> None:
    """The documents of a unit that are kept: shards, tokens, and the counts for the manifest."""
    from codellama_jax.tokenizer import Tokenizer

    starts = offsets(job)
    duplicates = _duplicates(job, number, starts)
    chosen = json.loads((job.path("heldout") / "chosen.json").read_text())
    ranks, unit = _column(job, number, "rank"), job.units[number]
    tokenizer = Tokenizer(job.tokenizer)
    records, left = _Records(job, starts), _Left(out)
    splits: dict[str, _Split] = {}
    sources: dict[str, Counter] = {}
    for place in range(len(ranks)):
        record = records[int(starts[number]) + place]
        document = Document(**record)
        if place in duplicates:
            reason, kept = duplicates[place]
            left.add(reason, document, kept=records[kept]["path"])
            continue
        rank = int(ranks[place])
        held_out = (rank < chosen["limit"] or rank in chosen["in"]) and rank not in chosen["out"]
        name = _corpus(unit, filters.is_code(document))
        stem = f"{name}/{'heldout' if held_out else 'train'}"
        if stem not in splits:
            splits[stem] = _Split(out, stem)
        counted = splits[stem].add(record, tokens.count(tokenizer, document.text))
        sources.setdefault(document.source, Counter()).update(counted)
    left.close(
        {
            "splits": {stem: split.close() for stem, split in sorted(splits.items())},
            "sources": sources,
        }
    )


class _Split:
    """One split of one corpus, as far as it comes from one unit."""

    def __init__(self, out: Path, stem: str):
        self._stem = out / stem.replace("/", "-")
        self._writer = corpus.Writer(self._stem.with_suffix(".array_record"))
        self._lengths: list[int] = []
        self._paths: list[int] = []
        self._python: list[tuple[int, int]] = []  # number and length of the Python documents
        self._languages: dict[str, Counter] = {}

    def add(self, record: dict, chunk_tokens: list[int]) -> dict:
        length = sum(chunk_tokens) + 2  # BOS and EOS
        if len(chunk_tokens) > 1:
            record = {**record, "chunk_tokens": chunk_tokens}
        if record["language"] == "python":
            self._python.append((len(self._lengths), length))
        self._lengths.append(length)
        self._paths.append(corpus.path_hash(record["path"]))
        self._writer.write(json.dumps(record, ensure_ascii=False).encode())
        counted = {"documents": 1, "bytes": len(record["text"].encode()), "tokens": length}
        self._languages.setdefault(record["language"], Counter()).update(counted)
        return counted

    def close(self) -> dict:
        self._writer.close()
        np.save(f"{self._stem}.lengths.npy", np.array(self._lengths, np.uint32))
        np.save(f"{self._stem}.paths.npy", np.array(self._paths, np.uint64))
        python = np.array(self._python, np.int64).reshape(-1, 2)
        np.save(f"{self._stem}.python.npy", np.ascontiguousarray(python.T))
        return {
            "documents": len(self._lengths),
            "languages": self._languages,
            "file": corpus.checksum(self._stem.with_suffix(".array_record")),
        }


_TASKS = {
    "read": read,
    "exact": exact,
    "candidates": candidates,
    "compare": compare,
    "write": write,
}
