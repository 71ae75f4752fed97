"""What is asked, row by row: text that is whole as it comes, prompts that fit around their gap."""

import generate_fixture as tiny
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax import prompts
from codellama_jax import tokenizer as tokenizers
from codellama_jax.generate import request


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@given(st.text(min_size=1, max_size=30), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_a_stream_holds_back_characters_that_are_not_whole(tokenizer, text, chunk):
    text = text.replace(tokenizers.SPACE, " ")
    row = request.completion(tokenizer, "x")
    ids, shown = tokenizer.encode_infilling(text), ""
    row.limit = len(ids) + 1
    for start in range(0, len(ids), chunk):
        row.extend(np.array(ids[start : start + chunk]), np.zeros(chunk), [])
        assert row.settled().startswith(shown)
        shown = row.settled()
        assert text.startswith(shown)
    assert row.text() == text


def test_a_completion_keeps_its_leading_space(tokenizer):
    ids = tokenizer.encode_infilling(" b")
    row = request.completion(tokenizer, "a")
    row.limit = 9
    row.extend(np.array(ids), np.zeros(len(ids)), [tokenizer.eos_id])
    assert row.text() == " b"


@given(st.text(max_size=300), st.text(max_size=300), st.integers(5, 80))
@settings(max_examples=50, deadline=None)
def test_truncation_keeps_the_text_near_the_gap(tokenizer, prefix, suffix, room):
    start, end = request.near_gap(tokenizer, prefix, suffix, room)
    assert prefix.endswith(start) and suffix.startswith(end)
    assert len(prompts.infilling(tokenizer, start, end)) <= room
    whole = prompts.infilling(tokenizer, prefix, suffix)
    assert (start, end) == (prefix, suffix) or len(whole) > room
