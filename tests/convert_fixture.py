"""Small random models on disk, in any format, for the tests of convert."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.convert import run, table, weights

MHA = config.Model(
    dim=64, num_layers=2, num_heads=8, num_kv_heads=8, ffn_dim=96, vocab_size=336,
    rope_theta=1e6, max_seq_len=512, norm_eps=1e-5,
)  # fmt: skip
GQA = replace(MHA, num_heads=16, num_kv_heads=8, vocab_size=320)
DTYPES = ("bfloat16", "float16", "float32")


def random_params(model: config.Model, dtype: str, seed: int = 0) -> dict:
    """Weights of which no two are alike, so that a tensor in the wrong place is seen."""
    rng = np.random.default_rng(seed)
    lengths = table.sizes(model)
    params: dict = {}
    for row in table.rows(model):
        shape = table.shape(row.ours_axes, lengths)
        shape = (model.num_layers, *shape) if row.stacked else shape
        numbers = rng.random(shape, np.float32) - 0.5
        weights._put(params, row, numbers.astype(weights.dtype(dtype)))
    return params


def write(
    folder: Path, kind: str, model: config.Model, dtype: str = "bfloat16", seed: int = 0, **options
) -> Path:
    """Writes a random model of this kind ("meta", "hf" or "orbax") into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    source = weights.from_params(random_params(model, dtype, seed), model)
    run._write(source, kind, folder, options)
    return folder


def leaves(params: dict, path: tuple = ()) -> dict:
    """A nested dict as {path: array}."""
    flat = {}
    for key, value in params.items():
        more = leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
        flat |= more
    return flat


def assert_same_bits(left: dict, right: dict) -> None:
    left, right = leaves(left), leaves(right)
    assert left.keys() == right.keys()
    for path, array in left.items():
        other = np.asarray(right[path])
        assert (array.dtype, array.shape) == (other.dtype, other.shape), path
        assert array.tobytes() == other.tobytes(), path
