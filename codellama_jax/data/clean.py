"""What makes two texts near-duplicates, and how they are found: by MinHash.

Two documents are near-duplicates when the sets of their runs of five words have a Jaccard
similarity of at least the threshold (0.8). MinHash sketches, banded, find the candidates; the
similarity of a candidate pair is then computed, not estimated, so that no pair below the threshold
joins a cluster.
"""

import re
import zlib
from itertools import chain

import numpy as np

NUM_PERM, BANDS = 128, 16  # finds 99% of pairs at similarity 0.85, 94% at 0.8
SHINGLE_WORDS = 5
SEED = 42
LARGE_BUCKET = 32  # beyond it only neighbours and the first are compared


class Clusters:
    """Union-find over numbers; a cluster's name is the smallest of its numbers."""

    def __init__(self):
        self._root: dict[int, int] = {}

    def find(self, i: int) -> int:
        while (above := self._root.get(i, i)) != i:
            self._root[i] = self._root.get(above, above)
            i = self._root[i]
        return i

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.find(a), self.find(b)))
        self._root[b] = a


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


def band_keys(sketches: np.ndarray) -> np.ndarray:
    """A hash of each band of each sketch: uint64 [documents, bands]."""
    rows = sketches.reshape(len(sketches), BANDS, -1).astype(np.uint64)
    keys = np.zeros(rows.shape[:2], np.uint64)
    for place in range(rows.shape[2]):
        keys = (keys ^ rows[:, :, place]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    return keys


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


def similar(a: np.ndarray, b: np.ndarray, threshold: float) -> bool:
    """Whether two sets of shingles, sorted, have at least this Jaccard similarity."""
    few, many = sorted((len(a), len(b)))
    return few >= threshold * many and jaccard(a, b) >= threshold
