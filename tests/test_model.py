import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spine_fixture as tiny
from flax import nnx

from codellama_jax import model, state
from codellama_jax.model import Compute

ONE_DOCUMENT = [tiny.document(12, seed=5)]


@functools.cache
def params():
    return tiny.params()


def hidden(params, row, *, config=tiny.MODEL, compute=tiny.FLOAT32, segmented=True):
    """Hidden states [T, D] of one packed row."""

    @jax.jit
    def run(params, row):
        segments = row["segments"][None] if segmented else None
        llama = state.bind(config, params)
        return llama(row["tokens"][None], row["positions"][None], segments, compute=compute)[0]

    return run(params, row)


# -- what a token sees ---------------------------------------------------------------------------
def test_a_token_sees_itself_and_its_past_and_no_other_document():
    row = tiny.row([[1, 5, 6, 7], [1, 8, 9]], capacity=9)
    T = 9
    rows = {name: np.tile(x, (T, 1)) for name, x in row.items()}
    rows["tokens"] = np.arange(T * T, dtype=np.int32).reshape(T, T)  # every use has its own vector
    direction_D = np.random.default_rng(0).normal(size=tiny.MODEL.dim).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(params, rows):
        x_BTD = state.bind(tiny.MODEL, params)(
            rows["tokens"], rows["positions"], rows["segments"], compute=tiny.FLOAT32
        )
        return jnp.trace(x_BTD @ direction_D)  # place t of row t

    table = gradient(params(), rows)["tok_embeddings"]
    seen_TS = np.any(table[: T * T].reshape(T, T, -1), axis=-1)
    allowed = np.tril(np.ones((T, T), bool)) & (row["segments"][:, None] == row["segments"])
    np.testing.assert_array_equal(seen_TS, allowed)


def test_packed_documents_come_out_as_if_alone():
    documents = [tiny.document(9, 1), tiny.document(4, 2), tiny.document(14, 3)]
    packed = hidden(params(), tiny.row(documents, capacity=32))
    start = 0
    for ids in documents:
        alone = hidden(params(), tiny.row([ids], len(ids)), segmented=False)
        np.testing.assert_allclose(packed[start : start + len(ids)], alone, atol=2e-5)
        start += len(ids)


# -- norm and rotary positions -------------------------------------------------------------------
def test_rms_norm_has_the_numbers_of_the_formula():
    x_BTD = jnp.asarray([[[1.0, 2.0, 3.0, 4.0]]])
    got = model.rms_norm(x_BTD, nnx.Param(jnp.ones(4)), 1e-5)
    np.testing.assert_allclose(
        got[0, 0], [0.36514813, 0.73029626, 1.09544438, 1.46059251], rtol=1e-6
    )


def test_rms_norm_rounds_to_bfloat16_before_the_weight():
    rng = np.random.default_rng(0)
    x_BTD = jnp.asarray(rng.normal(size=(1, 8, 64)), jnp.bfloat16)
    weight_D = jnp.asarray(1 + 0.3 * rng.normal(size=64), jnp.float32)
    got = model.rms_norm(x_BTD, nnx.Param(weight_D), 1e-5)
    x32 = np.asarray(x_BTD, np.float32)
    normal = jnp.asarray(x32 / np.sqrt((x32**2).mean(-1, keepdims=True) + 1e-5))
    rounded_first = normal.astype(jnp.bfloat16) * weight_D.astype(jnp.bfloat16)[None, None]
    rounded_last = (normal * weight_D[None, None]).astype(jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    assert (got == rounded_first).mean() > 0.99  # rsqrt may differ in its last bit
    assert (got == rounded_last).mean() < 0.9


@pytest.mark.parametrize(
    "theta, index, frequency",
    [
        (1e6, 0, 1.0),
        (1e6, 1, 0.8058421878),
        (1e6, 2, 0.6493816316),
        (1e6, 31, 0.001240937761),
        (1e6, 32, 0.001),
        (1e6, 62, 1.539926526e-6),
        (1e6, 63, 1.240937761e-6),
        (1e4, 1, 0.8659643234),
        (1e4, 32, 0.01),
        (1e4, 63, 0.0001154781985),
    ],
)
def test_rope_frequencies(theta, index, frequency):
    cos, sin = rope([1], theta)
    np.testing.assert_allclose(np.arctan2(sin[0, index], cos[0, index]), frequency, rtol=2e-6)


def test_rope_angles_stay_exact_at_long_positions():
    cos, sin = rope([16_383], 1e6)
    np.testing.assert_allclose(cos[0, 1], np.cos(13202.1126), atol=2e-3)
    np.testing.assert_allclose(sin[0, 1], np.sin(13202.1126), atol=2e-3)
    cos, _ = rope([99_998, 99_999, 100_000], 1e6)
    np.testing.assert_allclose(cos[:, 0], np.cos([99_998, 99_999, 100_000]), atol=1e-5)


def rope(positions, theta, head_dim=128):
    """cos and sin, [T, H/2] each."""
    shape = replace(tiny.MODEL, dim=4 * head_dim, rope_theta=theta)
    table = model.rope_table(jnp.asarray([positions], jnp.int32), shape)
    assert table.dtype == jnp.float32
    return np.asarray(table)[:, 0, :, 0]


def test_scores_depend_on_the_difference_of_positions_only():
    q_BTNH, k_BTNH = np.random.default_rng(0).normal(size=(2, 1, 6, 4, 16)).astype(np.float32)

    def scores(offset):
        table = model.rope_table(jnp.arange(6)[None] + offset, tiny.MODEL)
        q, k = (model.rotate(jnp.asarray(x), table) for x in (q_BTNH, k_BTNH))
        return jnp.einsum("BTNH,BSNH->BNTS", q, k)

    np.testing.assert_allclose(scores(0), scores(1_000), atol=1e-3)
    assert np.abs(scores(0) - np.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH)).max() > 0.1


def test_half_split_rotation_is_metas_interleaved_one_after_a_permutation():
    permutation = [0, 2, 4, 6, 1, 3, 5, 7]
    shape = replace(tiny.MODEL, dim=32)
    x_TH = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    angles_TI = np.arange(5)[:, None] * 1e4 ** (-np.arange(0, 8, 2) / 8)
    pairs = (x_TH[:, 0::2] + 1j * x_TH[:, 1::2]) * np.exp(1j * angles_TI)
    interleaved = np.stack([pairs.real, pairs.imag], axis=-1).reshape(5, 8)
    table = model.rope_table(jnp.arange(5)[None], shape)
    halves = model.rotate(jnp.asarray(x_TH[None, :, None, permutation]), table)[0, :, 0]
    np.testing.assert_allclose(halves, interleaved[:, permutation], atol=1e-5)


# -- one meaning, many ways to compute it --------------------------------------------------------
def loss_and_grads(compute, params, config=tiny.MODEL):
    row = tiny.row([tiny.document(20, 1), tiny.document(9, 2)], capacity=32)

    @jax.jit
    @jax.value_and_grad
    def run(params, row):
        x_BTD = state.bind(config, params)(
            row["tokens"][None], row["positions"][None], row["segments"][None], compute=compute
        )
        return jnp.mean(jnp.sin(x_BTD.astype(jnp.float32)))

    return run(params, row)


@functools.cache
def reference():
    return loss_and_grads(tiny.FLOAT32, params())


@pytest.mark.parametrize(
    "remat, scan", [*((name, True) for name in model.REMAT if name != "none"), ("full", False)]
)
def test_recomputing_and_unrolling_change_neither_loss_nor_gradients(remat, scan):
    got = loss_and_grads(tiny.FLOAT32._replace(remat=remat, scan=scan), params())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(reference()), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)


def test_bfloat16_stays_close_to_float32():
    loss, grads = loss_and_grads(tiny.FLOAT32._replace(dtype=jnp.dtype("bfloat16")), params())
    want_loss, want = reference()
    np.testing.assert_allclose(loss, want_loss, rtol=0.05, atol=1e-3)
    for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(want), strict=True):
        assert a.dtype == jnp.float32, path
        assert np.linalg.norm(a - b) <= 0.05 * np.linalg.norm(b), path


def test_the_gradient_of_a_common_token_is_summed_in_float32():
    shape = replace(tiny.MODEL, num_layers=1)
    weights = tiny.params(shape)
    tokens_BT = np.full((32, 64), 7)
    places_BT = np.tile(np.arange(64), (32, 1))  # as segments: each token sees itself only

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=1)
    def gradient(dtype, weights, tokens_BT, places_BT):
        x_BTD = state.bind(shape, weights)(
            tokens_BT, places_BT * 0, places_BT, compute=tiny.FLOAT32._replace(dtype=dtype)
        )
        return jnp.sum(jnp.sin(x_BTD.astype(jnp.float32)))

    want, got = (
        gradient(jnp.dtype(name), weights, tokens_BT, places_BT)["tok_embeddings"][7]
        for name in ("float32", "bfloat16")
    )
    assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_layers_in_a_list_equal_stacked_layers():
    row = tiny.row(ONE_DOCUMENT, 12)
    listed = params() | {"layers": model.unstack(params()["layers"], tiny.MODEL.num_layers)}
    np.testing.assert_allclose(hidden(listed, row), hidden(params(), row), atol=1e-5)


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values():
    row = tiny.row(ONE_DOCUMENT, 12)
    full = jax.tree.map(lambda x: x, params())
    for name in ("wk", "wv"):  # [L, D, K, H] -> [L, D, N, H]
        full["layers"]["attention"][name] = jnp.repeat(params()["layers"]["attention"][name], 2, 2)
    shape = replace(tiny.MODEL, num_kv_heads=tiny.MODEL.num_heads)
    np.testing.assert_allclose(hidden(full, row, config=shape), hidden(params(), row), atol=1e-5)


def test_a_tied_model_reads_its_logits_from_the_embedding():
    tied = replace(tiny.MODEL, tied_embeddings=True)
    assert "output" not in state.abstract_params(tied)
    untied = params() | {"output": params()["tok_embeddings"].T}
    shared = {name: w for name, w in params().items() if name != "output"}
    x_TD = hidden(shared, tiny.row(ONE_DOCUMENT, 12), config=tied)
    np.testing.assert_allclose(
        state.bind(tied, shared).logits(x_TD),
        state.bind(tiny.MODEL, untied).logits(x_TD),
        atol=1e-5,
    )


def test_logits_are_float32_whatever_is_computed_in():
    x_TD = jnp.ones((3, tiny.MODEL.dim), jnp.bfloat16)
    assert state.bind(tiny.MODEL, params()).logits(x_TD).dtype == jnp.float32


# -- weights -------------------------------------------------------------------------------------
def test_weights_bear_metas_names_and_lie_stacked_over_layers():
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), state.abstract_params(tiny.MODEL))
    f32 = "float32"
    assert shapes == {
        "tok_embeddings": ((88, 64), f32),
        "layers": {
            "attention": {
                "wq": ((2, 64, 4, 16), f32),
                "wk": ((2, 64, 2, 16), f32),
                "wv": ((2, 64, 2, 16), f32),
                "wo": ((2, 4, 16, 64), f32),
            },
            "feed_forward": {
                "w1": ((2, 64, 96), f32),
                "w2": ((2, 96, 64), f32),
                "w3": ((2, 64, 96), f32),
            },
            "attention_norm": ((2, 64), f32),
            "ffn_norm": ((2, 64), f32),
        },
        "norm": ((64,), f32),
        "output": ((64, 88), f32),
    }


def test_the_shape_of_every_size_has_as_many_weights_as_it_says():
    from codellama_jax.config import SIZES

    for shape in [*SIZES.values(), tiny.MODEL, replace(tiny.MODEL, tied_embeddings=True)]:
        leaves = jax.tree.leaves(state.abstract_params(shape))
        assert sum(leaf.size for leaf in leaves) == shape.num_params


def test_random_weights_keep_the_variance_of_what_flows_through_them():
    shape = replace(tiny.MODEL, dim=128, ffn_dim=192)
    made = jax.jit(functools.partial(state.init_params, shape, 3))()
    spread = jax.tree.map(lambda w: float(jnp.std(w)), made)
    ffn, attention = spread["layers"]["feed_forward"], spread["layers"]["attention"]
    for value in (spread["tok_embeddings"], spread["output"], *attention.values(), ffn["w1"]):
        if value != attention["wo"]:
            assert value == pytest.approx(128**-0.5, rel=0.05)
    branches = 2 * shape.num_layers  # that add up in the residual stream
    assert attention["wo"] == pytest.approx((128 * branches) ** -0.5, rel=0.05)
    assert ffn["w2"] == pytest.approx((192 * branches) ** -0.5, rel=0.05)
    first, second = made["layers"]["feed_forward"]["w1"]
    assert not np.array_equal(first, second)
    assert (made["norm"] == 1).all() and (made["layers"]["ffn_norm"] == 1).all()


def test_how_to_compute_follows_from_the_layout_and_the_platform():
    compute = Compute.of(replace(tiny.LAYOUT, compute_dtype="bfloat16"), "tpu")
    assert compute == Compute(jnp.dtype("bfloat16"), "none", "splash", True)
