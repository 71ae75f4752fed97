"""data/clean.py: duplicates, exact and near."""

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import clean
from codellama_jax.data.sources import Document, Tally

WORDS = [f"word{i}" for i in range(2_000)]


def documents(texts):
    return [Document(text, f"{n}.py", "python", "test") for n, text in enumerate(texts)]


def random_text(rng, num_words=200):
    return " ".join(rng.choices(WORDS, k=num_words))


def changed(text, rng, num_words):
    """The same text with some of its words replaced, evenly spread."""
    words = text.split()
    for place in np.linspace(2, len(words) - 10, num_words).astype(int):
        words[place] = f"other{rng.random()}"
    return " ".join(words)


def similarity(a, b):
    hashes, starts = clean.shingle_hashes([a, b])
    one, two = (set(hashes[starts[i] : starts[i + 1]].tolist()) for i in range(2))
    return len(one & two) / len(one | two)


def test_of_equal_documents_the_first_is_kept_and_counted():
    tally = Tally()
    kept = clean.without_duplicates(
        documents(["a b c d e f g"] * 3 + ["x y z u v w"]), threshold=0.8, tally=tally
    )
    assert [d.path for d in kept] == ["0.py", "3.py"]
    assert tally.removed == {
        "exact duplicate": {"documents": 2, "bytes": 26, "examples": ["1.py", "2.py"]}
    }


def test_of_near_duplicates_the_longest_is_kept():
    rng = random.Random(0)
    text = random_text(rng)
    tally = Tally()
    kept = clean.without_duplicates(
        documents([text, text + " a few words more", random_text(rng)]), threshold=0.8, tally=tally
    )
    assert [d.path for d in kept] == ["1.py", "2.py"]
    assert tally.removed["near-duplicate (Jaccard 0.8)"]["examples"] == ["0.py"]


def test_planted_near_duplicates_are_found_and_nothing_else():
    rng = random.Random(1)
    originals = [random_text(rng) for _ in range(150)]
    near = [changed(text, rng, 3) for text in originals]  # about 0.86 similar
    apart = [changed(text, rng, 12) for text in originals]  # about 0.54
    assert 0.84 < np.mean([similarity(a, b) for a, b in zip(originals, near, strict=True)]) < 0.9
    roots = clean.near_duplicates(originals + near + apart, 0.8)
    found = np.mean([roots[150 + i] == i for i in range(150)])
    wrong = np.mean([roots[300 + i] != 300 + i for i in range(150)])
    assert found >= 0.95
    assert wrong == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab c\n."), max_size=40), min_size=1, max_size=6))
def test_shingles_are_the_runs_of_five_words(texts):
    import re

    hashes, starts = clean.shingle_hashes(texts)
    assert len(starts) == len(texts) + 1
    runs = {}
    for number, text in enumerate(texts):
        own = hashes[starts[number] : starts[number + 1]].tolist()
        words = re.findall(r"\w+|[^\w\s]", text)
        assert len(own) == max(len(words) - 4, 1)
        for place, value in enumerate(own):
            if len(words) >= 5:
                run = tuple(words[place : place + 5])
                assert runs.setdefault(value, run) == run


def test_short_and_empty_texts_are_told_apart():
    assert clean.near_duplicates(["a b", "a c", "a b", ""], 0.8) == [0, 1, 0, 3]
    assert clean.near_duplicates([], 0.8) == []


def test_large_clusters_become_one():
    rng = random.Random(2)
    text = random_text(rng)
    copies = [changed(text, rng, 1) for _ in range(100)]
    assert set(clean.near_duplicates(copies, 0.8)) == {0}
