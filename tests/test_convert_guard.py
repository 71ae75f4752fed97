"""Every single slip in the settings beside weights is refused, or repaired with a line."""

import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from convert_fixture import GQA, write

from codellama_jax import convert
from codellama_jax.convert import guard, huggingface, meta, proof, table
from codellama_jax.convert.official import OFFICIAL as OFFICIAL_MODELS
from codellama_jax.convert.official import describe

OFFICIAL = {official.name: official for official in OFFICIAL_MODELS}
NAMES = {
    "7b": "Code Llama 7B (base or Instruct)",
    "7b-python": "Code Llama 7B Python",
    "13b": "Code Llama 13B (base or Instruct)",
    "34b": "Code Llama 34B (base, Python or Instruct)",
    "70b": "Code Llama 70B (base)",
    "70b-instruct": "Code Llama 70B (Python or Instruct)",
    "llama2-7b": "Llama 2 7B (base or chat)",
    "llama2-70b": "Llama 2 70B (base or chat)",
}


def shapes_of(model):
    lengths = table.sizes(model)
    return {t.hf: table.shape(t.row.hf_axes, lengths) for t in table.tensors(model)}


def settle(kind, name, changes, tmp_path, allow=()):
    """The model and the printed lines for official `name` whose settings have `changes`."""
    model = OFFICIAL[NAMES[name]].model
    settings = published(kind, name)
    for key, value in changes.items():
        settings.pop(key, None) if value is None else settings.__setitem__(key, value)
    lines = []
    findings = guard.Findings(allow, lines.append)
    if kind == "meta":
        (tmp_path / "params.json").write_text(json.dumps(settings))
        declared = meta._declared(tmp_path / "params.json", findings)
    else:
        declared = huggingface._declared(settings, findings)
    return guard.settle(declared, shapes_of(model), findings), lines


def published(kind, name):
    """Settings as the official files have them: Meta's leave much out."""
    model = OFFICIAL[NAMES[name]].model
    if kind == "hf":
        settings = huggingface.config_json(model, "bfloat16")
        del settings["rope_parameters"]
        return settings
    settings = meta.params_json(model)
    del settings["vocab_size"]
    if name.startswith("llama2"):
        del settings["rope_theta"]
        settings["vocab_size"] = -1
        if settings["ffn_dim_multiplier"] == 1.0:
            del settings["ffn_dim_multiplier"]
    if model.num_kv_heads == model.num_heads:
        del settings["n_kv_heads"]
    return settings


@pytest.mark.parametrize("kind", ["meta", "hf"])
@pytest.mark.parametrize("name", NAMES)
def test_every_official_model_is_known_by_its_name(tmp_path, kind, name):
    model, _ = settle(kind, name, {}, tmp_path)
    assert model == OFFICIAL[NAMES[name]].model
    assert describe(model).startswith(NAMES[name])


# fmt: off
TWICE_THE_HEADS = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 64}
REFUSED = [  # format, model, what is changed in its settings, what the refusal says
    ("meta", "7b",           {"rope_theta": 1e4},           "rope_theta is 10,000; it is 1,000"),
    ("meta", "7b-python",    {"rope_theta": 1e4},           "rope_theta is 10,000; it is 1,000"),
    ("meta", "34b",          {"rope_theta": 1e4},           "rope_theta is 10,000"),
    ("meta", "70b",          {"rope_theta": None},          "rope_theta is missing"),
    ("meta", "llama2-7b",    {"rope_theta": 5e5},           "rope_theta is 500,000; it is 10,000"),
    ("meta", "7b",           {"vocab_size": 32_000},        "vocab_size is 32,000 in the settings"),
    ("meta", "34b",          {"n_kv_heads": 64},            "num_kv_heads is 64 in the settings"),
    ("meta", "7b",           {"n_heads": 16},               "num_heads is 16, but 32"),
    ("meta", "7b",           {"n_heads": None},             "the number of heads, missing"),
    ("meta", "7b",           {"n_layers": 31},              "num_layers is 31 in the settings, 32"),
    ("meta", "7b",           {"dim": 4_095},                "dim is 4,095 in the settings, 4,096"),
    ("meta", "7b",           {"norm_eps": 1e-6},            "norm_eps is 1e-06; it is 1e-05"),
    ("meta", "13b",          {"ffn_dim_multiplier": 1.3},   "ffn_dim is 17,920 in the settings"),
    ("meta", "7b",           {"multiple_of": 4_096},        "ffn_dim is 12,288 in the settings"),
    ("meta", "7b",           {"use_scaled_rope": True},     "settings no Llama 2 has: use_scaled"),
    ("hf",   "7b",           {"rope_theta": 1e4},           "rope_theta is 10,000; it is 1,000"),
    ("hf",   "34b",          {"rope_theta": 1e4},           "rope_theta is 10,000"),
    ("hf",   "7b-python",    {"rope_theta": 1e4},           "context 16,384 does not go with"),
    ("hf",   "7b-python",    {"max_position_embeddings": 4_096}, "context 4,096 does not go with"),
    ("hf",   "70b",          {"rope_theta": 1e4},           "context 16,384 does not go with"),
    ("hf",   "7b",           {"rope_parameters": {"rope_theta": 1e4}}, "two bases: "),
    ("hf",   "7b",           {"vocab_size": 32_000},        "vocab_size is 32,000 in the settings"),
    ("hf",   "34b",          {"num_key_value_heads": 64},   "num_kv_heads is 64 in the settings"),
    ("hf",   "7b",           {"head_dim": 64},              "head_dim 64 is not hidden_size 4096"),
    ("hf",   "7b",           TWICE_THE_HEADS, "num_heads is 64, but 32"),
    ("hf",   "7b",           {"intermediate_size": 11_009}, "ffn_dim is 11,009 in the settings"),
    ("hf",   "7b",           {"rms_norm_eps": 1e-6},        "norm_eps is 1e-06; it is 1e-05"),
    ("hf",   "7b",           {"rms_norm_eps": None},        "norm_eps is missing"),
    ("hf",   "7b",           {"model_type": "mistral"},     "model_type is 'mistral'"),
    ("hf",   "7b",           {"hidden_act": "gelu"},        "hidden_act is 'gelu'"),
    ("hf",   "7b",           {"attention_bias": True},      "attention_bias is True"),
    ("hf",   "7b",           {"mlp_bias": True},            "mlp_bias is True"),
    ("hf",   "7b",           {"tie_word_embeddings": True}, "1 tensors too many: lm_head.weight"),
    ("hf",   "7b",           {"rope_scaling": {"type": "linear", "factor": 4}}, "rope_scaling is"),
    ("hf",   "7b",           {"rope_parameters": {"rope_type": "llama3"}}, "'llama3' is not"),
    ("hf",   "7b",           {"quantization_config": {}},   "quantization_config is {}"),
]
REPAIRED = [  # ..., the line that says so
    ("meta", "7b",           {"rope_theta": None},          "rope_theta is missing: 1,000,000"),
    ("meta", "34b",          {"rope_theta": None},          "rope_theta is missing: 1,000,000"),
    ("meta", "7b-python",    {"rope_theta": None},          "rope_theta is missing: 1,000,000"),
    ("meta", "llama2-7b",    {},                            "rope_theta is missing: 10,000"),
    ("meta", "llama2-7b",    {},                            "vocab_size is -1: 32,000"),
    ("meta", "7b",           {},                            "vocab_size is missing: 32,016"),
    ("meta", "7b",           {},                            "n_kv_heads is missing: 32"),
    ("meta", "34b",          {"n_kv_heads": None},          "n_kv_heads is missing: 8"),
    ("meta", "7b",           {"norm_eps": None},            "norm_eps is missing: 1e-05"),
    ("hf",   "7b",           {"rope_theta": None},          "rope_theta is missing: 1,000,000"),
    ("hf",   "llama2-7b",    {"rope_theta": None},          "rope_theta is missing: 10,000"),
    ("hf",   "34b",          {"num_key_value_heads": None}, "n_kv_heads is missing: 8"),
    ("hf",   "7b",           {"vocab_size": None},          "vocab_size is missing: 32,016"),
    ("hf",   "70b-instruct", {"max_position_embeddings": 2_048}, "context is 2,048, a known slip"),
]
# fmt: on


@pytest.mark.parametrize(("kind", "name", "changes", "reason"), REFUSED)
def test_each_wrong_setting_is_refused_with_its_reason(tmp_path, kind, name, changes, reason):
    with pytest.raises(ValueError) as refusal:
        settle(kind, name, changes, tmp_path)
    assert reason in str(refusal.value)


@pytest.mark.parametrize(("kind", "name", "changes", "line"), REPAIRED)
def test_what_is_certain_is_repaired_with_a_line(tmp_path, kind, name, changes, line):
    model, lines = settle(kind, name, changes, tmp_path)
    assert model == OFFICIAL[NAMES[name]].model
    assert any(line in text for text in lines), lines


def test_an_exception_passes_one_check_only(tmp_path):
    wrong = {"rope_theta": 1e4, "norm_eps": 1e-6}
    with pytest.raises(ValueError, match="norm_eps") as refusal:
        settle("meta", "7b", wrong, tmp_path, allow=("rope_theta",))
    assert "--allow norm_eps" in str(refusal.value) and "rope_theta" not in str(refusal.value)
    model, lines = settle("meta", "7b", wrong, tmp_path, allow=("rope_theta", "norm_eps"))
    assert (model.rope_theta, model.norm_eps) == (1e4, 1e-6)
    assert sum(line.startswith("allowed: ") for line in lines) == 2


# -- folders -----------------------------------------------------------------------------------


def refusal(folder):
    with pytest.raises(ValueError) as error:
        convert.read_params(folder, say=lambda line: None)
    return str(error.value)


@pytest.fixture
def meta4(tmp_path):
    return write(tmp_path / "meta", "meta", GQA, shards=4)


@pytest.fixture
def hf4(tmp_path):
    folder = write(tmp_path / "hf", "hf", GQA, shard_bytes=60_000)
    (folder / "checksums.json").unlink()  # as others' folders are
    return folder


def test_a_missing_shard_is_named(meta4, hf4):
    (meta4 / "consolidated.02.pth").unlink()
    assert "consolidated.02.pth missing" in refusal(meta4)
    first = sorted(hf4.glob("*.safetensors"))[0]
    first.unlink()
    assert f"shards are missing: {first.name}" in refusal(hf4)


@pytest.mark.parametrize("keep", [0, 20, 3_000, -1])
def test_a_truncated_shard_is_refused(meta4, hf4, keep):
    for folder, pattern in ((meta4, "*.02.pth"), (hf4, "*00002-of-*")):
        path = next(folder.glob(pattern))
        path.write_bytes(path.read_bytes()[:keep])
        assert path.name in refusal(folder)


def test_a_shard_of_another_model_is_refused(meta4, hf4, tmp_path):
    wider = write(tmp_path / "wider", "meta", replace(GQA, ffn_dim=128), shards=4)
    shutil.copy(wider / "consolidated.03.pth", meta4)
    assert "are they of one model?" in refusal(meta4)
    shutil.copy(sorted(hf4.glob("*.safetensors"))[0], sorted(hf4.glob("*.safetensors"))[1])
    assert "are the shards of one model?" in refusal(hf4)


def test_shards_of_a_model_and_of_its_fine_tuned_twin_are_told_apart_by_their_norms(
    meta4, tmp_path
):
    other = write(tmp_path / "other", "meta", GQA, seed=1, shards=4)
    shutil.copy(other / "consolidated.03.pth", meta4)
    assert "differs in consolidated.00.pth and consolidated.03.pth" in refusal(meta4)


def test_missing_and_extra_tensors_are_named(tmp_path):
    folder = write(tmp_path / "a", "hf", GQA)
    (folder / "checksums.json").unlink()
    path = folder / "model.safetensors"
    content = path.read_bytes()
    up = b"model.layers.1.mlp.up_proj.weight"
    path.write_bytes(content.replace(up, up.replace(b"up_proj", b"up_bias")))
    text = refusal(folder)
    assert "1 tensors are missing: model.layers.1.mlp.up_proj.weight" in text
    assert "1 tensors too many: model.layers.1.mlp.up_bias.weight" in text


def test_settings_that_are_no_json_are_shown(meta4, hf4):
    (meta4 / "params.json").write_text("<html><head><title>403 Forbidden")
    assert "params.json is no JSON object; it begins '<html><head><title>403" in refusal(meta4)
    (hf4 / "config.json").write_text("[]")
    assert "config.json is no JSON object" in refusal(hf4)


@pytest.mark.parametrize("value", ["64", 0, -8, 16.5, float("nan"), True, [64]])
def test_a_setting_that_no_model_can_have_is_shown(meta4, hf4, value):
    for path, name in ((meta4 / "params.json", "dim"), (hf4 / "config.json", "vocab_size")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
        assert f"{name} is {value!r}, which is no whole number above 0" in refusal(path.parent)
    settings = json.loads((hf4 / "config.json").read_text()) | {"vocab_size": 336}
    settings["rope_parameters"] = {"rope_theta": "1e6"}
    (hf4 / "config.json").write_text(json.dumps(settings))
    assert "rope_theta is '1e6', which is no number above 0" in refusal(hf4)


def test_a_head_width_that_the_tensors_contradict_is_refused(outside_material, tmp_path):
    """Only rope.freqs, in Meta's own files, tells how wide a head is."""
    shutil.copytree(outside_material / "oracles/meta_gqa_v512/mp1", tmp_path / "a")
    params = json.loads((tmp_path / "a/params.json").read_text())
    (tmp_path / "a/params.json").chmod(0o644)
    (tmp_path / "a/params.json").write_text(json.dumps(params | {"n_heads": 4, "n_kv_heads": 1}))
    assert "rope.freqs is for 8" in refusal(tmp_path / "a")


def test_a_tokenizer_of_another_size_is_refused(tmp_path, material):
    write(tmp_path / "a", "hf", GQA)
    source, to = ("hf", tmp_path / "a"), ("orbax", tmp_path / "b")
    tokenizer = material / "tok512.model"
    with pytest.raises(ValueError, match="512 pieces, the weights have 320 rows"):
        convert.convert(source, to, tokenizer=tokenizer, say=lambda line: None)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ValueError, match="512 pieces, the weights have 320 rows"):
        convert.export_hf(convert.read_params(tmp_path / "a")[1], GQA, tmp_path / "c", tokenizer)


def test_settings_edited_after_we_wrote_them_are_noticed(tmp_path):
    folder = write(tmp_path / "a", "hf", GQA)
    settings = json.loads((folder / "config.json").read_text())
    del settings["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(settings | {"rope_theta": 1e4}))
    assert "rope_theta is 10000 in the settings, 1e+06 in the checksum table" in refusal(folder)


def test_our_own_weights_of_an_official_size_may_have_the_base_they_were_trained_with():
    """7B after the code stage, before long context: 32,016 rows, base 1e4."""
    model = replace(OFFICIAL[NAMES["7b"]].model, rope_theta=1e4, max_seq_len=4_096)
    findings = guard.Findings(say=lambda line: None)
    declared = huggingface._declared(huggingface.config_json(model, "float32"), findings)
    with pytest.raises(ValueError, match="rope_theta is 10,000"):
        guard.settle(declared, shapes_of(model), findings)
    findings = guard.Findings(say=lambda line: None)
    assert guard.settle(declared, shapes_of(model), findings, known=model) == model


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_found_anywhere_and_nothing_else_is(dtype, value):
    rng = np.random.default_rng(0)
    array = rng.normal(size=(400, 300)).astype(dtype)
    array[0, 0], array[1, 1] = ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min
    array[2, 2] = ml_dtypes.finfo(dtype).tiny
    assert not guard.has_nonfinite(array)
    for place in [(0, 0), (399, 299), (200, 17)]:
        changed = array.copy()
        changed[place] = value
        assert guard.has_nonfinite(changed) and guard.has_nonfinite(changed.T)


def test_a_checksum_table_that_is_damaged_or_newer_is_refused(tmp_path):
    folder = write(tmp_path / "a", "hf", GQA)
    path = folder / "checksums.json"
    good = path.read_text()
    path.write_text(good[:100])
    assert "checksums.json is damaged" in refusal(folder)
    path.write_text(good.replace(proof.FORMAT, "codellama_jax weights 2"))
    assert "use newer code" in refusal(folder)
    path.write_text(good.replace('"vocab_size": 320', '"vocab_size": 321'))
    assert "of another model" in refusal(folder)
