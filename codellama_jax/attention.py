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

from codellama_jax import config, sharding

QUERY_BLOCK = 128  # of the plain XLA form
SPLASH_BLOCK = 512  # fits the VMEM of every TPU
SPLASH_LANES = 128  # rows are padded to whole blocks, shorter rows to a multiple of this


def kernel(name: str, platform: str, dtype: str = "bfloat16") -> str:
    """Resolves "auto" for devices of `platform`; refuses a kernel that cannot run there."""
    best = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(platform, "xla")
    if best == "cudnn" and dtype == "float32":  # it computes in 16 bits only
        best = "xla"
    if name == "auto":
        return best
    config.check(
        name in ("xla", best),
        f"attention={name!r} does not run on {platform} in {dtype}; use {best!r} or auto",
    )
    return name


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    kernel: str = "xla",
) -> jax.Array:
    """Causal self-attention over whole rows (T = S). Returns [B, T, N, H] in the dtype of q."""
    if kernel == "splash":
        return _splash(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    if kernel == "cudnn":
        return _cudnn(q_BTNH, k_BSKH, v_BSKH, segments_BT)
    return _blocks(q_BTNH, k_BSKH, v_BSKH, segments_BT)


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
    """softmax(q k / sqrt(H)) v with softmax in float32. Each query must see one key at least."""
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    G = N // K
    # the queries of all heads that share a key lie end to end: M = G T, one product for all
    q_BKMH = q_BTNH.swapaxes(1, 2).reshape(B, K, G * T, H)
    s_BKMS = jnp.einsum("BKMH,BSKH->BKMS", q_BKMH, k_BSKH, preferred_element_type=jnp.float32)
    s_BKGTS = s_BKMS.reshape(B, K, G, T, S) / math.sqrt(H)
    s_BKGTS = jnp.where(mask_BTS[:, None, None], s_BKGTS, -1e30)
    p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(v_BSKH.dtype)
    o_BKMH = jnp.einsum("BKMS,BSKH->BKMH", p_BKGTS.reshape(B, K, G * T, S), v_BSKH)
    return o_BKMH.reshape(B, N, T, H).swapaxes(1, 2)


def _splash(q_BTNH, k_BSKH, v_BSKH, segments_BT):
    """The TPU kernel, run by each device on its own rows and heads."""
    if segments_BT is None:
        segments_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        interpret = jax.default_backend() == "cpu"
        return _splash_local(q_BTNH, k_BSKH, v_BSKH, segments_BT, interpret=interpret)
    heads = sharding.spec("batch", None, "heads", None)
    device = mesh.abstract_device  # of the mesh: programs for TPUs are compiled on CPUs, too
    interpret = device is not None and device.platform == "cpu"
    local = jax.shard_map(
        functools.partial(_splash_local, interpret=interpret),
        mesh=mesh,
        in_specs=(heads, heads, heads, sharding.spec("batch", None)),
        out_specs=heads,
        check_vma=False,  # the kernel does not say how its output varies
    )
    return local(q_BTNH, k_BSKH, v_BSKH, segments_BT)


def _splash_local(q_BTNH, k_BSKH, v_BSKH, segments_BT, *, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

    length, N, H = q_BTNH.shape[1:]
    block = min(SPLASH_BLOCK, -(-length // SPLASH_LANES) * SPLASH_LANES)
    T = -(-length // block) * block
    q_BTNH, k_BSKH, v_BSKH, segments_BT = (  # behind the row: no query of it looks there
        jnp.pad(x, [(0, 0), (0, T - length)] + [(0, 0)] * (x.ndim - 2))
        for x in (q_BTNH, k_BSKH, v_BSKH, segments_BT)
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * N)
    attend = splash.make_splash_mha(
        mask,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name="attention_out",
        block_sizes=splash.BlockSizes(
            **{name: block for name in ("block_q", "block_kv", "block_kv_compute")},
            **{name: block for name in ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")},
            **{name: block for name in ("block_q_dq", "block_kv_dq")},
        ),
    )
    q_BTNH = (q_BTNH / np.sqrt(H)).astype(q_BTNH.dtype)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSKH, v_BSKH)]  # [B, heads, T, H]
    o_BNTH = jax.vmap(attend)(*heads_first, splash.SegmentIds(q=segments_BT, kv=segments_BT))
    return jnp.swapaxes(o_BNTH, 1, 2)[:, :length]
