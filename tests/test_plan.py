"""Planning: what is read from a schedule, what follows from it, and one real compile for a TPU."""

import argparse
import gzip
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest

from codellama_jax import chips, config, launch, ledger, plan, schedule
from recipes import code_llama

V5E = chips.Slice.parse("v5e:16x16")
CODE_7B = code_llama.stages("7b")["code"]

# A program with a loop of 32 trips, in it a kernel, one asynchronous all-gather that is seen three
# times, and an all-reduce of two arrays. The kernel's text holds lines that begin with "}}".
HLO = """\
HloModule jit_train_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%gathering (p0: bf16[16,128]) -> bf16[4096,128] {
  %p0 = bf16[16,128]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[4096,128]{1,0} all-gather(%p0), channel_id=3, \
replica_groups=mesh['a'=1,'b'=256] {'b'}, dimensions={0}
}

%gathering.done (p0: bf16[16,128]) -> bf16[4096,128] {
  ROOT %all-gather.2 = bf16[4096,128]{1,0} all-gather(%p0), channel_id=3, \
replica_groups=mesh['a'=1,'b'=256] {'b'}, dimensions={0}
}

%inner (p0: bf16[8]) -> bf16[8] {
  ROOT %product = bf16[8]{0} multiply(%p0, %p0), \
backend_config={"window_config":{"estimated_cycles":"999999"}}
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %async-collective-start = (bf16[4096,128]{1,0}, s32[]) fusion(%w), kind=kCustom, calls=%gathering
  %fusion.1 = bf16[8]{0} fusion(%x), kind=kOutput, calls=%inner, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %splash_mha_fwd_segmented_residuals.3 = (f32[512,128]{1,0}, bf16[32,4096,128]{2,1,0}) \
custom-call(%q, %k), custom_call_target="tpu_custom_call", \
backend_config={"custom_call_config": {"body": "
}} not the end of the loop
"}}
  %async-collective-done = bf16[4096,128]{1,0} \
fusion(%async-collective-start), kind=kCustom, calls=%gathering.done
  %all-reduce.7 = (bf16[1024,8]{1,0}, bf16[1024,24]{1,0}) all-reduce(%g, %h), channel_id=9, \
replica_groups=[1,256]<=[256], to_apply=%add
  ROOT %next = (s32[], f32[8]) tuple(%i, %y)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %copy.1 = f32[8]{0} copy(%p), backend_config={"window_config":{"estimated_cycles":"70"}}
  %while.1 = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0} get-tuple-element(%while.1), index=1
}
"""


def test_a_loop_counts_as_often_as_it_runs():
    program, loop = schedule.read(HLO)
    assert (program.times, program.cycles) == (1, 70)
    assert (loop.times, loop.cycles) == (32, 1_000)  # nothing from inside the fusion
    assert dict(loop.kernels) == {"splash_mha_fwd_segmented_residuals": 1}


def test_a_collective_seen_three_times_moves_once():
    _, loop = schedule.read(HLO)
    gather, reduce = sorted(loop.collectives, key=lambda each: each.kind)
    assert (gather.kind, gather.dtype, gather.asynchronous) == ("all-gather", "bf16", True)
    assert gather.wire_bytes == 4_096 * 128 * 2 * 255 / 256
    assert (reduce.kind, reduce.size, reduce.asynchronous) == ("all-reduce", 1_024 * 32 * 2, False)
    assert reduce.wire_bytes == 2 * 1_024 * 32 * 2 * 255 / 256


def test_a_text_that_is_no_schedule_is_refused():
    with pytest.raises(ValueError, match="no scheduled HLO module"):
        schedule.read(HLO.replace("is_scheduled=true", ""))
    with pytest.raises(ValueError, match="no trip count"):
        schedule.read(HLO.replace("constant(32)", "parameter(0)"))


@pytest.mark.parametrize(
    "groups, first",
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,2]<=[4]", (0, 1)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", (0, 2)),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}, z", (0, 2)),
        ("source_target_pairs={{0,1}}", ()),
    ],
)
def test_every_way_to_write_groups_is_read(groups, first):
    assert schedule.group_of(groups) == first


def test_groups_in_another_form_are_refused_rather_than_guessed():
    for text in ("replica_groups=mesh['x'=4] {'x':(1)2}", "replica_groups=@named"):
        with pytest.raises(ValueError, match="not known"):
            schedule.group_of(text)


@pytest.mark.parametrize(
    "line, wire",
    [
        ("bf16[256]{0} reduce-scatter(%x), replica_groups=[1,4]<=[4]", 256 * 2 * 4 * 3 / 4),
        (
            "(bf16[64]{0}, bf16[256]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]",
            256 * 2 * 3 / 4,
        ),
        ("f32[256]{0} all-to-all(%x), replica_groups=[1,4]<=[4]", 256 * 4 * 3 / 4),
        ("(f32[8]{0}, f32[8]{0}, u32[]) collective-permute-start(%x)", 32),
    ],
)
def test_bytes_on_the_wire(line, wire):
    opcode = schedule.OPCODE.search(" " + line)[1]
    assert schedule.collective(opcode, line, False).wire_bytes == wire


# -- chips ---------------------------------------------------------------------------------------
def test_chips_compute_what_their_matrix_units_can():
    for chip in chips.CHIPS.values():
        units = chip.peak_tflops * 1e12 / (2 * chip.mxu**2 * chip.clock_ghz * 1e9)
        assert units == pytest.approx(round(units), rel=0.02), chip.name  # a whole number of them


def test_slices_are_read_and_written():
    for text in ("v5e:16x16", "v5p:4x4x8", "2xv6e:16x16", "tpu7x:4x4x4"):
        assert str(chips.Slice.parse(text)) == text
    assert chips.Slice.parse("2xv6e:16x16").chips == 512
    assert chips.Slice.parse("tpu7x:4x4x4").devices == 128


@pytest.mark.parametrize(
    "text, said",
    [
        ("v5p-128", "is no slice; write chip:shape"),
        ("v9:4x4", "The chips are v4, v5e"),
        ("v5e:4x4x4", "has 2 dimensions"),
        ("v5e:32x32", "256 chips a slice"),
    ],
)
def test_a_slice_that_is_none_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        chips.Slice.parse(text)


def test_links_of_a_group():
    places = [(x, y) for x in range(16) for y in range(16)]
    one = [0] * 256

    def links(group):
        return plan.span(tuple(group), places, one, V5E)

    assert links(range(256)) == 4  # two rings, both ways
    assert links(range(16)) == 2  # one ring
    assert links((0, 1)) == 1  # neighbours
    assert links(range(0, 16, 2)) == 1  # a ring shared with another group
    assert plan.span((0, 255), places, [0] * 255 + [1], V5E) == 0  # another slice


# -- the estimate --------------------------------------------------------------------------------
def facts(**changes):
    """1.5e9 cycles of compute, and 180 GB to gather: a second each on v5e's four links."""
    gather = {
        "kind": "all-gather", "dtype": "bf16", "wire_bytes": 180e9, "ways": 256, "links": 4.0,
        "asynchronous": True,
    }  # fmt: skip
    region = {
        "name": "main", "times": 1, "cycles": 1_500_000_000, "kernels": {},
        "collectives": [gather | changes],
    }  # fmt: skip
    return {"mesh": {"fsdp": 256}, "regions": [region]}


def test_asynchronous_links_hide_behind_compute_and_synchronous_ones_do_not():
    hidden = plan.step_time(CODE_7B, V5E, facts())
    waited = plan.step_time(CODE_7B, V5E, facts(asynchronous=False))
    longer = plan.step_time(CODE_7B, V5E, facts(wire_bytes=360e9))
    assert [t["step_seconds"] for t in (hidden, waited, longer)] == [1, 2, 2]
    assert (hidden["exposed_seconds"], longer["binds"]) == (0, "links")


def test_mfu_follows_from_flops_per_token():
    time = plan.step_time(CODE_7B, V5E, facts())
    flops = CODE_7B.model.flops_per_token(4_096) * CODE_7B.data.batch_tokens
    assert time["mfu"] == pytest.approx(flops / (256 * 197e12), rel=1e-4)
    assert time["mfu_full_attention"] > time["mfu"]
    days = CODE_7B.steps / 86_400
    assert time["stage_chip_hours"] == pytest.approx(days * 24 * 256, rel=1e-4)


def test_flops_per_token_are_those_of_the_step_that_is_traced():
    import jax
    from spine_fixture import mesh, stage

    from codellama_jax import optim, state, step

    small = stage()
    tx, devices = optim.adamw(small.optim, small.steps), mesh()
    with jax.set_mesh(devices):
        jaxpr = jax.make_jaxpr(step.make_train_step(small, "cpu"))(
            state.abstract_state(small.model, tx, devices), plan.abstract_batch(small, devices)
        )
    attention = small.model.flops_per_token(32) - small.model.flops_per_token(0)
    # a row of 32 is one block: the whole square of scores is computed, twice the causal half;
    # chunked losses compute their logits twice; norms are counted as weights, and are no product
    logits = 2 * small.model.dim * small.model.vocab_size
    norms = 6 * small.model.dim * (2 * small.model.num_layers + 1)
    expected = small.model.flops_per_token(32) + attention + logits - norms
    assert products(jaxpr.jaxpr) == expected * small.data.batch_tokens


def products(jaxpr, times=1) -> int:
    """Floating point operations of the matrix products of a program."""
    import math

    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (left, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in left)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape) * times
        trips = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for value in eqn.params.values():
            for part in value if isinstance(value, tuple | list) else (value,):
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    total += products(part, trips)
    return total


def test_an_unknown_kernel_is_refused_rather_than_left_out():
    made = facts()
    made["regions"][0]["kernels"] = {"my_kernel": 1}
    with pytest.raises(ValueError, match="no estimate for the kernel 'my_kernel'"):
        plan.step_time(CODE_7B, V5E, made)


def test_the_smallest_slice_by_arithmetic_grows_with_the_model():
    sizes = [
        plan.smallest(code_llama.stages(size)["code"], chips.CHIPS["v5p"]).chips
        for size in config.SIZES
    ]
    assert sizes == sorted(sizes)
    assert plan.by_arithmetic(CODE_7B, chips.Slice.parse("v5e:4x4")) > plan.by_arithmetic(
        CODE_7B, V5E
    )


def test_arithmetic_comes_near_the_compiler():
    everything_recomputed = plan.by_arithmetic(CODE_7B, V5E)  # 2.82 GiB compiled
    assert everything_recomputed == (pytest.approx(2.82, rel=0.2), 1)
    # 64 rows of 16,384 do not divide among 256 devices: with a tensor axis they do
    long = plan.by_arithmetic(code_llama.stages("34b")["long_context"], V5E)
    assert long == (pytest.approx(7.95, rel=0.2), 4)  # compiled: 7.95 GiB
    assert plan.by_arithmetic(CODE_7B, chips.Slice.parse("v5e:3x3")) is None


# -- refusals and the cache ----------------------------------------------------------------------
def test_a_stage_that_does_not_fit_is_told_what_would(tmp_path, monkeypatch):
    refused = {"mesh": {"fsdp": 256}, "too_big": {"needs": 32.54, "has": 15.75}}
    monkeypatch.setattr(plan, "compiled", lambda *_: refused)
    stage = replace(CODE_7B, layout=config.Layout(remat="dots"))
    with pytest.raises(ValueError, match="32.5 GiB.*15.75: try layout.remat=full, or layout.micro"):
        plan.plan(stage, V5E, cache=tmp_path)


def test_rows_that_do_not_divide_are_refused():
    stage = replace(CODE_7B, layout=config.Layout(microbatches=8))
    with pytest.raises(ValueError, match="128 rows per microbatch do not divide.*256"):
        plan.check_rows(stage, V5E, 256)


def test_the_same_question_is_answered_without_asking_again(tmp_path, monkeypatch):
    stage = plan.canonical(CODE_7B)
    asked = plan.digest(
        [config.to_json(stage), str(V5E), {}, plan.versions(), plan.own_code()],
    )
    places = [[x, y] for x in range(16) for y in range(16)]
    kept = {"mesh": {"fsdp": 256}, "places": places, "slices": [0] * 256}
    plan.save(tmp_path / "program.json", kept)
    plan.save(tmp_path / "program.hlo.gz", gzip.compress(HLO.encode()))
    plan.save(tmp_path / f"{asked}.alias.json", "program")
    monkeypatch.setattr(plan, "lower", lambda *_: pytest.fail("asked again"))
    loop = plan.compiled(stage, V5E, {}, tmp_path)["regions"][1]
    assert (loop["times"], [each["links"] for each in loop["collectives"]]) == (32, [4, 4])
    assert not list(tmp_path.glob("*.tmp"))


def test_stages_that_differ_in_numbers_alone_share_a_compile():
    stages = code_llama.stages("34b")
    assert plan.canonical(stages["code"]) == plan.canonical(stages["python"])
    assert plan.canonical(stages["code"]) != plan.canonical(stages["long_context"])


def test_every_layout_of_the_recipes_divides():
    found = 0
    for size in config.SIZES:
        for stage in code_llama.stages(size).values():
            for text, layout in code_llama.layouts(stage, size).items():
                where = chips.Slice.parse(text)
                others = layout.data * layout.tensor * layout.context
                fsdp = where.devices // others if layout.fsdp == -1 else layout.fsdp
                assert others * fsdp == where.devices
                plan.check_rows(replace(stage, layout=layout), where, layout.data * fsdp)
                found += 1
    assert found


def test_a_slice_takes_the_layout_of_the_recipe_or_is_refused():
    def laid_out(where):
        args = argparse.Namespace(size="7b", slice=where)
        return launch.laid_out(CODE_7B, args, code_llama.layouts).layout

    assert laid_out(None) == CODE_7B.layout
    assert laid_out("v5e:16x16") == code_llama.layouts(CODE_7B, "7b")["v5e:16x16"]
    with pytest.raises(ValueError, match="no layout for slice 'v5e:2x2', only for v5e:16x16, v5p"):
        laid_out("v5e:2x2")


# -- the ledger ----------------------------------------------------------------------------------
DOCS = Path(__file__).parents[1] / "docs"


def test_every_layout_of_the_recipes_is_in_the_ledger_with_room_to_spare():
    rows = {
        (row["size"], row["rows"], row["seq_len"], row["slice"], row["layout"]): row
        for row in ledger.read(DOCS)
    }
    for (size, number, length), layouts in code_llama.LAYOUTS.items():
        for where, layout in layouts.items():
            row = rows[size, number, length, where, " ".join(plan.as_fields(layout))]
            assert row["headroom"] >= plan.HEADROOM
            assert row["peak_gib"] <= row["limit_gib"]


def test_the_table_in_the_docs_is_that_of_the_ledger():
    assert ledger.table(ledger.read(DOCS)) in (DOCS / "pods.md").read_text()


def test_recording_a_cell_again_replaces_it(tmp_path):
    (tmp_path / "pods.md").write_text("above\n<!-- ledger -->\nold\n<!-- /ledger -->\nbelow\n")
    rows = ledger.read(DOCS)
    for row in (*rows, rows[0] | {"mfu": 0.5}):
        ledger.record(tmp_path, row)
    assert len(ledger.read(tmp_path)) == len(rows)
    text = (tmp_path / "pods.md").read_text()
    assert text.startswith("above") and text.endswith("below\n") and "50.0%" in text


def test_a_cell_that_got_worse_is_refused():
    row = ledger.read(DOCS)[0]
    assert "no new collectives" in ledger.compare(DOCS, row)
    with pytest.raises(ValueError, match="3.0% more than the ledger's"):
        ledger.compare(DOCS, row | {"peak_gib": 1.03 * row["peak_gib"]})
    with pytest.raises(ValueError, match="does not: send"):
        ledger.compare(DOCS, row | {"collectives": [*row["collectives"], {"kind": "send"}]})
    with pytest.raises(ValueError, match="has no row of 7b code on v5e:2x2"):
        ledger.compare(DOCS, row | {"slice": "v5e:2x2", "size": "7b", "stage": "code"})


# -- the real compiler ---------------------------------------------------------------------------
@pytest.mark.slow
def test_a_two_layer_twin_compiles_for_tpus(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'codellama_jax[aot]'")
    where = chips.Slice.parse("v5e:2x2")
    model = replace(
        CODE_7B.model, num_layers=2, dim=512, num_heads=4, num_kv_heads=2, ffn_dim=1_024
    )
    stage = replace(
        CODE_7B,
        model=model,
        data=replace(CODE_7B.data, seq_len=512, batch_tokens=8 * 512),
        layout=config.Layout(remat="dots", loss_chunk=512),
    )
    report = plan.plan(stage, where, cache=tmp_path)
    assert report["memory"]["arguments"] * 2**30 == pytest.approx(3 * model.num_params, rel=0.02)
    assert report["memory"]["headroom"] > 0.9
    assert {row["kind"] for row in report["time"]["collectives"]} <= set(schedule.KINDS)
    assert json.loads(json.dumps(report)) == plan.plan(stage, where, cache=tmp_path)
