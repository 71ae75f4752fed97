"""Randomness without tables or state: a 64-bit hash, and permutations computed, not stored.

A corpus of 200 million documents is shuffled anew every epoch; a table of that order would take
1.6 GB. Here the document at a place of the order is computed from (place, count, key), so that any
row of any epoch can be read at once, on any host. It is 64-bit arithmetic, the same everywhere.
"""

import hashlib
import random
from math import isqrt

import numpy as np

ROUNDS = 4


def hash64(*parts: int | str) -> int:
    """A 64-bit number that depends on all of `parts`."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def draws(*parts: int | str) -> random.Random:
    """A generator that depends on `parts` alone.

    Only its random() may be used: Python promises the same sequence of it in every version.
    """
    return random.Random(hash64(*parts))


def permute(places: np.ndarray, *, count: int, key: int) -> np.ndarray:
    """What stands at `places` in a shuffle of 0..count-1: a bijection for every key.

    A Feistel network over a grid of a x b cells, the smallest with at least `count`; results beyond
    `count` are sent through again (cycle walking), which few need: a x b < count + sqrt(count) + 1.
    places: integers [n] below count. Returns int64 [n].
    """
    b = isqrt(count - 1) + 1 if count > 1 else 1
    a = -(-count // b)
    values = _feistel(np.asarray(places, np.uint64), a, b, key)
    outside = np.flatnonzero(values >= count)
    while outside.size:
        values[outside] = _feistel(values[outside], a, b, key)
        outside = outside[values[outside] >= count]
    return values.astype(np.int64)


def place_of(value: int, *, count: int, key: int) -> int:
    """Where permute puts `value`: its inverse, for one value."""
    b = isqrt(count - 1) + 1 if count > 1 else 1
    a = -(-count // b)
    place = np.array([value], np.uint64)
    while True:
        place = _feistel_back(place, a, b, key)
        if place[0] < count:
            return int(place[0])


def _feistel_back(values: np.ndarray, a: int, b: int, key: int) -> np.ndarray:
    left, right = np.divmod(values, np.uint64(b))
    for turn in reversed(range(ROUNDS)):
        taken = _mix(left, hash64(key, turn, "right")) % np.uint64(b)
        right = (right + np.uint64(b) - taken) % np.uint64(b)
        taken = _mix(right, hash64(key, turn, "left")) % np.uint64(a)
        left = (left + np.uint64(a) - taken) % np.uint64(a)
    return left * np.uint64(b) + right


def _feistel(values: np.ndarray, a: int, b: int, key: int) -> np.ndarray:
    left, right = np.divmod(values, np.uint64(b))
    for turn in range(ROUNDS):
        left = (left + _mix(right, hash64(key, turn, "left"))) % np.uint64(a)
        right = (right + _mix(left, hash64(key, turn, "right"))) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(values: np.ndarray, key: int) -> np.ndarray:
    """32 well-mixed bits of each value (splitmix64's finalizer), so that sums cannot overflow."""
    x = values ^ np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(32)
