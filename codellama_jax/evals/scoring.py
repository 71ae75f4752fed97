"""The loss of every token of some rows, on a mesh: what evals without generation are made of."""

import functools

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from codellama_jax import config, sharding, state, step
from codellama_jax.data.rows import Row
from codellama_jax.model import Compute

# Scored at once on a device, or one row where that is longer. On a CPU they stay in the caches.
TOKENS_PER_DEVICE = {"cpu": 1_024, "tpu": 8_192, "gpu": 8_192}


def losses(
    model: config.Model,
    params: state.Params,
    rows: Row,
    *,
    layout: config.Layout,
    mesh: Mesh,
    isolated: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns nll_RT (nats, 0 where masked) and mask_RT of rows [R, T+1], on every host.

    params: stacked over layers, on the host, on one device or on the mesh. rows: tokens,
    loss_mask, segments, positions, the same on every host. `isolated` documents do not see each
    other. Compiled once for a model, layout, mesh and shape of rows.
    """
    num_rows, length = rows["tokens"].shape
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    at_once = TOKENS_PER_DEVICE[mesh.devices.flat[0].platform]
    per_device = min(-(-num_rows // ways), max(1, at_once // (length - 1)))
    batch = ways * per_device
    score = _compiled(model, layout, isolated, mesh)
    params = jax.device_put(params, state.param_shardings(model, mesh))  # a view if they lie there
    parts = []
    with jax.set_mesh(mesh):
        for first in range(0, num_rows, batch):
            part = {key: _filled(x[first : first + batch], batch) for key, x in rows.items()}
            scored = score(params, {key: _placed(x, mesh) for key, x in part.items()})
            # Read before the next goes out: on CPUs, several in flight can wait for each other.
            parts.append(multihost_utils.process_allgather(scored, tiled=True))
    nll, mask = zip(*parts, strict=True)
    return np.concatenate(nll)[:num_rows], np.concatenate(mask)[:num_rows]


@functools.cache
def _compiled(model: config.Model, layout: config.Layout, isolated: bool, mesh: Mesh):
    compute = Compute.of(layout, mesh.devices.flat[0].platform)

    def score(params, batch):
        llama = state.bind(model, params)
        return step.token_losses(llama, batch, compute, layout.loss_chunk, isolated)

    return jax.jit(score, out_shardings=sharding.batch_sharding(mesh))


def _filled(x: np.ndarray, num_rows: int) -> np.ndarray:
    """x with empty rows at its end, so that the last batch has the shape of the others."""
    return np.concatenate([x, np.zeros((num_rows - len(x), *x.shape[1:]), x.dtype)])


def _placed(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """Rows that every host holds, as one array split over the mesh."""
    return jax.make_array_from_callback(x.shape, sharding.batch_sharding(mesh), x.__getitem__)
