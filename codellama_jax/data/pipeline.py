"""Preparing a corpus of any size: units of the input, read and written by processes of their own.

    read        unit -> filtered, masked documents; their digests, bands of sketches, sizes
    exact       a part of all digests -> which documents equal an earlier one
    candidates  a band of all sketches, a part of its keys -> pairs that may be near-duplicates
    compare     the pairs that begin in a unit -> those that are, by their texts
    write       unit -> shards of what is kept, token counts, checksums

Every task writes a folder below OUT/work under a temporary name and renames it when it is whole, so
a killed run goes on with the tasks that are missing. Tasks depend on the input and the settings
alone: any number of workers gives the same bytes. In memory a task holds a block of documents
(BLOCK_BYTES, or one document) or a part of the keys (request.memory_bytes); the parent process
holds a few numbers per duplicate and one byte per document.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from codellama_jax.data import clean, corpus, inputs, tasks
from codellama_jax.data.filters import Filters

REMOVED = "removed"  # folder of lists of the documents that were left out
VIEW = ("python", "code")  # the corpus that is a part of another, as in the paper


@dataclass(frozen=True)
class Request:
    """What a corpus is made of, and how."""

    inputs: tuple[inputs.Input, ...]
    fields: inputs.Fields = inputs.Fields()
    filters: Filters = Filters()
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
        if not 0 < self.heldout_rate < 1:
            raise ValueError(f"heldout_rate={self.heldout_rate} must lie between 0 and 1")
        if not 0 <= self.jaccard <= 1:
            raise ValueError(f"jaccard={self.jaccard} must lie between 0 and 1")
        if self.ngram_words < 5:
            raise ValueError(f"ngram_words={self.ngram_words} must be at least 5")
        for name in ("unit_bytes", "memory_bytes"):
            if getattr(self, name) < 1_024:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1,024")

    def fingerprint(self) -> str:
        """Changes when the settings or the files they name change."""
        files = [inputs.fingerprint(given) for given in self.inputs]
        files += [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.evaluations]
        return hashlib.sha256(json.dumps([asdict(self), files]).encode()).hexdigest()


def prepare(
    folder: str | Path,
    tokenizer,
    request: Request,
    *,
    workers: int = 1,
    progress: corpus.Progress | None = None,
) -> corpus.Corpus:
    """Writes the corpora of `request` to `folder`, goes on where it was left, or opens them.

    progress(task, done, total) in bytes of input, or in tasks. Raises ValueError for inputs that
    cannot be read, settings other than those of what lies there, and where nothing is left.
    """
    folder = Path(folder)
    for path in request.evaluations:
        if not Path(path).is_file():
            raise ValueError(f"{path}, an evaluation set, is missing")
    asked = {"request": request.fingerprint(), "tokenizer": tokenizer.fingerprint}
    if (folder / "manifest.json").exists():
        prepared = corpus.open(folder, tokenizer)
        _same(prepared.manifest["asked"], asked, folder)
        return prepared
    units = [
        unit
        for given in request.inputs
        for unit in inputs.units(given, unit_bytes=request.unit_bytes)
    ]
    job = tasks.Job(str(folder / "work"), request, tuple(units), str(tokenizer.path))
    _claim(folder, asked)
    with _Pool(job, workers, progress) as pool:
        _run(job, pool)
    return _finish(folder, job, asked, tokenizer)


def _same(before: dict, asked: dict, folder: Path) -> None:
    if before != asked:
        raise ValueError(
            f"{folder} was prepared with other settings, another tokenizer or from files that have "
            "changed since; delete it or choose another folder"
        )


def _claim(folder: Path, asked: dict) -> None:
    """Notes what the work folder is for, so that it is gone on with for nothing else."""
    path = folder / "work" / "asked.json"
    if path.exists():
        _same(json.loads(path.read_text()), asked, folder)
        return
    if folder.exists() and any(folder.iterdir()) and not (folder / "work").exists():
        raise ValueError(f"{folder} holds something else; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_json(path, asked)


def _run(job: "tasks.Job", pool: "_Pool") -> None:
    """All tasks, in five rounds."""
    sizes = [unit.num_bytes for unit in job.units]
    pool.run("read", sizes)
    tasks.whole(job.path("counted"), lambda out: tasks.count(job, out))
    kept = tasks.offsets(job)[-1]
    if kept == 0:
        raise ValueError(f"nothing that can be used was read ({_reasons(job)})")
    pool.run("exact", [1] * tasks.parts(job, kept))
    tasks.whole(job.path("gone"), lambda out: tasks.merge_exact(job, out))
    if job.request.jaccard:
        pool.run("candidates", [1] * (clean.BANDS * tasks.parts(job, kept)))
        pool.run("compare", sizes)
    tasks.whole(job.path("near"), lambda out: tasks.merge_near(job, out))
    tasks.whole(job.path("heldout"), lambda out: tasks.choose_heldout(job, out))
    pool.run("write", sizes)


class _Pool:
    """Runs the tasks that are not done yet: in processes, or here for one worker."""

    def __init__(self, job: "tasks.Job", workers: int, progress):
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        self._job, self._workers, self._progress = job, workers, progress
        self._executor = None

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind, *_) -> None:
        if self._executor:
            self._executor.shutdown(wait=True, cancel_futures=kind is not None)

    def run(self, name: str, weights: list[int]) -> None:
        """Tasks 0 .. len(weights)-1 of a round; weights say how much of the whole each one is."""
        done, total = 0, max(sum(weights), 1)

        def tell(number: int) -> None:
            nonlocal done
            done += weights[number]
            if self._progress:
                self._progress(name, done, total)

        waiting = []
        for number in range(len(weights)):
            if self._job.path(name, number).exists():
                tell(number)
            else:
                waiting.append(number)
        if self._workers == 1 or len(waiting) < 2:
            for number in waiting:
                tasks.do(self._job, name, number)
                tell(number)
            return
        if self._executor is None:  # not forked: libraries that were used have threads
            self._executor = concurrent.futures.ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=tasks.receive,
                initargs=(self._job,),
            )
        futures = {self._executor.submit(tasks.do_received, name, n): n for n in waiting}
        for future in concurrent.futures.as_completed(futures):
            future.result()
            tell(futures[future])


# -- the end ----------------------------------------------------------------------------------


def _finish(folder: Path, job: "tasks.Job", asked: dict, tokenizer) -> corpus.Corpus:
    """Puts the shards in their places and writes the manifest."""
    results = [tasks.result(job, "write", n) for n in range(len(job.units))]
    names = sorted({stem.split("/")[0] for result in results for stem in result["splits"]})
    files, corpora = {}, {}
    for name in names:
        (folder / name).mkdir(exist_ok=True)
        corpora[name] = {"kind": "documents", "origin": _origin(job, name)}
        for which in corpus.SPLITS:
            corpora[name][which] = _join(folder, job, results, f"{name}/{which}", files)
    part, whole = VIEW
    if whole in corpora and part not in corpora:
        corpora |= _view(folder, job, results, corpora[whole], files)
    _keep_lists(folder, job, files)
    read = [tasks.result(job, "read", n) for n in range(len(job.units))]
    manifest = {
        "format": corpus.FORMAT,
        "asked": asked,
        "settings": asdict(job.request),
        "versions": {name: corpus.version(name) for name in (*corpus.PACKAGES, "detect_secrets")},
        "corpora": corpora,
        "sources": _sum(result["sources"] for result in results),
        "removed": _removed(read + results),
        "masked": dict(sorted(sum((Counter(r["masked"]) for r in read), Counter()).items())),
        "files": dict(sorted(files.items())),
    }
    _write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / "work")
    return corpus.open(folder, tokenizer)


def _join(folder: Path, job: "tasks.Job", results: list, stem: str, files: dict) -> dict:
    """One split out of the parts that the tasks wrote: shards renamed, numbers joined."""
    have = [n for n, result in enumerate(results) if stem in result["splits"]]
    records = [
        f"{stem}-{i:05d}-of-{max(len(have), 1):05d}.array_record" for i in range(len(have) or 1)
    ]
    for number, name in zip(have, records, strict=False):
        part = job.path("write", number) / stem.replace("/", "-")
        if part.with_suffix(".array_record").exists():  # else a run before this one moved it
            os.replace(part.with_suffix(".array_record"), folder / name)
        files[name] = results[number]["splits"][stem]["file"]
    if not have:
        corpus.write_shard(folder / records[0], [])
        files[records[0]] = corpus.checksum(folder / records[0])
    entry = {"documents": 0, "bytes": 0, "tokens": 0}
    languages = _sum(results[n]["splits"][stem]["languages"] for n in have)
    for key in entry:
        entry[key] = sum(of[key] for of in languages.values())
    entry |= {"languages": languages, "records": records}
    for kind, dtype in (("lengths", np.uint32), ("paths", np.uint64)):
        entry[kind] = f"{stem}.{kind}.npy"
        parts = [job.path("write", n) / f"{stem.replace('/', '-')}.{kind}.npy" for n in have]
        _join_arrays(folder / entry[kind], parts, dtype)
        files[entry[kind]] = corpus.checksum(folder / entry[kind])
    return entry


def _view(folder: Path, job: "tasks.Job", results: list, whole: dict, files: dict) -> dict:
    """The Python of the code, as a corpus that points into it: no document is kept twice."""
    part, of = VIEW
    view = {"kind": "documents", "origin": f"the {part} of {of}"}
    for which in corpus.SPLITS:
        stem, begin, numbers, counts = f"{of}/{which}", 0, [], []
        for number, result in enumerate(results):
            if stem in result["splits"]:
                found = np.load(job.path("write", number) / f"{of}-{which}.{part}.npy")
                counts.append(found.shape[1])
                numbers.append(found + np.array([[begin], [0]], np.int64))
                begin += result["splits"][stem]["documents"]
        if not sum(counts) and which == "train":
            return {}
        index, lengths = np.concatenate([np.zeros((2, 0), np.int64), *numbers], axis=1)
        (folder / part).mkdir(exist_ok=True)
        languages = {k: v for k, v in whole[which]["languages"].items() if k == part}
        totals = languages.get(part, {"documents": 0, "bytes": 0, "tokens": 0})
        view[which] = {**totals, "languages": languages, "records": whole[which]["records"]}
        for kind, array in (("index", index), ("lengths", lengths.astype(np.uint32))):
            view[which][kind] = f"{part}/{which}.{kind}.npy"
            _save(folder / view[which][kind], array)
            files[view[which][kind]] = corpus.checksum(folder / view[which][kind])
    return {part: view}


def _join_arrays(path: Path, parts: list[Path], dtype) -> None:
    """Arrays of numbers, one behind the other, without holding them all."""
    counts = [len(np.load(part, mmap_mode="r")) for part in parts]
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (sum(counts),)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.load(part).astype(dtype).tobytes())
    os.replace(temporary, path)


def _keep_lists(folder: Path, job: "tasks.Job", files: dict) -> None:
    """removed/: one JSON line per document that was left out, in order of the input."""
    (folder / REMOVED).mkdir(exist_ok=True)
    for number in range(len(job.units)):
        name = f"{REMOVED}/{number:05d}.jsonl"
        temporary = folder / f"{name}.tmp"
        with temporary.open("wb") as file:
            for task in ("read", "write"):
                file.write((job.path(task, number) / "removed.jsonl").read_bytes())
        os.replace(temporary, folder / name)
        files[name] = corpus.checksum(folder / name)


def _origin(job: "tasks.Job", name: str) -> str:
    return ", ".join(dict.fromkeys(g.path for g in job.request.inputs if g.corpus in ("", name)))


def _sum(parts) -> dict:
    """Adds {name: {documents, bytes, tokens}}."""
    total: dict[str, Counter] = {}
    for part in parts:
        for name, counts in part.items():
            total.setdefault(name, Counter()).update(counts)
    return {name: dict(total[name]) for name in sorted(total)}


def _removed(results: list[dict]) -> dict:
    total: dict[str, dict] = {}
    for result in results:
        for reason, of in result["removed"].items():
            entry = total.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
            entry["documents"] += of["documents"]
            entry["bytes"] += of["bytes"]
            entry["examples"] = (entry["examples"] + of["examples"])[:3]
    return total


def _reasons(job: "tasks.Job") -> str:
    removed = _removed([tasks.result(job, "read", n) for n in range(len(job.units))])
    return ", ".join(f"{of['documents']} {why}" for why, of in removed.items()) or "no document"


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    os.replace(temporary, path)


def _write_json(path: Path, value: dict) -> None:
    corpus.write(path, json.dumps(value, indent=1).encode())
