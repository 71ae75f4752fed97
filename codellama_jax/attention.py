"""Causal attention with grouped heads: one meaning, a kernel for each platform.

Axes: B batch, T query position, S key position, N query heads, K key/value heads,
G = N / K queries per key, H head width.
A query sees the keys of its own segment at positions up to its own.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from codellama_jax import config, sharding

QUERY_BLOCK = 128  # of the plain XLA form
SPLASH_BLOCK = 1_024  # queries, and keys, of a block: the fastest on every TPU (plan/kernels.py)
SPLASH_KEYS = 512  # of them at a time in the forward kernel
SPLASH_LANES = 128  # rows are padded to whole blocks, shorter rows to a multiple of this


def kernel(name: str, platform: str, dtype: str = "bfloat16", context: int = 1) -> str:
    """Resolves "auto" for devices of `platform`; refuses a kernel that cannot run there."""
    best = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
    if best == "cudnn" and (dtype == "float32" or context > 1):  # 16 bits and whole rows only
        best = "xla"
    if name == "auto":
        return best
    config.check(
        name in ("xla", best),
        f"attention={name!r} does not run on {platform} in {dtype} with context={context}; "
        f"use {best!r} or auto",
    )
    return name


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    kernel: str = "xla",
    context: int = 1,
    block: int = 0,
) -> jax.Array:
    """Causal self-attention over whole rows (T = S). Returns [B, T, N, H] in the dtype of q.

    To a rematerialisation policy it takes "query", "key", "value" and returns "attention_out".

    With context > 1 the rows, segments too, lie in the order of sharding.balance. `block`: of the
    splash kernel, if not the usual one.
    """
    k_BSKH, v_BSKH = checkpoint_name(k_BSKH, "key"), checkpoint_name(v_BSKH, "value")
    if kernel == "splash":  # names queries and output inside, as its gradient wants them
        return _splash(q_BTNH, k_BSKH, v_BSKH, segments_BT, context, block)
    q_BTNH = checkpoint_name(q_BTNH, "query")
    if kernel == "cudnn":
        o_BTNH = _cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    elif context > 1:
        o_BTNH = _shares(q_BTNH, k_BSKH, v_BSKH, segments_BT, context)
    else:
        o_BTNH = _blocks(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    return checkpoint_name(o_BTNH, "attention_out")


def pairs(length: int, context: int = 1, block: int | None = None) -> int:
    """Pairs of a query and a key that the splash kernel of one device computes for a row and head:
    whole blocks on the diagonal, of `block` queries and keys if not of splash_block."""
    slices, block = 2 * context, block or splash_block(length, context)
    size = _padded(length, block) // slices
    of_slice = [size * (start + (size + block) / 2) for start in range(0, size * slices, size)]
    return round(max(of_slice[i] + of_slice[-1 - i] for i in range(context)))


def _blocks(q_BTNH, k_BSKH, v_BSKH, segments_BT):
    """Plain XLA, a block of queries at a time: it skips the keys after the block, which causality
    hides, and scores stay small enough for a cache. Long rows get longer blocks, 16 at most."""
    T = q_BTNH.shape[1]
    block = max(QUERY_BLOCK, -(-T // 16))
    outs = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        mask_BTS = (jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None])[None]
        if segments_BT is not None:
            same = segments_BT[:, start:stop, None] == segments_BT[:, None, :stop]
            mask_BTS = mask_BTS & same
        outs.append(masked(q_BTNH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], mask_BTS))
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def _shares(q_BTNH, k_BSKH, v_BSKH, segments_BT, context):
    """Plain XLA over balanced rows: each device of the context axis has its share of the queries,
    a block of it at a time, and all keys."""
    B, T, N, H = q_BTNH.shape
    share = T // context
    order_T = sharding.balance(np.arange(T), context, axis=0)
    k_BSKH, v_BSKH = (
        sharding.constrain(x, "batch", None, "kv_heads", None) for x in (k_BSKH, v_BSKH)
    )

    def block_of(x, start, stop, axis=1):  # of each share: [.., T, ..] -> [.., context * block, ..]
        shape = x.shape
        x = x.reshape(*shape[:axis], context, share, *shape[axis + 1 :])
        x = x[(slice(None),) * (axis + 1) + (slice(start, stop),)]
        return x.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    outs, block = [], max(QUERY_BLOCK, -(-share // 16))
    for start in range(0, share, block):
        stop = min(start + block, share)
        mask_BTS = (block_of(order_T, start, stop, 0)[:, None] >= order_T[None])[None]
        if segments_BT is not None:
            same = block_of(segments_BT, start, stop)[:, :, None] == segments_BT[:, None]
            mask_BTS = mask_BTS & same
        out = masked(block_of(q_BTNH, start, stop), k_BSKH, v_BSKH, mask_BTS)
        outs.append(out.reshape(B, context, stop - start, N, H))
    return jnp.concatenate(outs, axis=2).reshape(B, T, N, H)


def _cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT):
    """The NVIDIA kernel; segments need an explicit mask, [B, 1, T, S] bool."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    if segments_BT is None:
        return attend(q_BTNH, k_BSKH, v_BSKH, is_causal=True)
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return attend(q_BTNH, k_BSKH, v_BSKH, is_causal=True, mask=same_BTS[:, None])


def masked(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    """softmax(q k / sqrt(H)) v with softmax in float32. Each query must see one key at least.

    The sum divides the output, not the pairs of query and key: on CPUs each pass over all pairs,
    there and back, takes a good part of the time.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    G = N // K
    # the queries of all heads that share a key lie end to end: M = G T, one product for all
    q_BKMH = q_BTNH.swapaxes(1, 2).reshape(B, K, G * T, H)
    s_BKMS = jnp.einsum("BKMH,BSKH->BKMS", q_BKMH, k_BSKH, preferred_element_type=jnp.float32)
    s_BKGTS = s_BKMS.reshape(B, K, G, T, S) / math.sqrt(H)
    s_BKGTS = jnp.where(mask_BTS[:, None, None], s_BKGTS, -1e30)
    highest_BKGT1 = jax.lax.stop_gradient(jnp.max(s_BKGTS, axis=-1, keepdims=True))
    p_BKMS = jnp.exp(s_BKGTS - highest_BKGT1).reshape(B, K, G * T, S)
    sum_BKM1 = jnp.sum(p_BKMS, axis=-1, keepdims=True)
    o_BKMH = jnp.einsum(
        "BKMS,BSKH->BKMH", p_BKMS.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32
    )
    o_BKMH = (o_BKMH / sum_BKM1).astype(v_BSKH.dtype)
    return o_BKMH.reshape(B, N, T, H).swapaxes(1, 2)


def _splash(q_BTNH, k_BSKH, v_BSKH, segments_BT, context, block):
    """The TPU kernel, run by each device on its own rows, heads and queries."""
    if segments_BT is None:
        segments_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
    mesh = jax.sharding.get_abstract_mesh()
    split = 1 if mesh.empty or context == 1 else mesh.shape["context"]
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    length, interpret = q_BTNH.shape[1], sharding.platform() == "cpu"
    block = splash_block(length, context, block)
    attend = splash_kernel(length, block, group, context, split, interpret)
    behind = _padded(length, block) - length if context == 1 else None
    if mesh.empty:
        return _splash_local(attend, q_BTNH, k_BSKH, v_BSKH, segments_BT, behind=behind)
    queries = "queries" if split > 1 else None
    parts = sharding.spec("batch", queries, "heads", None)
    local = jax.shard_map(
        functools.partial(_splash_local, behind=behind, gather=split > 1),
        mesh=mesh,
        in_specs=(
            attend.manual_sharding_spec(NamedSharding(mesh, sharding.spec(None, queries))),
            *(parts, parts, parts),
            sharding.spec("batch", queries),
        ),
        out_specs=parts,
        check_vma=False,  # the kernel does not say how its output varies
    )
    return local(attend, q_BTNH, k_BSKH, v_BSKH, segments_BT)


def splash_kernel(length, block, group, context=1, split=1, interpret=False):
    """The kernel for the `group` heads that share a key, over rows of `length` in the order of
    sharding.balance, and what its mask says of the blocks; `split` devices take a part of the
    queries each."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T = _padded(length, block)
    mask = masks.CausalMask((T, T)) if context == 1 else _balanced_mask(T, block, context)
    return splash.make_splash_mqa(
        masks.MultiHeadMask([mask] * group),
        head_shards=1,
        q_seq_shards=split,
        interpret=interpret,
        residual_checkpoint_name="attention_out",
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=math.gcd(block, SPLASH_KEYS),
            **{name: block for name in ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")},
            **{name: block for name in ("block_q_dq", "block_kv_dq")},
        ),
    )


def _balanced_mask(T: int, block: int, context: int):
    """Causality where queries and keys lie in the order of sharding.balance.

    Positions only decide which blocks are run: slices are whole blocks, so of two different blocks
    the queries of one see all keys of the other, or none. What is left to the kernel, which knows
    places but not positions, is the order inside a block. (To put keys into natural order copies
    them several times: a quarter of a step of 13B in rows of 16,384.)
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    position_T = sharding.balance(np.arange(T), context, axis=0)

    class BalancedMask(masks.CausalMask):
        def __getitem__(self, idx):
            queries, keys = (position_T[part] for part in idx)
            return queries[:, None] >= keys[None]

    mask = BalancedMask((T, T))
    # places in different blocks differ in a bit above those of a block, a power of two
    mask.mask_function = lambda query, key: (query >= key) | ((query ^ key) >= block)
    return mask


def splash_block(length: int, context: int, asked: int = 0) -> int:
    """Queries, and keys, of one block: as many as asked, the usual number where 0 are.

    Raises ValueError when a slice of the row is not of whole blocks.
    """
    most = _padded(length, SPLASH_LANES) if context == 1 else length // (2 * context)
    if asked:
        config.check(
            asked <= most and (context == 1 or most % asked == 0),
            f"attention_block={asked} is no part of {most}, what a device takes at once of rows of "
            f"{length}; use {math.gcd(most, SPLASH_BLOCK)}",
        )
        return asked
    if context == 1:
        return min(SPLASH_BLOCK, most)
    block = math.gcd(SPLASH_BLOCK, most)
    config.check(
        block % SPLASH_LANES == 0,
        f"rows of {length} in 2 * context = {2 * context} slices: the kernel wants slices of a "
        f"multiple of {SPLASH_LANES}; use a smaller layout.context",
    )
    return block


def _padded(length: int, to: int) -> int:
    return -(-length // to) * to


def _splash_local(attend, q_BTNH, k_BSKH, v_BSKH, segments_BT, *, behind, gather=False):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )

    length, H = q_BTNH.shape[1], q_BTNH.shape[3]
    segments_BS = segments_BT
    if gather:  # the gradient goes back by a reduce-scatter
        k_BSKH, v_BSKH, segments_BS = (
            jax.lax.all_gather(x, "context", axis=1, tiled=True)
            for x in (k_BSKH, v_BSKH, segments_BS)
        )
    if behind is not None:  # whole blocks; no query of the row looks behind it
        q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS = (
            jnp.pad(x, [(0, 0), (0, behind)] + [(0, 0)] * (x.ndim - 2))
            for x in (q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS)
        )
    q_BTNH = checkpoint_name((q_BTNH / np.sqrt(H)).astype(q_BTNH.dtype), "query")
    q_BNTH, k_BKSH, v_BKSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSKH, v_BSKH))
    (B, N, T, _), K = q_BNTH.shape, k_BKSH.shape[1]
    q_BKGTH = q_BNTH.reshape(B, K, N // K, T, H)
    segments = splash.SegmentIds(q=segments_BT, kv=segments_BS)
    # rows and keys in parallel: TPUs of two cores share them; within a kernel they would not
    attend_rows = jax.vmap(jax.vmap(attend, in_axes=(0, 0, 0, None)))
    o_BNTH = attend_rows(q_BKGTH, k_BKSH, v_BKSH, segments).reshape(B, N, T, H)
    return jnp.swapaxes(o_BNTH, 1, 2)[:, :length]
