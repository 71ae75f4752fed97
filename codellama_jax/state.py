"""What a run holds between steps, made where it lies. nnx.split and nnx.merge live here only.

Everywhere else weights are `params`: a nested dict of arrays under Meta's names, layers stacked
(for decoding: `params["layers"]` is a list, see model.unstack).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from codellama_jax import config, sharding
from codellama_jax.model import Llama

Params = dict[str, Any]


class TrainState(NamedTuple):
    step: jax.Array  # int32: optimizer steps taken
    params: Params
    opt_state: Any


@functools.cache
def _abstract_llama(model: config.Model, stacked: bool = True):
    return nnx.split(nnx.eval_shape(lambda: Llama(model, nnx.Rngs(0), stacked)))


def bind(model: config.Model, params: Params) -> Llama:
    """The module with these weights: bind(model, params)(tokens_BT, positions_BT, ...)."""
    graph, variables = _abstract_llama(model, stacked=isinstance(params["layers"], dict))
    values = {
        tuple(getattr(key, "key", getattr(key, "idx", None)) for key in path): value
        for path, value in jax.tree_util.tree_leaves_with_path(params)
    }
    flat = {path: var.replace(values[path]) for path, var in nnx.to_flat_state(variables)}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def abstract_params(model: config.Model) -> Params:
    """Shapes and dtypes of the weights, without memory."""
    return nnx.to_pure_dict(_abstract_llama(model)[1])


def param_axes(model: config.Model) -> Params:
    """The logical axis names of each weight; a stacked leading dim is ("layers")."""

    def named(path, variable):
        stacked = ("layers",) * (path[0] == "layers")
        return stacked + tuple(variable.axes)

    flat = nnx.to_flat_state(_abstract_llama(model)[1])
    return _nested({path: named(path, variable) for path, variable in flat})


def param_shardings(model: config.Model, mesh: Mesh) -> Params:
    """Where each weight lies. Raises ValueError when a weight does not divide."""
    axes = param_axes(model)
    sharding.check_divides(abstract_params(model), axes, mesh)
    return sharding.of_axes(axes, mesh)


def init_params(model: config.Model, seed: int) -> Params:
    """Random weights (see model.weight)."""
    return nnx.to_pure_dict(nnx.split(Llama(model, nnx.Rngs(seed)))[1])


def abstract_state(model: config.Model, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A TrainState of ShapeDtypeStructs that carry their shardings: for restoring and compiling."""
    shapes = jax.eval_shape(lambda: _new_state(init_params(model, 0), tx))
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        shapes,
        state_shardings(model, tx, mesh),
    )


def state_shardings(
    model: config.Model, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Adam's moments lie where their weights lie; counters are everywhere."""
    params = param_shardings(model, mesh)
    everywhere = NamedSharding(mesh, P())
    moments = optax.tree_map_params(
        tx,
        lambda _, place: place,
        jax.eval_shape(tx.init, abstract_params(model)),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, moments)


def random_state(
    model: config.Model, tx: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A fresh state, made sharded: no device ever holds a whole large weight."""
    make = jax.jit(
        lambda: _new_state(init_params(model, seed), tx),
        out_shardings=state_shardings(model, tx, mesh),
    )
    with jax.set_mesh(mesh):
        return make()


def state_from_params(
    params: Params, model: config.Model, tx: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A state at step 0 around existing weights, which are given away (donated)."""
    make = jax.jit(
        functools.partial(_new_state, tx=tx),
        out_shardings=state_shardings(model, tx, mesh),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        return make(params)


def _new_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def _nested(flat: dict[tuple, Any]) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree
