"""Infilling: a document cut in three at random, and put in an order that a model can learn from.

Section 2.3 of the paper: two cut points, each uniform over the characters, give prefix, middle and
suffix; half of the documents become prefix-suffix-middle (PSM), half suffix-prefix-middle (SPM).
The share cut at line ends is ours: with few tokens to learn from, a nano model sees more of the
single lines that it is asked for.
"""

from dataclasses import dataclass

from codellama_jax import prompts

TRIES = 8  # draws of cut points until an infilled document fits its place in the row


@dataclass(frozen=True)
class Rates:
    infilling: float  # share of whole documents that are infilled
    spm: float = 0.5  # of these, share in suffix-prefix-middle order
    line: float = 0.0  # of these, share cut at line ends


@dataclass(frozen=True)
class Infilled:
    """An infilled document: its tokens, the order, and where the middle begins and ends."""

    tokens: list[int]
    mode: str  # "psm" or "spm"
    start: int  # of the middle, in characters
    end: int


def infill(text: str, tokenizer, rng, *, rates: Rates, max_tokens: int) -> Infilled | None:
    """Infills `text` with probability rates.infilling; None leaves it plain.

    A pure function of its arguments and of rng.random(). Where the result is longer than max_tokens
    the cuts are drawn again, at most 8 times; then the document stays plain.
    """
    if rng.random() >= rates.infilling:
        return None
    spm = rng.random() < rates.spm  # once, so that redrawing changes no share
    cut = line_cut if rng.random() < rates.line else character_cut
    for _ in range(TRIES):
        start, end = cut(text, rng)
        tokens = prompts.infilling_example(
            tokenizer, text[:start], text[start:end], text[end:], suffix_first=spm
        )
        if len(tokens) <= max_tokens:
            return Infilled(tokens, "spm" if spm else "psm", start, end)
    return None


def character_cut(text: str, rng) -> tuple[int, int]:
    """Two independent uniform cut points, in order: parts may be empty.  "abc" -> (1, 3)"""
    a, b = (int(rng.random() * (len(text) + 1)) for _ in range(2))
    return min(a, b), max(a, b)


def line_cut(text: str, rng) -> tuple[int, int]:
    """A middle of whole lines that is not blank: one line half of the time, else 2 to 8."""
    starts = [0, *(i + 1 for i, char in enumerate(text) if char == "\n"), len(text)]
    starts = list(dict.fromkeys(starts))
    num_lines = len(starts) - 1
    if num_lines < 1:
        return character_cut(text, rng)
    filled = [i for i in range(num_lines) if text[starts[i] : starts[i + 1]].strip()]
    first = filled[int(rng.random() * len(filled))] if filled else 0
    length = 1 if rng.random() < 0.5 else 2 + int(rng.random() * 7)
    return starts[first], starts[min(first + length, num_lines)]
