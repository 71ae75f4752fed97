"""Duplicates out: exact ones by hash, near ones by MinHash, one of each cluster kept.

Two documents are near-duplicates when the sets of their runs of five words have a Jaccard
similarity of at least the threshold (0.8). MinHash sketches, banded, find the candidates; the
similarity of a candidate pair is then computed, not estimated, so that no pair below the threshold
joins a cluster.
"""

import re
import zlib
from collections import defaultdict
from itertools import chain

import numpy as np

from codellama_jax.data.sources import Document, Tally

NUM_PERM, BANDS = 128, 16  # finds 99% of pairs at similarity 0.85, 94% at 0.8
SHINGLE_WORDS = 5
SEED = 42
LARGE_BUCKET = 32  # beyond it only neighbours and the first are compared


def without_duplicates(
    documents: list[Document], *, threshold: float, tally: Tally
) -> list[Document]:
    """Leaves one document of every cluster of duplicates: the longest, of these the first."""
    seen: set[str] = set()
    different = []
    for document in documents:
        if document.text in seen:
            _count(tally, "exact duplicate", document)
        else:
            seen.add(document.text)
            different.append(document)
    clusters = defaultdict(list)
    for number, root in enumerate(near_duplicates([d.text for d in different], threshold)):
        clusters[root].append(number)
    kept = {max(group, key=lambda i: (len(different[i].text), -i)) for group in clusters.values()}
    for number, document in enumerate(different):
        if number not in kept:
            _count(tally, f"near-duplicate (Jaccard {threshold:g})", document)
    return [different[number] for number in sorted(kept)]


def near_duplicates(texts: list[str], threshold: float) -> list[int]:
    """For each text the number of its cluster's first text."""
    if not texts:
        return []
    hashes, starts = shingle_hashes(texts)
    marks = sketches(hashes, starts)
    root = list(range(len(texts)))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    sets: dict[int, np.ndarray] = {}

    def shingles(i: int) -> np.ndarray:
        if i not in sets:
            sets[i] = np.unique(hashes[starts[i] : starts[i + 1]])
        return sets[i]

    for a, b in _candidates(marks):
        a_root, b_root = find(a), find(b)
        if a_root != b_root and jaccard(shingles(a), shingles(b)) >= threshold:
            root[max(a_root, b_root)] = min(a_root, b_root)
    return [find(i) for i in range(len(texts))]


def shingle_hashes(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every run of five words: uint64 [shingles], and where each text's begin [texts+1].

    A shorter text is one shingle: all its words.
    """
    words, sizes = word_hashes(texts, least=SHINGLE_WORDS)
    hashes, inside = run_hashes(words, sizes, SHINGLE_WORDS)
    starts = np.concatenate([[0], np.cumsum(sizes - (SHINGLE_WORDS - 1))])
    return hashes[inside], starts


def word_hashes(texts: list[str], *, least: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words and signs of all texts, uint64 [words], and how many each text has.

    The last word of a text with fewer than `least` is repeated.
    """
    numbers: dict[str, int] = {}
    rows = []
    for text in texts:
        words = re.findall(r"\w+|[^\w\s]", text)
        row = [numbers.setdefault(w, len(numbers)) for w in words] or [0]
        rows.append(row + [row[-1]] * (least - len(row)))
    crc = np.array([zlib.crc32(word.encode()) for word in numbers] or [0], np.uint64)
    sizes = np.array([len(row) for row in rows])
    return crc[np.fromiter(chain.from_iterable(rows), np.int64, int(sizes.sum()))], sizes


def run_hashes(words: np.ndarray, sizes: np.ndarray, num_words: int) -> tuple:
    """Hashes of the run that begins at each word, and which runs lie inside one text."""
    mixed = np.zeros(len(words), np.uint64)
    for turn in range(num_words):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + np.roll(words, -turn)
    ends = np.cumsum(sizes)
    left = np.repeat(ends, sizes) - np.arange(len(words))  # words from here to the text's end
    return mixed ^ (mixed >> np.uint64(29)), left >= num_words


def sketches(hashes: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """MinHash sketches: uint32 [texts, 128]."""
    import rensa

    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        hashes, starts.astype(np.uint64), NUM_PERM, SEED
    )
    return np.array(matrix.to_rows(), np.uint32)


def _candidates(sketches: np.ndarray):
    """Pairs whose sketches agree in all of some band."""
    for band in np.split(sketches, BANDS, axis=1):
        keys = np.ascontiguousarray(band).view(np.dtype((np.void, band.shape[1] * 4))).ravel()
        yield from bucket_pairs(keys)


def bucket_pairs(keys: np.ndarray):
    """Pairs of places with equal keys, the smaller place first."""
    _, bucket, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    order = np.argsort(bucket, kind="stable")
    ends = np.cumsum(sizes)
    for number in np.flatnonzero(sizes > 1):
        group = order[ends[number] - sizes[number] : ends[number]]
        if len(group) <= LARGE_BUCKET:
            yield from ((int(a), int(b)) for n, a in enumerate(group) for b in group[n + 1 :])
        else:
            for a, b in zip(group[:-1], group[1:], strict=True):
                yield int(a), int(b)
                yield int(group[0]), int(b)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _count(tally: Tally, reason: str, document: Document) -> None:
    name = f"{document.path} {document.part}".strip()
    tally.add(reason, name, len(document.text.encode()))
