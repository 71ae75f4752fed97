import dataclasses
import json
from dataclasses import replace

import pytest
import spine_fixture as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax import config

STAGE = tiny.stage(steps=1_000)


def refused(*parts: str):
    """A ValueError whose message holds each of `parts`."""
    return pytest.raises(ValueError, match="".join(f"(?=.*{part})" for part in parts))


# -- numbers of the paper ------------------------------------------------------------------------
def test_parameter_counts_are_those_of_the_paper():
    counts = {name: model.num_params for name, model in config.SIZES.items()}
    assert counts == {
        "7b": 6_738_546_688,
        "13b": 13_016_028_160,
        "34b": 33_743_970_304,
        "70b": 68_976_910_336,
    }


@pytest.mark.parametrize(
    "size, multiplier", [("7b", 1.0), ("13b", 1.0), ("34b", 1.0), ("70b", 1.3)]
)
def test_ffn_widths_follow_from_the_rounding_rule(size, multiplier):
    model = config.SIZES[size]
    multiple_of = {"7b": 256, "13b": 256, "34b": 256, "70b": 4_096}[size]
    width = int(multiplier * int(2 * 4 * model.dim / 3))
    assert model.ffn_dim == -(-width // multiple_of) * multiple_of


def test_every_size_has_heads_of_width_128():
    assert {model.head_dim for model in config.SIZES.values()} == {128}


def test_a_tied_model_counts_its_embedding_once():
    tied = replace(tiny.MODEL, tied_embeddings=True)
    assert tiny.MODEL.num_params - tied.num_params == tied.dim * tied.vocab_size
    assert tied.flops_per_token(32) == tiny.MODEL.flops_per_token(32)


# -- refusals ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"num_heads": 3}, ("dim=64", "num_heads=3")),
        ({"dim": 4}, ("dim=4", "num_heads=4")),  # heads of width 1 have no pairs to turn
        ({"num_kv_heads": 3}, ("num_heads=4", "num_kv_heads=3")),
        ({"num_heads": 0}, ("num_heads=0", "positive")),
        ({"num_kv_heads": -1}, ("num_kv_heads=-1", "positive")),
        ({"num_layers": 0}, ("num_layers=0", "positive")),
        ({"ffn_dim": 0}, ("ffn_dim=0", "positive")),
        ({"vocab_size": -5}, ("vocab_size=-5", "positive")),
        ({"max_seq_len": 0}, ("max_seq_len=0", "positive")),
        ({"norm_eps": 0.0}, ("norm_eps=0", "positive")),
        ({"rope_theta": 1.0}, ("rope_theta=1", "larger than 1")),
        ({"rope_theta": float("nan")}, ("rope_theta=nan",)),
    ],
)
def test_a_model_that_cannot_be_is_refused_with_its_numbers(changes, parts):
    with refused(*parts):
        replace(tiny.MODEL, **changes)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"mix": {}}, ("mix is empty",)),
        ({"mix": {"code": 0.5, "python": 0.4}}, ("code", "0.5", "sum to 1", "0.9")),
        ({"mix": {"code": 1.5, "python": -0.5}}, ("positive", "-0.5")),
        ({"mix": {"code": 1.0, "python": 0.0}}, ("positive", "0.0")),
        ({"seq_len": 0}, ("seq_len=0", "positive")),
        ({"batch_tokens": 100}, ("batch_tokens=100", "seq_len=32", "multiple")),
        ({"batch_tokens": 0}, ("batch_tokens=0", "seq_len=32")),
        ({"infilling_rate": 1.1}, ("infilling_rate=1.1", "between 0 and 1")),
        ({"infilling_rate": 0.9, "spm_rate": -0.1}, ("spm_rate=-0.1", "between 0 and 1")),
        ({"spm_rate": 0.7}, ("spm_rate=0.7", "no effect", "infilling_rate is 0")),
        ({"line_rate": 0.7}, ("line_rate=0.7", "no effect", "infilling_rate is 0")),
    ],
)
def test_data_that_cannot_be_is_refused_with_its_numbers(changes, parts):
    with refused(*parts):
        replace(STAGE.data, **changes)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"peak_lr": 0.0}, ("peak_lr=0.0", "positive")),
        ({"warmup_steps": -1}, ("warmup_steps=-1", "negative")),
        ({"final_lr_ratio": 30.0}, ("final_lr_ratio=30.0", "0..1")),
        ({"beta1": 1.0}, ("beta1=1.0", r"\[0, 1\)")),
        ({"beta2": -0.1}, ("beta2=-0.1", r"\[0, 1\)")),
        ({"eps": 0.0}, ("eps=0.0", "positive")),
        ({"weight_decay": -0.1}, ("weight_decay=-0.1", "negative")),
        ({"clip_norm": 0.0}, ("clip_norm=0.0", "positive")),
    ],
)
def test_an_optimizer_that_cannot_be_is_refused_with_its_numbers(changes, parts):
    with refused(*parts):
        replace(tiny.OPTIM, **changes)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"remat": "some"}, ("remat='some'", "none, full, attention, products, dots")),
        ({"compute_dtype": "float16"}, ("compute_dtype='float16'", "float32, bfloat16")),
        ({"attention": "flash"}, ("attention='flash'", "auto, xla, splash, cudnn")),
        ({"tensor": 0}, ("tensor=0", "at least 1")),
        ({"microbatches": 0}, ("microbatches=0", "at least 1")),
        ({"loss_chunk": 0}, ("loss_chunk=0", "at least 1")),
        ({"fsdp": 0}, ("fsdp=0", "at least 1, or -1")),
        ({"attention_block": 96}, ("attention_block=96", "a power of two from 128 on")),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_its_numbers(changes, parts):
    with refused(*parts):
        config.Layout(**changes)


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"name": ""}, ("name=''",)),
        ({"data": replace(STAGE.data, seq_len=128)}, ("seq_len=128", "max_seq_len=64")),
        ({"steps": 0}, ("steps=0", "positive")),
        ({"steps": 2}, ("warmup_steps=2", "steps=2")),
        ({"layout": {"microbatches": 3}}, ("8 rows", "microbatches=3")),
        ({"log_every": 0}, ("log_every=0", "at least 1")),
        ({"eval_every": 0}, ("eval_every=0", "at least 1")),
        ({"eval_rows": 0}, ("eval_rows=0", "at least 1")),
        ({"save_every": 0}, ("save_every=0", "at least 1")),
        ({"keep_checkpoints": 0}, ("keep_checkpoints=0", "at least 1")),
        ({"start_from": "code"}, ("'code'", "itself")),
    ],
)
def test_a_stage_that_cannot_be_is_refused_with_its_numbers(changes, parts):
    with refused(*parts):
        tiny.stage(**changes)


def test_nothing_can_be_changed_after_it_was_checked():
    for value in (STAGE, STAGE.model, STAGE.data, STAGE.optim, STAGE.layout):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.seed = 1


# -- changing a field from the command line ------------------------------------------------------
TEXTS = {
    int: st.integers(1, 10**6).flatmap(lambda n: st.sampled_from([(n, f"{n}"), (n, f"{n:_}")])),
    float: st.floats(1e-9, 1.0, exclude_max=True).map(lambda x: (x, repr(x))),
    bool: st.sampled_from([(True, "true"), (False, "False"), (True, "1"), (False, "0")]),
}


def _paths(value, prefix=""):
    """(dotted path, type) of every number or truth value in `value`."""
    for f in dataclasses.fields(value):
        inner = getattr(value, f.name)
        if dataclasses.is_dataclass(inner):
            yield from _paths(inner, f"{prefix}{f.name}.")
        elif f.type in TEXTS:
            yield prefix + f.name, f.type


@settings(max_examples=200, deadline=None)
@given(choice=st.data())
def test_every_number_can_be_set_by_its_path_or_is_refused_in_a_sentence(choice):
    path, kind = choice.draw(st.sampled_from(sorted(_paths(STAGE), key=str)))
    value, text = choice.draw(TEXTS[kind])
    group, _, name = path.rpartition(".")
    before = getattr(STAGE, group) if group else STAGE
    try:
        direct = replace(before, **{name: value})
        expected = replace(STAGE, **{group: direct}) if group else direct
    except ValueError as error:
        with pytest.raises(ValueError) as refusal:
            config.override(STAGE, {path: text})
        assert str(refusal.value) == str(error)
        return
    assert config.override(STAGE, {path: text}) == expected


@pytest.mark.parametrize(
    "path, text, parts",
    [
        ("optim.peek_lr", "1", ("Optim has no field 'peek_lr'", "did you mean 'peak_lr'")),
        ("xyzzy", "1", ("Stage has no field 'xyzzy'", "steps", "layout", "seed")),
        ("", "1", ("Stage has no field ''", "steps")),
        ("steps.count", "1", ("'steps' has no fields", "steps.count")),
        ("optim", "1", ("'optim' is a group", "optim.peak_lr")),
        ("steps", "many", ("steps='many' is not a whole number",)),
        ("steps", "1.5", ("steps='1.5' is not a whole number",)),
        ("optim.peak_lr", "high", ("peak_lr='high' is not a number",)),
        ("layout.scan_layers", "yes", ("scan_layers='yes' is not true or false",)),
        ("data.mix", "code", ("mix='code' is not a JSON object of numbers",)),
        ("data.mix", "[1]", (r"mix='\[1\]' is not a JSON object",)),
        ("data.mix", '{"code": "x"}', ("mix=", "is not a JSON object")),
        ("data.mix", '{"code": null}', ("mix=", "is not a JSON object")),
    ],
)
def test_a_setting_that_cannot_be_is_answered_with_what_there_is(path, text, parts):
    with refused(*parts):
        config.override(STAGE, {path: text})


def test_names_and_mixes_can_be_set():
    assert config.override(STAGE, {"start_from": "llama2"}).start_from == "llama2"
    assert config.override(STAGE, {"start_from": "none"}).start_from is None
    assert config.override(STAGE, {"layout.remat": "dots"}).layout.remat == "dots"
    mixed = config.override(STAGE, {"data.mix": '{"code": 0.25, "python": 0.75}'})
    assert mixed.data.mix == {"code": 0.25, "python": 0.75}


# -- JSON ----------------------------------------------------------------------------------------
@settings(max_examples=50, deadline=None)
@given(
    steps=st.integers(3, 10**9),
    share=st.floats(0.01, 0.99),
    start_from=st.none() | st.text(min_size=1),
    theta=st.floats(1.5, 1e8),
    remat=st.sampled_from(config.REMAT_POLICIES),
    tied=st.booleans(),
)
def test_a_stage_survives_json(steps, share, start_from, theta, remat, tied):
    stage = tiny.stage(
        name="any",
        start_from=None if start_from == "any" else start_from,
        steps=steps,
        model=replace(tiny.MODEL, rope_theta=theta, tied_embeddings=tied),
        data=replace(STAGE.data, mix={"code": share, "python": 1 - share}),
        layout={"remat": remat},
    )
    text = json.dumps(config.to_json(stage))
    assert config.from_json(config.Stage, json.loads(text)) == stage


def test_json_of_newer_or_older_code_is_refused():
    values = config.to_json(tiny.MODEL)
    with refused("Model has no field num_experts", "newer code"):
        config.from_json(config.Model, values | {"num_experts": 8})
    del values["dim"], values["norm_eps"]
    with refused("Model needs dim, norm_eps"):
        config.from_json(config.Model, values)


def test_json_may_lack_what_has_a_default():
    values = config.to_json(STAGE)
    del values["layout"], values["seed"], values["model"]["tied_embeddings"]
    assert config.from_json(config.Stage, values).layout == config.Layout()


def test_settings_that_only_fit_together_may_come_in_any_order():
    short = {"steps": "4", "optim.warmup_steps": "2"}
    for order in (list(short), list(short)[::-1]):
        changed = config.override(STAGE, {path: short[path] for path in order})
        assert (changed.steps, changed.optim.warmup_steps) == (4, 2)
