"""A random model that generates, and a tokenizer of this Python's own library."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from codellama_jax import config, generate, state, tokenizer
from codellama_jax.tokenizer import training

V = 512  # batches of 4, buckets of 16 and 32: few shapes, for each takes seconds to compile
MODEL = config.Model(
    dim=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    ffn_dim=96,
    vocab_size=V,
    rope_theta=1e4,
    max_seq_len=2_048,
    norm_eps=1e-5,
)
CODE = Path(json.__file__).parent / "decoder.py"  # text that every Python has


def make_tokenizer(folder: Path) -> tokenizer.Tokenizer:
    path = folder / "tokenizer.model"
    training.train([CODE.read_text()], V, path)
    return tokenizer.Tokenizer(path)


def params():
    """Random weights, larger than a fresh model's, so that what was read matters to the logits."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: jnp.array(rng.normal(0, 0.1, w.shape), w.dtype), state.abstract_params(MODEL)
    )


def make_llama(folder: Path) -> generate.CodeLlama:
    return generate.CodeLlama(MODEL, params(), make_tokenizer(folder))
