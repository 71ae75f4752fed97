"""Llama 2: the decoder that every Code Llama is.

Pre-norm residual blocks, RMSNorm, SwiGLU, rotary positions, grouped key/value heads, no biases.
Weights bear Meta's names and lie stacked over layers, or layer by layer for decoding. Modules are
made in `__init__`, compute in `__call__`, and are plain pytrees: only JAX's transforms touch them.

Axes: B batch  T query position  S key position  D width  N query heads  K key/value heads
      H head width  F ffn width  V vocabulary  L layers
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from codellama_jax import attention, config, sharding

LANES = 128  # of a TPU: so many numbers of a row lie side by side
WIDE = 8_192  # of heads together, from here on `product` merges their axes before wo is gathered
POLICIES = jax.checkpoint_policies
REMAT = {  # what a layer keeps for its backward pass; the rest is computed again
    "none": POLICIES.everything_saveable,
    "full": POLICIES.nothing_saveable,
    "attention": POLICIES.save_only_these_names("query", "key", "value", "attention_out"),
    "products": POLICIES.dots_with_no_batch_dims_saveable,
    "dots": POLICIES.save_from_both_policies(  # the kernel is no product: kept by its name
        POLICIES.dots_with_no_batch_dims_saveable, POLICIES.save_only_these_names("attention_out")
    ),
}


class Compute(NamedTuple):
    """How to compute, from config.Layout; never changes what is computed."""

    dtype: jnp.dtype = jnp.bfloat16
    remat: str = "full"
    kernel: str = "xla"
    scan: bool = True
    context: int = 1  # rows come in the order of sharding.balance
    block: int = 0  # queries, and keys, in a block of the splash kernel; 0: the usual one

    @classmethod
    def of(cls, layout: config.Layout, platform: str) -> "Compute":
        kernel = attention.kernel(layout.attention, platform, layout.compute_dtype, layout.context)
        block, dtype = layout.attention_block, jnp.dtype(layout.compute_dtype)
        config.check(
            block == 0 or kernel == "splash",
            f"attention_block={block} is for the splash kernel of TPUs; on {platform} "
            f"{kernel!r} runs: leave it at 0",
        )
        return cls(dtype, layout.remat, kernel, layout.scan_layers, layout.context, block)


class Llama(nnx.Module):
    """Tokens to logits. `layers` is one Block with stacked weights, or a list of Blocks."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs, stacked: bool = True):
        D, V = model.dim, model.vocab_size
        self.model = model
        self.tok_embeddings = weight(rngs, (V, D), ("vocab", "embed"), fan_in=D)
        keys = jax.random.split(rngs.params(), model.num_layers)
        if stacked:
            self.layers = jax.vmap(lambda key: Block(model, nnx.Rngs(key)))(keys)
        else:
            self.layers = nnx.List([Block(model, nnx.Rngs(key)) for key in keys])
        self.norm = ones((D,), (None,))
        if not model.tied_embeddings:
            self.output = weight(rngs, (D, V), ("embed", "vocab"), fan_in=D)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        *,
        compute: Compute,
    ):
        """Returns the normalised hidden states x_BTD.

        positions_BT count from 0 in each document; generate.decode has the same over a cache. With
        compute.context > 1 rows come, and go, in the order of sharding.balance.
        """
        # looked up, then rounded: the gradient sums thousands of uses of a common token in float32
        x_BTD = self.tok_embeddings[...][tokens_BT].astype(compute.dtype)
        x_BTD = sharding.constrain(x_BTD, "batch", "length", None)
        rope = rope_table(positions_BT, self.model)
        x_BTD = self._rows(x_BTD, rope, segments_BT, compute)
        # the gradient of the norm is summed before those of the layers, or else what it is summed
        # from is kept until they are done
        x_BTD, norm_D = jax.lax.optimization_barrier((x_BTD, self.norm[...]))
        return rms_norm(x_BTD, norm_D, self.model.norm_eps)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Hidden states to float32 logits [..., V]."""
        w_DV = self.output_weight().astype(x_BTD.dtype)
        return jnp.einsum("...D,DV->...V", x_BTD, w_DV, preferred_element_type=jnp.float32)

    def output_weight(self) -> jax.Array:
        """What turns hidden states into logits, [D, V]; the embedding where they are tied."""
        return self.tok_embeddings[...].T if self.model.tied_embeddings else self.output[...]

    def _rows(self, x_BTD, rope, segments_BT, compute):
        def layer(x_BTD, block):
            x_BTD = sharding.constrain(x_BTD, "batch", "length", None)

            def attend(q_BTNH, k_BTKH, v_BTKH):
                return attention.attend(
                    *(q_BTNH, k_BTKH, v_BTKH),
                    segments_BT=segments_BT,
                    kernel=compute.kernel,
                    context=compute.context,
                    block=compute.block,
                )

            return block(x_BTD, rope, attend), None

        stacked = isinstance(self.layers, Block)
        scan = stacked and compute.scan
        if compute.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[compute.remat], prevent_cse=not scan)
        if scan:
            return jax.lax.scan(layer, x_BTD, self.layers)[0]
        blocks = unstack(self.layers, self.model.num_layers) if stacked else self.layers
        for block in blocks:
            x_BTD, _ = layer(x_BTD, block)
        return x_BTD


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        self.attention = Attention(model, rngs)
        self.feed_forward = FeedForward(model, rngs)
        self.attention_norm = ones((model.dim,), (None,))
        self.ffn_norm = ones((model.dim,), (None,))
        self.eps = model.norm_eps

    def __call__(self, x_BTD: jax.Array, rope: jax.Array, attend: Callable) -> jax.Array:
        h_BTD = x_BTD + self.attention(rms_norm(x_BTD, self.attention_norm, self.eps), rope, attend)
        h_BTD = sharding.constrain(h_BTD, "batch", "length", None)
        return h_BTD + self.feed_forward(rms_norm(h_BTD, self.ffn_norm, self.eps))


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; `attend` decides what a query sees."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        D, N, K, H = model.dim, model.num_heads, model.num_kv_heads, model.head_dim
        self.wq = weight(rngs, (D, N, H), ("embed", "heads", None), fan_in=D)
        self.wk = weight(rngs, (D, K, H), ("embed", "kv_heads", None), fan_in=D)
        self.wv = weight(rngs, (D, K, H), ("embed", "kv_heads", None), fan_in=D)
        # 2 L branches add up in the residual stream
        wo_fan_in = N * H * 2 * model.num_layers
        self.wo = weight(rngs, (N, H, D), ("heads", None, "embed"), fan_in=wo_fan_in)

    def __call__(self, x_BTD: jax.Array, rope: jax.Array, attend: Callable) -> jax.Array:
        q_BTNH = sharding.constrain(product(x_BTD, self.wq), "batch", "queries", "heads", None)
        k_BTKH, v_BTKH = (
            sharding.constrain(product(x_BTD, w), "batch", "queries", "kv_heads", None)
            for w in (self.wk, self.wv)
        )
        o_BTNH = attend(rotate(q_BTNH, rope), rotate(k_BTKH, rope), v_BTKH)
        return product(o_BTNH, self.wo)


class FeedForward(nnx.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, model: config.Model, rngs: nnx.Rngs):
        D, F = model.dim, model.ffn_dim
        self.w1 = weight(rngs, (D, F), ("embed", "ffn"), fan_in=D)
        self.w2 = weight(rngs, (F, D), ("ffn", "embed"), fan_in=F * 2 * model.num_layers)
        self.w3 = weight(rngs, (D, F), ("embed", "ffn"), fan_in=D)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF, up_BTF = (  # left to itself the compiler may keep rows split, and gather weights
            sharding.constrain(product(x_BTD, w), "batch", "queries", "ffn")
            for w in (self.w1, self.w3)
        )
        return product(jax.nn.silu(gate_BTF) * up_BTF, self.w2)


def product(x_BTX: jax.Array, weight_XY: nnx.Param) -> jax.Array:
    """x times a weight, in the dtype of x. X and Y are one axis or more (heads and their width).

    Where nothing is split over devices, rows are laid end to end first: XLA transposes both sides
    of a weight's gradient on CPUs otherwise, a quarter of a training step.
    """
    w_XY = weight_XY[...].astype(x_BTX.dtype)
    B, T, *X = x_BTX.shape
    Y = w_XY.shape[len(X) :]
    if sharding.is_whole():
        width = math.prod(X)
        y_MY = x_BTX.reshape(B * T, width) @ w_XY.reshape(width, math.prod(Y))
        return y_MY.reshape(B, T, *Y)
    if len(X) > 1 and math.prod(X) >= WIDE and Y[0] // sharding.ways("embed") < LANES:
        # A TPU that gathers wo in pieces narrower than its lanes has it in a layout that no product
        # reads, and copies it at each use; not so if heads and their width are one axis. Narrower
        # models lose little by the copy, or nothing: the compiler avoids it.
        w_XY = jax.lax.optimization_barrier(w_XY.reshape(-1, *Y))
        return x_BTX.reshape(B, T, -1) @ w_XY
    return jnp.tensordot(x_BTX, w_XY, axes=len(X))


def rms_norm(x_BTD: jax.Array, weight_D: nnx.Param | jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) in float32, rounded to the dtype of x, then times the weight."""
    x32_BTD = x_BTD.astype(jnp.float32)
    scale_BT1 = jax.lax.rsqrt(jnp.mean(x32_BTD * x32_BTD, axis=-1, keepdims=True) + eps)
    return (x32_BTD * scale_BT1).astype(x_BTD.dtype) * weight_D[...].astype(x_BTD.dtype)[None, None]


def rope_table(positions_BT: jax.Array, model: config.Model) -> jax.Array:
    """(cos, sin) [2, B, T, 1, H/2] of position * theta^(-2i/H), float32 from the start.

    bfloat16 cannot hold consecutive integers above 256. The frequencies are constants, rounded
    step by step as in the reference: a compiled power is off by one bit here and there, and
    position 100,000 makes of that an angle off by 0.008.
    """
    H = model.head_dim
    exponents = np.arange(0, H, 2, dtype=np.float32) / np.float32(H)
    frequencies = 1 / (model.rope_theta ** exponents.astype(np.float64)).astype(np.float32)
    angles = positions_BT.astype(jnp.float32)[..., None, None] * frequencies[None, None, None]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


@jax.custom_vjp
def rotate(x_BTNH: jax.Array, rope: jax.Array) -> jax.Array:
    """Turns pair (i, i + H/2) of each head by its angle, in float32.

    Meta pairs (2i, 2i + 1) instead; convert.py permutes wq and wk at the border.
    """
    if x_BTNH.dtype != jnp.bfloat16:
        return _rotate_halves(x_BTNH, rope)
    return jax.lax.platform_dependent(x_BTNH, rope, tpu=_rotate_swapped, default=_rotate_halves)


def _rotate_halves(x_BTNH, rope):
    cos, sin = rope
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


def _rotate_swapped(x_BTNH, rope):
    """The same bits. The halves are swapped by a product with a permutation, which is exact: a TPU
    computes on 128 lanes at a time, and halves of heads would leave half of them idle."""
    H = x_BTNH.shape[-1]
    cos, sin = (jnp.concatenate([x, x], axis=-1) for x in (rope[0], rope[1]))
    signs = np.repeat(np.float32([-1, 1]), H // 2)[None, None, None]
    swap_HH = jnp.roll(jnp.eye(H, dtype=x_BTNH.dtype), H // 2, axis=1)
    swapped = jnp.matmul(x_BTNH, swap_HH, preferred_element_type=jnp.float32)
    return (x_BTNH.astype(jnp.float32) * cos + swapped * (sin * signs)).astype(x_BTNH.dtype)


def _rotate_back(rope, grad_BTNH):
    """The gradient of a rotation is the rotation back."""
    return rotate(grad_BTNH, jnp.stack([rope[0], -rope[1]])), None


rotate.defvjp(lambda x_BTNH, rope: (rotate(x_BTNH, rope), rope), _rotate_back)


def unstack(layers, num_layers: int) -> list:
    """A pytree of stacked layers as one pytree per layer: decoding is fast only in this form."""
    return [jax.tree.map(lambda w, i=i: w[i], layers) for i in range(num_layers)]


# -- weights -----------------------------------------------------------------------------------
def weight(rngs: nnx.Rngs, shape, axes, *, fan_in: int) -> nnx.Param:
    """A normal(0, 1 / sqrt(fan_in)) weight that remembers the logical names of its dims.

    No initialisation of Llama 2 is published; at the width of 7B this is 0.016, near the 0.02 of
    its configs, and unlike it keeps its meaning at small widths.
    """
    values = fan_in**-0.5 * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(values, axes=axes)


def ones(shape, axes) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, jnp.float32), axes=axes)
