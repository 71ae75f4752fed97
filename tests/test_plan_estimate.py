"""The time of a step: links, what hides behind what, and attention by its kernels' schedules."""

from dataclasses import replace

import pytest

from codellama_jax import config
from codellama_jax.plan import chips, collective, estimate, kernels, program
from recipes import code_llama

V5E = chips.Slice.parse("v5e:16x16")
CODE_7B = code_llama.stages("7b")["code"]


# -- links ---------------------------------------------------------------------------------------
def test_the_devices_of_a_chip_share_its_links():
    each = {"links": 2.0, "wire_bytes": 200e9}
    assert estimate.seconds(each, chips.CHIPS["tpu7x"]) == 2.0  # two devices, links of 100 GB/s


def test_links_of_a_group():
    places = [(x, y) for x in range(16) for y in range(16)]
    one = [0] * 256

    def span_of(group, slices, kind="all-gather"):
        each = collective.Collective(kind, "bf16", 1, tuple(group), False)
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


# -- the step ------------------------------------------------------------------------------------
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
            state.abstract_state(small.model, tx, devices), program.abstract_batch(small, devices)
        )
    attention = small.model.flops_per_token(32) - small.model.flops_per_token(0)
    # a row of 32 is one block: the whole square of scores is computed, twice the causal half; norms
    # are counted as weights, and are no product
    norms = 6 * small.model.dim * (2 * small.model.num_layers + 1)
    expected = small.model.flops_per_token(32) + attention - norms
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


# -- kernels -------------------------------------------------------------------------------------
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
