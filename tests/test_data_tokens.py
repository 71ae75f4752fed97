"""data/tokens.py: a document's tokens, whole and in slices."""

import corpus_fixture
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax import prompts
from codellama_jax.data import tokens

LINES = st.lists(st.text(st.characters(codec="utf-8"), max_size=30), max_size=40).map("\n".join)


@settings(max_examples=30, deadline=None)
@given(LINES)
def test_chunks_end_with_lines_and_join_to_the_text(text):
    text = text * (1 + 9_000 // (len(text) + 1))
    chunks = tokens.chunks(text)
    assert "".join(chunks) == text
    assert all(chunk.endswith("\n") and len(chunk) >= 4_096 for chunk in chunks[:-1])


@settings(max_examples=30, deadline=None)
@given(LINES, st.data())
def test_a_slice_is_that_of_the_whole_document(text, data):
    tokenizer = corpus_fixture.tokenizer()
    text = text * (1 + data.draw(st.integers(0, 15_000)) // (len(text) + 1))
    whole = prompts.document(tokenizer, text)
    assert tokens.encode(tokenizer, text) == whole
    counts = tokens.count(tokenizer, text)
    assert sum(counts) + 2 == len(whole)
    for _ in range(5):
        start = data.draw(st.integers(0, len(whole) - 1))
        end = data.draw(st.integers(start + 1, len(whole)))
        assert tokens.encode_slice(tokenizer, text, counts, start, end) == whole[start:end]


def test_a_slice_of_a_long_document_encodes_only_what_it_needs():
    tokenizer, encoded = corpus_fixture.tokenizer(), []

    class Counting:
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id

        def encode(self, text):
            encoded.append(len(text))
            return tokenizer.encode(text)

        def encode_infilling(self, text):
            encoded.append(len(text))
            return tokenizer.encode_infilling(text)

    text = "x = 1\n" * 100_000
    counts = tokens.count(tokenizer, text)
    assert len(tokens.encode_slice(Counting(), text, counts, 100_000, 100_064)) == 64
    assert sum(encoded) < 3 * tokens.CHUNK_CHARS
