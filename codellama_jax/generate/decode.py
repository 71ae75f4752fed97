"""The decoding machine: prompts in, tokens out, one compiled program per shape.

`prefill` reads prompts of unequal length into a cache; `decode` adds tokens to all rows at once. A
prompt is padded at its right to T slots of the cache, and what a row generates goes to slots T,
T + 1, ... whatever the length of its prompt. So all rows write one slot, in place, and between a
prompt and its answer lies a gap that no query sees. Positions (RoPE) know no gap:

    slot       0  1  2  3  4 | 5  6          T = 5
    short row  a  b  .  .  . | c  d          positions 0 1 - - - | 2 3
    long row   e  f  g  h  i | j  k          positions 0 1 2 3 4 | 5 6

Sizes come in buckets, so shapes recur.

Axes: B batch  T query position  S cache slot  C slots read or written by one call  N query heads
      K key/value heads  H head width  D width  V vocab
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from codellama_jax import attention, config, sharding, state
from codellama_jax import model as llama_model
from codellama_jax.generate import cached_attention

PREFILL_CHUNK = 512  # prompt tokens read at once: bounds the scores to [B, N, 512, S]
TPU_PREFILL_CHUNK = 2_048  # there the scores never leave the kernel
DECODE_CHUNK = 16  # most tokens added by one call of decode
MAX_STOP_IDS = 4


class Cache(NamedTuple):
    """Keys and values of one layer."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array


class Rows(NamedTuple):
    """A batch between two calls of decode, which takes it away (donated) and returns the next."""

    caches: list[Cache]
    logits_BV: jax.Array  # float32: what comes next
    lengths_B: jax.Array  # int32: tokens of each prompt
    step: jax.Array  # int32: tokens generated so far


class Draw(NamedTuple):
    """How the next tokens are drawn."""

    temperature: np.float32  # 0: the most likely token
    top_p: np.float32  # mass of the nucleus
    stop_ids: np.ndarray  # int32[MAX_STOP_IDS], filled up with -1


def bucket(length: int) -> int:
    """The size that `length` is padded to: 16, 32, ..., 512, 1,024, 1,536, 2,048, ...

    Powers of two up to PREFILL_CHUNK, then at most four sizes per doubling, because a cache of
    100,000 positions padded to 131,072 would not fit where it just did.
    """
    size = max(16, 1 << (length - 1).bit_length())
    step = min(size, max(PREFILL_CHUNK, size // 8))
    return -(-length // step) * step


def kernel_of(platform: str, dtype) -> str:
    """What prompts are read by. The kernel of TPUs knows no float16."""
    return "splash" if platform == "tpu" and dtype != jnp.float16 else "xla"


def chunk_of(T: int, kernel: str) -> int:
    """How many of the T tokens of a bucket are read at once."""
    most = TPU_PREFILL_CHUNK if kernel == "splash" else PREFILL_CHUNK
    return T if T <= most else math.gcd(T, most)


@functools.partial(jax.jit, static_argnames=("model", "room"))
def prefill(
    params: state.Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    model: config.Model,
    room: int,
) -> Rows:
    """Reads prompts and leaves `room` slots after them.

    The layers of `params` are a list (weights.unstack). T is a bucket; row b has
    lengths_B[b] tokens, one at least, then padding of any id. Only its last position is turned into
    logits.
    """
    llama = state.bind(model, params)
    B, T = tokens_BT.shape
    dtype = llama.tok_embeddings[...].dtype
    kernel = kernel_of(sharding.platform(), dtype)
    C = chunk_of(T, kernel)

    def read(i, carry):
        caches, last_BD = carry
        x_BCD, caches = _read_chunk(llama, tokens_BT, i * C, C, caches, kernel)
        end_B = lengths_B - 1 - i * C  # where in this chunk a prompt ends, if it does
        x_B1D = jnp.take_along_axis(x_BCD, jnp.clip(end_B, 0, C - 1)[:, None, None], axis=1)
        ends_here_B1 = ((end_B >= 0) & (end_B < C))[:, None]
        return caches, jnp.where(ends_here_B1, x_B1D[:, 0], last_BD)

    start = _empty_caches(model, B, T + room, dtype), jnp.zeros((B, model.dim), dtype)
    num_chunks = (lengths_B.max() + C - 1) // C
    caches, last_BD = jax.lax.fori_loop(0, num_chunks, read, start)
    return Rows(caches, _logits(llama, last_BD[:, None]), lengths_B, jnp.int32(0))


@functools.partial(jax.jit, static_argnames=("model", "prompt_room"), donate_argnames="rows")
def decode(
    params: state.Params,
    rows: Rows,
    draw: Draw,
    points_BC: jax.Array,
    done_B: jax.Array,
    steps: int,
    *,
    model: config.Model,
    prompt_room: int,
) -> tuple[Rows, jax.Array, jax.Array]:
    """Adds up to `steps` <= DECODE_CHUNK tokens to every row; ends early when all rows are done.

    points_BC: float32 in 0..1, where each draw falls. done_B: rows that need no more. prompt_room:
    the T of prefill. Returns (rows, tokens_BC, log_probs_BC), the log-probabilities before
    temperature and nucleus. What a row says after a stop id, or once it is done, is of no use.
    """
    llama = state.bind(model, params)
    B, S = rows.lengths_B.shape[0], rows.caches[0].k_BKSH.shape[2]
    slots_1S = jnp.arange(S)[None]
    idle = 1 if sharding.platform() == "tpu" else 0

    def unfinished(carry):
        i, _, done_B, *_ = carry
        return (i < steps) & ~done_B.all()

    def step(carry):
        i, rows, done_B, tokens_BC, log_probs_BC = carry
        token_B = sample(rows.logits_BV, draw, points_BC[:, i])
        token_B1 = token_B[:, None]
        log_probs_BV = jax.nn.log_softmax(rows.logits_BV, axis=-1)
        log_prob_B1 = jnp.take_along_axis(log_probs_BV, token_B1, axis=1)

        slot = prompt_room + rows.step
        prompt_BS = slots_1S < rows.lengths_B[:, None]
        answer_1S = (slots_1S >= prompt_room) & (slots_1S <= slot)
        positions_B1 = (rows.lengths_B + rows.step)[:, None]
        mask_B1S = (prompt_BS | answer_1S)[:, None]

        def attend(q_BTNH, k_BTKH, v_BTKH, cache):
            return cached_attention.masked(q_BTNH, *cache, mask_B1S)

        # A TPU's compiler gives products of one row to the vector unit, 4 to 20 times slower: a
        # second row, whose token is of no use, has them computed by the matrix units.
        token_BT = jnp.pad(token_B1, ((0, 0), (0, idle)))
        x_BTD, caches = _forward(llama, token_BT, positions_B1, rows.caches, slot, attend, new=1)
        return (
            i + 1,
            Rows(caches, _logits(llama, x_BTD), rows.lengths_B, rows.step + 1),
            done_B | jnp.isin(token_B, draw.stop_ids),
            jax.lax.dynamic_update_slice(tokens_BC, token_B1, (0, i)),
            jax.lax.dynamic_update_slice(log_probs_BC, log_prob_B1, (0, i)),
        )

    points_BC = jnp.asarray(points_BC)
    tokens_BC = jnp.zeros((B, DECODE_CHUNK), jnp.int32)
    log_probs_BC = jnp.zeros((B, DECODE_CHUNK), jnp.float32)
    start = (jnp.int32(0), rows, jnp.asarray(done_B), tokens_BC, log_probs_BC)
    _, rows, _, tokens_BC, log_probs_BC = jax.lax.while_loop(unfinished, step, start)
    return rows, _everywhere(tokens_BC), _everywhere(log_probs_BC)


@functools.partial(jax.jit, donate_argnames="rows")
def allow(rows: Rows, allowed_BV: jax.Array) -> Rows:
    """Rows whose next token is one of allowed_BV, bool."""
    logits_BV = jnp.where(allowed_BV, rows.logits_BV, -jnp.inf)
    return rows._replace(logits_BV=sharding.constrain(logits_BV, "batch", None))


@functools.partial(jax.jit, static_argnames="model")
def logits(params: state.Params, tokens_BT: jax.Array, *, model: config.Model) -> jax.Array:
    """float32[B, T, V]: the logits of every position, read as prefill reads; T is a bucket."""
    llama = state.bind(model, params)
    B, T = tokens_BT.shape
    dtype = llama.tok_embeddings[...].dtype
    kernel = kernel_of(sharding.platform(), dtype)
    C = chunk_of(T, kernel)

    def read(caches, i):
        x_BCD, caches = _read_chunk(llama, tokens_BT, i * C, C, caches, kernel)
        return caches, llama.logits(x_BCD)

    caches = _empty_caches(model, B, T, dtype)
    _, logits_nBCV = jax.lax.scan(read, caches, jnp.arange(T // C))
    logits_BTV = jnp.moveaxis(logits_nBCV, 0, 1).reshape(B, T, -1)  # [n,B,C,V] -> [B,n*C,V]
    return _everywhere(logits_BTV)


# -- sampling ----------------------------------------------------------------------------------
def sample(logits_BV: jax.Array, draw: Draw, point_B: jax.Array) -> jax.Array:
    """The next token of each row, int32[B]: the one whose share of 0..1 holds point_B < 1.

    The shares lie in the order of the ids, not of their size, so that rounding in another batch
    cannot swap two of like size.
    """

    def by_chance():
        kept_BV = nucleus(jax.nn.softmax(logits_BV / draw.temperature, axis=-1), draw.top_p)
        end_BV = jnp.where(kept_BV > 0, jnp.cumsum(kept_BV, axis=-1), 0.0)
        point_B1 = point_B[:, None] * end_BV.max(axis=-1, keepdims=True)
        return jnp.argmax(end_BV > point_B1, axis=-1).astype(jnp.int32)

    def likeliest():
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    return jax.lax.cond(draw.temperature > 0, by_chance, likeliest)


def nucleus(probs_BV: jax.Array, top_p: float) -> jax.Array:
    """Probabilities without the tail beyond `top_p`, in sum 1.

    A token falls out when the tokens before it (the likelier ones; of equal ones those of lower id)
    have more than top_p together. So the token that crosses top_p stays, and top_p = 0 keeps one.
    """
    sorted_BV = jnp.sort(probs_BV, axis=-1, descending=True)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    count_B1 = (before_BV <= top_p).sum(axis=-1, keepdims=True)
    least_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
    above_BV, equal_BV = probs_BV > least_B1, probs_BV == least_B1
    room_B1 = count_B1 - above_BV.sum(axis=-1, keepdims=True)
    kept_BV = above_BV | (equal_BV & (jnp.cumsum(equal_BV, axis=-1) <= room_B1))
    kept_BV = jnp.where(kept_BV, probs_BV, 0.0)
    return kept_BV / kept_BV.sum(axis=-1, keepdims=True)


# -- forward with a cache ----------------------------------------------------------------------
def _read_chunk(llama, tokens_BT, start, C, caches, kernel):
    """Reads tokens_BT[:, start : start + C] into the cache; slots are positions here."""
    B, T = tokens_BT.shape
    tokens_BC = jax.lax.dynamic_slice(tokens_BT, (0, start), (B, C))
    positions_BC = jnp.broadcast_to(start + jnp.arange(C), (B, C))

    def attend(q_BCNH, k_BCKH, v_BCKH, cache):
        if C == T:  # nothing was read before: a causal row, faster without the cache
            return attention.attend(q_BCNH, k_BCKH, v_BCKH, kernel=kernel)
        return cached_attention.chunk(q_BCNH, *cache, start, slots=T, kernel=kernel)

    return _forward(llama, tokens_BC, positions_BC, caches, start, attend, new=C)


def _forward(llama, tokens_BT, positions_BT, caches, slot, attend, new):
    """Normalised hidden states x_BTD, and the caches with the first `new` tokens from `slot` on."""
    x_BTD = llama.tok_embeddings[...][tokens_BT]
    rope = llama_model.rope_table(positions_BT, llama.model)
    new_caches = []
    for block, cache in zip(llama.layers, caches, strict=True):

        def write_and_attend(q_BTNH, k_BTKH, v_BTKH, cache=cache):
            new_caches.append(_write(cache, k_BTKH[:, :new], v_BTKH[:, :new], slot))
            return attend(q_BTNH, k_BTKH, v_BTKH, new_caches[-1])

        x_BTD = block(x_BTD, rope, write_and_attend)
    return llama_model.rms_norm(x_BTD, llama.norm, llama.model.norm_eps), new_caches


def _write(cache: Cache, k_BTKH, v_BTKH, slot) -> Cache:
    def put(old_BKSH, new_BTKH):
        new_BKTH = jnp.swapaxes(new_BTKH, 1, 2)
        return _placed(jax.lax.dynamic_update_slice(old_BKSH, new_BKTH, (0, 0, slot, 0)))

    return Cache(put(cache.k_BKSH, k_BTKH), put(cache.v_BKSH, v_BTKH))


def _empty_caches(model: config.Model, batch: int, slots: int, dtype) -> list[Cache]:
    """Zeros, not whatever memory holds: 0 times a NaN behind the mask would be a NaN."""
    zeros_BKSH = jnp.zeros((batch, model.num_kv_heads, slots, model.head_dim), dtype)
    return [Cache(_placed(zeros_BKSH), _placed(zeros_BKSH)) for _ in range(model.num_layers)]


def _logits(llama, x_BTD):
    """Of the first position, float32[B, V]."""
    return sharding.constrain(llama.logits(x_BTD)[:, 0], "batch", None)


def _placed(x_BKSH):
    return sharding.constrain(x_BKSH, "batch", "kv_heads", None, None)


def _everywhere(x):
    """On a mesh: a copy for each process to read."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, P())
