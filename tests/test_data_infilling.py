"""data/infilling.py: documents cut in three."""

import random

import corpus_fixture
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.data import infilling
from codellama_jax.data.infilling import Rates

TEXT = st.text(st.characters(codec="utf-8"), max_size=120)
ALWAYS = Rates(infilling=1.0)


def read(tokenizer, ids):
    """prefix, middle and suffix as the ids of an infilled document spell them."""
    assert ids[:2] == [tokenizer.bos_id, tokenizer.prefix_id]
    assert ids[-2:] == [tokenizer.eot_id, tokenizer.eos_id]
    suffix, middle = ids.index(tokenizer.suffix_id), ids.index(tokenizer.middle_id)
    after = tokenizer.decode_infilling(ids[suffix + 1 : middle])
    if suffix == 2:
        return "", tokenizer.decode(ids[middle + 1 : -2]), after
    return (
        tokenizer.decode(ids[2:suffix]),
        tokenizer.decode_infilling(ids[middle + 1 : -2]),
        after,
    )


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(0, 10**6), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0]))
def test_prefix_middle_and_suffix_are_the_document(text, seed, spm, line):
    text = text.replace("\u2581", "_")  # SentencePiece's own mark for a space: decodes to one
    tokenizer = corpus_fixture.tokenizer()
    rates = Rates(1.0, spm, line)
    got = infilling.infill(text, tokenizer, random.Random(seed), rates=rates, max_tokens=10**6)
    assert got.mode == ("spm" if spm else "psm")
    assert 0 <= got.start <= got.end <= len(text)
    prefix, middle, suffix = read(tokenizer, got.tokens)
    assert prefix + middle + suffix == text
    assert suffix == text[got.end :]
    if got.mode == "psm" or not got.start:
        assert prefix == text[: got.start]


def test_the_same_numbers_give_the_same_cuts():
    tokenizer, text = corpus_fixture.tokenizer(), "def f(x):\n    return x\n"
    one, two = (
        infilling.infill(text, tokenizer, random.Random(5), rates=ALWAYS, max_tokens=99)
        for _ in range(2)
    )
    assert one == two


def test_rates_are_kept():
    tokenizer, rng = corpus_fixture.tokenizer(), random.Random(0)
    rates = Rates(infilling=0.9, spm=0.25)
    got = [
        infilling.infill("a = 1\n", tokenizer, rng, rates=rates, max_tokens=99)
        for _ in range(4_000)
    ]
    infilled = [one for one in got if one]
    assert len(infilled) / len(got) == pytest.approx(0.9, abs=0.02)
    spm = sum(one.mode == "spm" for one in infilled)
    assert spm / len(infilled) == pytest.approx(0.25, abs=0.03)


def test_cut_points_are_uniform_over_characters_and_parts_may_be_empty():
    rng = random.Random(0)
    cuts = [infilling.character_cut("abc", rng) for _ in range(16_000)]
    share = {cut: cuts.count(cut) / len(cuts) for cut in set(cuts)}
    assert share.keys() == {(a, b) for a in range(4) for b in range(a, 4)}
    for (a, b), value in share.items():
        assert value == pytest.approx(1 / 16 if a == b else 2 / 16, abs=0.01)


@settings(max_examples=100, deadline=None)
@given(st.text("ab \n", max_size=40), st.integers(0, 10**6))
def test_line_cuts_lie_at_line_ends(text, seed):
    start, end = infilling.line_cut(text, random.Random(seed))
    assert start == 0 or text[start - 1] == "\n"
    assert end == len(text) or text[end - 1] == "\n"
    if text.strip():
        assert text[start:end].strip()


def test_half_of_the_line_cuts_are_single_lines():
    text, rng = "".join(f"line {i}\n" for i in range(50)), random.Random(0)
    cuts = [infilling.line_cut(text, rng) for _ in range(2_000)]
    single = sum(text[a:b].count("\n") == 1 for a, b in cuts)
    assert single / len(cuts) == pytest.approx(0.5, abs=0.05)


def test_what_does_not_fit_is_drawn_again_or_stays_plain():
    tokenizer, text = corpus_fixture.tokenizer(), "def find(tree):\n    return tree\n"
    plain = len(tokenizer.encode(text)) + 2
    lengths = [
        len(got.tokens) if got else None
        for seed in range(300)
        if (
            got := infilling.infill(
                text, tokenizer, random.Random(seed), rates=ALWAYS, max_tokens=plain + 5
            )
        )
        or got is None
    ]
    assert max(length for length in lengths if length) <= plain + 5
    assert lengths.count(None) < 30
    nothing = infilling.infill(text, tokenizer, random.Random(0), rates=ALWAYS, max_tokens=plain)
    assert nothing is None
