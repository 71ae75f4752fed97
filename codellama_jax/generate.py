"""A Code Llama in use: it completes, fills gaps and answers.

    llama = codellama_jax.load("runs/nano/code")          # or Meta's or Hugging Face's folder
    llama.complete("def fib(n):\n")                       # what follows
    llama.infill("def add(a, b):\n    return ", "\n")     # what belongs between
    llama.chat([{"role": "user", "content": "Reverse a list in place."}])
    llama.complete(["import ", "def "], temperature=0.8, seed=1)    # a list is a batch
    for piece in llama.complete("class Stack:", stream=True):
        print(piece, end="", flush=True)

prompts.py has the formats of the prompts, request.py the rows, decode.py the compiled programs.
This file cuts rows into batches of like length and drives the programs.
"""

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from codellama_jax import checkpoint, config, decode, prompts, request, sharding, state
from codellama_jax.config import check
from codellama_jax.request import Request, Sampling
from codellama_jax.tokenizer import Tokenizer, beside

DEFAULT_TOP_P = 0.9  # of Meta's reference code
PIECE_SECONDS = 0.1  # how long a stream is silent, roughly
BATCH_SIZE = 64  # rows decoded at once, unless the caller says

Dialog = Sequence[dict[str, str]]


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

        dtype=None: their own, but bfloat16 for float32 weights on an accelerator.
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
            params = unstack(own, model, compute_dtype(params, dtype))
        self.params = params
        place = params["norm"].sharding
        self.mesh = place.mesh if isinstance(place, NamedSharding) else None

    # -- ids -----------------------------------------------------------------------------------
    def logits(self, tokens_BT) -> np.ndarray:
        """float32[B, T, V] for int[B, T]: at each position the logits of the next token."""
        tokens_BT = np.asarray(tokens_BT, np.int32)
        check(tokens_BT.ndim == 2, f"tokens of shape {tokens_BT.shape} are no rows; pass [B, T]")
        B, T = tokens_BT.shape
        self._check_ids(tokens_BT.ravel())
        check(
            1 <= T <= self.model.max_seq_len,
            f"rows of {T} tokens do not fit max_seq_len={self.model.max_seq_len}",
        )
        padded_BT = np.zeros((self._batch_bucket(B), decode.bucket(T)), np.int32)
        padded_BT[:B, :T] = tokens_BT
        with self._on_mesh():
            return np.asarray(decode.logits(self.params, padded_BT, model=self.model))[:B, :T]

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
        """Extends each row until it is done or has max_new_tokens more.

        Goes by batches of like length, the longest first, so that one too large fails at once.
        """
        check(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
        self._prepare(rows, sampling)
        by_length = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
        for start in range(0, len(rows), batch_size):
            for _ in self._decode(by_length[start : start + batch_size], sampling, stop_ids):
                pass

    def _answer(self, rows, sampling, stop_ids, single, stream, batch_size):
        if stream:
            check(single, f"stream=True takes one prompt, not a list of {len(rows)}")
            self._prepare(rows, sampling)
            return self._stream(rows[0], sampling, stop_ids)
        self.run(rows, sampling, stop_ids, batch_size)
        return rows[0].text() if single else [row.text() for row in rows]

    def _stream(self, row: Request, sampling: Sampling, stop_ids) -> Iterator[str]:
        sent = 0
        for _ in self._decode([row], sampling, stop_ids, PIECE_SECONDS):
            if piece := row.settled()[sent:]:
                sent += len(piece)
                yield piece
        if piece := row.text()[sent:]:
            yield piece

    def _prepare(self, rows: Sequence[Request], sampling: Sampling) -> None:
        """Checks the prompts and gives each row its random numbers."""
        for row, random in zip(rows, sampling.generators(len(rows)), strict=True):
            row.random = random
            row.limit = sampling.limit(len(row.prompt), self.model.max_seq_len)
            self._check_ids(row.prompt)
            check(len(row.prompt) > 0, "a prompt has no ids; start it with BOS")

    def _decode(
        self,
        rows: Sequence[Request],
        sampling: Sampling,
        stop_ids: Sequence[int],
        seconds: float = math.inf,
    ) -> Iterator[None]:
        """Extends the rows of one batch; yields after each chunk, every `seconds` or so."""
        B, T = self._batch_bucket(len(rows)), decode.bucket(max(len(r.prompt) for r in rows))
        tokens_BT, lengths_B = np.zeros((B, T), np.int32), np.ones(B, np.int32)
        for b, row in enumerate(rows):
            lengths_B[b] = len(row.prompt)
            tokens_BT[b, : lengths_B[b]] = row.prompt
        left = max(row.limit for row in rows)
        draw = _draw(sampling, stop_ids)
        extend = functools.partial(decode.decode, self.params, model=self.model, prompt_room=T)
        with self._on_mesh():
            kept = decode.prefill(
                self.params, tokens_BT, lengths_B, model=self.model, room=decode.bucket(left)
            )
        chunk = decode.DECODE_CHUNK if seconds == math.inf else 1
        while not all(row.done for row in rows):
            started = time.perf_counter()
            allowed_BV = self._allowed(rows, B)
            count = min(left, chunk) if allowed_BV is None else 1
            points_BC, done_B = np.zeros((B, decode.DECODE_CHUNK), np.float32), np.ones(B, bool)
            for b, row in enumerate(rows):
                points_BC[b, :count] = row.random.random(count, np.float32)
                done_B[b] = row.done
            with self._on_mesh():
                if allowed_BV is not None:
                    kept = decode.allow(kept, allowed_BV)
                kept, *out = extend(kept, draw, points_BC, done_B, count)
            tokens_BC, log_probs_BC = jax.device_get(out)
            for b, row in enumerate(rows):
                row.extend(tokens_BC[b, :count], log_probs_BC[b, :count], stop_ids)
            left -= count
            if time.perf_counter() - started < seconds / 2:
                chunk = min(2 * chunk, decode.DECODE_CHUNK)
            yield

    def _allowed(self, rows: Sequence[Request], batch: int) -> np.ndarray | None:
        """bool[B, V]: what may come next while a row still spells what healing took, else None."""
        allowed_BV = None
        for b, row in enumerate(rows):
            wanted = len(row.spelled.encode()) if not row.done else 0
            written = int(self.tokenizer.num_bytes[row.tokens].sum()) if wanted else 0
            if written < wanted:
                if allowed_BV is None:
                    allowed_BV = np.ones((batch, self.model.vocab_size), bool)
                allowed_V = self._spelling(row.spelled)[written]
                allowed_BV[b] = np.pad(allowed_V, (0, self.model.vocab_size - len(allowed_V)))
        return allowed_BV

    @functools.cached_property
    def _spelling(self) -> Callable[[str], np.ndarray]:
        return functools.lru_cache(256)(self.tokenizer.allowed_while_spelling)

    # -- the machine and its limits --------------------------------------------------------------
    def _batch_bucket(self, num_rows: int) -> int:
        """A power of two, or a multiple of the ways the mesh splits a batch."""
        sizes = dict(self.mesh.shape) if self.mesh else {}
        ways = math.prod(sizes.get(axis, 1) for axis in sharding.AXIS_RULES["batch"])
        return -(-(1 << (num_rows - 1).bit_length()) // ways) * ways

    def _on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def _check_ids(self, ids: Sequence[int]) -> None:
        low, high = min(ids, default=0), max(ids, default=0)
        check(
            0 <= low and high < self.model.vocab_size,
            f"ids from {low} to {high} are not all in the vocabulary of {self.model.vocab_size}",
        )

    def _text_tokenizer(self) -> Tokenizer:
        check(
            self.tokenizer is not None,
            "these weights have no tokenizer beside them; load them with tokenizer=PATH",
        )
        return self.tokenizer


def _draw(sampling: Sampling, stop_ids: Sequence[int]) -> decode.Draw:
    check(
        len(stop_ids) <= decode.MAX_STOP_IDS,
        f"{len(stop_ids)} stop ids are more than {decode.MAX_STOP_IDS}",
    )
    top_p = DEFAULT_TOP_P if sampling.top_p is None else sampling.top_p
    ids = np.full(decode.MAX_STOP_IDS, -1, np.int32)
    ids[: len(stop_ids)] = stop_ids
    return decode.Draw(np.float32(sampling.temperature), np.float32(top_p), ids)


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


# -- weights -----------------------------------------------------------------------------------
def load(
    path: str | os.PathLike,
    tokenizer: str | os.PathLike | Tokenizer | None = None,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    max_seq_len: int | None = None,
) -> CodeLlama:
    """The Code Llama that lies at `path`: our checkpoint, or Meta's or Hugging Face's folder.

    tokenizer: the file, if it is not beside the weights. dtype: "bfloat16", "float16" or "float32",
    to hold the weights and compute in; None: as stored, but bfloat16 for float32 weights on an
    accelerator. mesh: devices to split the weights over (sharding.make_mesh); None: one device.
    max_seq_len: lets the model read more than it was trained on (Code Llama, trained on 16,384
    tokens, is good to about 100,000: section 3.3 of the paper).

    Raises ValueError when there are no such weights, or the tokenizer does not fit them.
    """
    folder = Path(path)
    check(folder.is_dir(), f"there is no folder {folder}")
    foreign = (folder / "params.json").exists() or (folder / "config.json").exists()
    if foreign or (mesh is None and checkpoint.has_checksums(folder)):
        from codellama_jax import convert

        # Repairs are told, but not among the text that a program may print.
        tell = functools.partial(print, file=sys.stderr)
        model, params = convert.read_params(folder, dtype, say=tell)
        found = beside(folder) or beside(folder.parent)  # Meta's, and a step's, lies above
    else:
        model, params, found = checkpoint.load(folder, mesh, dtype)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = tokenizer or found
        tokenizer = Tokenizer(tokenizer) if tokenizer else None
    if max_seq_len is not None:
        model = dataclasses.replace(model, max_seq_len=max_seq_len)
    return CodeLlama(model, unstack(params, model, compute_dtype(params, dtype), mesh), tokenizer)


def compute_dtype(params: state.Params, dtype: str | None) -> np.dtype:
    """`dtype`, or by default that of the weights; but float32 only on a CPU."""
    known = {name: jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}
    check(dtype in (None, *known), f"dtype={dtype!r} is not one of {', '.join(known)}")
    stored = jnp.dtype(params["norm"].dtype)
    if dtype is None and stored == jnp.float32 and jax.default_backend() != "cpu":
        return known["bfloat16"]
    return stored if dtype is None else known[dtype]


def unstack(
    params: state.Params, model: config.Model, dtype: np.dtype, mesh: Mesh | None = None
) -> state.Params:
    """Weights as decoding wants them: on devices, in `dtype`, "layers" a list.

    Empties `params` as it goes, so that no more than one weight is there twice. `mesh` is for
    weights on the host; those on devices stay on theirs.
    """
    places = state.param_shardings(model, mesh) if mesh else jax.tree.map(lambda _: None, params)
    stacked = params.pop("layers"), places.pop("layers")
    moved = {name: _put(params.pop(name), dtype, places[name]) for name in list(params)}
    return moved | {"layers": _per_layer(*stacked, model.num_layers, dtype)}


def _per_layer(stacked: dict, places: dict, num_layers: int, dtype: np.dtype) -> list[dict]:
    """A nested dict of [L, ...], which it empties, as L nested dicts."""
    layers: list[dict] = [{} for _ in range(num_layers)]
    for name in list(stacked):
        value, place = stacked.pop(name), places[name]
        if isinstance(value, dict):
            parts = _per_layer(value, place, num_layers, dtype)
        else:
            one = place and NamedSharding(place.mesh, P(*place.spec[1:]))
            parts = [_put(_layer(value, i), dtype, one) for i in range(num_layers)]
        for layer, part in zip(layers, parts, strict=True):
            layer[name] = part
    return layers


def _layer(stacked, i: int):
    return stacked[i] if isinstance(stacked, np.ndarray) else _slice(stacked, i)


@jax.jit
def _slice(stacked: jax.Array, i: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False)


def _put(weight, dtype: np.dtype, place: NamedSharding | None) -> jax.Array:
    if isinstance(weight, np.ndarray):
        return jax.device_put(weight.astype(dtype, copy=False), place)
    return weight.astype(dtype)
