"""Seconds of a step on a slice, put together from what the compiler says of it, loop by loop.

    compute   the compiler's `estimated_cycles` over the chip's clock, each loop times its trips
    kernels   attention, which has no such cycles: the instructions of each kernel's own schedule,
              as often as its grid runs them (kernels.py)
    links     bytes on the wire over the speed of the links their group spans, one collective after
              another. What is exposed comes from playing the schedule through in its order:
              compute and kernels go on while a collective moves, until it is awaited

It is an estimate. Left out: waits for memory inside kernels, the input pipeline, checkpoints and
held-out losses, stragglers, clock throttling, contention between collectives, and the latency of
small ones. Nothing ran on a chip.
"""

from collections.abc import Callable
from typing import Any

from codellama_jax import config
from codellama_jax.plan import chips, kernels, schedule
from codellama_jax.plan.collective import Collective

Report = dict[str, Any]


def step_time(stage: config.Stage, where: chips.Slice, facts: Report) -> Report:
    """Seconds of a step and its parts, and what follows from them for the whole stage."""

    def of_kernel(name: str) -> float:
        return kernel_seconds(name, stage, where, facts["mesh"])

    total = seconds_of(where, facts, of_kernel)
    tokens = stage.data.batch_tokens
    peak = where.chip.peak_tflops * 1e12 * where.chips
    causal = stage.model.flops_per_token(stage.data.seq_len)
    full = 2 * causal - stage.model.flops_per_token(0)  # attention counted as the whole square
    days = stage.steps * total["step"] / 86_400
    return {
        **{f"{name}_seconds": round(value, 4) for name, value in total.items()},
        "binds": binds(total),
        "tokens_per_second_per_chip": round(tokens / total["step"] / where.chips, 1),
        "mfu": round(tokens * causal / total["step"] / peak, 4),
        "mfu_full_attention": round(tokens * full / total["step"] / peak, 4),
        "stage_days": round(days, 2),
        "stage_chip_hours": round(days * 24 * where.chips),
        "collectives": collectives(facts, where.chip),
    }


def seconds_of(
    where: chips.Slice, facts: Report, of_kernel: Callable[[str], float]
) -> dict[str, float]:
    """compute, kernels, links, exposed (links that nothing hides) and step, in seconds.

    of_kernel: those of one call of the kernel of a name.
    """
    chip = where.chip
    total = dict.fromkeys(("compute", "kernels", "links", "exposed", "step"), 0.0)
    for region in facts["regions"]:
        compute = region["cycles"] / (chip.clock_ghz * 1e9)
        attention = sum(calls * of_kernel(name) for name, calls in region["kernels"].items())
        links = [seconds(each, chip) for each in region["collectives"]]
        step = played(region, links, of_kernel, chip)
        for name, value in (
            ("compute", compute),
            ("kernels", attention),
            ("links", sum(links)),
            ("exposed", step - compute - attention),
            ("step", step),
        ):
            total[name] += region["times"] * value
    return total


def played(
    region: Report, links: list[float], of_kernel: Callable[[str], float], chip: chips.Chip
) -> float:
    """Seconds of one round of a region in the order of its schedule. links: of each collective.

    Of a loop it is the second round: a collective may begin in one and be awaited in the next.
    """
    now, free = 0.0, 0.0  # free: when the links have done what was begun
    arrives: dict[int, float] = {}
    for _ in range(1 if region["times"] == 1 else 2):
        began = now
        for event, what in region["order"]:
            if event == "cycles":
                now += what / (chip.clock_ghz * 1e9)
            elif event == "kernel":
                now += of_kernel(what)
            elif event == "begin":
                free = arrives[what] = max(now, free) + links[what]
            else:
                now = max(now, arrives.get(what, now))
    return now - began


def binds(total: dict[str, float]) -> str:
    """What would have to be faster for the step to be: the larger of the two."""
    return "links" if total["links"] > total["compute"] + total["kernels"] else "compute"


def kernel_seconds(name: str, stage: config.Stage, where: chips.Slice, mesh: dict) -> float:
    """Time of one splash call on one device; the name ends with the side of its blocks."""
    from codellama_jax import attention

    ways = mesh.get("data", 1) * mesh.get("fsdp", 1)
    context, length, model = mesh.get("context", 1), stage.data.seq_len, stage.model
    part, (_, _, side) = kernels.part_of(name), name.partition(" ")
    block = int(side)
    keys, queries = length / block, length / context / block
    cycles = kernels.cycles(
        part,
        where.chip,
        block,
        blocks=attention.pairs(length, context, block) / block**2,
        rows=keys if part == "dkv" else queries,
        steps=queries * keys,
        table=kernels.BALANCED if context > 1 else kernels.SCHEDULED,
    )
    rows = stage.data.rows_per_batch / stage.layout.microbatches / ways
    pairs = rows * model.num_kv_heads / mesh.get("tensor", 1)
    return kernels.seconds(where.chip, cycles, pairs, model.num_heads // model.num_kv_heads)


# -- links ---------------------------------------------------------------------------------------
def regions(
    text: str, facts: Report, where: chips.Slice, rounds: int | None = None
) -> list[Report]:
    """The regions of a schedule (schedule.read), with the links that each collective has."""
    return [
        {
            "name": region.name,
            "times": region.times,
            "cycles": region.cycles,
            "kernels": dict(region.kernels),
            "collectives": [
                moved(each, span(each, facts["places"], facts["slices"], where))
                for each in region.collectives
            ],
            "order": region.order,
        }
        for region in schedule.read(text, rounds)
    ]


def moved(each: Collective, links: float) -> Report:
    return {
        "kind": each.kind,
        "dtype": each.dtype,
        "wire_bytes": round(each.wire_bytes),
        "ways": len(each.group),
        "links": links,  # 0: between slices
        "asynchronous": each.asynchronous,
    }


def span(each: Collective, places: list, slices: list, where: chips.Slice) -> float:
    """How many links a device sends through at once in this collective; 0 is the DCN.

    Along each dimension of the torus that the group spans: 2 if it is the whole ring, 1 on a line,
    and the share that is its own where groups lie interleaved.
    """
    group = each.group
    if each.kind == "send":  # TPUs send to other slices only
        return 0.0
    if not group:  # a permutation: to a neighbour
        return 1.0
    if len({slices[i] for i in group}) > 1:
        return 0.0
    links = 0.0
    for dim, (size, is_ring) in enumerate(zip(where.shape, where.rings, strict=True)):
        met = {places[i][dim] for i in group}
        if len(met) == 1:
            continue
        ring = 2.0 if is_ring else 1.0
        reach = max(met) - min(met) + 1
        links += ring if len(met) == size else 1.0 if reach == len(met) else ring * len(met) / size
    return links or 1.0


def seconds(each: Report, chip: chips.Chip) -> float:
    """Of the bytes that one device sends; the devices of a chip share its links."""
    speed = each["links"] * chip.link_gbs or chip.dcn_gbs
    return each["wire_bytes"] * chip.devices / (speed * 1e9)


def collectives(facts: Report, chip: chips.Chip) -> list[Report]:
    """By kind and type: GB a device sends in a step, and the seconds its links need for it."""
    rows: dict[tuple, Report] = {}
    for region in facts["regions"]:
        for each in region["collectives"]:
            key = each["kind"], each["dtype"], each["asynchronous"]
            row = rows.setdefault(key, {"gigabytes": 0.0, "seconds": 0.0, "calls": 0})
            row["gigabytes"] += region["times"] * each["wire_bytes"] / 1e9
            row["seconds"] += region["times"] * seconds(each, chip)
            row["calls"] += region["times"]
    names = ("kind", "dtype", "asynchronous")
    made = [dict(zip(names, key, strict=True)) | row for key, row in rows.items()]
    for row in made:
        row["gigabytes"], row["seconds"] = round(row["gigabytes"], 3), round(row["seconds"], 4)
    return sorted(made, key=lambda row: -row["gigabytes"])
