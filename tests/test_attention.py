import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spine_fixture as tiny

from codellama_jax import attention, config, model, sharding


def inputs(length: int, *, heads=4, kv_heads=2, width=8, rows=2, seed=0, dtype=np.float32):
    """q, k, v and segments (three documents and padding) of random rows."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.normal(size=(rows, length, n, width)), dtype)
        for n in (heads, kv_heads, kv_heads)
    )
    segments = np.sort(rng.integers(1, 5, (rows, length)), axis=1)
    return q, k, v, jnp.asarray(segments % 4, jnp.int32)  # the fourth is padding: 0


def naive(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
    """The definition, in float64, one query head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BTNH, k_BTKH, v_BTKH))
    B, T, N, H = q.shape
    sees = np.tril(np.ones((T, T), bool))[None].repeat(B, 0)
    if segments_BT is not None:
        segments = np.asarray(segments_BT)
        sees &= segments[:, :, None] == segments[:, None, :]
    out = np.zeros_like(q)
    for n in range(N):
        head = n // (N // k.shape[2])
        scores = np.where(sees, q[:, :, n] @ k[:, :, head].swapaxes(1, 2) / np.sqrt(H), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, n] = weights / weights.sum(-1, keepdims=True) @ v[:, :, head]
    return out


def value_and_grads(attend, q, k, v):
    """A weighted sum of the outputs and its gradients with respect to q, k and v."""
    weights = jnp.asarray(np.random.default_rng(9).normal(size=q.shape), q.dtype)
    return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv) * weights), (0, 1, 2)))(
        q, k, v
    )


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# -- plain XLA -----------------------------------------------------------------------------------
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", [1, 4, 18])
def test_blocks_of_queries_equal_one_softmax_for_any_length(length, segmented, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    q, k, v, segments_BT = inputs(length)
    segments_BT = segments_BT if segmented else None
    got = jax.jit(lambda *qkv: attention.attend(*qkv, segments_BT=segments_BT))(q, k, v)
    np.testing.assert_allclose(got, naive(q, k, v, segments_BT), atol=1e-5)


def test_a_row_longer_than_sixteen_blocks_gets_longer_blocks():
    q, k, v, segments_BT = inputs(2_100, heads=1, kv_heads=1, rows=1)
    attend = functools.partial(attention.attend, segments_BT=segments_BT)
    got = jax.jit(attend)(q, k, v)
    np.testing.assert_allclose(got, naive(q, k, v, segments_BT), atol=1e-5)
    assert _largest_square(jax.make_jaxpr(attend)(q, k, v)) <= 132 * 2_100


def _largest_square(jaxpr) -> int:
    """Entries of the largest float32 matrix of scores in a program."""
    shapes = [v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.dtype == np.float32]
    return max(shape[-1] * shape[-2] for shape in shapes if len(shape) >= 2)


def test_grouped_heads_equal_repeated_heads():
    q, k, v, segments_BT = inputs(20, heads=6, kv_heads=2)
    attend = jax.jit(functools.partial(attention.attend, segments_BT=segments_BT))
    grouped = attend(q, k, v)
    k, v = (jnp.repeat(x, 3, axis=2) for x in (k, v))
    np.testing.assert_allclose(grouped, attend(q, k, v), atol=1e-6)


def test_bfloat16_comes_out_as_bfloat16_and_close_to_float32():
    q, k, v, segments_BT = inputs(40, dtype=jnp.bfloat16)
    got = jax.jit(functools.partial(attention.attend, segments_BT=segments_BT))(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), naive(q, k, v, segments_BT), atol=0.02)


def test_softmax_is_computed_in_float32():
    program = jax.make_jaxpr(attention.attend)(*inputs(8, dtype=jnp.bfloat16)[:3])
    exponentials = [eqn for eqn in program.eqns if eqn.primitive.name == "exp"]
    assert exponentials and all(e.outvars[0].aval.dtype == np.float32 for e in exponentials)


def test_scores_far_apart_do_not_overflow():
    q, k, v, _ = inputs(12)
    got = jax.jit(attention.attend)(q * 1e4, k * 1e4, v)
    assert np.isfinite(got).all()


# -- the TPU kernel, interpreted -----------------------------------------------------------------
def splash(segments_BT):
    return functools.partial(attention.attend, segments_BT=segments_BT, kernel="splash")


@pytest.mark.parametrize("length, segmented", [(128, False), (100, True)])
def test_splash_equals_the_definition(length, segmented):
    q, k, v, segments_BT = inputs(length, width=16, rows=1)
    segments_BT = segments_BT if segmented else None
    got = jax.jit(splash(segments_BT))(q, k, v)
    np.testing.assert_allclose(got, naive(q, k, v, segments_BT), atol=1e-5)


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_rematerialisation_may_keep_the_output_and_keeps_it_once(kernel):
    q, k, v, _ = inputs(128, width=16, rows=1)
    attend = functools.partial(attention.attend, kernel=kernel)
    text = str(jax.make_jaxpr(lambda *qkv: jax.vjp(attend, *qkv)[0])(q, k, v))
    shapes = re.findall(r"\w+:f32\[([\d,]+)\] = name\[name=attention_out\]", text)
    sizes = [math.prod(int(n) for n in shape.split(",")) for shape in shapes]
    assert sizes.count(q.size) == 1


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_each_input_has_one_name_for_rematerialisation(kernel):
    q, k, v, _ = inputs(128, width=16, rows=1)
    text = str(jax.make_jaxpr(functools.partial(attention.attend, kernel=kernel))(q, k, v))
    for name in ("query", "key", "value"):
        assert len(re.findall(rf"name\[name={name}\]", text)) == 1


def test_rematerialisation_keeps_queries_as_the_kernel_takes_them():
    q, k, v, _ = inputs(128, width=16, rows=1)
    attend = functools.partial(attention.attend, kernel="splash")
    attend = jax.checkpoint(attend, policy=model.REMAT["attention"])
    text = str(jax.make_jaxpr(jax.grad(lambda *qkv: attend(*qkv).sum(), (0, 1, 2)))(q, k, v))
    shape = ",".join(map(str, q.shape))
    scalings = re.findall(rf":f32\[{shape}\] = div ", text)
    assert len(scalings) == 2  # the queries, and on the way back their gradient


@pytest.mark.slow
@pytest.mark.parametrize("length", [256, 200])
def test_splash_has_the_gradients_of_plain_xla(length):
    q, k, v, segments_BT = inputs(length, width=16, rows=1)
    assert_close(
        value_and_grads(splash(segments_BT), q, k, v),
        value_and_grads(functools.partial(attention.attend, segments_BT=segments_BT), q, k, v),
    )


@pytest.mark.slow
def test_splash_runs_on_each_devices_own_rows_and_heads():
    q, k, v, segments_BT = inputs(128, width=16, rows=4)
    with jax.set_mesh(tiny.mesh(fsdp=2, tensor=2)):
        got = value_and_grads(splash(segments_BT), q, k, v)
    plain = functools.partial(attention.attend, segments_BT=segments_BT)
    assert_close(got, value_and_grads(plain, q, k, v))


@pytest.mark.parametrize("length", [1, 100, 128, 384, 640, 1_024])
def test_splash_takes_rows_of_any_length(length):
    q, k, v, segments_BT = jax.eval_shape(lambda: inputs(length, rows=1))
    out = jax.eval_shape(
        lambda q, k, v, s: attention.attend(q, k, v, segments_BT=s, kernel="splash"),
        *(q, k, v, segments_BT),
    )
    assert out.shape == q.shape


# -- rows over the context axis ------------------------------------------------------------------
def balanced(context, kernel, segments_BT):
    """Attention over rows in natural order, computed in the order of sharding.balance."""

    def attend(*qkv):
        there = [sharding.balance(x, context) for x in qkv]
        segments = None if segments_BT is None else sharding.balance(segments_BT, context)
        out = attention.attend(*there, segments_BT=segments, kernel=kernel, context=context)
        return sharding.unbalance(out, context)

    return attend


@pytest.mark.parametrize(
    "kernel, length, context, segmented, axes",
    [
        ("xla", 24, 2, True, {}),
        ("xla", 24, 2, False, {"context": 2, "tensor": 2}),
        ("xla", 24, 4, True, {"context": 4, "fsdp": 2}),
        ("splash", 512, 2, True, {"context": 2}),
        pytest.param("splash", 512, 2, False, {}, marks=pytest.mark.slow),
        pytest.param("splash", 512, 2, True, {"context": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_balanced_rows_have_the_values_and_gradients_of_whole_rows(
    kernel, length, context, segmented, axes, monkeypatch
):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    q, k, v, segments_BT = inputs(length, width=16)
    segments_BT = segments_BT if segmented else None
    want = value_and_grads(functools.partial(attention.attend, segments_BT=segments_BT), q, k, v)
    mesh = jax.set_mesh(tiny.mesh(**axes)) if axes else contextlib.nullcontext()
    with mesh:
        got = value_and_grads(balanced(context, kernel, segments_BT), q, k, v)
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("length, context", [(1_024, 2), (3_072, 2), (4_096, 4)])
def test_the_kernel_sees_in_balanced_rows_what_causality_shows(length, context):
    """From what each of its programs is told: the keys of a block, whether it runs, the mask."""
    block = attention.splash_block(length, context)
    kernel = attention.splash_kernel(length, block, 1, context, split=context)
    position_T = sharding.balance(np.arange(length), context, axis=0)
    sees, blocks = kernel.kwargs["mask_function"], np.arange(length).reshape(-1, block)
    for info, of_keys in ((kernel.fwd_mask_info, False), (kernel.dkv_mask_info, True)):
        got_TS = np.zeros((length, length), bool)
        steps = info.block_mask.shape[1] // context  # of a device
        for _, i, j in zip(*np.nonzero(np.asarray(info.block_mask)), strict=True):
            there = int(info.data_next[0, i, j])
            first = i // steps * len(blocks) // context  # block of queries of this device
            query, key = (first + there, j) if of_keys else (i, there)
            queries, keys = blocks[query], blocks[key]
            got_TS[np.ix_(queries, keys)] = sees(queries[:, None], keys[None])
        np.testing.assert_array_equal(got_TS, position_T[:, None] >= position_T[None])


def test_the_devices_of_the_context_axis_do_equal_work():
    whole = attention.pairs(16_384)
    block = attention.splash_block(16_384, 1)
    assert whole == sum(block * (1 + i // block) for i in range(16_384))
    assert attention.pairs(16_384, context=4) == whole / 4


def test_slices_too_short_for_the_kernel_are_refused():
    q, k, v, _ = jax.eval_shape(lambda: inputs(256))
    attend = functools.partial(attention.attend, kernel="splash", context=2)
    with pytest.raises(ValueError, match="rows of 256 .*multiple of 128; use a smaller"):
        jax.eval_shape(attend, q, k, v)


@pytest.mark.parametrize("length, context, asked", [(256, 1, 512), (4_096, 4, 1_024)])
def test_a_block_that_is_no_part_of_a_row_is_refused_with_one_that_is(length, context, asked):
    with pytest.raises(
        ValueError, match=rf"attention_block={asked} .* of {length}; use (\d+)"
    ) as e:
        attention.splash_block(length, context, asked)
    instead = int(str(e.value).rsplit(" ", 1)[1])
    assert attention.splash_block(length, context, instead) == instead


def test_a_block_for_another_kernel_is_refused():
    layout = config.Layout(attention_block=512)
    with pytest.raises(
        ValueError, match="attention_block=512 is for the splash kernel.*'xla' runs"
    ):
        model.Compute.of(layout, "cpu")
    assert model.Compute.of(layout, "tpu").block == 512


@pytest.mark.parametrize("block", [128, 512])
def test_the_block_of_the_kernel_changes_nothing_but_speed(block):
    q, k, v, segments = inputs(512)
    attend = functools.partial(attention.attend, segments_BT=segments, kernel="splash")
    np.testing.assert_allclose(attend(q, k, v, block=block), attend(q, k, v), atol=2e-6, rtol=2e-5)


# -- which kernel --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, platform, dtype, chosen",
    [
        ("auto", "tpu", "bfloat16", "splash"),
        ("auto", "tpu", "float32", "splash"),
        ("auto", "gpu", "bfloat16", "cudnn"),
        ("auto", "gpu", "float32", "xla"),  # cuDNN computes in 16 bits only
        ("auto", "cpu", "bfloat16", "xla"),
        ("xla", "tpu", "bfloat16", "xla"),
        ("splash", "tpu", "bfloat16", "splash"),
        ("cudnn", "gpu", "bfloat16", "cudnn"),
    ],
)
def test_each_platform_has_its_kernel(name, platform, dtype, chosen):
    assert attention.kernel(name, platform, dtype) == chosen


@pytest.mark.parametrize(
    "name, platform, dtype, use",
    [
        ("splash", "cpu", "float32", "xla"),
        ("splash", "gpu", "bfloat16", "cudnn"),
        ("cudnn", "tpu", "bfloat16", "splash"),
        ("cudnn", "cpu", "bfloat16", "xla"),
        ("cudnn", "gpu", "float32", "xla"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_one_that_can(name, platform, dtype, use):
    with pytest.raises(ValueError, match=f"{name}.* does not run on {platform}.*use '{use}'"):
        attention.kernel(name, platform, dtype)


def test_the_nvidia_kernel_takes_whole_rows_only():
    assert attention.kernel("auto", "gpu", "bfloat16", context=2) == "xla"
    with pytest.raises(ValueError, match="cudnn.*context=2; use 'xla'"):
        attention.kernel("cudnn", "gpu", "bfloat16", context=2)
