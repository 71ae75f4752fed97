"""Attention over a cache: the TPU kernel, interpreted, is plain XLA's; both are the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spine_fixture as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.generate import cached_attention

H = 16


def inputs(chunk, slots, room, heads, kv_heads, rows=2, seed=0):
    rng = np.random.default_rng(seed)
    q_BCNH = rng.normal(size=(rows, chunk, heads, H))
    k_BKSH, v_BKSH = rng.normal(size=(2, rows, kv_heads, slots + room, H))
    return [jnp.array(x, jnp.float32) for x in (q_BCNH, k_BKSH, v_BKSH)]


def definition(q_BCNH, k_BKSH, v_BKSH, start):
    """One query after the other, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BCNH, k_BKSH, v_BKSH))
    (B, C, N, _), K = q.shape, k.shape[1]
    out = np.empty(q.shape)
    for b, i, n in np.ndindex(B, C, N):
        seen = slice(0, start + i + 1)
        scores = k[b, n * K // N, seen] @ q[b, i, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, i, n] = weights @ v[b, n * K // N, seen] / weights.sum()
    return out


@functools.partial(jax.jit, static_argnames=("slots", "kernel"))
def chunk(q_BCNH, k_BKSH, v_BKSH, start, slots, kernel):
    return cached_attention.chunk(q_BCNH, k_BKSH, v_BKSH, start, slots=slots, kernel=kernel)


@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (2, 2), (4, 2)])
def test_a_query_sees_the_slots_up_to_its_own(kernel, heads, kv_heads):
    qkv = inputs(128, 384, 16, heads, kv_heads)
    for start in (0, 128, 256):
        got = chunk(*qkv, start, slots=384, kernel=kernel)
        np.testing.assert_allclose(got, definition(*qkv, start), atol=2e-6)


@pytest.fixture(scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cached_attention, "QUERY_BLOCK", 128)
        patch.setattr(cached_attention, "KEY_BLOCK", 256)
        patch.setattr(cached_attention, "KEYS", 128)
        yield


@given(st.integers(0, 1_024 - 256), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_the_kernel_of_many_blocks_is_plain_attention(small_blocks, start, seed):
    """Also where blocks of queries and of keys do not end together."""
    qkv = inputs(256, 1_024, 32, heads=4, kv_heads=2, rows=1, seed=seed)
    got, want = (chunk(*qkv, start, slots=1_024, kernel=name) for name in ("splash", "xla"))
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_what_lies_after_a_query_is_never_seen(small_blocks):
    q_BCNH, *kv = inputs(256, 1_024, 32, heads=4, kv_heads=2, rows=1)
    kept = chunk(q_BCNH, *kv, 256, slots=1_024, kernel="splash")
    wild = [x_BKSH.at[:, :, 512:].set(1e30) for x_BKSH in kv]
    np.testing.assert_array_equal(chunk(q_BCNH, *wild, 256, slots=1_024, kernel="splash"), kept)


def test_each_device_has_its_own_rows_and_heads(small_blocks):
    qkv = inputs(128, 256, 16, heads=4, kv_heads=2)
    with jax.set_mesh(tiny.mesh(fsdp=2, tensor=2)):
        got = chunk(*qkv, 128, slots=256, kernel="splash")
    np.testing.assert_allclose(got, definition(*qkv, 128), atol=2e-6)
