"""What we write opens in PyTorch and transformers, and means the same there."""

import json

import numpy as np
import pytest
from convert_fixture import DTYPES, GQA, MHA, leaves, random_params, write

import codellama_jax
from codellama_jax import convert, prompts
from codellama_jax.convert import huggingface, pth, table, weights
from codellama_jax.tokenizer import Tokenizer
from codellama_jax.tokenizer.training import train

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("default")  # theirs


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shards", [1, 4])
def test_torch_opens_our_meta_files_mapped_and_in_its_safe_mode(tmp_path, dtype, shards):
    folder = write(tmp_path / "a", "meta", GQA, dtype, shards=shards)
    for path in sorted(folder.glob("*.pth")):
        ours = pth.index(path)
        for mapped in (True, False):
            theirs = torch.load(path, mmap=mapped, weights_only=True)
            assert list(theirs) == list(ours)
            for name, tensor in theirs.items():
                assert tuple(tensor.shape) == ours[name].shape
                assert bits(tensor) == ours[name].array().tobytes()


def test_we_open_what_torch_saves(tmp_path):
    from collections import OrderedDict

    x = torch.randn(6, 4)
    state = OrderedDict(whole=x, turned=x.t(), row=x[2], half=x.half(), bf16=x.bfloat16())
    state["parameter"] = torch.nn.Parameter(x + 1)
    state._metadata = {"": {"version": 1}}
    torch.save(state, tmp_path / "x.pth")
    index = pth.index(tmp_path / "x.pth")
    assert list(index) == list(state)
    for name, tensor in state.items():
        read = index[name].array()
        assert read.tobytes() == bits(tensor.detach()), name
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="before 1.6"):
        pth.index(tmp_path / "old.pth")


@pytest.mark.parametrize("model", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_every_bit_and_no_tensor_too_few_or_too_many(tmp_path, model, dtype):
    transformers = pytest.importorskip("transformers")
    write(tmp_path / "a", "hf", model, dtype, shard_bytes=90_000)
    llama, about = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a", output_loading_info=True, dtype=getattr(torch, dtype)
    )
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = llama.state_dict()
    source = weights.from_params(random_params(model, dtype), model)
    for tensor in table.tensors(model):
        assert bits(state[tensor.hf]) == source.read(tensor).tobytes()
    rope = llama.config.rope_parameters
    assert rope["rope_theta"] == model.rope_theta and rope["rope_type"] == "default"


def test_logits_in_transformers_are_ours(tmp_path):
    """Float32, grouped heads, both rotary bases."""
    transformers = pytest.importorskip("transformers")
    import jax.numpy as jnp

    from codellama_jax import state
    from codellama_jax.model import Compute

    for model in (MHA, GQA):
        write(tmp_path / str(model.num_heads), "hf", model, "float32")
        folder = tmp_path / str(model.num_heads)
        llama = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokens = np.random.default_rng(1).integers(0, model.vocab_size, (2, 50))
        with torch.no_grad():
            theirs = llama(torch.tensor(tokens)).logits.numpy()
        ours = state.bind(model, random_params(model, "float32"))
        positions = jnp.tile(jnp.arange(50), (2, 1))
        compute = Compute(jnp.dtype("float32"), "none")
        logits = ours.logits(ours(jnp.asarray(tokens), positions, compute=compute))
        assert np.abs(logits - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_the_exported_folder_completes_infills_and_chats_with_metas_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print('hello', i)\n"
    train([text] * 5, 336, tmp_path / "tokenizer.model")
    ours = Tokenizer(tmp_path / "tokenizer.model")
    params = random_params(MHA, "float32")
    convert.export_hf(params, MHA, tmp_path / "a", tmp_path / "tokenizer.model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")

    assert theirs(text)["input_ids"] == ours.encode(text, bos=True)
    assert theirs.decode(ours.encode(text)) == text
    prompt = "▁<PRE>def add(▁<SUF>:\n    return a▁<MID>"
    expected = prompts.infilling(ours, "def add(", ":\n    return a")
    assert theirs(prompt)["input_ids"] == expected
    dialog = [{"role": "system", "content": "s"}, {"role": "user", "content": " Hi "}]
    chat = theirs.apply_chat_template(dialog, tokenize=True, return_dict=False)
    assert chat == prompts.chat(ours, dialog)

    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert llama.generation_config.eos_token_id == [2, ours.eot_id]
    out = llama.generate(torch.tensor([expected]), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > len(expected)


def test_transformers_own_files_are_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = huggingface.config_json(GQA, "float32")
    del settings["rope_theta"]
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": GQA.rope_theta}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    llama.save_pretrained(tmp_path / "a", max_shard_size="100KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    assert json.loads((tmp_path / "a/config.json").read_text()).get("rope_theta") is None
    model, params = convert.read_params(tmp_path / "a", say=lambda line: None)
    assert model == GQA
    norm = leaves(params)[("norm",)]
    assert bits(llama.model.norm.weight.detach()) == norm.tobytes()


def test_what_was_imported_and_exported_tells_the_same_story_in_transformers(tmp_path, material):
    transformers = pytest.importorskip("transformers")
    source, ours = ("hf", material / "hf_stories260K"), ("orbax", tmp_path / "workdir/stories")
    tokenizer = material / "tok512.model"
    convert.convert(source, ours, tokenizer=tokenizer, verify=True, say=lambda line: None)
    convert.convert(ours, ("hf", tmp_path / "exported"), verify=True, say=lambda line: None)
    told = codellama_jax.load(ours[1]).complete("Once upon a time", max_new_tokens=60)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    ids = torch.tensor([theirs("Once upon a time")["input_ids"]])
    out = llama.generate(ids, max_new_tokens=60, do_sample=False)
    whole = theirs.decode(out[0], skip_special_tokens=True)
    assert whole == "Once upon a time" + told and len(told) > 100
