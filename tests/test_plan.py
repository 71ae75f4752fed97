"""Planning: what is read from a schedule, what follows from it, and one real compile for a TPU."""

import gzip
from dataclasses import replace

import pytest

from codellama_jax import arithmetic, chips, config, estimate, kernels, launch, plan, schedule
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
custom-call(%q, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, metadata={op_name="jit(f)/splash_mha_fwd_segmented_residuals/pallas_call"}
  %fusion.2 = f32[32,128]{1,0} fusion(%z), frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, kind=kLoop, calls=%inner, backend_config={"window_config":{"estimated_cycles":"30"}}
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
    assert (loop.times, loop.cycles) == (32, 1_030)  # nothing from inside the fusions
    assert dict(loop.kernels) == {"splash_mha_fwd_segmented_residuals 512": 1}


def test_a_loop_over_shards_counts_its_steps_in_another_type():
    shards = HLO.replace("s32[]{:T(128)} constant(32)", "u32[]{:T(128)} constant(4)")
    assert [region.times for region in schedule.read(shards, rounds=196)] == [1, 4]


def test_a_collective_seen_three_times_moves_once():
    _, loop = schedule.read(HLO)
    gather, reduce = sorted(loop.collectives, key=lambda each: each.kind)
    assert (gather.kind, gather.dtype, gather.asynchronous) == ("all-gather", "bf16", True)
    assert gather.wire_bytes == 4_096 * 128 * 2 * 255 / 256
    assert (reduce.kind, reduce.size, reduce.asynchronous) == ("all-reduce", 1_024 * 32 * 2, False)
    assert reduce.wire_bytes == 2 * 1_024 * 32 * 2 * 255 / 256


SCATTER = """\
%all-reduce-scatter.1.clone (input: bf16[4096,128]) -> bf16[16,128] {
  %all-reduce.2 = bf16[4096,128]{1,0} all-reduce(%input), channel_id=5, \
replica_groups=[1,256]<=[256], to_apply=%add
  ROOT %own = bf16[16,128]{1,0} dynamic-slice(%all-reduce.2, %place, %zero), \
dynamic_slice_sizes={16,128}
}

%body (state"""
SCATTERS = """
  %fusion.9 = bf16[16,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1.clone
  ROOT %next ="""


def test_an_all_reduce_whose_slice_is_taken_is_a_reduce_scatter_and_sends_half():
    text = HLO.replace("%body (state", SCATTER, 1).replace("\n  ROOT %next =", SCATTERS, 1)
    _, loop = schedule.read(text)
    (scatter,) = [each for each in loop.collectives if each.kind == "reduce-scatter"]
    assert not scatter.asynchronous
    assert scatter.wire_bytes == 4_096 * 128 * 2 * 255 / 256
    assert sum(each.kind == "all-reduce" for each in loop.collectives) == 1


def test_a_collective_begun_before_a_loop_moves_in_the_loop_too():
    """As where the compiler lets a loop gather what its next round needs."""
    before = "  %async-collective-start = (bf16[8]) fusion(%w), kind=kCustom, calls=%gathering\n"
    text = HLO.replace("  %while.1", f"{before}  %while.1")
    for region in schedule.read(text):
        assert [each.kind for each in region.collectives].count("all-gather") == 1


def test_a_schedule_keeps_its_order():
    program, loop = schedule.read(HLO)
    assert program.order == [("cycles", 70)]
    assert loop.order == [
        ("begin", 0), ("cycles", 1_000), ("kernel", "splash_mha_fwd_segmented_residuals 512"),
        ("cycles", 30), ("end", 0), ("begin", 1), ("end", 1),
    ]  # fmt: skip


TWICE = """
  %async-collective-start.1 = (bf16[4096,128]{1,0}, s32[]) \
fusion(%v), kind=kCustom, calls=%gathering
  %state.1 = s32[] get-tuple-element(%async-collective-start.1), index=1
  %fusion.3 = (bf16[8]{0}, s32[]) fusion(%x, %state.1), kind=kOutput, calls=%gathering
  %state.2 = s32[] get-tuple-element(%fusion.3), index=1
  %async-collective-done.1 = bf16[4096,128]{1,0} \
fusion(%state.2), kind=kCustom, calls=%gathering.done
  %all-reduce.7 ="""


def test_collectives_of_one_channel_are_told_apart_by_what_they_take():
    """jax.shard_map gives all of its collectives the same channel: keys and values, for one."""
    _, loop = schedule.read(HLO.replace("\n  %all-reduce.7 =", TWICE, 1))
    assert [each.kind for each in loop.collectives] == ["all-gather", "all-gather", "all-reduce"]
    assert loop.order[-4:] == [("begin", 1), ("end", 1), ("begin", 2), ("end", 2)]


OFFLOADED = """\
%called_computation.1 (p0: bf16[64,128], p1: token[]) -> bf16[1024,128] {
  ROOT %all-gather.8 = bf16[1024,128]{1,0} all-gather(%p0), channel_id=8, \
replica_groups=[16,16]<=[256], dimensions={0}
}, execution_thread="sparsecore"

%body (state"""
OFFLOADS = {  # to a sparse core, by the version of libtpu
    "0.0.42": """
  %all-gather.9.cloned.1.call-start = ((bf16[64,128]{1,0}, token[]), bf16[1024,128]{1,0}) \
call-start(%v, %t), async_execution_thread="sparsecore", to_apply=%called_computation.1
  %all-gather.9.cloned.1.call-done = bf16[1024,128]{1,0} \
call-done(%all-gather.9.cloned.1.call-start)
  ROOT %next =""",
    "0.0.52": """
  %all-gather.9.cloned.1.call-start = ((), (), (s32[8192]{0}, s32[99]{0})) custom-call-start(), \
async_execution_thread="sparsecore", called_computations={%called_computation.1}
  %all-gather.9.cloned.1.call-update = ((bf16[64,128]{1,0}), bf16[1024,128]{1,0}, (s32[8192]{0})) \
custom-call-update(%all-gather.9.cloned.1.call-start, %v)
  %all-gather.9.cloned.1.call-done = bf16[1024,128]{1,0} \
custom-call-done(%all-gather.9.cloned.1.call-update)
  ROOT %next =""",
}


@pytest.mark.parametrize("libtpu", OFFLOADS)
def test_a_collective_of_a_sparse_core_runs_beside_the_others(libtpu):
    offloads = OFFLOADS[libtpu]
    text = HLO.replace("%body (state", OFFLOADED, 1).replace("\n  ROOT %next =", offloads, 1)
    _, loop = schedule.read(text)
    assert loop.cycles == 1_030  # the computation that follows is read as before
    (gather,) = [each for each in loop.collectives if len(each.group) == 16]
    assert (gather.kind, gather.asynchronous) == ("all-gather", True)
    assert gather.wire_bytes == 1_024 * 128 * 2 * 15 / 16
    place = loop.collectives.index(gather)
    assert loop.order[-2:] == [("begin", place), ("end", place)]


def test_the_devices_of_a_chip_share_its_links():
    each = {"links": 2.0, "wire_bytes": 200e9}
    assert estimate.seconds(each, chips.CHIPS["tpu7x"]) == 2.0  # two devices, links of 100 GB/s


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


@pytest.mark.parametrize(
    "text, rings, wrap",
    [
        ("v5e:16x16", (True, True), ()),
        ("v6e:8x16", (False, True), ()),
        ("v5e:8x8", (False, False), ()),
        ("v5p:4x4x8", (True, True, True), (True, True, True)),
        ("v4:4x4x4", (True, True, True), (True, True, True)),
        ("v5p:2x4x4", (False, False, False), ()),  # less than a cube
    ],
)
def test_cubes_and_sides_of_16_are_rings_and_libtpu_is_told_of_cubes(text, rings, wrap):
    where = chips.Slice.parse(text)
    assert (where.rings, where.wrap) == (rings, wrap)


def test_links_of_a_group():
    places = [(x, y) for x in range(16) for y in range(16)]
    one = [0] * 256

    def span_of(group, slices, kind="all-gather"):
        each = schedule.Collective(kind, "bf16", 1, tuple(group), False)
        return estimate.span(each, places, slices, V5E)

    def links(group):
        return span_of(group, one)

    assert links(range(256)) == 4  # two rings, both ways
    assert links(range(16)) == 2  # one ring
    assert links((0, 1)) == 1  # neighbours
    assert links(range(0, 16, 2)) == 1  # a ring shared with another group
    assert span_of((0, 255), [0] * 255 + [1]) == 0  # another slice
    assert span_of((), one, "collective-permute") == 1
    assert span_of((), one, "send") == 0


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
        "order": [("begin", 0), ("cycles", 1_500_000_000), ("end", 0)],
    }  # fmt: skip
    return {"mesh": {"fsdp": 256}, "regions": [region]}


def test_what_moves_hides_behind_compute_until_it_is_awaited():
    hidden = estimate.step_time(CODE_7B, V5E, facts())
    longer = estimate.step_time(CODE_7B, V5E, facts(wire_bytes=360e9))
    assert [t["step_seconds"] for t in (hidden, longer)] == [1, 2]
    assert (hidden["exposed_seconds"], longer["binds"]) == (0, "links")


CYCLES = [("cycles", 750_000_000)]  # half a second on v5e
MOVES = ("begin", 0), ("begin", 1)


@pytest.mark.parametrize(
    "order, times, seconds",
    [
        ([MOVES[0], ("end", 0), *CYCLES], 1, 1.5),  # at once: nothing is hidden
        ([MOVES[0], *CYCLES, ("end", 0)], 1, 1.0),
        ([*MOVES, *CYCLES, *CYCLES, ("end", 0), ("end", 1)], 1, 2.0),  # one after another
        ([*CYCLES, MOVES[0]], 1, 0.5),  # awaited elsewhere
        ([("end", 0), *CYCLES, *CYCLES, MOVES[0]], 32, 2.0),  # of a loop: begun a round before
        ([*CYCLES, ("end", 0), MOVES[0], *CYCLES], 32, 1.0),
    ],
)
def test_a_region_is_played_in_its_order(order, times, seconds):
    region = {"times": times, "order": order}
    assert estimate.played(region, [1.0, 1.0], None, chips.CHIPS["v5e"]) == seconds


def test_mfu_follows_from_flops_per_token():
    time = estimate.step_time(CODE_7B, V5E, facts())
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
        estimate.step_time(CODE_7B, V5E, made)


def test_kernels_take_their_schedule_as_often_as_their_grid_runs():
    layout = config.Layout(microbatches=4)
    stage = replace(CODE_7B, layout=layout)
    each = kernels.SCHEDULED["v5e"][512]["fwd"]  # blocks of 512
    blocks, rows, steps = 8 * 9 / 2, 8, 8 * 8  # of a row of 4,096, a row and 32 heads a device
    expected = 32 * (blocks * each.block + rows * each.row + steps * each.step) / 1.5e9
    name = "splash_mha_fwd_segmented_residuals 512"
    assert estimate.kernel_seconds(name, stage, V5E, {"fsdp": 256}) == pytest.approx(expected)
    half = estimate.kernel_seconds(name, stage, V5E, {"fsdp": 128, "tensor": 2})
    assert half == pytest.approx(expected)  # twice the rows, half the heads


def test_the_cores_of_a_device_share_pairs_of_a_row_and_a_key_head_but_not_one_of_them():
    stage, name = code_llama.stages("34b")["code"], "splash_mqa_dkv_segmented_no_residuals 1024"
    v5p = chips.Slice.parse("v5p:4x4x8")

    def seconds(rows, tensor):
        made = replace(stage, layout=config.Layout(microbatches=1_024 // (rows * 128 // tensor)))
        return estimate.kernel_seconds(name, made, v5p, {"fsdp": 128 // tensor, "tensor": tensor})

    assert seconds(2, 1) == 2 * seconds(1, 1)
    assert seconds(1, 4) == pytest.approx(seconds(1, 1) / 4)  # 2 of 8 key heads: a core each
    assert seconds(1, 8) == pytest.approx(seconds(1, 4))  # one: the other core waits


def test_no_kernel_is_faster_than_the_matrix_units():
    for table in (kernels.SCHEDULED, kernels.BALANCED):
        for chip, sizes in table.items():
            for size, parts in sizes.items():
                for part, each in parts.items():
                    assert each.block >= 0.99 * kernels.ideal(part, chips.CHIPS[chip], size)


# -- without the compiler ------------------------------------------------------------------------
def test_policies_recompute_the_products_that_they_do_not_keep():
    model = config.SIZES["7b"]
    D, F, norms = 4_096, 11_008, 2 * 4_096
    assert arithmetic.recomputed(model, "full") == pytest.approx(
        4 * D * D + 2 * D * F, abs=2 * norms
    )
    assert arithmetic.recomputed(model, "attention") == D * D + 2 * D * F
    assert arithmetic.recomputed(model, "dots") == arithmetic.recomputed(model, "none") == 0


def laid_out(size, name, **layout):
    return replace(code_llama.stages(size)[name], layout=config.Layout(**layout))


@pytest.mark.parametrize(
    "size, name, where, layout, peak",
    [  # what compiles said: jax 0.10.2, libtpu 0.0.42.1
        ("7b", "code", "v5e:16x16", {"microbatches": 4, "remat": "dots"}, 14.34),
        ("13b", "code", "v5e:16x16", {"microbatches": 4, "remat": "attention"}, 12.39),
        ("34b", "code", "v5e:16x16", {"microbatches": 4}, 8.69),
        ("34b", "long_context", "v5e:16x16", {"tensor": 4}, 7.73),
        ("7b", "long_context", "v5e:16x16", {"tensor": 2, "remat": "attention"}, 13.84),
        (
            *("7b", "code", "v5p:4x4x4"),
            {"data": 4, "fsdp": 16, "microbatches": 4, "remat": "dots"},
            62.55,
        ),
    ],
)
def test_arithmetic_comes_near_the_compiler(size, name, where, layout, peak):
    stage = laid_out(size, name, loss_chunk=4_096, **layout)
    assert arithmetic.gib(stage, chips.Slice.parse(where)) == pytest.approx(peak, rel=0.22)


def test_the_smallest_slice_by_arithmetic_grows_with_the_model():
    sizes = [
        arithmetic.smallest(code_llama.stages(size)["code"], chips.CHIPS["v5p"]).chips
        for size in config.SIZES
    ]
    assert sizes == sorted(sizes)
    assert arithmetic.least(CODE_7B, chips.Slice.parse("v5e:3x3")) is None


@pytest.mark.parametrize("where", ["v5e:16x16", "v5p:4x4x8", "2xv5e:16x16"])
@pytest.mark.parametrize("size, name", [("7b", "code"), ("34b", "long_context")])
def test_candidates_divide_and_the_promising_come_first(size, name, where):
    where = chips.Slice.parse(where)
    stage = code_llama.stages(size)[name]
    made = [replace(stage, layout=layout) for layout in arithmetic.candidates(stage, where)]
    assert made
    for each in made:
        data, fsdp = arithmetic.ways(each, where)
        assert data * fsdp * each.layout.tensor * each.layout.context == where.devices
        assert data % where.count == 0
        plan.check_rows(each, where, data * fsdp)
    times = [arithmetic.seconds(each, where) for each in made]
    assert times == sorted(times)


# -- refusals and the cache ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "size, where, layout, hint",
    [
        ("7b", "v5e:16x16", {"remat": "dots"}, "layout.remat=full$"),
        ("34b", "v5e:4x4", {}, "a larger slice, such as v5e:"),
        ("70b", "v5e:16x16", {"remat": "dots"}, "layout.fsdp=.* layout.microbatches=.*"),
    ],
)
def test_a_stage_that_does_not_fit_is_told_what_would(
    tmp_path, monkeypatch, size, where, layout, hint
):
    refused = {"mesh": {"fsdp": 256}, "too_big": {"needs": 32.54, "has": 15.75}}
    monkeypatch.setattr(plan, "compiled", lambda *_: refused)
    stage, where = laid_out(size, "code", **layout), chips.Slice.parse(where)
    sentence = f"32.5 GiB a device, {where} has 15.75: try {hint}"
    with pytest.raises(ValueError, match=sentence) as said:
        plan.plan(stage, where, cache=tmp_path)
    settings = [part.strip(",") for part in str(said.value).split() if part.startswith("layout.")]
    if settings:
        stage = launch.changed({"code": stage}, settings)["code"]
        assert arithmetic.divides(stage, where)
        assert arithmetic.gib(stage, where) <= arithmetic.SPARED * where.chip.hbm_gib


@pytest.mark.parametrize("layout", [{"context": 3}, {"fsdp": 64}])
def test_a_mesh_that_does_not_fill_the_slice_is_refused_with_one_that_does(layout):
    stage = laid_out("34b", "long_context", **layout)
    with pytest.raises(ValueError, match="v5e:16x16 has 256: try layout.*context=4"):
        plan.check_mesh(stage, V5E)
    plan.check_mesh(laid_out("34b", "long_context", context=4), V5E)


def test_rows_that_do_not_divide_are_refused():
    stage = replace(CODE_7B, layout=config.Layout(microbatches=8))
    with pytest.raises(ValueError, match="128 rows per microbatch.*256.*microbatches=4 they"):
        plan.check_rows(stage, V5E, 256)
    with pytest.raises(ValueError, match="64 rows.*microbatches=1 and layout.context=4 they"):
        plan.check_rows(code_llama.stages("34b")["long_context"], V5E, 256)


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
