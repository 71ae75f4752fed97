"""Generation: cached decoding is the full forward pass, batches change nothing, text is whole."""

import importlib.util
import io
import json
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax import (
    config,
    convert,
    decode,
    generate,
    model,
    prompts,
    request,
    sharding,
    state,
    tokenizer_train,
)
from codellama_jax import tokenizer as tokenizers
from codellama_jax.request import Sampling

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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    tokenizer_train.train([CODE.read_text()], V, path)
    return tokenizers.Tokenizer(path)


@pytest.fixture(scope="module")
def params():
    """Random weights, larger than a fresh model's, so that what was read matters to the logits."""
    return random_params(MODEL)


@pytest.fixture(scope="module")
def llama(params, tokenizer):
    return generate.CodeLlama(MODEL, params, tokenizer)


def random_params(shape):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda w: jnp.array(rng.normal(0, 0.1, w.shape), w.dtype), state.abstract_params(shape)
    )


@jax.jit
def forward(params, tokens_BT):
    """The forward pass of training: stacked layers, no cache."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    compute = model.Compute(jnp.float32, "none", "xla", scan=True)
    llama = state.bind(MODEL, params)
    return llama.logits(llama(tokens_BT, positions_BT, compute=compute))


def full_logits(params, ids, padded=64):
    tokens_BT = np.zeros((1, max(padded, len(ids))), np.int32)
    tokens_BT[0, : len(ids)] = ids
    return np.asarray(forward(params, tokens_BT))[0, : len(ids)]


def random_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, V, shape, dtype=np.int32)


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
    short = generate.CodeLlama(config.replace(MODEL, max_seq_len=40), params)
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
    split = jax.device_put(params, state.param_shardings(MODEL, mesh))
    spread = generate.CodeLlama(MODEL, split)
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


# -- text --------------------------------------------------------------------------------------
def test_a_stream_joined_is_the_whole_answer(llama):
    for seed in range(4):
        hot = {"max_new_tokens": 30, "temperature": 2.0, "top_p": 1.0, "seed": seed}
        pieces = list(llama.complete("def f(x):", stream=True, **hot))
        assert len(pieces) > 1
        assert "".join(pieces) == llama.complete("def f(x):", **hot)
        pieces = llama.infill("a = ", "\n", suffix_first=True, stream=True, **hot)
        assert "".join(pieces) == llama.infill("a = ", "\n", suffix_first=True, **hot)
        dialog = [{"role": "user", "content": "Hello"}]
        assert "".join(llama.chat(dialog, stream=True, **hot)) == llama.chat(dialog, **hot)


@given(st.text(min_size=1, max_size=30), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_a_stream_holds_back_characters_that_are_not_whole(tokenizer, text, chunk):
    text = text.replace(tokenizers.SPACE, " ")
    row = request.completion(tokenizer, "x")
    ids, shown = tokenizer.encode_infilling(text), ""
    row.limit = len(ids) + 1
    for start in range(0, len(ids), chunk):
        row.extend(np.array(ids[start : start + chunk]), np.zeros(chunk), [])
        assert row.settled().startswith(shown)
        shown = row.settled()
        assert text.startswith(shown)
    assert row.text() == text


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(llama):
    free = llama.complete("import json\n", max_new_tokens=30)
    stop = free[20:23]
    how = {"max_new_tokens": 30, "stop": ["no such text", stop]}
    expected = free[: free.index(stop)]
    assert llama.complete("import json\n", **how) == expected
    assert llama.complete(["import json\n", "x" * 20, "y"], **how)[0] == expected
    assert "".join(llama.complete("import json\n", stream=True, **how)) == expected


def test_a_completion_keeps_its_leading_space(tokenizer):
    ids = tokenizer.encode_infilling(" b")
    row = request.completion(tokenizer, "a")
    row.limit = 9
    row.extend(np.array(ids), np.zeros(len(ids)), [tokenizer.eos_id])
    assert row.text() == " b"


def test_a_list_is_a_batch_of_single_calls(llama):
    how = {"max_new_tokens": 20}
    texts = ["def f(x):", "", "class A:\n    def g(self):\n        "]
    assert llama.complete(texts, **how) == [llama.complete(text, **how) for text in texts]
    prefixes, suffixes = ["a = ", "for element", ""], ["\n", ":\n    pass\n", "x"]
    for suffix_first in (False, True):
        how["suffix_first"] = suffix_first
        assert llama.infill(prefixes, suffixes, **how) == [
            llama.infill(p, s, **how) for p, s in zip(prefixes, suffixes, strict=True)
        ]
    dialogs = [[{"role": "user", "content": text}] for text in ("Hi", "Reverse", "a")]
    assert llama.chat(dialogs, max_new_tokens=20) == [
        llama.chat(dialog, max_new_tokens=20) for dialog in dialogs
    ]
    assert llama.complete([]) == []


def test_an_infilling_ends_at_its_mark_and_at_the_end_of_the_document(llama, monkeypatch):
    seen = []
    monkeypatch.setattr(llama, "run", lambda rows, sampling, stop_ids, batch: seen.append(stop_ids))
    llama.infill("a", "b")
    llama.complete("a")
    llama.chat([{"role": "user", "content": "a"}])
    eos, eot = llama.tokenizer.eos_id, llama.tokenizer.eot_id
    assert seen == [[eot, eos], [eos], [eos]]


@pytest.mark.parametrize("prefix", ["x = ", "    ret", "import js", "if x:\n        ", "u"])
def test_healing_writes_the_end_of_the_prefix_anew(llama, prefix):
    """Whatever the weights want: what was taken back comes first, and is no part of the middle."""
    for seed in range(5):
        row = request.infilling(llama.tokenizer, prefix, "\n", suffix_first=True)
        kept = prompts.infilling(llama.tokenizer, prefix, "\n", suffix_first=True)
        assert row.spelled and row.prompt == kept[: len(row.prompt)] and len(row.prompt) < len(kept)
        llama.run([row], Sampling(20, temperature=3.0, top_p=1.0, seed=seed), [])
        written = llama.tokenizer.decode_infilling(row.tokens)
        assert written == row.spelled + row.text()
        assert (prefix + row.text()).endswith(written.removeprefix(" "))


def test_nothing_is_healed_after_a_newline_nor_in_psm(llama):
    for prefix, suffix_first in (("x = 1\n", True), ("x = ", False), ("", True)):
        row = request.infilling(llama.tokenizer, prefix, "y", suffix_first)
        assert row.spelled == ""
        assert row.prompt == prompts.infilling(llama.tokenizer, prefix, "y", suffix_first)


@given(st.text(max_size=300), st.text(max_size=300), st.integers(5, 80))
@settings(max_examples=50, deadline=None)
def test_truncation_keeps_the_text_near_the_gap(tokenizer, prefix, suffix, room):
    start, end = request.near_gap(tokenizer, prefix, suffix, room)
    assert prefix.endswith(start) and suffix.startswith(end)
    assert len(prompts.infilling(tokenizer, start, end)) <= room
    whole = prompts.infilling(tokenizer, prefix, suffix)
    assert (start, end) == (prefix, suffix) or len(whole) > room


def test_truncation_is_done_only_when_asked(llama, monkeypatch):
    text, lengths = "x = 1\n" * 2_000, []
    with pytest.raises(ValueError, match="max_seq_len=2048; shorten"):
        llama.infill(text, text)
    monkeypatch.setattr(llama, "run", lambda rows, *_: lengths.extend(len(r.prompt) for r in rows))
    llama.infill(text, text, truncate=True, max_new_tokens=48)
    llama.infill("", text, truncate=True, max_new_tokens=48)
    assert lengths == [2_000, 2_000]
    with pytest.raises(ValueError, match="leaves room for 2 tokens"):
        llama.infill(text, text, truncate=True, max_new_tokens=2_046)


# -- wrong use ---------------------------------------------------------------------------------
def test_what_cannot_be_done_is_refused_in_a_sentence(llama, params, tokenizer, material):
    def refused(pattern, call, *args, **kwargs):
        with pytest.raises(ValueError, match=pattern):
            call(*args, **kwargs)

    refused("2048 tokens leaves no room", llama.generate, [[3] * 2_048])
    refused("1 tokens and max_new_tokens=2048 make 2049", llama.complete, "", max_new_tokens=2048)
    refused("top_p=0.5 has no effect at temperature=0", llama.complete, "a", top_p=0.5)
    refused("seed=3 has no effect", llama.complete, "a", seed=3)
    refused("top_p=1.5 must be", llama.complete, "a", top_p=1.5, temperature=1.0)
    refused("temperature=-1", llama.complete, "a", temperature=-1)
    refused("max_new_tokens=0", llama.complete, "a", max_new_tokens=0)
    refused("2 seeds for 1 prompts", llama.complete, "a", temperature=1.0, seed=[1, 2])
    refused("one prompt, not a list of 2", llama.complete, ["a", "b"], stream=True)
    refused("is one text", llama.complete, "a", stop="b")
    refused("two lists of one length", llama.infill, ["a"], ["b", "c"])
    refused("ids from 3 to 512", llama.generate, [[3, V]])
    refused("no ids", llama.generate, [[]])
    refused("no tokenizer", generate.CodeLlama(MODEL, params).complete, "a")
    bare = tokenizers.Tokenizer(material / "tok512.model")
    refused("cannot infill.*7B", generate.CodeLlama(MODEL, params, bare).infill, "a", "b")
    other = config.replace(MODEL, vocab_size=128)
    refused("has 512 pieces.* 128", generate.CodeLlama, other, params, tokenizer)
    refused("float32; give stacked", generate.CodeLlama, MODEL, llama.params, dtype="bfloat16")


def test_loading_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        generate.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="there is no checkpoint"):
        generate.load(tmp_path)


# -- real weights --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stories(material):
    return generate.load(material / "hf_stories260K", material / "tok512.model")


def test_a_trained_model_tells_the_same_stories_token_by_token(stories, material):
    """Meta's reference code ran these weights; it decodes a batch as one."""
    told = json.loads((material / "meta_stories260K" / "generations.json").read_text())
    (batch, single), how = (told["completion"], told["single_bos"]), Sampling(255)
    out = stories.generate(batch["prompt_tokens"] + single["prompt_tokens"], how, stop_ids=[2])
    assert [o.tokens[:200] for o in out[:4]] == batch["out_tokens"]
    assert [o.tokens for o in out[4:]] == single["out_tokens"]
    texts = stories.complete(["", *batch["prompts"]], max_new_tokens=255)
    assert texts[0] == told["single_text"][0]
    assert all(t.lstrip().startswith(w) for t, w in zip(texts[1:], told["text"], strict=True))


@pytest.mark.parametrize("name", ["completion", "completion_stop"])
def test_a_model_with_grouped_heads_continues_as_the_reference(material, name):
    case = json.loads((material / "meta_gqa_v512" / "generations.json").read_text())[name]
    llama = generate.load(material / "hf_gqa_v512", dtype="float32")  # stored in bfloat16
    stop_ids = [case["kw"]["stop_token"]] if case["kw"] else [2]
    out = llama.generate(case["prompt_tokens"], Sampling(case["max_gen_len"]), stop_ids=stop_ids)
    assert [o.tokens for o in out] == case["out_tokens"]


def test_half_the_bytes_load_without_a_float32_copy(material):
    before = {id(array) for array in jax.live_arrays()}
    llama = generate.load(material / "hf_gqa_v512")
    new = [array for array in jax.live_arrays() if id(array) not in before]
    assert {leaf.dtype for leaf in jax.tree.leaves(llama.params)} == {jnp.dtype(jnp.bfloat16)}
    assert sum(array.nbytes for array in new) == 2 * llama.model.num_params
    [out] = llama.generate([[1]], Sampling(30))
    logits_TV = llama.logits([[1] + out.tokens])[0, :-1]
    chosen_T = np.take_along_axis(logits_TV, np.array(out.tokens)[:, None], axis=1)[:, 0]
    assert (logits_TV.max(axis=-1) - chosen_T < 0.1).all()  # near ties may fall either way


def test_a_checkpoint_loads_as_it_is_stored_or_split_over_devices(material, tmp_path):
    source = material / "hf_gqa_v512"
    convert.convert(("hf", source), ("orbax", tmp_path / "stage"), say=lambda _: None)
    expected = jax.tree.leaves(generate.load(source).params)
    mesh = sharding.make_mesh(config.Layout(tensor=2, fsdp=4))
    for folder, place in ((tmp_path / "stage", None), (tmp_path / "stage", mesh), (source, mesh)):
        llama = generate.load(folder, mesh=place)
        assert (llama.mesh is None) == (place is None)
        for leaf, want in zip(jax.tree.leaves(llama.params), expected, strict=True):
            assert leaf.dtype == jnp.bfloat16
            np.testing.assert_array_equal(leaf, want)


def test_our_export_loads_and_tells_the_same(llama, params, tokenizer, tmp_path):
    convert.export_hf(params, MODEL, tmp_path / "hf", tokenizer.path)
    loaded = generate.load(tmp_path / "hf")
    assert loaded.model == MODEL
    how = {"max_new_tokens": 20}
    assert loaded.infill("a = ", "\n", **how) == llama.infill("a = ", "\n", **how)


# -- at the shell --------------------------------------------------------------------------------
ROOT = Path(__file__).parents[1]


def test_importing_the_package_imports_no_jax():
    code = "import codellama_jax, sys; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_is_quick_and_has_examples():
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "tools/generate.py", "--help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "generate.py infill --checkpoint" in out.stdout
    assert " jax" not in out.stderr and " numpy" not in out.stderr


@pytest.fixture(scope="module")
def shell(tokenizer, params, tmp_path_factory):
    """tools/generate.py on a folder of the random weights: (exit code, what it printed, error)."""
    folder = tmp_path_factory.mktemp("shell") / "hf"
    convert.export_hf(params, MODEL, folder, tokenizer.path)
    spec = importlib.util.spec_from_file_location("generate_tool", ROOT / "tools/generate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(command, *args, stdin="", checkpoint=folder):
        out, errors = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", errors)
            args = [command, "--checkpoint", str(checkpoint), "--max-new-tokens", "20", *args]
            code = tool.main(args)
        return code, out.getvalue(), errors.getvalue()

    return run


def test_the_shell_shows_what_the_face_returns(llama, shell, tmp_path):
    how = {"max_new_tokens": 20}
    expected = llama.complete("def f(x):\r\n", **how)
    assert shell("complete", "--prompt", "def f(x):\r\n") == (0, expected, "")
    assert shell("complete", stdin="def f(x):\r\n") == (0, expected, "")
    middle = llama.infill("a = ", "\n", **how)
    assert shell("infill", "--prefix", "a = ", "--suffix", "\n") == (0, middle, "")
    gap = tmp_path / "gap.py"
    gap.write_text("a = <FILL>\n")
    assert shell("infill", "--file", str(gap)) == (0, middle, "")
    assert shell("infill", "--whole", stdin="a = <FILL>\n") == (0, f"a = {middle}\n", "")
    warm = {"temperature": 0.9, "top_p": 0.8, "seed": 3, "suffix_first": True}
    flags = "--temperature 0.9 --top-p 0.8 --seed 3 --suffix-first".split()
    assert shell("infill", *flags, stdin="a = <FILL>\n")[1] == llama.infill(
        "a = ", "\n", **how, **warm
    )
    dialog = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    answer = llama.chat(dialog, **how)
    assert shell("chat", "--system", "Be brief", "--prompt", "Hi") == (0, answer, "")


def test_the_shell_says_in_one_line_what_is_wrong(shell, tmp_path):
    def refused(pattern, *args, **how):
        code, out, error = shell(*args, **how)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert error.startswith("error: ") and pattern in error

    refused("standard input has 2 times <FILL>", "infill", stdin="<FILL><FILL>")
    refused("give both --prefix and --suffix", "infill", "--prefix", "a")
    refused("No such file", "infill", "--file", str(tmp_path / "nothing"))
    refused("there is no folder", "complete", "--prompt", "a", checkpoint=tmp_path / "nothing")
    refused("has no effect at temperature=0", "complete", "--prompt", "a", "--seed", "1")
    refused("make 3011, but", "complete", "--max-new-tokens", "3000", "--prompt", "def f(x): pass")
