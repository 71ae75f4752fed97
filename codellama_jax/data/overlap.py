"""Decontamination: documents that share a long run of words with an evaluation set.

A set is a JSONL file (.gz too) such as HumanEval's or MBPP's. Every text in a record counts, and so
do prompt and solution joined; the runs are of words and signs, so white space makes no difference.
"""

import functools
import gzip
import json
from pathlib import Path

import numpy as np

from codellama_jax.data import clean, storage

JOINED = (("prompt", "canonical_solution"), ("text", "code"))


@functools.lru_cache(maxsize=1)
def load(paths: tuple[str, ...], num_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all runs in the sets, sorted, uint64 [runs], and the number of each one's set.

    Raises ValueError for a file that is missing, damaged, or holds no text of num_words words.
    """
    hashes, numbers = [], []
    for number, path in enumerate(paths):
        found, inside = clean.run_hashes(*clean.word_hashes(_texts(storage.path(path))), num_words)
        if not inside.any():
            raise ValueError(f"{path} has no text of {num_words} words to look for")
        hashes.append(np.unique(found[inside]))
        numbers.append(np.full(len(hashes[-1]), number))
    if not hashes:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    order = np.argsort(np.concatenate(hashes), kind="stable")
    return np.concatenate(hashes)[order], np.concatenate(numbers)[order]


def find(runs: np.ndarray, inside: np.ndarray, sizes: np.ndarray, sets: tuple) -> np.ndarray:
    """For each text the number of the set it shares a run with, or -1.

    runs, inside: of clean.run_hashes; sizes: words of every text.
    """
    known, numbers = sets
    found = np.full(len(sizes), -1)
    if len(known) == 0:
        return found
    places = np.minimum(np.searchsorted(known, runs), len(known) - 1)
    hits = np.flatnonzero(inside & (known[places] == runs))
    texts = np.searchsorted(np.cumsum(sizes), hits, side="right")
    found[texts[::-1]] = numbers[places[hits]][::-1]  # the first run of a text decides
    return found


def _texts(path: Path) -> list[str]:
    if not path.exists():
        raise ValueError(f"{path}, an evaluation set, is missing")
    texts, opened = [], gzip.open if path.suffix == ".gz" else open
    try:
        with opened(storage.local(path), "rt", encoding="utf-8") as file:
            for line in filter(str.strip, file):
                record = json.loads(line)
                fields = {k: "\n".join(v) if isinstance(v, list) else v for k, v in record.items()}
                texts += [value for value in fields.values() if isinstance(value, str)]
                for names in JOINED:
                    texts.append("\n".join(fields[n] for n in names if n in fields))
    except (ValueError, TypeError, AttributeError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a JSONL file of an evaluation set: {error}") from None
    return texts
