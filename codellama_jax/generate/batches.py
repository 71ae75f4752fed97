"""Requests through the compiled programs of decode.py: batches of like length, chunk by chunk.

What the programs add to a batch goes to its rows, on the host, which say when they are done. The
`params` are as weights.py leaves them, and may lie on a mesh.

Axes: B batch  T query position  C tokens of a chunk  V vocab
"""

import contextlib
import functools
import math
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from codellama_jax import config, sharding, state
from codellama_jax.config import check
from codellama_jax.generate import decode, request, weights
from codellama_jax.generate.request import Request, Sampling

PIECE_SECONDS = 0.1  # how long a stream is silent, roughly


def logits(params: state.Params, tokens_BT, *, model: config.Model) -> np.ndarray:
    """float32[B, T, V] for int[B, T]: at each position the logits of the next token."""
    tokens_BT = np.asarray(tokens_BT, np.int32)
    check(tokens_BT.ndim == 2, f"tokens of shape {tokens_BT.shape} are no rows; pass [B, T]")
    B, T = tokens_BT.shape
    _check_ids(tokens_BT.ravel(), model)
    check(
        1 <= T <= model.max_seq_len,
        f"rows of {T} tokens do not fit max_seq_len={model.max_seq_len}",
    )
    padded_BT = np.zeros((_batch_bucket(B, params), decode.bucket(T)), np.int32)
    padded_BT[:B, :T] = tokens_BT
    with _on_mesh(params):
        return np.asarray(decode.logits(params, padded_BT, model=model))[:B, :T]


def run(
    params: state.Params,
    rows: Sequence[Request],
    sampling: Sampling,
    stop_ids: Sequence[int],
    batch_size: int,
    *,
    model: config.Model,
) -> None:
    """Extends each row until it is done.

    Goes by batches of like length, the longest first, so that one too large fails at once.
    """
    check(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    _prepare(rows, sampling, model)
    by_length = sorted(rows, key=lambda row: len(row.prompt), reverse=True)
    for start in range(0, len(rows), batch_size):
        batch = by_length[start : start + batch_size]
        for _ in _extend(params, batch, sampling, stop_ids, model=model):
            pass


def stream(
    params: state.Params,
    row: Request,
    sampling: Sampling,
    stop_ids: Sequence[int],
    *,
    model: config.Model,
) -> Iterator[str]:
    """The text of a row, piece by piece as it settles."""
    _prepare([row], sampling, model)  # now, not when the first piece is asked for

    def pieces() -> Iterator[str]:
        sent = 0
        for _ in _extend(params, [row], sampling, stop_ids, PIECE_SECONDS, model=model):
            if piece := row.settled()[sent:]:
                sent += len(piece)
                yield piece
        if piece := row.text()[sent:]:
            yield piece

    return pieces()


def _prepare(rows: Sequence[Request], sampling: Sampling, model: config.Model) -> None:
    """Checks the prompts and gives each row its random numbers."""
    for row, random in zip(rows, sampling.generators(len(rows)), strict=True):
        row.random = random
        row.limit = sampling.limit(len(row.prompt), model.max_seq_len)
        _check_ids(row.prompt, model)
        check(len(row.prompt) > 0, "a prompt has no ids; start it with BOS")


def _check_ids(ids: Sequence[int], model: config.Model) -> None:
    low, high = min(ids, default=0), max(ids, default=0)
    check(
        0 <= low and high < model.vocab_size,
        f"ids from {low} to {high} are not all in the vocabulary of {model.vocab_size}",
    )


# -- one batch -----------------------------------------------------------------------------------
def _extend(
    params: state.Params,
    rows: Sequence[Request],
    sampling: Sampling,
    stop_ids: Sequence[int],
    seconds: float = math.inf,
    *,
    model: config.Model,
) -> Iterator[None]:
    """Extends the rows of one batch; yields after each chunk, every `seconds` or so."""
    tokens_BT, lengths_B = _prompts(rows, _batch_bucket(len(rows), params))
    B, T = tokens_BT.shape
    left = max(row.limit for row in rows)
    draw = _draw(sampling, stop_ids)
    extend = functools.partial(decode.decode, params, model=model, prompt_room=T)
    with _on_mesh(params):
        room = decode.bucket(left)
        kept = decode.prefill(params, tokens_BT, lengths_B, model=model, room=room)
    chunk = decode.DECODE_CHUNK if seconds == math.inf else 1
    while not all(row.done for row in rows):
        started = time.perf_counter()
        allowed_BV = _allowed(rows, B, model)
        count = min(left, chunk) if allowed_BV is None else 1
        points_BC, done_B = _points(rows, B, count)
        with _on_mesh(params):
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


def _prompts(rows: Sequence[Request], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens_BT, padded to a bucket, and lengths_B."""
    T = decode.bucket(max(len(row.prompt) for row in rows))
    tokens_BT, lengths_B = np.zeros((batch, T), np.int32), np.ones(batch, np.int32)
    for b, row in enumerate(rows):
        lengths_B[b] = len(row.prompt)
        tokens_BT[b, : lengths_B[b]] = row.prompt
    return tokens_BT, lengths_B


def _points(rows: Sequence[Request], batch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """points_BC: where each of the next `count` draws falls; done_B: rows that need no more."""
    points_BC = np.zeros((batch, decode.DECODE_CHUNK), np.float32)
    done_B = np.ones(batch, bool)
    for b, row in enumerate(rows):
        points_BC[b, :count] = row.random.random(count, np.float32)
        done_B[b] = row.done
    return points_BC, done_B


def _allowed(rows: Sequence[Request], batch: int, model: config.Model) -> np.ndarray | None:
    """bool[B, V]: what may come next; None where that is everything, in every row."""
    by_row = [row.allowed() for row in rows]
    if all(allowed_V is None for allowed_V in by_row):
        return None
    allowed_BV = np.ones((batch, model.vocab_size), bool)
    for b, allowed_V in enumerate(by_row):
        if allowed_V is not None:
            allowed_BV[b] = np.pad(allowed_V, (0, model.vocab_size - len(allowed_V)))
    return allowed_BV


def _draw(sampling: Sampling, stop_ids: Sequence[int]) -> decode.Draw:
    check(
        len(stop_ids) <= decode.MAX_STOP_IDS,
        f"{len(stop_ids)} stop ids are more than {decode.MAX_STOP_IDS}",
    )
    top_p = request.DEFAULT_TOP_P if sampling.top_p is None else sampling.top_p
    ids = np.full(decode.MAX_STOP_IDS, -1, np.int32)
    ids[: len(stop_ids)] = stop_ids
    return decode.Draw(np.float32(sampling.temperature), np.float32(top_p), ids)


def _batch_bucket(num_rows: int, params: state.Params) -> int:
    """A power of two, or a multiple of the ways the mesh splits a batch."""
    mesh = weights.mesh_of(params)
    sizes = dict(mesh.shape) if mesh else {}
    ways = math.prod(sizes.get(axis, 1) for axis in sharding.AXIS_RULES["batch"])
    return -(-(1 << (num_rows - 1).bit_length()) // ways) * ways


def _on_mesh(params: state.Params):
    mesh = weights.mesh_of(params)
    return jax.set_mesh(mesh) if mesh else contextlib.nullcontext()
