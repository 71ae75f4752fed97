"""A Code Llama in use: streams, batches, gaps and chats, what is refused, and real weights."""

import json

import generate_fixture as tiny
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codellama_jax import config, convert, generate, prompts, sharding
from codellama_jax import tokenizer as tokenizers
from codellama_jax.generate import Sampling, request


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def params():
    return tiny.params()


@pytest.fixture(scope="module")
def llama(params, tokenizer):
    return generate.CodeLlama(tiny.MODEL, params, tokenizer)


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


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(llama):
    free = llama.complete("import json\n", max_new_tokens=30)
    stop = free[20:23]
    how = {"max_new_tokens": 30, "stop": ["no such text", stop]}
    expected = free[: free.index(stop)]
    assert llama.complete("import json\n", **how) == expected
    assert llama.complete(["import json\n", "x" * 20, "y"], **how)[0] == expected
    assert "".join(llama.complete("import json\n", stream=True, **how)) == expected


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
    refused("ids from 3 to 512", llama.generate, [[3, tiny.MODEL.vocab_size]])
    refused("no ids", llama.generate, [[]])
    refused("no tokenizer", generate.CodeLlama(tiny.MODEL, params).complete, "a")
    bare = tokenizers.Tokenizer(material / "tok512.model")
    refused("cannot infill.*7B", generate.CodeLlama(tiny.MODEL, params, bare).infill, "a", "b")
    other = config.replace(tiny.MODEL, vocab_size=128)
    refused("has 512 pieces.* 128", generate.CodeLlama, other, params, tokenizer)
    refused("float32; give stacked", generate.CodeLlama, tiny.MODEL, llama.params, dtype="bfloat16")


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
    convert.export_hf(params, tiny.MODEL, tmp_path / "hf", tokenizer.path)
    loaded = generate.load(tmp_path / "hf")
    assert loaded.model == tiny.MODEL
    how = {"max_new_tokens": 20}
    assert loaded.infill("a = ", "\n", **how) == llama.infill("a = ", "\n", **how)
