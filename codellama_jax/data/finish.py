"""The end of preparing: the parts that tasks wrote become a corpus, with its manifest."""

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np

from codellama_jax.data import corpus, sources
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
        (folder / name).mkdir(exist_ok=True)
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
    shutil.rmtree(folder / "work")
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
        (folder / part).mkdir(exist_ok=True)
        languages = {k: v for k, v in entry[which]["languages"].items() if k == "python"}
        totals = languages.get("python", {"documents": 0, "bytes": 0, "tokens": 0})
        view[which] = {**totals, "languages": languages, "records": entry[which]["records"]}
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


def _keep_lists(folder: Path, job: Job, files: dict) -> None:
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


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    os.replace(temporary, path)
