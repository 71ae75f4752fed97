"""Attention of new queries over a cache of keys and values.

A cache lies [B, K, S, H], a head's positions side by side: what the TPU kernel wants, and what a
query reads in one pass (four times faster on a CPU than [B, S, K, H]).

Axes: B batch  T query position  C query position of a chunk  S cache slot  N query heads
      K key/value heads  G = N / K  H head width
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from codellama_jax import sharding

# Of the kernel. A head that reads 100,000 tokens on v5e takes 22.7 M cycles; with blocks of 1,024
# keys 24.0 M, with 256 keys at a time 22.3 M; blocks of 2,048 queries too do not fit its VMEM.
QUERY_BLOCK = 1_024
KEY_BLOCK = 2_048
KEYS = 512  # of a block at a time


def chunk(
    q_BCNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    start: jax.Array,
    *,
    slots: int,
    kernel: str = "xla",
) -> jax.Array:
    """The C queries of slots `start`, `start` + 1, ...: each sees the slots up to its own.

    No slot from `slots` on is in use yet. Returns [B, C, N, H] in the dtype of q. "splash" wants C
    and `slots` to be multiples of 128, and is interpreted on CPUs.
    """
    if kernel == "splash":
        return _splash(q_BCNH, k_BKSH, v_BKSH, start, slots)
    mask_CS = jnp.arange(slots)[None] <= start + jnp.arange(q_BCNH.shape[1])[:, None]
    return masked(q_BCNH, k_BKSH[:, :, :slots], v_BKSH[:, :, :slots], mask_CS[None])


def blocks(chunk: int, slots: int) -> tuple[int, int]:
    """Queries and keys of a block of the kernel."""
    return math.gcd(chunk, QUERY_BLOCK), math.gcd(slots, KEY_BLOCK)


def masked(
    q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with softmax in float32. Each query must see one slot at least."""
    (B, T, N, H), K = q_BTNH.shape, k_BKSH.shape[1]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    s_BKGTS = jnp.einsum("BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32)
    s_BKGTS = jnp.where(mask_BTS[:, None, None], s_BKGTS / math.sqrt(H), -1e30)
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(v_BKSH.dtype)
    return jnp.einsum("BKGTS,BKSH->BTKGH", p_BKGTS, v_BKSH).reshape(B, T, N, H)


def _splash(q_BCNH, k_BKSH, v_BKSH, start, slots):
    """The TPU kernel, run by each device on its own rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    attend = functools.partial(_splash_local, slots=slots, interpret=sharding.platform() == "cpu")
    if mesh.empty:
        return attend(q_BCNH, k_BKSH, v_BKSH, start)
    queries = sharding.spec("batch", None, "heads", None)
    keys = sharding.spec("batch", "kv_heads", None, None)
    local = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(queries, keys, keys, P()),
        out_specs=queries,
        check_vma=False,  # the kernel does not say how its output varies
    )
    return local(q_BCNH, k_BKSH, v_BKSH, start)


def _splash_local(q_BCNH, k_BKSH, v_BKSH, start, *, slots, interpret):
    (B, C, N, H), K = q_BCNH.shape, k_BKSH.shape[1]
    attend = _splash_kernel(C, slots, start, interpret)
    q_BCNH = (q_BCNH / np.sqrt(H)).astype(q_BCNH.dtype)
    q_BKGCH = jnp.swapaxes(q_BCNH, 1, 2).reshape(B, K, N // K, C, H)
    # rows and keys in parallel: TPUs of two cores share them; within a kernel they would not
    o_BKGCH = jax.vmap(jax.vmap(attend))(q_BKGCH, k_BKSH, v_BKSH)
    return jnp.swapaxes(o_BKGCH.reshape(B, N, C, H), 1, 2)


def _splash_kernel(C, slots, start, interpret):
    """The kernel of the heads that share a key, with a mask that is known only when it runs.

    It is made for a fixed causal mask, and then told what to do in each block of the real one:
    queries from `start` on against the slots before `slots`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    block_q, block_kv = blocks(C, slots)
    causal = splash_attention_mask.CausalMask((block_q, block_kv))
    attend = splash.make_splash_mqa(
        splash_attention_mask.MultiHeadMask([causal]),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        block_sizes=splash.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_kv_compute=math.gcd(block_kv, KEYS)
        ),
    )
    end_1Q1 = start + block_q * jnp.arange(1, C // block_q + 1)[None, :, None]
    block_11J = jnp.arange(slots // block_kv)[None, None]
    seen_1QJ = block_kv * block_11J < end_1Q1
    attend.fwd_mask_info = attend.fwd_mask_info._replace(
        q_sequence=(start + jnp.arange(C)).astype(jnp.int32),
        block_mask=seen_1QJ.astype(jnp.int32),
        # a block that nobody sees is not fetched, but the first one of the next queries
        data_next=jnp.where(seen_1QJ, block_11J, 0).astype(jnp.int32),
    )
    return attend
