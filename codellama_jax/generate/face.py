"""A Code Llama in use: it completes, fills gaps and answers.

    llama = codellama_jax.load("runs/nano/code")          # or Meta's or Hugging Face's folder
    llama.complete("def fib(n):\n")                       # what follows
    llama.infill("def add(a, b):\n    return ", "\n")     # what belongs between
    llama.chat([{"role": "user", "content": "Reverse a list in place."}])
    llama.complete(["import ", "def "], temperature=0.8, seed=1)    # a list is a batch
    for piece in llama.complete("class Stack:", stream=True):
        print(piece, end="", flush=True)

prompts.py has the formats of the prompts, request.py the rows that are asked for, weights.py where
the weights come from, batches.py the batches that compiled programs (decode.py) extend.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from codellama_jax import config, prompts, state
from codellama_jax.config import check
from codellama_jax.generate import batches, request, weights
from codellama_jax.generate.request import Request, Sampling
from codellama_jax.tokenizer import Tokenizer

BATCH_SIZE = 64  # rows decoded at once, unless the caller says

Dialog = Sequence[dict[str, str]]


def load(
    path: str | os.PathLike,
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    max_seq_len: int | None = None,
) -> "CodeLlama":
    """The Code Llama that lies at `path`: our checkpoint, or Meta's or Hugging Face's folder.

    tokenizer: the file, if it is not beside the weights. dtype: "bfloat16", "float16" or "float32",
    to hold the weights and compute in; None: as stored, but bfloat16 for float32 weights on an
    accelerator. mesh: devices to split the weights over (sharding.make_mesh); None: one device.
    max_seq_len: lets the model read more than it was trained on (Code Llama, trained on 16,384
    tokens, is good to about 100,000: section 3.3 of the paper).

    Raises ValueError when there are no such weights, or the tokenizer does not fit them.
    """
    model, params, found = weights.load(path, dtype, mesh)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = tokenizer or found
        tokenizer = Tokenizer(tokenizer) if tokenizer else None
    if max_seq_len is not None:
        model = dataclasses.replace(model, max_seq_len=max_seq_len)
    return CodeLlama(model, params, tokenizer)


class Generation(NamedTuple):
    """What came after one prompt."""

    tokens: list[int]  # without the stop id
    log_probs: list[float]  # of each token, before temperature and nucleus
    stopped: bool  # at a stop id; False: at max_new_tokens


class CodeLlama:
    """Weights on a device, and the tokenizer they speak: ready to generate.

    model      shape of the network; its max_seq_len bounds prompt and answer together
    params     weights in the dtype to compute in; "layers" is a list
    tokenizer  None: ids only
    mesh       the devices the weights are split over, or None
    """

    def __init__(
        self,
        model: config.Model,
        params: state.Params,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: str | None = None,
    ):
        """Copies the stacked weights of `params` layer by layer and into `dtype`, on their devices.

        dtype=None: their own, but bfloat16 for float32 weights on an accelerator. Weights that lie
        layer by layer already are taken as they are. Raises ValueError for another dtype than
        theirs, and for the tokenizer of another model.
        """
        if tokenizer is not None:
            check(
                tokenizer.vocab_size <= model.vocab_size,
                f"{tokenizer.path} has {tokenizer.vocab_size} pieces and the model's vocabulary "
                f"{model.vocab_size}: it is the tokenizer of another model",
            )
        self.model, self.tokenizer = model, tokenizer
        if isinstance(params["layers"], dict):
            own = jax.tree.map(lambda w: w, params)  # unstack empties it
            params = weights.unstack(own, model, dtype)
        held = params["norm"].dtype.name
        check(
            dtype in (None, held),
            f"dtype={dtype!r}: weights that lie layer by layer stay as they are, {held}; give "
            f"stacked ones, or load(..., dtype={dtype!r})",
        )
        self.params, self.mesh = params, weights.mesh_of(params)

    # -- ids -----------------------------------------------------------------------------------
    def logits(self, tokens_BT) -> np.ndarray:
        """float32[B, T, V] for int[B, T]: at each position the logits of the next token."""
        return batches.logits(self.params, tokens_BT, model=self.model)

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        *,
        stop_ids: Sequence[int] = (),
        batch_size: int = BATCH_SIZE,
    ) -> list[Generation]:
        """What follows each prompt of ids, up to a stop id or max_new_tokens.

        batch_size: rows decoded at once; more is faster until memory ends. Raises ValueError for a
        prompt that with max_new_tokens exceeds max_seq_len.
        """
        rows = [Request(list(ids)) for ids in prompt_ids]
        self.run(rows, sampling, stop_ids, batch_size)
        return [Generation(row.tokens, row.log_probs, row.stopped) for row in rows]

    # -- text ----------------------------------------------------------------------------------
    def complete(
        self,
        text: str | Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> str | list[str] | Iterator[str]:
        """What follows `text`; for a list of texts, a list.

        Ends at EOS, before the first of the texts in `stop`, or after max_new_tokens. These,
        temperature, top_p and seed: see request.Sampling. stream=True yields the answer to one text
        piece by piece. batch_size: texts decoded at once; lower it when memory runs short.
        """
        tokenizer = self._text_tokenizer()
        rows = [request.completion(tokenizer, one, stop) for one in _listed(text)]
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        stop_ids = [tokenizer.eos_id]
        return self._answer(rows, sampling, stop_ids, isinstance(text, str), stream, batch_size)

    def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | Sequence[str],
        *,
        suffix_first: bool = False,
        truncate: bool = False,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> str | list[str] | Iterator[str]:
        """What belongs between `prefix` and `suffix`; for two lists of one length, a list.

        suffix_first: SPM, with token healing, instead of PSM. truncate: leave out the text farthest
        from the gap when it is too long to read (default: ValueError). The rest as in `complete`.
        Raises ValueError when the tokenizer has no infilling marks. Source: section 2.3.
        """
        tokenizer = self._text_tokenizer()
        prompts.require_infilling(tokenizer)
        pairs = _paired(prefix, suffix)
        if truncate:
            longest = self.model.max_seq_len
            room = longest - (max_new_tokens or min(longest // 2, request.DEFAULT_NEW_TOKENS))
            pairs = [request.near_gap(tokenizer, *pair, room) for pair in pairs]
        rows = [request.infilling(tokenizer, *pair, suffix_first, stop) for pair in pairs]
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        stop_ids = [tokenizer.eot_id, tokenizer.eos_id]
        return self._answer(rows, sampling, stop_ids, isinstance(prefix, str), stream, batch_size)

    def chat(
        self,
        dialog: Dialog | Sequence[Dialog],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop: Sequence[str] = (),
        stream: bool = False,
        batch_size: int = BATCH_SIZE,
    ) -> str | list[str] | Iterator[str]:
        """The answer to a dialog [{"role": "user", "content": "..."}, ...]; for a list, a list.

        Without the white space around it. Other arguments as in `complete`. Raises ValueError for
        a dialog out of order (see prompts.chat).
        """
        tokenizer = self._text_tokenizer()
        single = len(dialog) > 0 and isinstance(dialog[0], dict)
        rows = [request.chat(tokenizer, one, stop) for one in ([dialog] if single else dialog)]
        sampling = Sampling(max_new_tokens, temperature, top_p, seed)
        stop_ids = [i for i in (tokenizer.step_id, tokenizer.eos_id) if i is not None]
        return self._answer(rows, sampling, stop_ids, single, stream, batch_size)

    # -- rows ----------------------------------------------------------------------------------
    def run(
        self,
        rows: Sequence[Request],
        sampling: Sampling,
        stop_ids: Sequence[int],
        batch_size: int = BATCH_SIZE,
    ) -> None:
        """Extends each row until it is done or has max_new_tokens more."""
        batches.run(self.params, rows, sampling, stop_ids, batch_size, model=self.model)

    def _answer(self, rows, sampling, stop_ids, single, stream, batch_size):
        if stream:
            check(single, f"stream=True takes one prompt, not a list of {len(rows)}")
            return batches.stream(self.params, rows[0], sampling, stop_ids, model=self.model)
        self.run(rows, sampling, stop_ids, batch_size)
        return rows[0].text() if single else [row.text() for row in rows]

    def _text_tokenizer(self) -> Tokenizer:
        check(
            self.tokenizer is not None,
            "these weights have no tokenizer beside them; load them with tokenizer=PATH",
        )
        return self.tokenizer


def _listed(text: str | Sequence[str]) -> list[str]:
    return [text] if isinstance(text, str) else list(text)


def _paired(prefix: str | Sequence[str], suffix: str | Sequence[str]) -> list[tuple[str, str]]:
    prefixes, suffixes = _listed(prefix), _listed(suffix)
    check(
        isinstance(prefix, str) == isinstance(suffix, str) and len(prefixes) == len(suffixes),
        f"prefix and suffix must be two texts or two lists of one length, not {len(prefixes)} in "
        f"a {type(prefix).__name__} and {len(suffixes)} in a {type(suffix).__name__}",
    )
    return list(zip(prefixes, suffixes, strict=True))
