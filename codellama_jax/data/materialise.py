"""Writes rows ahead of training: tokenized once, in parallel, by the code that reads them.

A shard is whole or absent, so a killed run goes on with those that are missing. Each row is read
back from its bytes and compared before it is written. ahead.py has the format.
"""

import concurrent.futures
import functools
import json
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.data import ahead, corpus, mix, storage
from codellama_jax.tokenizer import Tokenizer

SHARD_TOKENS = 32 * 1024**2


@dataclass(frozen=True)
class Job:
    """What is written: of every corpus counts[name] rows from firsts[name] on, cut into shards."""

    data: config.Data
    corpus_dir: str
    tokenizer: str
    firsts: dict[str, int]
    counts: dict[str, int]

    @property
    def folder(self) -> Path:
        return storage.beside(self.corpus_dir, self.data.rows)

    def shards(self) -> list[tuple[str, str, int, int]]:
        """(file, corpus, first row, last row + 1) of every shard; rows from firsts[corpus] on."""
        step = max(SHARD_TOKENS // self.data.seq_len, 1)
        return [
            (f"{name}-{first // step:05d}.array_record", name, first, min(first + step, count))
            for name, count in self.counts.items()
            for first in range(0, count, step)
        ]


def prepare(
    data: config.Data,
    corpus_dir: str | Path,
    tokenizer,
    *,
    steps: int,
    epochs: int = 1,
    workers: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict:
    """Writes the rows that `steps` read, of each corpus at most `epochs`; returns the manifest.

    Run again, it goes on with the shards that are missing. progress(corpus, rows done, of how
    many). Raises ValueError for settings that do not fit each other or what lies there already.
    """
    if data.rows is None:
        raise ValueError("data.rows names the folder to write, and is not set")
    if epochs < 1 or workers < 1:
        raise ValueError(f"epochs={epochs} and workers={workers} must be at least 1")
    mixture = mix.open_mixture(replace(data, rows=None), corpus_dir, tokenizer)
    reads = mixture.schedule.counts(steps * data.rows_per_batch)
    counts = {
        rows.name: min(count, epochs * rows.rows_per_epoch)
        for rows, count in zip(mixture.rows, reads, strict=True)
    }
    firsts = {rows.name: mixture.first(number) for number, rows in enumerate(mixture.rows)}
    job = Job(data, str(corpus_dir), str(tokenizer.path), firsts, counts)
    of = ahead.depends_on(data, corpus.open(corpus_dir, tokenizer), tokenizer)
    asked = {"of": of, "rows": {n: [firsts[n], firsts[n] + counts[n]] for n in counts}}
    _claim(job.folder, asked)
    done = ahead.read_json(job.folder / "manifest.json")
    return done or _finish(job, asked, _write_shards(job, workers, progress))


def _claim(folder: Path, asked: dict) -> None:
    """Notes what the folder is for, so that it is gone on with for nothing else."""
    before = ahead.read_json(folder / "asked.json")
    if before is None:
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} holds something else; name another folder by data.rows")
        folder.mkdir(parents=True, exist_ok=True)
        corpus.write(folder / "asked.json", json.dumps(asked, indent=1).encode())
        return
    ahead.same(before["of"], asked["of"], folder)
    if before["rows"] != asked["rows"]:
        raise ValueError(
            f"{folder} is for {before['rows']} rows, now {asked['rows']} are asked for; "
            "name another folder by data.rows, or delete this one"
        )


def _write_shards(job: Job, workers: int, progress) -> dict[str, dict]:
    """Writes what is missing; returns size and checksum of every shard."""
    shards, files, done = job.shards(), {}, dict.fromkeys(job.counts, 0)

    def note(shard: tuple, checksum: dict) -> None:
        file, name, first, last = shard
        files[file] = checksum
        done[name] += last - first
        if progress:
            progress(name, done[name], job.counts[name])

    if workers == 1:
        for shard in shards:
            note(shard, _write_shard(job, shard))
        return files
    context = multiprocessing.get_context("spawn")  # libraries that were used have threads
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(_write_shard, job, shard): shard for shard in shards}
        try:
            for future in concurrent.futures.as_completed(futures):
                note(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return files


def _write_shard(job: Job, shard: tuple[str, str, int, int]) -> dict:
    """Writes one shard, unless it is there; returns its size and checksum."""
    file, name, first, last = shard
    path = job.folder / file
    if not path.exists():
        rows, dtype = _rows(job)[name], _dtype(job.tokenizer)
        with storage.writing(path) as temporary:
            writer = corpus.Writer(temporary)
            try:
                for index in range(first, last):
                    row = rows.row(job.firsts[name] + index)
                    record = ahead.encode(row, dtype)
                    again = ahead.decode(record, dtype, job.data.seq_len + 1)
                    assert all((row[key] == again[key]).all() for key in row), (name, index)
                    writer.write(record)
            finally:
                writer.close()
    return corpus.checksum(path)


@functools.lru_cache(maxsize=1)
def _opened(corpus_dir: str, tokenizer: str, data: str) -> dict:
    settings = config.from_json(config.Data, json.loads(data))
    mixture = mix.open_mixture(settings, corpus_dir, Tokenizer(tokenizer))
    return {rows.name: rows for rows in mixture.rows}


def _rows(job: Job) -> dict:
    """The rows of every corpus, opened once in each process."""
    data = json.dumps(config.to_json(replace(job.data, rows=None)))
    return _opened(job.corpus_dir, job.tokenizer, data)


@functools.cache
def _dtype(tokenizer: str) -> np.dtype:
    return np.dtype("<u2" if Tokenizer(tokenizer).vocab_size <= 1 << 16 else "<u4")


def _finish(job: Job, asked: dict, files: dict[str, dict]) -> dict:
    """Writes the manifest; what a killed process left under a temporary name goes."""
    for left in job.folder.glob("*.tmp"):
        left.unlink()
    dtype = _dtype(job.tokenizer).str
    corpora = {
        name: {
            "first": job.firsts[name],
            "rows": count,
            "dtype": dtype,
            "files": [file for file, of, _, _ in job.shards() if of == name],
        }
        for name, count in job.counts.items()
        if count
    }
    manifest = {"of": asked["of"], "corpora": corpora, "files": dict(sorted(files.items()))}
    corpus.write(job.folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    return manifest
