"""The end of preparing: the parts that tasks wrote become a corpus, with its manifest."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from codellama_jax.data import corpus, sources, storage
from codellama_jax.data.job import Job
from codellama_jax.data.tasks import PARTS

REMOVED = "removed"  # folder of lists of the documents that were left out


def finish(folder: Path, job: Job, asked: dict, tokenizer) -> corpus.Corpus:
    """Puts the shards in their places and writes the manifest."""
    read, written = (
        [job.result(name, n) for n in range(len(job.units))] for name in ("read", "write")
    )
    names = sorted({stem.split("/")[0] for result in written for stem in result["splits"]})
    files, corpora = {}, {}
    for name in names:
        _make_folder(folder / name)
        corpora[name] = _about(job, written, name)
        for which in corpus.SPLITS:
            corpora[name][which] = _join(folder, job, written, f"{name}/{which}", files)
        if PARTS.get(name, name) not in names:
            corpora |= _part(folder, job, written, name, corpora[name], files)
    _keep_lists(folder, job, files)
    manifest = {
        "format": corpus.FORMAT,
        "asked": asked,
        "settings": asdict(job.request),
        "versions": {name: corpus.version(name) for name in corpus.PACKAGES},
        "corpora": {name: corpora[name] for name in sorted(corpora, key=_place)},
        "sources": _sum(result["sources"] for result in written),
        "read": _sum(result["read"] for result in read),
        "removed": _removed([result["removed"] for result in read + written]),
        "removed_pieces": _removed([result["removed_pieces"] for result in written]),
        "masked": dict(sorted(sum((Counter(r["masked"]) for r in read), Counter()).items())),
        "files": dict(sorted(files.items())),
    }
    corpus.write(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    storage.remove(folder / "work")
    return corpus.open(folder, tokenizer)


def _place(name: str) -> tuple:
    """Well-known corpora first."""
    return corpus.NAMES.index(name) if name in corpus.NAMES else len(corpus.NAMES), name


def _about(job: Job, results: list, name: str) -> dict:
    """What kind of corpus it is and which inputs it is from."""
    stems = [f"{name}/{which}" for which in corpus.SPLITS]
    units = [n for n, result in enumerate(results) if set(stems) & set(result["splits"])]
    parts = [of for n in units for stem, of in results[n]["splits"].items() if stem in stems]
    dialogues = sum(of["dialogues"] for of in parts)
    if dialogues not in (0, sum(of["documents"] for of in parts)):
        raise ValueError(
            f"corpus {name!r} would have both texts and dialogues; put another name in front of "
            "one input, as in dialogues=FILE"
        )
    origin = ", ".join(dict.fromkeys(job.units[n].given.path for n in units))
    return {"kind": "dialogues" if dialogues else "documents", "origin": origin}


def _join(folder: Path, job: Job, results: list, stem: str, files: dict) -> dict:
    """One split out of the parts that the tasks wrote: shards renamed, numbers joined."""
    have = [n for n, result in enumerate(results) if stem in result["splits"]]
    records = [
        f"{stem}-{i:05d}-of-{max(len(have), 1):05d}.array_record" for i in range(len(have) or 1)
    ]
    for number, name in zip(have, records, strict=False):
        part = job.path("write", number) / f"{stem.replace('/', '-')}.array_record"
        storage.move(part, folder / name)
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
        column = f"{stem.replace('/', '-')}.{kind}"
        parts = [job.array(column, "write", n) for n in have]
        files[entry[kind]] = _put(
            folder / entry[kind], functools.partial(_join_arrays, parts, dtype)
        )
    return entry


def _part(folder: Path, job: Job, results: list, whole: str, entry: dict, files: dict) -> dict:
    """The Python of some code, as a corpus that points into it: no document is kept twice."""
    part = PARTS[whole]
    view = {"kind": "documents", "origin": entry["origin"]}
    for which in corpus.SPLITS:
        stem, begin, numbers = f"{whole}/{which}", 0, [np.zeros((2, 0), np.int64)]
        for number, result in enumerate(results):
            if stem in result["splits"]:
                found = job.array(f"{whole}-{which}.python", "write", number)
                numbers.append(found + np.array([[begin], [0]], np.int64))
                begin += result["splits"][stem]["documents"]
        index, lengths = np.concatenate(numbers, axis=1)
        if not len(index) and which == "train":
            return {}
        _make_folder(folder / part)
        languages = {k: v for k, v in entry[which]["languages"].items() if k == "python"}
        totals = languages.get("python", {"documents": 0, "bytes": 0, "tokens": 0})
        view[which] = {**totals, "languages": languages, "records": entry[which]["records"]}
        for kind, array in (("index", index), ("lengths", lengths.astype(np.uint32))):
            view[which][kind] = f"{part}/{which}.{kind}.npy"
            files[view[which][kind]] = _put(
                folder / view[which][kind], functools.partial(_save, array)
            )
    return {part: view}


def _make_folder(folder: Path) -> None:
    if not storage.is_remote(folder):  # a remote store has none
        folder.mkdir(exist_ok=True)


def _put(path: Path, fill: Callable[[Path], None]) -> dict:
    """Writes a file, whole; returns its size and checksum."""
    with storage.writing(path) as temporary:
        fill(temporary)
        return corpus.checksum(temporary)


def _join_arrays(parts: list[np.ndarray], dtype, path: Path) -> None:
    """Arrays of numbers, one behind the other, without holding them all."""
    with path.open("wb") as file:
        shape = (sum(map(len, parts)),)
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.astype(dtype).tobytes())


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _keep_lists(folder: Path, job: Job, files: dict) -> None:
    """removed/: one JSON line per document that was left out, in order of the input."""
    _make_folder(folder / REMOVED)
    for number in range(len(job.units)):

        def fill(path: Path, number: int = number) -> None:
            with path.open("wb") as file:
                for task in ("read", "write"):
                    part = storage.local(job.path(task, number) / "removed.jsonl")
                    file.write(part.read_bytes())

        name = f"{REMOVED}/{number:05d}.jsonl"
        files[name] = _put(folder / name, fill)


def _sum(parts) -> dict:
    """Adds {name: {documents, bytes, tokens}}."""
    total: dict[str, Counter] = {}
    for part in parts:
        for name, counts in part.items():
            total.setdefault(name, Counter()).update(counts)
    return {name: dict(total[name]) for name in sorted(total)}


def _removed(parts: list[dict]) -> dict:
    """Adds what tasks left out, by reason."""
    total: dict[str, dict] = {}
    for part in parts:
        for reason, of in part.items():
            empty = {"documents": 0, "bytes": 0, "examples": [], "languages": {}}
            entry = total.setdefault(reason, empty)
            entry["documents"] += of["documents"]
            entry["bytes"] += of["bytes"]
            entry["examples"] = (entry["examples"] + of["examples"])[: sources.EXAMPLES]
            counts = Counter(entry["languages"]) + Counter(of["languages"])
            entry["languages"] = dict(sorted(counts.items()))
    return total


def reasons(job: Job) -> str:
    """Why nothing was kept, in words."""
    removed = _removed([job.result("read", n)["removed"] for n in job.named])
    return ", ".join(f"{of['documents']} {why}" for why, of in removed.items()) or "no document"
