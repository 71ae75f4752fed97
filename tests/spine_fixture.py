"""A tiny model, a stage of it, and packed rows of random tokens, for the tests of the spine."""

import functools
from dataclasses import replace

import jax
import numpy as np

from codellama_jax import config, sharding, state
from codellama_jax.model import Compute

MODEL = config.Model(
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=96,
    vocab_size=88,
    rope_theta=1e4,
    max_seq_len=64,
    norm_eps=1e-5,
)
OPTIM = config.Optim(
    peak_lr=1e-2,
    warmup_steps=2,
    final_lr_ratio=1 / 30,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
)
LAYOUT = config.Layout(compute_dtype="float32", remat="none", loss_chunk=16)
FLOAT32 = Compute(dtype=np.dtype("float32"), remat="none", kernel="xla", scan=True)


def stage(layout: dict | None = None, **changes) -> config.Stage:
    """A stage of rows of 32 tokens, 8 rows a step; `layout` holds fields of it to change."""
    settings = {
        "name": "code",
        "start_from": None,
        "model": MODEL,
        "data": config.Data(mix={"code": 1.0}, seq_len=32, batch_tokens=8 * 32, infilling_rate=0.0),
        "optim": OPTIM,
        "steps": 8,
        "layout": replace(LAYOUT, **layout or {}),
    }
    return config.Stage(**settings | changes)


def document(length: int, seed: int, vocab_size: int = MODEL.vocab_size) -> list[int]:
    """BOS and random tokens."""
    rng = np.random.default_rng([length, seed])
    return [1, *rng.integers(3, vocab_size, length - 1).tolist()]


def row(documents: list[list[int]], capacity: int) -> dict[str, np.ndarray]:
    """Documents one after another, padding behind; every token but the first of each counts."""
    made = {
        "tokens": np.zeros(capacity, np.int32),
        "loss_mask": np.zeros(capacity, bool),
        "segments": np.zeros(capacity, np.int32),
        "positions": np.zeros(capacity, np.int32),
    }
    place = 0
    for number, ids in enumerate(documents):
        here = slice(place, place + len(ids))
        made["tokens"][here] = ids
        made["loss_mask"][here] = np.arange(len(ids)) > 0
        made["segments"][here] = number + 1
        made["positions"][here] = np.arange(len(ids))
        place += len(ids)
    assert place <= capacity
    return made


def batch(rows: list[list[list[int]]], capacity: int = 33) -> dict[str, np.ndarray]:
    """One row for each list of documents: {name: [B, T+1]}, all of corpus 0."""
    made = [row(documents, capacity) for documents in rows]
    stacked = {name: np.stack([r[name] for r in made]) for name in made[0]}
    return stacked | {"corpus": np.zeros(len(rows), np.int32)}


def random_batch(num_rows: int = 8, capacity: int = 33, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two or three documents and some padding; masks of different sizes."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(num_rows):
        lengths = rng.integers(2, capacity // 3, 2 + number % 2)
        rows.append(
            [document(int(n), seed * 1_000 + 10 * number + i) for i, n in enumerate(lengths)]
        )
    return batch(rows, capacity)


@functools.partial(jax.jit, static_argnums=(0, 1))
def params(model: config.Model = MODEL, seed: int = 0) -> state.Params:
    """Random weights, norms too."""
    made = state.init_params(model, seed)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return jax.tree.map(lambda w: w + 0.05 * jax.random.normal(next(keys), w.shape), made)


def mesh(**axes: int) -> jax.sharding.Mesh:
    """A mesh over as many of the fake devices as the axes need."""
    layout = config.Layout(**{"fsdp": 1} | axes)
    count = layout.data * layout.fsdp * layout.tensor * layout.context
    return sharding.make_mesh(layout, jax.devices()[:count])


def two_corpora() -> config.Data:
    """The data of a stage that mixes two corpora."""
    return replace(stage().data, mix={"python": 0.25, "code": 0.75})
