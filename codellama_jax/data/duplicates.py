"""Which rows of a table are duplicates: rounds of tasks, each of which holds a part of the keys.

    exact        a part of all digests -> which rows equal another
    candidates   a band of all sketches, a part of its keys -> pairs that may be near-duplicates
    compare      the pairs that begin in a unit -> those that are, by their texts

Of equal rows the first is kept, of a cluster of near-duplicates the longest (the first of these);
but rows that are marked `last` (held out, or of an input that only fills) after all others.
"""

import functools
from pathlib import Path

import numpy as np

from codellama_jax.data import clean
from codellama_jax.data.job import Job, Records

COMPARED = 256  # documents whose shingles are kept while comparing
NEAR = "near-duplicate (Jaccard {:g})"


def parts(job: Job, table: str) -> int:
    """Into how many parts keys are split so that sorting one stays within the memory allowed."""
    return -(-int(job.offsets(table)[-1]) * 64 // job.request.memory_bytes)  # 24 bytes a key


def exact(job: Job, table: str, number: int, out: Path) -> None:
    """Rows that equal another: int64 [duplicates, 2], with the one that is kept."""
    starts, num_parts = job.offsets(table), parts(job, table)
    keys, rows, last = [], [], []
    for unit, start in enumerate(starts[:-1]):
        digests = job.array("digest", table, unit)
        mine = np.flatnonzero(digests[:, 0] % np.uint64(num_parts) == number)
        keys.append(digests[mine])
        last.append(job.array("last", table, unit)[mine])
        rows.append(mine + start)
    keys, rows, last = map(np.concatenate, (keys, rows, last))
    order = np.lexsort((rows, last, keys[:, 1], keys[:, 0]))
    keys, rows = keys[order], rows[order]
    same = np.concatenate([[False], (keys[1:] == keys[:-1]).all(axis=1)])[: len(rows)]
    heads = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
    again = np.flatnonzero(same)
    np.save(out / "pairs.npy", np.stack([rows[again], rows[heads[again]]], axis=1))


def merge_exact(job: Job, table: str, out: Path) -> None:
    """All exact duplicates in order, and one flag per row."""
    pairs = _concatenate(job, f"{table}_exact", parts(job, table))
    np.save(out / "pairs.npy", pairs)
    flags = np.zeros(job.offsets(table)[-1], bool)
    flags[pairs[:, 0]] = True
    np.save(out / "flags.npy", flags)


def candidates(job: Job, table: str, number: int, out: Path) -> None:
    """Pairs that agree in a band, of one part of its keys: int64 [pairs, 2], sorted."""
    starts, num_parts = job.offsets(table), parts(job, table)
    band, part = divmod(number, num_parts)
    gone = job.array("flags", f"{table}_gone")
    keys, rows = [], []
    for unit, start in enumerate(starts[:-1]):
        own = job.array("bands", table, unit)[band]
        mine = np.flatnonzero(
            (own % np.uint64(num_parts) == part) & ~gone[start : start + len(own)]
        )
        keys.append(own[mine])
        rows.append(mine + start)
    rows = np.concatenate(rows)
    places = list(clean.bucket_pairs(np.concatenate(keys)))
    pairs = rows[np.array(places, np.int64).reshape(-1, 2)]
    np.save(out / "pairs.npy", pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))])


def compare(job: Job, table: str, number: int, out: Path) -> None:
    """Of the pairs that begin in a unit, those that are as similar as asked: int64 [pairs, 2]."""
    starts = job.offsets(table)
    found = []
    for task in range(clean.BANDS * parts(job, table)):
        pairs = job.array("pairs", f"{table}_candidates", task)
        first, end = np.searchsorted(pairs[:, 0], starts[number : number + 2])
        found.append(pairs[first:end])
    pairs = np.unique(np.concatenate(found or [np.zeros((0, 2), np.int64)]), axis=0)
    records, clusters = Records(job, table), clean.Clusters()

    @functools.lru_cache(maxsize=COMPARED)
    def shingles(row: int) -> np.ndarray:
        return np.unique(clean.shingle_hashes([records[row].text])[0])

    near = []
    for a, b in pairs.tolist():
        if clusters.find(a) != clusters.find(b):
            if clean.similar(shingles(a), shingles(b), job.request.jaccard):
                clusters.join(a, b)
                near.append((a, b))
    np.save(out / "pairs.npy", np.array(near, np.int64).reshape(-1, 2))


def merge_near(job: Job, table: str, out: Path) -> None:
    """Clusters, and of each all but one: int64 [duplicates, 2], with the one that is kept."""
    pairs = _concatenate(job, f"{table}_compare", len(job.units) if job.request.jaccard else 0)
    np.save(out / "pairs.npy", _all_but_one(job, table, pairs))


def _all_but_one(job: Job, table: str, pairs: np.ndarray) -> np.ndarray:
    from scipy import sparse

    if len(pairs) == 0:
        return pairs
    rows, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(pairs.shape)
    graph = sparse.coo_matrix(
        (np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(rows),) * 2
    )
    _, cluster = sparse.csgraph.connected_components(graph, directed=False)
    starts = job.offsets(table)
    chars, last = np.zeros(len(rows), np.int64), np.zeros(len(rows), bool)
    for unit, bounds in enumerate(np.searchsorted(rows, [starts[:-1], starts[1:]]).T):
        own = rows[slice(*bounds)] - starts[unit]
        chars[slice(*bounds)] = job.array("chars", table, unit)[own]
        last[slice(*bounds)] = job.array("last", table, unit)[own]
    order = np.lexsort((rows, -chars, last, cluster))  # the one to keep leads its cluster
    leads = np.flatnonzero(np.diff(cluster[order], prepend=-1))
    keeper = rows[order][leads]
    dropped = np.delete(order, leads)
    found = np.stack([rows[dropped], keeper[cluster[dropped]]], axis=1)
    return found[np.argsort(found[:, 0])]


def _concatenate(job: Job, name: str, count: int) -> np.ndarray:
    """The pairs of all tasks of a round, sorted by the first row."""
    found = [job.array("pairs", name, n) for n in range(count)]
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *found])
    return pairs[np.argsort(pairs[:, 0], kind="stable")]


def of_unit(job: Job, table: str, unit: int) -> dict[int, tuple[str, int]]:
    """Rows of a unit that are left out, by their place in it: the reason and the row kept."""
    starts, found = job.offsets(table), {}
    reasons = {"gone": "exact duplicate", "near": NEAR.format(job.request.jaccard)}
    for folder, reason in reasons.items():
        pairs = job.array("pairs", f"{table}_{folder}")
        first, end = np.searchsorted(pairs[:, 0], starts[unit : unit + 2])
        for row, kept in pairs[first:end].tolist():
            found[row - int(starts[unit])] = (reason, kept)
    return found


def kept(job: Job, table: str, unit: int) -> np.ndarray:
    """Which rows of a unit are not left out: bool [rows]."""
    starts = job.offsets(table)
    flags = np.ones(int(starts[unit + 1] - starts[unit]), bool)
    flags[list(of_unit(job, table, unit))] = False
    return flags
