"""Does a model use the text after the gap? Single lines of held-out code, scored and generated.

A problem is a document with one line taken out, as in HumanEval's single-line infilling: prefix
and middle end in a newline, so the prompt of either order ends at the end of a token. It is asked
in the forms below; what is scored is always the line, token for token the same.

    psm             BOS PRE prefix SUF suffix MID       |  line EOT
    psm_no_suffix   BOS PRE prefix SUF MID              |  line EOT
    spm             BOS PRE SUF suffix MID prefix       |  line EOT
    spm_no_suffix   BOS PRE SUF MID prefix              |  line EOT
    spm_other       as spm, with the suffix of another document
    plain           BOS prefix                          |  line

An empty suffix is unusual in training, so a model may be worse without one for that alone; `plain`
is what a model without infilling does, and `spm_other` tells a suffix from the right suffix.
Bits are those of the line's text; a gain "with_end" counts EOT, too: all that a model has to
write, and where to stop is what a suffix tells most of all.
"""

import ast
import re
import textwrap
import warnings
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from codellama_jax import config, prompts, state
from codellama_jax.data import corpus, shuffle
from codellama_jax.data import rows as data_rows
from codellama_jax.evals import bootstrap, scoring

FORMS = ("psm", "psm_no_suffix", "spm", "spm_no_suffix", "spm_other", "plain")
GAINS = {  # what the suffix gains: bits per byte of the first form less those of the second
    "psm": ("psm_no_suffix", "psm"),
    "spm": ("spm_no_suffix", "spm"),
    "psm_over_plain": ("plain", "psm"),
    "spm_over_plain": ("plain", "spm"),
    "spm_over_other": ("spm_other", "spm"),
    "psm_with_end": ("psm_no_suffix", "psm"),
    "spm_with_end": ("spm_no_suffix", "spm"),
}
MIN_CHARS = 8  # fewer characters other than space make a line too easy: `else:`, `return`
COMMENTS = ("#", "//", "/*", "*", "--", ";", "%")  # how such a line begins
ROW_MULTIPLE = 128  # of a row's length: what attention kernels want


# -- problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A document with a line taken out: prefix + middle + suffix is the document."""

    prefix: str  # ends in a newline
    middle: str  # one line with its newline
    suffix: str
    document: int  # its number among the held-out documents of its corpus
    path: str


def problems(
    corpus_dir: str | Path,
    tokenizer,
    *,
    count: int,
    max_tokens: int,
    seed: int,
    corpus_name: str = "code",
) -> list[Problem]:
    """Up to `count` problems from held-out documents, at most two of a document, always the same.

    A line counts if it has code on it (8 characters at least; no comment, no docstring) and text
    above and below, and if the whole has at most max_tokens tokens in every form. A second line of
    a document is used only where there are too few documents. A smaller corpus gives fewer.
    A Python document that does not parse is left out: it may be the middle of a docstring.
    """
    prompts.require_infilling(tokenizer)
    split = corpus.open(corpus_dir, tokenizer).split(corpus_name, "heldout")
    key = shuffle.hash64(seed, corpus_name, "infilling problems")
    order = shuffle.permute(np.arange(len(split)), count=len(split), key=key)
    firsts, seconds = [], []
    for document in order.tolist():
        if len(firsts) == count:
            break
        found = _of_document(split.record(document), document, tokenizer, seed, max_tokens)
        firsts += found[:1]
        seconds += found[1:2]
    return (firsts + seconds)[:count]


def _of_document(record: dict, document: int, tokenizer, seed: int, max_tokens: int):
    """The first two lines, in random order, that make a problem."""
    if record["language"] == "python" and not _parses(record["text"]):
        return []
    lines = _lines(record["text"])
    rng, found = shuffle.draws(seed, "infilling line", document), []
    candidates = [i for i in code_lines(record["text"]) if 0 < i < len(lines) - 1]
    for i in sorted(candidates, key=lambda _: rng.random()):
        prefix, middle, suffix = ("".join(part) for part in (lines[:i], lines[i], lines[i + 1 :]))
        if (
            prefix.strip()
            and suffix.strip()
            and _fits(tokenizer, prefix + middle, suffix, max_tokens)
        ):
            found.append(Problem(prefix, middle, suffix, document, record["path"]))
        if len(found) == 2:
            break
    return found


def _fits(tokenizer, before: str, suffix: str, max_tokens: int) -> bool:
    """Prefix and middle end in newlines, so both orders have the tokens of SPM and EOT."""
    if len(before) + len(suffix) > 16 * max_tokens:  # spare the encoding of a whole file
        return False
    return len(prompts.infilling(tokenizer, before, suffix, suffix_first=True)) < max_tokens


def code_lines(text: str) -> list[int]:
    """The numbers of the lines with code on them, from 0. Lines in triple quotes are not code."""
    numbers, quoted = [], False
    for number, line in enumerate(_lines(text)):
        quotes = line.count('"""') + line.count("'''")
        enough = sum(not char.isspace() for char in line) >= MIN_CHARS
        comment = line.lstrip().startswith(COMMENTS)
        if enough and line.endswith("\n") and not (quoted or quotes or comment):
            numbers.append(number)
        quoted ^= quotes % 2 == 1
    return numbers


def _parses(text: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about somebody else's source
        try:
            ast.parse(textwrap.dedent(text))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def _lines(text: str) -> list[str]:
    """Lines that end in a newline, and what follows the last. (splitlines ends some elsewhere.)"""
    return re.findall(r"[^\n]*\n|[^\n]+", text)


# -- bits per byte -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Middles:
    """How well a model expects the true lines. Bits per byte of text; EOT apart, in nats."""

    problems: int
    documents: int
    bits_per_byte: dict[str, bootstrap.Interval]  # by form
    gain: dict[str, bootstrap.Interval]  # see GAINS; paired, over documents; positive is good
    eot_nats: dict[str, float]  # of the mark that ends the middle, by form


def bits_per_byte(
    model: config.Model,
    params: state.Params,
    tokenizer,
    problems: Sequence[Problem],
    *,
    layout: config.Layout,
    mesh: Mesh,
) -> Middles:
    """Scores the true line of every problem in every form, given the tokens before (FORMS).

    All forms of all problems are packed into rows of one length, where they do not see each other.
    Raises ValueError where there are no problems.
    """
    config.check(len(problems) > 0, "there are no infilling problems: no held-out line is usable")
    examples = [e for form in FORMS for e in _examples(tokenizer, problems, form)]
    nats, eot = _score(model, params, examples, tokenizer, layout, mesh)
    bits = dict(zip(FORMS, (nats / np.log(2)).reshape(len(FORMS), -1), strict=True))
    ends = dict(zip(FORMS, eot.reshape(len(FORMS), -1), strict=True))
    weights = [len(problem.middle.encode()) for problem in problems]
    groups = [problem.document for problem in problems]

    def interval(values):
        return bootstrap.interval(values, weights, groups)

    def gain(name):
        cost = {f: bits[f] + ends[f] / np.log(2) * name.endswith("with_end") for f in GAINS[name]}
        before, after = GAINS[name]
        return interval(cost[before] - cost[after])

    return Middles(
        problems=len(problems),
        documents=len(set(groups)),
        bits_per_byte={form: interval(values) for form, values in bits.items()},
        gain={name: gain(name) for name in GAINS},
        eot_nats={form: float(ends[form].mean()) for form in FORMS if form != "plain"},
    )


@dataclass(frozen=True)
class Example:
    tokens: list[int]
    scored: int  # tokens at its end that are scored: the line, and EOT if there is one


def _examples(tokenizer, problems: Sequence[Problem], form: str) -> Iterator[Example]:
    for number, problem in enumerate(problems):
        suffix = problem.suffix
        if form.endswith("no_suffix"):
            suffix = ""
        elif form.endswith("other"):
            suffix = _other(problems, number).suffix
        line = tokenizer.encode_infilling(problem.middle)
        if form == "plain":
            prompt = tokenizer.encode(problem.prefix, bos=True)
        else:
            spm = form.startswith("spm")
            prompt = prompts.infilling(tokenizer, problem.prefix, suffix, suffix_first=spm)
            line = [*line, tokenizer.eot_id]
        yield Example(prompt + line, len(line))


def _other(problems: Sequence[Problem], number: int) -> Problem:
    """The next problem that is of another document; of the same where there is only one."""
    after = [*problems[number + 1 :], *problems[:number]]
    other = (p for p in after if p.document != problems[number].document)
    return next(other, problems[number])


def _score(model, params, examples: list[Example], tokenizer, layout, mesh):
    """nats[examples] of the lines, and of the EOT after them (0 where there is none)."""
    longest = max(len(example.tokens) for example in examples)
    capacity = -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE + 1
    layout_of_rows = pack([len(example.tokens) for example in examples], capacity)
    packed = []
    for numbers in layout_of_rows:
        chosen = [examples[i] for i in numbers]
        targets = [[False] * (len(e.tokens) - e.scored) + [True] * e.scored for e in chosen]
        packed.append(
            data_rows.pack([e.tokens for e in chosen], capacity=capacity, targets=targets)
        )
    rows = {key: np.stack([row[key] for row in packed]) for key in packed[0]}
    nll, mask = scoring.losses(model, params, rows, layout=layout, mesh=mesh)
    row, column = np.nonzero(mask)
    slot = rows["segments"][row, column + 1] - 1
    owner = np.array([layout_of_rows[r][s] for r, s in zip(row, slot, strict=True)])
    is_eot = rows["tokens"][row, column + 1] == tokenizer.eot_id
    values = nll[row, column].astype(np.float64)

    def total(chosen):
        return np.bincount(owner[chosen], values[chosen], minlength=len(examples))

    return total(~is_eot), total(is_eot)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts things into rows of `capacity`, longest first, each into the fullest row that has room.

    pack([5, 3, 4, 2], 7) -> [[0, 3], [2, 1]]
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(room, (lengths[i], -1))
        free, row = room.pop(at) if at < len(room) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        insort(room, (free - lengths[i], row))
    return rows


# -- generating ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactMatch:
    """How often a generated middle is the true one; shares of the problems."""

    problems: int
    exact: float  # to the last character
    stripped: float  # but for space around it, as published single-line numbers are counted
    first_line: float  # the first line of it, stripped: right, but for where to stop
    generated: list[str]


def exact_match(
    generator, problems: Sequence[Problem], suffix_first: bool, max_new_tokens: int
) -> ExactMatch:
    """Infills every problem greedily and compares.

    generator: has .infill(prefixes, suffixes, suffix_first=, max_new_tokens=, temperature=).
    """
    config.check(len(problems) > 0, "there are no infilling problems: no held-out line is usable")
    generated = generator.infill(
        [problem.prefix for problem in problems],
        [problem.suffix for problem in problems],
        suffix_first=suffix_first,
        max_new_tokens=max_new_tokens,
        temperature=0.0,
    )
    pairs = [(text, problem.middle) for text, problem in zip(generated, problems, strict=True)]

    def share(same) -> float:
        return sum(same(text, line) for text, line in pairs) / len(pairs)

    return ExactMatch(
        problems=len(problems),
        exact=share(lambda text, line: text == line),
        stripped=share(lambda text, line: text.strip() == line.strip()),
        first_line=share(lambda text, line: text.partition("\n")[0].strip() == line.strip()),
        generated=list(generated),
    )
