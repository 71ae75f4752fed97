"""The one table of weights: names, axes and rotary layout in our, Meta's and Hugging Face's files.

A row is a weight. Each of its three patterns names the same axes in the order in which that format
stores them; axes in parentheses are merged into one. Transposes, merges and the permutation of the
rotary pairs are all in the patterns, and `rearrange` reads them in any direction:

    (N h two) D   Meta: the rows of a head are interleaved pairs (2i, 2i + 1)
    (N two h) D   Hugging Face: the same pairs as halves (i, i + H/2)
    D N (two h)   ours: halves too, and stored the way the forward pass multiplies

Axes: L layers (not in the patterns: every tensor here is one layer's)  D width  N query heads
      K key/value heads  H head width  h half of it  F ffn width  V vocabulary
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from codellama_jax import config


@dataclass(frozen=True)
class Row:
    """One weight; `{}` in a name stands for the layer."""

    ours: str  # path in our nested dict; those under "layers" are stacked over layers
    meta: str
    hf: str
    ours_axes: str
    meta_axes: str
    hf_axes: str
    split: int | None  # axis that Meta's model-parallel shards divide; None: each holds it whole

    @property
    def stacked(self) -> bool:
        return self.ours.startswith("layers.")


# fmt: off
TABLE = (
    Row("tok_embeddings",
        "tok_embeddings.weight", "model.embed_tokens.weight",
        "V D", "V D", "V D", 1),
    Row("layers.attention_norm",
        "layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight",
        "D", "D", "D", None),
    Row("layers.attention.wq",
        "layers.{}.attention.wq.weight", "model.layers.{}.self_attn.q_proj.weight",
        "D N (two h)", "(N h two) D", "(N two h) D", 0),
    Row("layers.attention.wk",
        "layers.{}.attention.wk.weight", "model.layers.{}.self_attn.k_proj.weight",
        "D K (two h)", "(K h two) D", "(K two h) D", 0),
    Row("layers.attention.wv",
        "layers.{}.attention.wv.weight", "model.layers.{}.self_attn.v_proj.weight",
        "D K H", "(K H) D", "(K H) D", 0),
    Row("layers.attention.wo",
        "layers.{}.attention.wo.weight", "model.layers.{}.self_attn.o_proj.weight",
        "N H D", "D (N H)", "D (N H)", 1),
    Row("layers.ffn_norm",
        "layers.{}.ffn_norm.weight", "model.layers.{}.post_attention_layernorm.weight",
        "D", "D", "D", None),
    Row("layers.feed_forward.w1",
        "layers.{}.feed_forward.w1.weight", "model.layers.{}.mlp.gate_proj.weight",
        "D F", "F D", "F D", 0),
    Row("layers.feed_forward.w3",
        "layers.{}.feed_forward.w3.weight", "model.layers.{}.mlp.up_proj.weight",
        "D F", "F D", "F D", 0),
    Row("layers.feed_forward.w2",
        "layers.{}.feed_forward.w2.weight", "model.layers.{}.mlp.down_proj.weight",
        "F D", "D F", "D F", 1),
    Row("norm",
        "norm.weight", "model.norm.weight",
        "D", "D", "D", None),
    Row("output",
        "output.weight", "lm_head.weight",
        "D V", "V D", "V D", 0),
)
# fmt: on


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: a row of the table, and the layer if it is stacked."""

    row: Row
    layer: int | None

    @property
    def meta(self) -> str:
        return self.row.meta.format(self.layer)

    @property
    def hf(self) -> str:
        return self.row.hf.format(self.layer)


def rows(model: config.Model) -> tuple[Row, ...]:
    """The weights that `model` has: no output projection where it is the embedding."""
    return tuple(row for row in TABLE if row.ours != "output" or not model.tied_embeddings)


def tensors(model: config.Model) -> Iterator[Tensor]:
    """Every tensor of `model`, in the order of the forward pass."""
    own = rows(model)
    first = next(i for i, row in enumerate(own) if row.stacked)
    last = next(i for i, row in enumerate(own) if i > first and not row.stacked)
    yield from (Tensor(row, None) for row in own[:first])
    for layer in range(model.num_layers):
        yield from (Tensor(row, layer) for row in own[first:last])
    yield from (Tensor(row, None) for row in own[last:])


def sizes(model: config.Model) -> dict[str, int]:
    """The length of each axis that a pattern may name."""
    return {
        "D": model.dim,
        "N": model.num_heads,
        "K": model.num_kv_heads,
        "H": model.head_dim,
        "h": model.head_dim // 2,
        "two": 2,
        "F": model.ffn_dim,
        "V": model.vocab_size,
    }


def shape(axes: str, lengths: dict[str, int]) -> tuple[int, ...]:
    """The shape that pattern `axes` describes.  shape("D N (two h)", ...) -> (D, N, 2h)"""
    return tuple(math.prod(lengths[a] for a in group) for group in _groups(axes))


def rearrange(
    x: np.ndarray, axes: str, to: str, lengths: dict[str, int], out: np.ndarray | None = None
) -> np.ndarray:
    """`x`, stored as pattern `axes`, as a contiguous array stored as pattern `to`.

    Returns `x` itself where the patterns agree; fills and returns `out`, if it is given, which may
    be a slice of a matrix. Moves bits and never looks at numbers.
    """
    if axes == to and out is None:
        return x
    if out is None:
        out = np.empty(shape(to, lengths), x.dtype)
    source = [a for group in _groups(axes) for a in group]
    target = [a for group in _groups(to) for a in group]
    # The target order is turned, like a wheel, until it ends in the source's last axis: that far
    # whole runs of memory move. What remains is the transpose of a matrix.
    turn = target.index(source[-1]) + 1
    turned = target[turn:] + target[:turn]
    bits = np.dtype(f"u{x.dtype.itemsize}")  # numpy moves bfloat16 one by one
    x = x.view(bits).reshape([lengths[a] for a in source])
    x = x.transpose([source.index(a) for a in turned])
    if turned == target:
        np.copyto(_as(out.view(bits), [lengths[a] for a in target]), x)
    else:
        rows_ = math.prod(lengths[a] for a in target[turn:])
        _transpose(x.reshape(rows_, -1), _as(out.view(bits), [-1, rows_]))
    return out


def _as(out: np.ndarray, shape: list[int]) -> np.ndarray:
    """The same memory in another shape."""
    view = out.reshape(shape)
    assert np.may_share_memory(view, out), (out.shape, out.strides, shape)
    return view


TILE = (512, 512)  # rows and bytes; the fastest of those tried: runs long enough to be written


def _transpose(x: np.ndarray, out: np.ndarray) -> None:
    """Copies x.T to `out`, tile by tile: a tile fits the cache, x does not.

    A tile's rows are kept 64 bytes apart, since rows whose distance is a power of two would all
    fall into the same few lines of the cache. The rows of `out` are filled one after the other.
    """
    height, width = TILE[0], TILE[1] // x.itemsize
    padded = np.empty((height, width + 64 // x.itemsize), x.dtype)
    for j in range(0, x.shape[1], width):
        for i in range(0, x.shape[0], height):
            part = x[i : i + height, j : j + width]
            tile = padded[: part.shape[0], : part.shape[1]]
            np.copyto(tile, part)
            np.copyto(out[j : j + width, i : i + height], tile.T)


def _groups(axes: str) -> list[list[str]]:
    """ "D N (two h)" -> [["D"], ["N"], ["two", "h"]]"""
    groups: list[list[str]] = []
    inside = False
    for word in axes.replace("(", "( ").replace(")", " )").split():
        if word in "()":
            inside = word == "("
            if inside:
                groups.append([])
        elif inside:
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups
