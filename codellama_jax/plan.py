"""What a stage needs on a TPU slice, from compiling its real step for it. No TPU is needed.

    report = plan.plan(stage, chips.Slice.parse("v5e:16x16"))      # minutes, then kept in a cache

The compiler gives the bytes. The time of a step is put together from three parts, loop by loop:

    compute   the compiler's `estimated_cycles` over the chip's clock, each loop times its trips
    kernels   attention, which the compiler does not estimate: the operations of each kernel call
              over KERNEL_SHARE of the chip's peak
    links     bytes on the wire over the speed of the links their group spans. Asynchronous ones
              hide behind compute and kernels of their loop, as long as these last; others wait

It is an estimate. Left out: the input pipeline, checkpoints and held-out losses, stragglers, clock
throttling, contention between collectives, and the latency of small ones. Nothing ran on a chip.
"""

import dataclasses
import gzip
import hashlib
import json
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from codellama_jax import chips, config, schedule
from codellama_jax.config import check

HEADROOM = 0.05  # share of the memory that a layout of a recipe leaves free
KERNEL_SHARE = {128: 0.55, 256: 0.35}  # of peak that splash attention reaches with heads of 128, by
# the side of a matrix unit: our assumption, between published profiles. A head of 128 fills half
# the rows of a unit of 256, and the softmax between two products runs on the vector unit.
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # products of T x T x H in each splash kernel
TENSORS = (1, 2, 4, 8)  # sizes of the tensor axis worth a thought; 8 key/value heads from 34B on
QUICK = {"exec_time_optimization_effort": -1.0}  # for bytes only: the schedule means nothing then
SOURCES = (
    "chips",
    "schedule",
    "plan",
    "config",
    "sharding",
    "attention",
    "model",
    "state",
    "optim",
)

Report = dict[str, Any]


def plan(
    stage: config.Stage, where: chips.Slice, *, quick: bool = False, cache: Path | None = None
) -> Report:
    """The JSON-ready report of one cell: a stage on a slice.

    `quick` compiles with least effort, for the bytes: such a report has no times. Raises ValueError
    when the stage does not divide or fit, with what would.
    """
    facts = compiled(canonical(stage), where, QUICK if quick else {}, cache or cache_folder())
    check("too_big" not in facts, too_big(stage, where, facts))
    report = {
        "stage": stage.name,
        "slice": str(where),
        "chips": where.chips,
        "rows": stage.data.rows_per_batch,
        "seq_len": stage.data.seq_len,
        "layout": config.to_json(stage.layout),
        "mesh": facts["mesh"],
        "memory": memory(facts, where.chip),
        "compiled": facts["compiled"],
    }
    if not quick:
        report["time"] = step_time(stage, where, facts)
    return report


# -- compiling -----------------------------------------------------------------------------------
def canonical(stage: config.Stage) -> config.Stage:
    """The stage without the numbers that change no byte: stages equal but for these are one."""
    data = replace(stage.data, mix={"any": 1.0}, infilling_rate=0.0, spm_rate=0.5, line_rate=0.0)
    data = replace(data, corpus="corpus", tokenizer="tokenizer.model", seed=0, workers=0)
    optim = config.Optim(
        peak_lr=1e-4, warmup_steps=1, final_lr_ratio=0.1, beta1=0.9, beta2=0.95, eps=1e-5,
        weight_decay=0.1, clip_norm=1.0,
    )  # fmt: skip
    return config.Stage(
        name="plan", start_from=None, model=stage.model, data=data, optim=optim, steps=1_000,
        layout=stage.layout,
    )  # fmt: skip


def compiled(stage: config.Stage, where: chips.Slice, options: dict, cache: Path) -> Report:
    """What the compiler says of a stage, from the cache if it was asked before.

    Two keys lead there: one of the recipe and the source files, which needs no work, and one of the
    program itself, which survives changes of the sources that do not change it.
    """
    asked = digest(
        [config.to_json(stage), str(where), options, versions(), own_code()],
    )
    program = load(cache / f"{asked}.alias.json")
    facts = load(cache / f"{program}.json") if program else None
    if facts is None:
        lowered, mesh = lower(stage, where)
        program = digest([lowered.as_text(), str(where), options, versions()])
        facts = load(cache / f"{program}.json")
        if facts is None:
            facts, text = compile_now(lowered, mesh, options)
            save(cache / f"{program}.hlo.gz", gzip.compress(text.encode()))
            save(cache / f"{program}.json", facts)
        save(cache / f"{asked}.alias.json", program)
    if "too_big" in facts:
        return facts
    text = gzip.decompress((cache / f"{program}.hlo.gz").read_bytes()).decode()
    return facts | {"regions": regions(text, facts, where)}


def lower(stage: config.Stage, where: chips.Slice):
    """The real step for devices that are not there: abstract state and batch, state donated."""
    devices = where.topology()
    import jax

    from codellama_jax import optim, sharding, state, step

    mesh = sharding.make_mesh(stage.layout, devices)
    check_rows(stage, where, mesh.shape["data"] * mesh.shape["fsdp"])
    train_state = state.abstract_state(stage.model, optim.adamw(stage.optim, stage.steps), mesh)
    train_step = jax.jit(step.make_train_step(stage, "tpu"), donate_argnums=0)
    with jax.set_mesh(mesh):
        return train_step.lower(train_state, abstract_batch(stage, mesh)), mesh


def abstract_batch(stage: config.Stage, mesh) -> dict:
    """The batch of a stage as shapes that know where they lie."""
    import jax
    import numpy as np

    from codellama_jax import sharding

    rows, place = stage.data.rows_per_batch, sharding.batch_sharding(mesh)
    shapes = {name: (rows, stage.data.seq_len + 1) for name in ("tokens", "segments", "positions")}
    made = {name: jax.ShapeDtypeStruct(s, np.int32, sharding=place) for name, s in shapes.items()}
    made["loss_mask"] = jax.ShapeDtypeStruct(shapes["tokens"], np.bool_, sharding=place)
    return made | {"corpus": jax.ShapeDtypeStruct((rows,), np.int32, sharding=place)}


def check_rows(stage: config.Stage, where: chips.Slice, ways: int) -> None:
    rows = stage.data.rows_per_batch // stage.layout.microbatches
    most = math.gcd(stage.data.rows_per_batch, where.devices)
    check(
        rows % ways == 0,
        f"{rows} rows per microbatch do not divide among data * fsdp = {ways} devices; with "
        f"layout.microbatches=1 and layout.tensor={where.devices // most} they would on {where}",
    )


def compile_now(lowered, mesh, options: dict) -> tuple[Report, str]:
    """What the compiler says of the bytes, and the schedule it made (HLO text)."""
    import jax

    began, cpu = time.monotonic(), time.process_time()
    made: Report = {"mesh": {name: n for name, n in mesh.shape.items() if n > 1}}
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", str(error))
        if found is None:
            raise
        return made | {"too_big": {"needs": float(found[1]), "has": float(found[2])}}, ""
    sizes = program.memory_analysis()
    made |= {
        "compiled": {
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "options": options,
            **versions(),
        },
        "memory": {
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "host": sizes.host_temp_size_in_bytes,
            "peak": sizes.peak_memory_in_bytes,
        },
        "places": [[int(x) for x in device.coords] for device in mesh.devices.flat],
        "slices": [int(getattr(device, "slice_index", 0)) for device in mesh.devices.flat],
    }
    return made, program.as_text()


def regions(text: str, facts: Report, where: chips.Slice) -> list[Report]:
    """The regions of a schedule (schedule.Region), with the links that each collective has."""
    return [
        {
            "name": region.name,
            "times": region.times,
            "cycles": region.cycles,
            "kernels": dict(region.kernels),
            "collectives": [
                moved(each, span(each.group, facts["places"], facts["slices"], where))
                for each in region.collectives
            ],
        }
        for region in schedule.read(text)
    ]


def moved(each: schedule.Collective, links: float) -> Report:
    return {
        "kind": each.kind,
        "dtype": each.dtype,
        "wire_bytes": round(each.wire_bytes),
        "ways": len(each.group),
        "links": links,  # 0: between slices
        "asynchronous": each.asynchronous,
    }


def span(group: tuple[int, ...], places: list, slices: list, where: chips.Slice) -> float:
    """How many links a device sends through at once in a collective of this group; 0 is the DCN.

    Along each dimension of the torus that the group spans: 2 if it is the whole ring, 1 on a line,
    and the share that is its own where groups lie interleaved.
    """
    if not group:  # a permutation: to a neighbour
        return 1.0
    if len({slices[i] for i in group}) > 1:
        return 0.0
    links = 0.0
    for dim, size in enumerate(where.shape):
        met = {places[i][dim] for i in group}
        if len(met) == 1:
            continue
        ring = 2.0 if size % where.chip.wraps_at == 0 else 1.0
        reach = max(met) - min(met) + 1
        links += ring if len(met) == size else 1.0 if reach == len(met) else ring * len(met) / size
    return links or 1.0


def too_big(stage: config.Stage, where: chips.Slice, facts: Report) -> str:
    needs, has = facts.get("too_big", {}).values() or (0, 0)
    larger = smallest(stage, where.chip)
    hints = ["layout.remat=full"] if stage.layout.remat != "full" else []
    ways = facts["mesh"].get("data", 1) * facts["mesh"].get("fsdp", 1)
    if stage.data.rows_per_batch // stage.layout.microbatches > ways:
        hints.append(f"layout.microbatches={stage.data.rows_per_batch // ways}")
    if larger and larger.chips > where.chips:
        hints.append(f"a larger slice, such as {larger}")
    hints.append(f"layout.tensor={2 * stage.layout.tensor}")
    return (
        f"{stage.name} needs {needs:.1f} GiB a device, {where} has {has:.2f}: "
        f"try {', or '.join(hints[:2])}"
    )


# -- the estimate --------------------------------------------------------------------------------
def memory(facts: Report, chip: chips.Chip) -> Report:
    """GiB per device. The peak counts the arguments, but not what never lives at the same time."""
    made = {name: round(n / 2**30, 3) for name, n in facts["memory"].items()}
    return made | {
        "limit": chip.hbm_gib,
        "headroom": round(1 - made["peak"] / chip.hbm_gib, 4),
    }


def step_time(stage: config.Stage, where: chips.Slice, facts: Report) -> Report:
    """Seconds of a step and its parts, and what follows from them for the whole stage."""
    chip = where.chip
    total = dict.fromkeys(("compute", "kernels", "links", "exposed", "step"), 0.0)
    for region in facts["regions"]:
        compute = region["cycles"] / (chip.clock_ghz * 1e9)
        kernels = sum(
            calls * kernel_seconds(name, stage, where, facts["mesh"])
            for name, calls in region["kernels"].items()
        )
        hidden = sum(seconds(c, chip) for c in region["collectives"] if c["asynchronous"])
        waited = sum(seconds(c, chip) for c in region["collectives"] if not c["asynchronous"])
        exposed = waited + max(0.0, hidden - compute - kernels)
        for name, value in (
            ("compute", compute),
            ("kernels", kernels),
            ("links", hidden + waited),
            ("exposed", exposed),
            ("step", compute + kernels + exposed),
        ):
            total[name] += region["times"] * value
    tokens = stage.data.batch_tokens
    peak = chip.peak_tflops * 1e12 * where.chips
    causal = stage.model.flops_per_token(stage.data.seq_len)
    full = 2 * causal - stage.model.flops_per_token(0)  # attention counted as the whole square
    days = stage.steps * total["step"] / 86_400
    return {
        **{f"{name}_seconds": round(value, 4) for name, value in total.items()},
        "binds": "links" if total["links"] > total["compute"] + total["kernels"] else "compute",
        "tokens_per_second_per_chip": round(tokens / total["step"] / where.chips, 1),
        "mfu": round(tokens * causal / total["step"] / peak, 4),
        "mfu_full_attention": round(tokens * full / total["step"] / peak, 4),
        "stage_days": round(days, 2),
        "stage_chip_hours": round(days * 24 * where.chips),
        "collectives": collectives(facts, chip),
    }


def kernel_seconds(name: str, stage: config.Stage, where: chips.Slice, mesh: dict) -> float:
    """Time of one splash call on one device; an unknown kernel is refused, not left out."""
    part = next((part for part in ("dkv", "dq", "fwd") if part in name), None)
    check(part is not None, f"no estimate for the kernel {name!r}: teach plan.KERNEL_PRODUCTS")
    from codellama_jax import attention

    ways = mesh.get("data", 1) * mesh.get("fsdp", 1)
    rows = stage.data.rows_per_batch / stage.layout.microbatches / ways
    heads = stage.model.num_heads / mesh.get("tensor", 1)
    block = min(attention.SPLASH_BLOCK, stage.data.seq_len)
    pairs = stage.data.seq_len * (stage.data.seq_len + block) / 2  # whole blocks on the diagonal
    operations = KERNEL_PRODUCTS[part] * 2 * rows * heads * stage.model.head_dim * pairs
    peak = where.chip.peak_tflops * 1e12 / where.chip.devices
    return operations / (KERNEL_SHARE[where.chip.mxu] * peak)


def seconds(each: Report, chip: chips.Chip) -> float:
    speed = each["links"] * chip.link_gbs or chip.dcn_gbs
    return each["wire_bytes"] / (speed * 1e9)


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


# -- without the compiler ------------------------------------------------------------------------
def by_arithmetic(stage: config.Stage, where: chips.Slice) -> tuple[float, int] | None:
    """GiB a device, roughly, and the tensor axis for it; None where no rows divide.

    The smallest tensor axis that leaves a tenth of the memory free, or else the one that needs
    least.

    State, gradients, kept layer inputs, one layer at work, a chunk of logits: a row at a time on
    each device of (data, fsdp), everything recomputed. Within 20% of the compiler at 7B and 34B.
    """
    model, devices = stage.model, where.devices
    state = 16 * model.num_params / devices  # weights, two moments, gradients: float32
    layer = (model.num_params - 2 * model.vocab_size * model.dim) / model.num_layers
    needs = []
    for tensor in TENSORS:
        if devices % tensor or stage.data.rows_per_batch % (devices // tensor):
            continue
        tokens = stage.data.seq_len / tensor
        kept = 2 * tokens * model.dim * model.num_layers
        work = 2 * 2 * layer / tensor + 2 * tokens * (4 * model.dim + 3 * model.ffn_dim)
        logits = 4 * 2 * stage.layout.loss_chunk * model.vocab_size / tensor
        needs.append(((state + kept + work + logits) / 2**30, tensor))
    fits = [need for need in needs if need[0] <= 0.9 * where.chip.hbm_gib]
    return fits[0] if fits else min(needs, default=None)


def smallest(stage: config.Stage, chip: chips.Chip) -> chips.Slice | None:
    """The smallest slice that fits by arithmetic, a tenth of the memory spared."""
    for where in chips.known(chip):
        needs = by_arithmetic(stage, where)
        if needs is not None and needs[0] <= 0.9 * chip.hbm_gib:
            return where
    return None


def candidates(stage: config.Stage, where: chips.Slice) -> list[config.Layout]:
    """Layouts worth a compile: meshes, microbatches and remat, without those that cannot be."""
    made = []
    for tensor in TENSORS:
        ways = where.devices // tensor
        rows = stage.data.rows_per_batch
        if stage.model.num_kv_heads % tensor or rows % ways or stage.model.dim % ways:
            continue
        micros = {m for m in (1, 2, 4, 8) if rows % (m * ways) == 0} | {rows // ways}
        for microbatches in sorted(micros):
            for remat in ("full", "attention", "dots"):
                made.append(
                    replace(
                        stage.layout,
                        data=where.count,
                        fsdp=-1,
                        tensor=tensor,
                        microbatches=microbatches,
                        remat=remat,
                    )  # fmt: skip
                )
    return made


# -- the cache -----------------------------------------------------------------------------------
def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "codellama_jax" / "plan"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def own_code() -> str:
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in (*SOURCES, "step")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def versions() -> dict[str, str]:
    """Of what compiles. Read without loading any of it."""
    from importlib import metadata

    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def load(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def save(path: Path, value: Any) -> None:
    """Under a temporary name, then renamed: never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    temporary.replace(path)


def as_fields(layout: config.Layout) -> list[str]:
    """What --set needs to be told to get this layout."""
    default = config.Layout()
    return [
        f"layout.{f.name}={getattr(layout, f.name)}"
        for f in dataclasses.fields(layout)
        if getattr(layout, f.name) != getattr(default, f.name)
    ]


# -- for people ----------------------------------------------------------------------------------
def table(report: Report) -> str:
    """The report as lines to read."""
    memory, mesh = report["memory"], " x ".join(f"{k} {n}" for k, n in report["mesh"].items())
    lines = [
        f"{report['stage']} on {report['slice']}: {report['chips']} chips, mesh {mesh}, "
        f"{report['rows']:,} rows of {report['seq_len']:,} a step",
        "layout     " + " ".join(as_fields(config.Layout(**report["layout"]))),
        f"memory     peak {memory['peak']:.2f} of {memory['limit']} GiB a device, "
        f"{memory['headroom']:.1%} free (arguments {memory['arguments']:.2f}, temporaries "
        f"{memory['temporaries']:.2f})",
    ]
    if "time" in report:
        lines += times(report["time"])
    made = report["compiled"]
    lines.append(
        f"compiled   in {made['seconds']:.0f} s ({made['cpu_seconds']:.0f} s of CPU) by jax "
        f"{made['jax']}, libtpu {made['libtpu']}"
    )
    return "\n".join(lines)


def times(time: Report) -> list[str]:
    lines = [
        f"step       {time['step_seconds']:.3f} s = compute {time['compute_seconds']:.3f} + "
        f"attention {time['kernels_seconds']:.3f} + exposed links {time['exposed_seconds']:.3f} "
        f"(links {time['links_seconds']:.3f} in all); {time['binds']} binds",
        f"speed      {time['tokens_per_second_per_chip']:,.0f} tokens/s/chip, "
        f"MFU {time['mfu']:.1%} ({time['mfu_full_attention']:.1%} with attention as a full square)",
        f"stage      {time['stage_days']:,.1f} days, {time['stage_chip_hours']:,} chip-hours",
    ]
    for row in time["collectives"]:
        if row["gigabytes"] >= 0.01:
            how = "asynchronous" if row["asynchronous"] else "synchronous"
            lines.append(
                f"           {row['kind']} {row['dtype']}, {how}: {row['gigabytes']:.1f} GB a "
                f"device, {row['seconds']:.3f} s of its links"
            )
    return lines
