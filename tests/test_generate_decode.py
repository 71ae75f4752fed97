"""The decoding machine: cached decoding is the full forward pass, and batches change nothing."""

import json
import types

import generate_fixture as tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codellama_jax import config, generate, model, sharding, state
from codellama_jax.generate import Sampling, decode


@pytest.fixture(scope="module")
def params():
    return tiny.params()


@pytest.fixture(scope="module")
def llama(params):
    return generate.CodeLlama(tiny.MODEL, params)


@jax.jit
def forward(params, tokens_BT):
    """The forward pass of training: stacked layers, no cache."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    compute = model.Compute(jnp.float32, "none", "xla", scan=True)
    llama = state.bind(tiny.MODEL, params)
    return llama.logits(llama(tokens_BT, positions_BT, compute=compute))


def full_logits(params, ids, padded=64):
    tokens_BT = np.zeros((1, max(padded, len(ids))), np.int32)
    tokens_BT[0, : len(ids)] = ids
    return np.asarray(forward(params, tokens_BT))[0, : len(ids)]


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, tiny.MODEL.vocab_size, shape, dtype=np.int32)


def prompts_of(*lengths):
    return [random_ids(length, seed=length).tolist() for length in lengths]


# -- the machine -------------------------------------------------------------------------------
@pytest.mark.parametrize("length", [1, 16, 17, 32, 2 * decode.PREFILL_CHUNK - 9])
def test_logits_equal_the_full_forward_pass(llama, params, length):
    ids = random_ids(length)
    np.testing.assert_allclose(
        llama.logits([ids])[0], full_logits(params, ids), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("split", [1, 2, 7, 15, 16, 17, 30])
def test_decoding_after_any_split_equals_the_full_forward_pass(llama, params, split):
    """What was decoded and how likely it was, read again in one pass."""
    prompt_ids = random_ids(32)[:split].tolist()
    [out] = llama.generate([prompt_ids], Sampling(max_new_tokens=32))
    logits_TV = full_logits(params, prompt_ids + out.tokens)[split - 1 : -1]
    assert len(out.tokens) == 32
    assert out.tokens == logits_TV.argmax(-1).tolist()
    log_probs_T = np.take_along_axis(
        np.asarray(jax.nn.log_softmax(logits_TV)), np.array(out.tokens)[:, None], axis=1
    )[:, 0]
    np.testing.assert_allclose(out.log_probs, log_probs_T, atol=2e-5)


def test_decoding_a_prompt_of_several_chunks_equals_the_full_forward_pass(llama, params):
    prompt_ids = random_ids(decode.PREFILL_CHUNK + 300).tolist()
    [out] = llama.generate([prompt_ids], Sampling(max_new_tokens=4))
    padded = 2 * decode.PREFILL_CHUNK - 9
    logits_TV = full_logits(params, prompt_ids + out.tokens, padded)[len(prompt_ids) - 1 : -1]
    assert out.tokens == logits_TV.argmax(-1).tolist()


def test_a_batch_of_unequal_prompts_equals_single_runs(llama):
    ids = prompts_of(3, 30, 1, 17, 16, 12, 2)
    sampling = Sampling(max_new_tokens=20)
    alone = [llama.generate([one], sampling)[0].tokens for one in ids]
    together = llama.generate(ids, sampling, batch_size=4)
    assert [out.tokens for out in together] == alone


def test_a_row_draws_the_same_tokens_in_any_batch(llama):
    ids = prompts_of(5, 30, 12)
    hot = {"max_new_tokens": 20, "temperature": 1.5}
    together = llama.generate(ids, Sampling(**hot, seed=[4, 5, 6]))
    alone = [
        llama.generate([one], Sampling(**hot, seed=seed))[0]
        for one, seed in zip(ids, [4, 5, 6], strict=True)
    ]
    assert [o.tokens for o in together] == [o.tokens for o in alone]


def test_one_seed_gives_each_row_its_own_numbers_and_the_same_ones_again(llama):
    ids = prompts_of(17) * 3
    hot = Sampling(max_new_tokens=20, temperature=1.5, seed=1)
    first, again = (llama.generate(ids, hot) for _ in range(2))
    other = llama.generate(ids, Sampling(max_new_tokens=20, temperature=1.5, seed=2))
    assert [o.tokens for o in first] == [o.tokens for o in again]
    assert len({tuple(o.tokens) for o in first + other}) == 6


def test_generation_ends_before_the_first_stop_id(llama):
    [free] = llama.generate(prompts_of(9), Sampling(max_new_tokens=30))
    stop = free.tokens[18]
    [stopped] = llama.generate(prompts_of(9), Sampling(max_new_tokens=30), stop_ids=[stop])
    assert stopped.tokens == free.tokens[: free.tokens.index(stop)]
    assert stopped.stopped and not free.stopped and len(free.tokens) == 30


def test_without_a_limit_each_row_goes_as_far_as_the_model_reads(params):
    short = generate.CodeLlama(config.replace(tiny.MODEL, max_seq_len=40), params)
    out = short.generate(prompts_of(30, 17, 40 - 16))
    assert [len(o.tokens) for o in out] == [10, 23, 16]
    assert not any(o.stopped for o in out)


def test_sizes_of_the_same_bucket_compile_once(llama):
    def run(*lengths, **how):
        llama.generate(prompts_of(*lengths), Sampling(**how))
        return decode.prefill._cache_size(), decode.decode._cache_size()

    compiled = run(20, 30, 25, max_new_tokens=20)
    for lengths in ((17, 32, 20), (31, 18, 20, 22)):
        assert run(*lengths, max_new_tokens=30) == compiled
    assert run(20, 20, 20, max_new_tokens=32, temperature=0.7, top_p=0.5, seed=3) == compiled


def test_buckets_hold_what_they_must_and_are_few():
    sizes = [decode.bucket(n) for n in range(1, 20_000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size <= max(16, 2 * n) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 6 + 4 * 6
    assert decode.bucket(100_000) < 115_000


def test_a_call_of_many_lengths_compiles_few_shapes(llama, monkeypatch):
    shapes = []
    monkeypatch.setattr(decode, "prefill", lambda _, x_BT, *__, **___: shapes.append(x_BT.shape))
    monkeypatch.setattr(decode, "decode", lambda *_, **__: (None, *np.ones((2, 16, 9))))
    llama.generate(prompts_of(*range(1, 600, 7)), Sampling(9), batch_size=16)
    assert shapes == [(16, 1_024), (16, 512), (16, 512), (16, 512), (16, 256), (8, 64)]


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Chunks by the kernel, which is interpreted here, and an idle row beside each token."""
    tpu = {**vars(sharding), "platform": lambda: "tpu"}
    monkeypatch.setattr(decode, "sharding", types.SimpleNamespace(**tpu))
    monkeypatch.setattr(decode, "TPU_PREFILL_CHUNK", 256)
    forget_programs()
    yield
    forget_programs()


def forget_programs():
    for program in (decode.prefill, decode.decode):
        program.clear_cache()


def test_what_a_tpu_runs_tells_the_same(llama, as_on_a_tpu, monkeypatch):
    ids, sampling = prompts_of(300, 30), Sampling(max_new_tokens=8)
    got = [llama.generate([one], sampling)[0] for one in ids]
    monkeypatch.undo()
    forget_programs()
    for one, out in zip(ids, got, strict=True):
        [want] = llama.generate([one], sampling)
        assert out.tokens == want.tokens
        np.testing.assert_allclose(out.log_probs, want.log_probs, atol=2e-5)


@pytest.mark.parametrize("T", [16, 512, 1_024, 1_536, 2_048, 3_584, 4_096, 7_168, 114_688])
@pytest.mark.parametrize("kernel, most", [("xla", 512), ("splash", 2_048)])
def test_chunks_divide_their_bucket_and_fit_the_kernel(T, kernel, most):
    C = decode.chunk_of(decode.bucket(T), kernel)
    assert decode.bucket(T) == T and T % C == 0
    assert C == T <= most or C % 512 == 0


def test_weights_split_over_devices_tell_the_same(llama, params):
    mesh = sharding.make_mesh(config.Layout(data=2, fsdp=2, tensor=2))
    split = jax.device_put(params, state.param_shardings(tiny.MODEL, mesh))
    spread = generate.CodeLlama(tiny.MODEL, split)
    assert spread.mesh is not None
    ids, sampling = prompts_of(5, 30, 12), Sampling(max_new_tokens=20)
    expected = llama.generate(ids, sampling)
    compiled = decode.decode._cache_size()
    assert [o.tokens for o in spread.generate(ids, sampling)] == [o.tokens for o in expected]
    assert decode.decode._cache_size() == compiled + 1  # not one more for each chunk


# -- sampling ----------------------------------------------------------------------------------
def test_nucleus_equals_the_reference(material):
    filtered = jax.jit(decode.nucleus)
    for case in json.loads((material / "sample_top_p.json").read_text()):
        probs_BV = jnp.array(case["probs"], jnp.float32)
        np.testing.assert_allclose(filtered(probs_BV, case["top_p"]), case["filtered"], atol=1e-6)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.9, [0, 1, 3]), (0.7, [1, 3]), (0.4, [1]), (0.0, [1]), (1.0, [0, 1, 2, 3])],
)
def test_the_token_that_crosses_top_p_is_kept(top_p, kept):
    probs_BV = decode.nucleus(jnp.array([[0.15, 0.5, 0.05, 0.3]]), top_p)
    assert np.flatnonzero(probs_BV[0]).tolist() == kept


def test_of_equal_tokens_only_those_that_are_needed_are_kept():
    probs_BV = decode.nucleus(jnp.full((1, 8), 0.125), 0.3)
    assert np.flatnonzero(probs_BV[0]).tolist() == [0, 1, 2]
    assert np.flatnonzero(decode.nucleus(jnp.full((1, 8), 0.125), 0.0)[0]).tolist() == [0]


def test_samples_follow_the_probabilities():
    probs_V = np.array([0.1, 0.6, 0.05, 0.25], np.float32)
    point_B = np.linspace(0, 1, 1_000, endpoint=False, dtype=np.float32)
    point_B[-1] = np.nextafter(np.float32(1), np.float32(0))
    draw = decode.Draw(np.float32(2), np.float32(1), np.full(4, -1, np.int32))
    logits_BV = jnp.broadcast_to(2 * jnp.log(probs_V), (1_000, 4))  # the temperature undoes the 2
    counts = np.bincount(decode.sample(logits_BV, draw, jnp.array(point_B)), minlength=4)
    np.testing.assert_allclose(counts / 1_000, probs_V, atol=0.002)
