"""Plans for reading and generating: what is refused, and one real compile for a TPU."""

from dataclasses import replace

import jax
import pytest
import spine_fixture as tiny

from codellama_jax import config, sharding
from codellama_jax.generate import decode
from codellama_jax.plan import chips, generation, kernels, program, schedule, shown

SMALL = replace(
    tiny.MODEL, dim=256, num_heads=2, num_kv_heads=2, ffn_dim=256, vocab_size=256, max_seq_len=4_096
)
FOUR = chips.Slice.parse("v5e:2x2")

COUNTING = """\
HloModule jit_prefill, is_scheduled=true, entry_computation_layout={()->s32[]}

%condition (state: (s32[], s32[])) -> pred[] {
  %state = (s32[], s32[]) parameter(0)
  ROOT %less = pred[] compare(%state, %state), direction=LT
}

%body (state: (s32[], s32[])) -> (s32[], s32[]) {
  ROOT %work = (s32[], s32[]) fusion(%state), kind=kLoop, calls=%inner, \
backend_config={"window_config":{"estimated_cycles":"100"}}
}

ENTRY %main () -> s32[] {
  %loop = (s32[], s32[]) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_that_ends_at_a_value_runs_as_often_as_is_said():
    assert [region.times for region in schedule.read(COUNTING, rounds=7)] == [1, 7]
    with pytest.raises(ValueError, match="no trip count"):
        schedule.read(COUNTING)


# -- layouts -------------------------------------------------------------------------------------
def test_heads_are_split_first_and_rows_over_what_is_left():
    layout = generation.layout_of(config.SIZES["34b"], chips.Slice.parse("v5e:4x4"), batch=2)
    assert (layout.data, layout.fsdp, layout.tensor) == (2, 1, 8)


@pytest.mark.parametrize(
    "slice_name, batch, tensor, sentence",
    [
        ("v5e:4x4", 1, None, "batch=1 .* 2 groups of 8 .*use batch=2, or a slice of 8 devices"),
        ("v5e:2x4", 8, 3, "tensor=3 does not divide 8 key/value heads and 8 devices; .*tensor=8"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(slice_name, batch, tensor, sentence):
    where = chips.Slice.parse(slice_name)
    with pytest.raises(ValueError, match=sentence):
        generation.layout_of(config.SIZES["34b"], where, batch, tensor)


@pytest.mark.parametrize(
    "where, batch, hint",
    [
        ("v5e:2x2", 1, "a shorter context, or a larger slice, such as v5e:2x4"),
        ("v5e:2x2", 2, "batch=1, a shorter context, or a larger slice, such as v5e:2x4"),
        ("v5e:2x4", 1, "a shorter context, or a chip with more memory"),  # 8 heads: 8 devices
    ],
)
def test_what_does_not_fit_is_told_what_would(tmp_path, monkeypatch, where, batch, hint):
    refused = {"mesh": {}, "too_big": {"needs": 20.0, "has": 15.75}}
    monkeypatch.setattr(program.Question, "answer", lambda *_: (refused, ""))
    with pytest.raises(ValueError, match=f"{batch} rows of 100000 .* 15.75: try {hint}$"):
        generation.plan_generation(
            config.SIZES["34b"], chips.Slice.parse(where), batch, 100_000, cache=tmp_path
        )


def test_reading_takes_little_longer_than_its_products():
    model, where = config.SIZES["34b"], chips.Slice.parse("v5e:2x4")
    chunks = -(-100_000 // decode.chunk_of(decode.bucket(100_000), "splash"))
    found = chunks * generation._reading(model, where, {"tensor": 8}, 1, 100_000)
    products = kernels.ideal("fwd", where.chip, 1) * 100_000**2 / 2  # of one head
    heads = model.num_heads / 8
    assert 1 < found * where.chip.clock_ghz * 1e9 / (heads * products) < 1.25


# -- compiled ------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_plan_counts_every_byte_and_every_chunk(tmp_path):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install codellama_jax[aot]")
    short, long = (
        generation.plan_generation(SMALL, FOUR, batch=2, context=n, cache=tmp_path)
        for n in (4_096, 8_192)
    )
    weights = 2 * SMALL.num_params / 2**30
    cache = 2 * 2 * SMALL.num_layers * 2 * SMALL.dim * (8_192 + 512) / 2**30
    logits = 2 * SMALL.vocab_size * 4 / 2**30
    token = long["decode"]
    assert token["mesh"] == {"data": 2, "tensor": 2}
    assert token["memory"]["arguments"] == pytest.approx(
        weights / 2 + cache / 4 + logits / 4, rel=0.1, abs=1.1e-3
    )
    assert token["time"]["step_seconds"] >= token["time"]["memory_seconds"] > 0
    assert token["time"]["kernels_seconds"] == 0
    assert {"all-reduce"} <= {row["kind"] for row in token["time"]["collectives"]}
    one, two = (found["prefill"]["time"] for found in (short, long))
    assert 1.5 < two["compute_seconds"] / one["compute_seconds"] < 2.5  # twice the chunks
    assert 3 < two["kernels_seconds"] / one["kernels_seconds"] < 4  # 6 blocks, then 20
    again = generation.plan_generation(SMALL, FOUR, batch=2, context=8_192, cache=tmp_path)
    assert again == long
    assert "decode on v5e:2x2: 4 chips, mesh data 2 x tensor 2" in shown.generation_table(long)


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_the_bytes(tmp_path):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install codellama_jax[aot]")
    model = replace(SMALL, num_layers=1)
    with pytest.raises(ValueError, match="prefill of 4096 rows .* needs .* GiB .*batch=2048, a sh"):
        generation.plan_generation(
            model, FOUR, batch=4_096, context=65_536, quick=True, cache=tmp_path
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_prompts_longer_than_a_chunk_are_read_by_weights_of_any_dtype(dtype):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install codellama_jax[aot]")
    where, model = chips.Slice.parse("v5e:2x2"), replace(SMALL, num_layers=1)
    mesh = sharding.make_mesh(config.Layout(data=2, fsdp=1, tensor=2), where.topology())

    def of(shape, dtype, place):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    params = jax.tree.map(
        lambda w: of(w.shape, dtype, w.sharding), generation.abstract_weights(model, mesh)
    )
    rows = jax.sharding.NamedSharding(mesh, sharding.spec("batch"))
    with jax.set_mesh(mesh):
        lowered = decode.prefill.lower(
            params, of((2, 4_096), "int32", rows), of((2,), "int32", rows), model=model, room=16
        )
    compiled = lowered.compile(compiler_options=program.least_effort("v5e"))
    kernels_called = compiled.as_text().count("splash_mqa_fwd")
    assert (kernels_called > 0) == (dtype != "float16")  # which the kernel does not know
