"""Our model on weights of others, against what Meta's and Hugging Face's code computes with them.

float32 throughout; the largest difference over the largest value must stay under 1e-5. Seen: at
most 7e-7 at positions up to 4,352, and 1.1e-6 at positions up to 100,000.
"""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import codellama_jax
from codellama_jax import convert, state
from codellama_jax.model import Compute

SHIPPED = Path(__file__).parent / "material"
FLOAT32 = Compute(jnp.dtype("float32"), "none")
OFFSETS = (0, 1_000, 16_384, 65_536, 99_936)  # of the first position


@cache
def llama(folder):
    model, params = convert.read_params(folder, "float32", say=lambda line: None)
    bound = state.bind(model, jax.tree.map(jnp.asarray, params))

    @jax.jit
    def run(tokens_BT, offset):
        positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        x_BTD = bound(tokens_BT, positions_BT + offset, compute=FLOAT32)
        return x_BTD, bound.logits(x_BTD)

    return run


def error(ours, theirs):
    """The largest difference, as a part of the largest value."""
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize(
    ("weights", "oracle"),
    [("meta_gqa_v512/mp2", "meta_gqa_v512"), ("hf_gqa_v512", "hf_gqa_v512")],
)
def test_logits_equal_the_references(weights, oracle):
    known = np.load(SHIPPED / oracle / "oracle.npz")
    assert error(llama(SHIPPED / weights)(known["tokens"], 0)[1], known["logits"]) < 1e-5


def test_hidden_states_equal_transformers():
    known = np.load(SHIPPED / "hf_gqa_v512/oracle.npz")
    x_BTD, _ = llama(SHIPPED / "hf_gqa_v512")(known["tokens"], 0)
    assert error(x_BTD, known["hidden_states"][-1]) < 1e-5


@pytest.mark.parametrize("offset", OFFSETS[1:])
def test_logits_far_into_a_long_text_equal_transformers(offset):
    """Rotary base 1e6; only differences of positions matter, but every angle is another one."""
    known = np.load(SHIPPED / "hf_gqa_v512/oracle.npz")
    logits = llama(SHIPPED / "hf_gqa_v512")(known["tokens"], offset)[1]
    assert error(logits, known[f"logits_pos{offset}"]) < 1e-5


@pytest.mark.parametrize("name", ["hf_gqa_v512", "hf_stories260K"])
def test_bfloat16_is_as_close_to_float32_as_the_reference_is(name):
    """Relative norms. Seen: 8.5e-3 and transformers' 8.5e-3, then 3.7e-3 and its 4.6e-3."""
    known = np.load(SHIPPED / name / "bfloat16.npz")
    theirs = known["logits_bits"].view(jnp.bfloat16).astype(np.float32)
    exact = np.asarray(llama(SHIPPED / name)(known["tokens"], 0)[1])
    model, params = convert.read_params(SHIPPED / name, "bfloat16", say=lambda line: None)
    bound = state.bind(model, jax.tree.map(jnp.asarray, params))
    positions_BT = np.tile(np.arange(known["tokens"].shape[1]), (len(known["tokens"]), 1))
    compute = Compute(jnp.dtype("bfloat16"), "none")
    trained = bound.logits(bound(jnp.asarray(known["tokens"]), positions_BT, compute=compute))
    decoded = codellama_jax.load(SHIPPED / name, dtype="bfloat16").logits(known["tokens"])
    reference = np.linalg.norm(theirs - exact)
    for ours in (trained, decoded):
        assert np.linalg.norm(np.asarray(ours, np.float32) - exact) < 1.1 * reference


@pytest.mark.slow
def test_a_text_of_4352_tokens_equals_metas_code():
    known = np.load(SHIPPED / "meta_gqa_v512/oracle.npz")
    tokens_T = known["long_tokens"]
    logits_TV = llama(SHIPPED / "meta_gqa_v512/mp2")(tokens_T[None], 0)[1][0]
    assert error(logits_TV[known["long_positions"]], known["long_logits"]) < 1e-5
    logprobs_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    nll = -logprobs_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]].mean()
    assert nll == pytest.approx(float(known["long_mean_nll"]), rel=1e-6)


def test_every_oracle_of_the_outside_material_agrees(outside_material):
    """Both models, rotary bases 1e4 and 1e6, one and two shards, both formats, all offsets."""
    oracles = outside_material / "oracles"
    folders = [f"meta_{name}/mp{n}" for name in ("gqa_v512", "stories260K") for n in (1, 2)]
    for folder in [*folders, "hf_gqa_v512", "hf_stories260K"]:
        known = np.load(oracles / folder.partition("/")[0] / "oracle.npz")
        for offset in OFFSETS:
            name = f"logits_pos{offset}" if offset else "logits"
            if name in known:
                logits = llama(oracles / folder)(known["tokens"], offset)[1]
                assert error(logits, known[name]) < 1e-5, (folder, offset)
