"""data/fitting.py: which lengths share a row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import fitting

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 40), st.data())
def test_an_order_with_few_cuts_has_every_item_once(sizes, capacity, data):
    room = data.draw(st.integers(1, capacity))
    order = fitting.order_with_few_cuts(sizes, room=room, capacity=capacity)
    assert sorted(order) == list(range(len(sizes)))


@settings(max_examples=100, deadline=None)
@given(SIZES)
def test_best_fit_has_every_item_once_and_no_row_too_full(sizes):
    sizes = sorted(sizes, reverse=True)
    rows = fitting.best_fit(sizes, 60)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in row) <= 60 for row in rows)
    room = [60 - sum(sizes[item] for item in row) for row in rows]
    assert not any(
        sizes[rows[b][0]] <= room[a] for a in range(len(rows)) for b in range(a + 1, len(rows))
    )


def test_more_documents_are_whole_than_as_they_come():
    sizes = np.random.default_rng(0).integers(20, 220, 1_000).tolist()
    order = fitting.order_with_few_cuts(sizes, room=257, capacity=257)
    assert whole(sizes, range(len(sizes)), 257) < 0.6
    assert whole(sizes, order, 257) > 0.9


def whole(sizes: list[int], order, capacity: int) -> float:
    """Share of the items that end in the row they begin in."""
    sizes = np.array([sizes[item] for item in order])
    ends = np.cumsum(sizes)
    return float(np.mean((ends - sizes) // capacity == (ends - 1) // capacity))
