"""Weights as decoding wants them: on devices, in the dtype to compute in, "layers" a list.

Training stacks the layers, one array per weight; decoding is faster where each has arrays of its
own.
"""

import functools
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from codellama_jax import checkpoint, config, state
from codellama_jax.config import check
from codellama_jax.tokenizer import beside


def load(
    path: str | os.PathLike, dtype: str | None = None, mesh: Mesh | None = None
) -> tuple[config.Model, state.Params, os.PathLike | None]:
    """(model, weights, tokenizer file or None) of our checkpoint, Meta's or Hugging Face's folder.

    Raises ValueError when there are no such weights.
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
    return model, unstack(params, model, dtype, mesh), found


def unstack(
    params: state.Params,
    model: config.Model,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> state.Params:
    """The weights, which `params` is emptied of, so that no more than one of them is there twice.

    dtype: "bfloat16", "float16" or "float32"; None: their own, but bfloat16 for float32 weights on
    an accelerator. mesh: for weights on the host; those on devices stay on theirs.
    """
    dtype = _compute_dtype(params, dtype)
    places = state.param_shardings(model, mesh) if mesh else jax.tree.map(lambda _: None, params)
    stacked = params.pop("layers"), places.pop("layers")
    moved = {name: _put(params.pop(name), dtype, places[name]) for name in list(params)}
    return moved | {"layers": _per_layer(*stacked, model.num_layers, dtype)}


def mesh_of(params: state.Params) -> Mesh | None:
    """The devices that the weights are split over; None for one device."""
    place = params["norm"].sharding
    return place.mesh if isinstance(place, NamedSharding) else None


def _compute_dtype(params: state.Params, dtype: str | None) -> np.dtype:
    known = {name: jnp.dtype(name) for name in ("bfloat16", "float16", "float32")}
    check(dtype in (None, *known), f"dtype={dtype!r} is not one of {', '.join(known)}")
    stored = jnp.dtype(params["norm"].dtype)
    if dtype is None and stored == jnp.float32 and jax.default_backend() != "cpu":
        return known["bfloat16"]
    return stored if dtype is None else known[dtype]


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
