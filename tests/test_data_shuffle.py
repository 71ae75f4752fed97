"""data/shuffle.py: permutations that are computed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import shuffle


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3_000), st.integers(0, 2**64 - 1))
def test_every_place_gets_another_document(count, key):
    places = shuffle.permute(np.arange(count), count=count, key=key)
    assert sorted(places) == list(range(count))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2**40), st.data())
def test_one_place_can_be_asked_for_alone(count, data):
    some = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=5))
    together = shuffle.permute(np.array(some), count=count, key=7)
    alone = [shuffle.permute(np.array([place]), count=count, key=7)[0] for place in some]
    assert together.tolist() == alone
    assert all(0 <= place < count for place in alone)


def test_keys_give_different_orders():
    orders = {tuple(shuffle.permute(np.arange(50), count=50, key=key)) for key in range(20)}
    assert len(orders) == 20


def test_every_document_comes_to_every_place_equally_often():
    count, keys = 7, 7_000
    hits = np.zeros((count, count))
    for key in range(keys):
        hits[np.arange(count), shuffle.permute(np.arange(count), count=count, key=key)] += 1
    assert np.abs(hits - keys / count).max() < 5 * np.sqrt(keys / count)


def test_neighbours_are_parted():
    order = shuffle.permute(np.arange(100_000), count=100_000, key=3)
    steps = np.abs(np.diff(order))
    assert steps.mean() == pytest.approx(100_000 / 3, rel=0.02)  # as of independent places
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


def test_hashes_are_the_same_everywhere():
    assert shuffle.hash64(0, "code", 1, 2) == 5916940362888725048
    assert shuffle.hash64("1") != shuffle.hash64(1)
    assert shuffle.draws(1, "x").random() == shuffle.draws(1, "x").random()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
def test_the_place_of_a_document_is_found_again(count, key, data):
    place = data.draw(st.integers(0, count - 1))
    value = int(shuffle.permute(np.array([place]), count=count, key=key)[0])
    assert shuffle.place_of(value, count=count, key=key) == place
