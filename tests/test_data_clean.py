"""data/clean.py and data/duplicates.py: duplicates, exact and near."""

import json
import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import clean, duplicates, pipeline
from codellama_jax.data.inputs import Input

WORDS = [f"word{i}" for i in range(2_000)]


def left_out(folder, texts, *, held_out=0.0001, **changes) -> dict[int, tuple[str, int]]:
    """What the rounds that find duplicates leave out of texts: the reason and the one kept."""
    lines = [json.dumps({"text": text, "path": f"{n}.txt"}) for n, text in enumerate(texts)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    named = (Input(str(folder / "texts.jsonl")),)
    request = pipeline.Request(named, heldout_rate=held_out, **changes)
    made = pipeline.clean_documents(folder / "out", request, workers=1)
    return duplicates.of_unit(made, "read", 0)


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


def test_of_equal_documents_the_first_is_kept(tmp_path):
    found = left_out(tmp_path, ["a b c d e f g"] * 3 + ["x y z u v w"])
    assert found == {1: ("exact duplicate", 0), 2: ("exact duplicate", 0)}


def test_of_near_duplicates_the_longest_is_kept(tmp_path):
    rng = random.Random(0)
    text = random_text(rng)
    found = left_out(tmp_path, [text, text + " a few words more", random_text(rng)])
    assert found == {0: ("near-duplicate (Jaccard 0.8)", 1)}


def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path):
    rng = random.Random(1)
    originals = [random_text(rng) for _ in range(150)]
    near = [changed(text, rng, 3) for text in originals]  # about 0.86 similar
    apart = [changed(text, rng, 12) for text in originals]  # about 0.54
    assert 0.84 < np.mean([similarity(a, b) for a, b in zip(originals, near, strict=True)]) < 0.9
    found = left_out(tmp_path, originals + near + apart)
    pairs = {tuple(sorted((number, kept))) for number, (_, kept) in found.items()}
    assert len(pairs & {(n, 150 + n) for n in range(150)}) >= 0.95 * 150
    assert not any(number >= 300 or kept >= 300 for number, (_, kept) in found.items())


def test_the_similarity_that_counts_is_a_setting(tmp_path):
    rng = random.Random(2)
    text = random_text(rng)
    texts = [text, changed(text, rng, 3)]
    assert 0.84 < similarity(*texts) < 0.9
    assert not left_out(tmp_path, texts, jaccard=0.9)


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


def test_short_texts_are_told_apart(tmp_path):
    found = left_out(tmp_path, ["a b", "a c", "a b", "d"])
    assert found == {2: ("exact duplicate", 0)}


def test_large_clusters_become_one(tmp_path):
    rng = random.Random(2)
    text = random_text(rng)
    copies = [changed(text, rng, 1) for _ in range(100)]
    kept = max(range(100), key=lambda n: (len(copies[n]), -n))
    found = left_out(tmp_path, copies)
    assert {number: of[1] for number, of in found.items()} == {
        n: kept for n in range(100) if n != kept
    }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20))
def test_clusters_join_what_is_linked(links):
    import itertools

    clusters, groups = clean.Clusters(), [{n} for n in range(13)]
    for a, b in links:
        clusters.join(a, b)
        one, two = (next(g for g in groups if n in g) for n in (a, b))
        groups = [g for g in groups if g not in (one, two)] + [one | two]
    for a, b in itertools.combinations(range(13), 2):
        together = any({a, b} <= group for group in groups)
        assert (clusters.find(a) == clusters.find(b)) == together
    assert [clusters.find(n) for n in range(13)] == [
        min(next(g for g in groups if n in g)) for n in range(13)
    ]
