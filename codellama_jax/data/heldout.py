"""Which files are held out, and which of their texts stand in training files all the same.

All parts of a file go together, in every corpus: a file is held out where the hash of its path is
small. But a function may have been copied from file to file. So all runs of 15 words of held-out
files are looked for in the training files, from which every training document is made; a held-out
document of which more than half is found there is left out, whatever its form.

    runs      unit -> hashes of the runs of its held-out files
    common    unit -> which of all those stand in its training files
"""

from pathlib import Path

import numpy as np

from codellama_jax.data import clean, duplicates, shuffle
from codellama_jax.data.job import Job, Records, write_result
from codellama_jax.data.sources import Document

RUN_WORDS = 15  # near-duplicates at a similarity of 0.8 share seven in ten of them
MOST = 0.5  # share of a held-out document's runs that may stand in training files
LEAK = "held out, but most of it stands in training files"
PRESENT_BITS = 27  # size of a table that tells most strange runs quickly: 128 MB


def choose(job: Job, out: Path) -> None:
    """Below which rank files are held out, and which are beside it.

    Where that holds out nothing of a corpus, or all of it, one file more or less is held out.
    """
    limit = int(job.request.heldout_rate * 2**64)
    lowest: dict[str, int] = {}
    highest: dict[str, int] = {}
    chars = 0
    for unit in range(len(job.units)):
        kept = duplicates.kept(job, "read", unit)
        rank, corpus = (job.array(name, "read", unit) for name in ("rank", "corpus"))
        chars += int(job.array("chars", "read", unit)[kept & (rank < limit)].sum())
        for number, name in enumerate(job.result("read", unit)["corpora"]):
            own = rank[kept & (corpus == number)]
            if len(own):
                lowest[name] = min(lowest.get(name, 2**64), int(own.min()))
                highest[name] = max(highest.get(name, 0), int(own.max()))
    more = [rank for name, rank in lowest.items() if limit <= rank < highest[name]]
    fewer = [rank for rank in highest.values() if rank < limit]
    # 8 bytes a run and as much to sort them; a word has about 3 characters
    every = -(-chars * 16 // 3 // job.request.memory_bytes) or 1
    write_result(out, {"limit": limit, "in": more, "out": fewer, "every": every})


def rank(seed: int, document: Document) -> int:
    return shuffle.hash64(seed, "heldout", document.path)


def flags(job: Job, table: str, unit: int) -> np.ndarray:
    """Which rows of a unit's table are from files that are held out: bool [rows]."""
    return of_ranks(job, job.array("rank", table, unit))


def of_ranks(job: Job, ranks: np.ndarray) -> np.ndarray:
    chosen = job.result("heldout")
    more, fewer = (np.array(chosen[name], np.uint64) for name in ("in", "out"))
    return ((ranks < np.uint64(chosen["limit"])) | np.isin(ranks, more)) & ~np.isin(ranks, fewer)


def runs(job: Job, number: int, out: Path) -> None:
    """Hashes of the runs of a unit's held-out files: uint64 [runs], sorted."""
    every = job.result("heldout")["every"]
    found = [np.zeros(0, np.uint64)]
    for text in _texts(job, number, held_out=True):
        found.append(_hashes([text], every))
    np.save(out / "runs.npy", np.unique(np.concatenate(found)))


def merge_runs(job: Job, out: Path) -> None:
    parts = [job.array("runs", "runs", n) for n in range(len(job.units))]
    np.save(out / "runs.npy", np.unique(np.concatenate(parts)))


def common(job: Job, number: int, out: Path) -> None:
    """Which of all runs stand in a unit's training files: int64 places, sorted."""
    every, known = job.result("heldout")["every"], np.array(job.array("runs", "all_runs"))
    found = np.zeros(len(known), bool)
    if len(known):
        mask = np.uint64((1 << PRESENT_BITS) - 1)
        present = np.zeros(1 << PRESENT_BITS, bool)
        present[known & mask] = True
        for text in _texts(job, number, held_out=False):
            hashes = _hashes([text], every)
            hashes = hashes[present[hashes & mask]]
            places, there = _places(known, hashes)
            found[places[there]] = True
    np.save(out / "places.npy", np.flatnonzero(found))


def merge_common(job: Job, out: Path) -> None:
    """Which of all runs stand in training files: bool [runs]."""
    found = np.zeros(len(job.array("runs", "all_runs")), bool)
    for unit in range(len(job.units)):
        found[job.array("places", "common", unit)] = True
    np.save(out / "common.npy", found)


class Common:
    """What held-out and training files have in common, for all documents of a task."""

    def __init__(self, job: Job):
        self._every = job.result("heldout")["every"]
        self._runs = np.array(job.array("runs", "all_runs"))
        self._common = job.array("common", "all_common")

    def has_most_of(self, document: Document) -> bool:
        """Whether most of a held-out document stands in training files."""
        hashes = _hashes([document.text], self._every)
        places, there = _places(self._runs, hashes)
        return np.count_nonzero(self._common[places[there]]) > MOST * len(hashes)


def _places(known: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each hash stands or would stand, and whether it does."""
    if len(known) == 0:
        return np.zeros(len(hashes), np.int64), np.zeros(len(hashes), bool)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return places, known[places] == hashes


def _texts(job: Job, unit: int, *, held_out: bool):
    chosen = duplicates.kept(job, "read", unit) & (flags(job, "read", unit) == held_out)
    for document in Records(job, "read").of_unit(unit, np.flatnonzero(chosen)):
        yield document.text


def _hashes(texts: list[str], every: int) -> np.ndarray:
    """Of the runs of 15 words (of a shorter text: of all its words), those that are sampled."""
    words, sizes = clean.word_hashes(texts, least=RUN_WORDS)
    hashes, inside = clean.run_hashes(words, sizes, RUN_WORDS)
    hashes = hashes[inside]
    return hashes if every == 1 else hashes[hashes % np.uint64(every) == 0]
