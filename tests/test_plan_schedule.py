"""What is read from the text of a schedule: how often, in which order, what moves."""

import pytest
from schedule_fixture import HLO

from codellama_jax.plan import schedule


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


def test_a_text_that_is_no_schedule_is_refused():
    with pytest.raises(ValueError, match="no scheduled HLO module"):
        schedule.read(HLO.replace("is_scheduled=true", ""))
    with pytest.raises(ValueError, match="no trip count"):
        schedule.read(HLO.replace("constant(32)", "parameter(0)"))
