from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import spine_fixture as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax import optim, state

PAPER = replace(tiny.OPTIM, peak_lr=3e-4, warmup_steps=1_000, final_lr_ratio=1 / 30)


# -- learning rate -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "step, rate", [(0, 0), (500, 1.5e-4), (1_000, 3e-4), (60_104, 1.55002e-4), (119_209, 1e-5)]
)
def test_the_learning_rate_of_the_paper(step, rate):
    schedule = optim.learning_rate(PAPER, 119_209)
    np.testing.assert_allclose(schedule(step), rate, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    warmup=st.integers(0, 50), rest=st.integers(1, 200), ratio=st.floats(0, 1), at=st.floats(0, 1)
)
def test_the_learning_rate_follows_the_formula(warmup, rest, ratio, at):
    steps = warmup + rest
    step = round(at * steps)
    schedule = optim.learning_rate(
        replace(PAPER, peak_lr=1.0, warmup_steps=warmup, final_lr_ratio=ratio), steps
    )
    if step < warmup:
        expected = step / warmup
    else:
        expected = ratio + (1 - ratio) * (1 + np.cos(np.pi * (step - warmup) / rest)) / 2
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-6)


def test_the_first_step_already_learns_and_the_last_has_the_final_rate():
    settings = replace(PAPER, peak_lr=1.0, warmup_steps=2, weight_decay=0.0)
    tx = optim.adamw(settings, steps=10)
    params = {"output": jnp.ones((2, 2))}
    opt_state, sizes = tx.init(params), []
    for _ in range(10):  # equal gradients: Adam's direction has size 1
        updates, opt_state = tx.update({"output": jnp.full((2, 2), 0.1)}, opt_state, params)
        sizes.append(-float(updates["output"][0, 0]))
    schedule = optim.learning_rate(settings, 10)
    np.testing.assert_allclose(sizes, [schedule(s) for s in range(1, 11)], rtol=1e-4)
    assert sizes[0] == pytest.approx(0.5)
    assert sizes[-1] == pytest.approx(1 / 30)


# -- decay and clipping --------------------------------------------------------------------------
def test_matrices_decay_and_norms_do_not():
    decays = optim.decays(state.abstract_params(tiny.MODEL))
    assert decays == {
        "tok_embeddings": True,
        "layers": {
            "attention": {"wq": True, "wk": True, "wv": True, "wo": True},
            "feed_forward": {"w1": True, "w2": True, "w3": True},
            "attention_norm": False,
            "ffn_norm": False,
        },
        "norm": False,
        "output": True,
    }


def test_without_gradients_only_what_decays_moves():
    tx = optim.adamw(replace(PAPER, peak_lr=0.1, warmup_steps=0, weight_decay=0.5), steps=10)
    params = {"output": jnp.ones((2, 2)), "norm": jnp.ones(2)}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    rate = optim.learning_rate(replace(PAPER, peak_lr=0.1, warmup_steps=0), 10)(1)
    np.testing.assert_allclose(updates["output"], -0.5 * rate, rtol=1e-6)
    np.testing.assert_array_equal(updates["norm"], 0)


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_a_gradient_is_clipped_to_the_global_norm_and_never_stretched(size):
    tx = optim.adamw(replace(PAPER, clip_norm=1.0, warmup_steps=0, eps=1e4), steps=10)
    params = {"output": jnp.ones((3, 3)), "norm": jnp.ones(3)}
    grads = jax.tree.map(lambda x: size * x, params)
    norm = float(optim.global_norm(grads))
    assert norm == pytest.approx(size * np.sqrt(12))
    _, opt_state = tx.update(grads, tx.init(params), params)
    first_moment = opt_state[1].mu["output"]
    np.testing.assert_allclose(first_moment, 0.1 * size * min(1, 1 / norm), rtol=1e-5)


def test_adam_divides_by_the_corrected_moments():
    settings = replace(
        PAPER, peak_lr=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=1e9, eps=1e-3
    )
    tx = optim.adamw(settings, steps=5)
    rng = np.random.default_rng(0)
    params = {"output": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
    opt_state, m, v, weights = tx.init(params), 0.0, 0.0, np.asarray(params["output"], np.float64)
    for step in range(1, 6):
        gradient = rng.normal(size=(3, 4))
        m = 0.9 * m + 0.1 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        rate = float(optim.learning_rate(settings, 5)(step))
        weights = weights - rate * (m / (1 - 0.9**step)) / (
            np.sqrt(v / (1 - 0.95**step)) + settings.eps
        )
        grads = {"output": jnp.asarray(gradient, jnp.float32)}
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["output"], weights, rtol=1e-4, atol=1e-5)


def test_the_global_norm_of_bfloat16_is_summed_in_float32():
    ones = {"a": jnp.ones(3_000, jnp.bfloat16), "b": jnp.ones(1_096, jnp.bfloat16)}
    norm = optim.global_norm(ones)
    assert norm.dtype == jnp.float32
    assert float(norm) == 64.0
