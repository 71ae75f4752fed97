"""What is asked of a model, and what has come of it so far: on the host, row by row.

A Request is a prompt of ids, how to read the ids that follow it, and these ids as they come. It
knows where its text ends and how much of it can be shown already. Sampling says how ids are drawn.
"""

import dataclasses
import functools
from bisect import bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from codellama_jax import prompts
from codellama_jax.config import check
from codellama_jax.tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 256
DEFAULT_TOP_P = 0.9  # of Meta's reference code


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How far to go and how to draw. At temperature=0 the likeliest token is taken, always.

    A row draws the same tokens in any batch, given its seed. One seed for many rows gives each its
    own numbers by its place, the first those of seed=[seed].
    """

    max_new_tokens: int | None = None  # None: 256, or what is left of max_seq_len
    temperature: float = 0.0
    top_p: float | None = None  # None: 0.9, as in Meta's code
    seed: int | Sequence[int] | None = None  # of all rows, or one for each; None: 0

    def __post_init__(self):
        check(
            self.max_new_tokens is None or self.max_new_tokens >= 1,
            f"max_new_tokens={self.max_new_tokens} must be at least 1",
        )
        check(
            0 <= self.temperature < float("inf"),
            f"temperature={self.temperature} must be 0 (greedy) or larger",
        )
        check(self.top_p is None or 0 <= self.top_p <= 1, f"top_p={self.top_p} must be in 0..1")
        for name in ("top_p", "seed"):
            check(
                self.temperature > 0 or getattr(self, name) is None,
                f"{name}={getattr(self, name)} has no effect at temperature=0, which always takes "
                f"the likeliest token; leave {name} out or raise the temperature",
            )

    def limit(self, prompt_length: int, max_seq_len: int) -> int:
        """Most tokens to write after a prompt. Raises ValueError where the model cannot go."""
        left = max_seq_len - prompt_length
        new = min(left, DEFAULT_NEW_TOKENS) if self.max_new_tokens is None else self.max_new_tokens
        check(
            left > 0,
            f"a prompt of {prompt_length} tokens leaves no room: the model reads max_seq_len="
            f"{max_seq_len}; shorten it, or load the model with a larger max_seq_len",
        )
        check(
            new <= left,
            f"a prompt of {prompt_length} tokens and max_new_tokens={new} make "
            f"{prompt_length + new}, but the model reads max_seq_len={max_seq_len}; shorten the "
            f"prompt or lower max_new_tokens by {new - left}, or load the model with a larger "
            "max_seq_len",
        )
        return new

    def generators(self, num_rows: int) -> list[np.random.Generator]:
        """Where each row gets its random numbers."""
        if self.seed is None or isinstance(self.seed, int | np.integer):
            sources = [(self.seed or 0, row) for row in range(num_rows)]
        else:
            check(
                len(self.seed) == num_rows,
                f"there are {len(self.seed)} seeds for {num_rows} prompts; give one each, or one",
            )
            sources = [(seed, 0) for seed in self.seed]
        for seed, _ in sources:
            check(seed >= 0, f"seed={seed} must not be negative")
        return [np.random.default_rng(source) for source in sources]


@dataclasses.dataclass
class Request:
    """A prompt, and the ids that have come after it."""

    prompt: list[int]
    text_of: Callable[[list[int]], str] | None = None  # ids after the prompt to text
    spelled: str = ""  # text to write first: what token healing took from the prompt
    spelling: Callable[[list[int]], np.ndarray | None] | None = None  # see allowed
    stop: tuple[str, ...] = ()  # texts that end it
    limit: int = 0  # most tokens
    random: np.random.Generator | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    stopped: bool = False  # by a stop id or a stop text

    @property
    def done(self) -> bool:
        return self.stopped or len(self.tokens) >= self.limit

    def extend(self, tokens: np.ndarray, log_probs: np.ndarray, stop_ids: Sequence[int]) -> None:
        """Takes in a chunk up to the limit or the first stop id."""
        if self.stopped:
            return
        tokens = tokens[: self.limit - len(self.tokens)]
        ends = np.flatnonzero(np.isin(tokens, stop_ids))
        count = int(ends[0]) if len(ends) else len(tokens)
        self.tokens += tokens[:count].tolist()
        self.log_probs += log_probs[:count].tolist()
        self.stopped = bool(len(ends)) or self._stop_at() is not None

    def allowed(self) -> np.ndarray | None:
        """bool[V]: what may come next while `spelled` is not all written; None: everything."""
        return None if self.done or self.spelling is None else self.spelling(self.tokens)

    def text(self) -> str:
        """The text so far, cut before the first stop text."""
        return self.text_of(self.tokens)[: self._stop_at()]

    def settled(self) -> str:
        """The part of text() that stays, whatever comes.

        Held back are the first bytes of a character, what may become a stop text, and white space,
        which a chat answer loses at its end.
        """
        text = self.text()
        if self.done:
            return text
        text = text[: len(text) - max((len(stop) - 1 for stop in self.stop), default=0)]
        return text.rstrip().rstrip("\ufffd")

    def _stop_at(self) -> int | None:
        text = self.text_of(self.tokens) if self.stop else ""
        return min((text.find(stop) for stop in self.stop if stop in text), default=None)


# -- one for each kind of prompt -----------------------------------------------------------------
def completion(tokenizer: Tokenizer, text: str, stop: Sequence[str] = ()) -> Request:
    text_of = functools.partial(prompts.completed, tokenizer, text)
    bos = tokenizer.begins_with_bos or not text  # a prompt has at least one id
    return Request(tokenizer.encode(text, bos=bos), text_of, stop=_texts(stop))


def chat(tokenizer: Tokenizer, dialog: Sequence[dict], stop: Sequence[str] = ()) -> Request:
    """White space around the answer is dropped: the format puts it there."""

    def text_of(tokens):
        return tokenizer.decode(tokens).strip()

    return Request(prompts.chat(tokenizer, dialog), text_of, stop=_texts(stop))


def infilling(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    suffix_first: bool = False,
    stop: Sequence[str] = (),
) -> Request:
    """In SPM with token healing: what the end of the prefix may share with the middle is taken
    back, and has to be written anew (appendix E of the paper)."""
    prompt, taken = prompts.infilling(tokenizer, prefix, suffix, suffix_first), ""
    if suffix_first:
        prompt, taken = tokenizer.take_back(prompt)

    def text_of(tokens):
        return prompts.infilled_middle(tokenizer, prefix, tokens, suffix_first, taken)

    spelling = functools.partial(_spelling, tokenizer, taken) if taken else None
    return Request(prompt, text_of, taken, spelling, stop=_texts(stop))


def _spelling(tokenizer: Tokenizer, text: str, tokens: list[int]) -> np.ndarray | None:
    """bool[V]: what may follow `tokens` on the way to spell `text`; None when that is done."""
    written = int(tokenizer.num_bytes[tokens].sum())
    return _steps(tokenizer, text)[written] if written < len(text.encode()) else None


@functools.lru_cache(256)
def _steps(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.allowed_while_spelling(text)


def near_gap(tokenizer: Tokenizer, prefix: str, suffix: str, room: int) -> tuple[str, str]:
    """The end of `prefix` and the start of `suffix` that make a prompt of at most `room` tokens.

    The suffix gets a quarter, or what the prefix leaves. Raises ValueError for no room at all.
    """
    if len(prompts.infilling(tokenizer, prefix, suffix)) <= room:
        return prefix, suffix
    marks = len(prompts.infilling(tokenizer, "", ""))
    check(
        room > marks,
        f"max_new_tokens leaves room for {room} tokens, and an infilling needs more than {marks}; "
        "lower max_new_tokens",
    )
    room -= marks

    def longest(part: Callable[[int], str], text: str, encode: Callable, room: int) -> str:
        fitting = bisect_right(range(len(text) + 1), room, key=lambda n: len(encode(part(n))))
        return part(fitting - 1)

    for_suffix = max(room // 4, room - len(tokenizer.encode(prefix)))
    end = longest(lambda n: suffix[:n], suffix, tokenizer.encode_infilling, for_suffix)
    for_prefix = room - len(tokenizer.encode_infilling(end))
    start = longest(lambda n: prefix[len(prefix) - n :], prefix, tokenizer.encode, for_prefix)
    return start, end


def _texts(stop: Sequence[str]) -> tuple[str, ...]:
    check(not isinstance(stop, str), f"stop={stop!r} is one text; give a list of texts")
    check(all(stop), "an empty text in `stop` would end every answer at once")
    return tuple(stop)
