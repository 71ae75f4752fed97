"""What is read from one collective's line: its group of devices, and its bytes."""

import pytest

from codellama_jax.plan import collective, schedule


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
    assert collective.group_of(groups) == first


def test_groups_in_another_form_are_refused_rather_than_guessed():
    for text in ("replica_groups=mesh['x'=4] {'x':(1)2}", "replica_groups=@named"):
        with pytest.raises(ValueError, match="not known"):
            collective.group_of(text)


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
    assert collective.read(opcode, line, False).wire_bytes == wire
