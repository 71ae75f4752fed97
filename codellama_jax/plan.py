"""What a stage needs on a TPU slice, from compiling its real step for it. No TPU is needed.

    report = plan.plan(stage, chips.Slice.parse("v5e:16x16"))      # minutes, then kept in a cache

The compiler gives the bytes; estimate.py puts the time of a step together from its schedule.
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

from codellama_jax import arithmetic, chips, compiler_options, config, estimate, whole
from codellama_jax.config import check

HEADROOM = 0.05  # share of the memory that a layout of a recipe leaves free
# Least effort, for bytes only: the schedule means nothing then. As jax 0.10 says it, and 0.12.
QUICK = ({"exec_time_optimization_effort": -1.0}, {"optimization_level": "O0"})
SOURCES = (  # what a program is made of; the estimate is made anew each time
    *("attention", "chips", "config", "model", "optim", "plan", "sharding", "state", "step"),
)

Report = dict[str, Any]


def plan(
    stage: config.Stage, where: chips.Slice, *, quick: bool = False, cache: Path | None = None
) -> Report:
    """The JSON-ready report of one cell: a stage on a slice.

    `quick` compiles with least effort, for the bytes: such a report has no times. Raises ValueError
    when the stage does not divide or fit, with what would.
    """
    facts = compiled(canonical(stage), where, told(stage, where, quick), cache or cache_folder())
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
        "program": facts["program"],
        "kinds": kinds(facts),
    }
    if not quick:
        report["time"] = estimate.step_time(stage, where, facts)
    return report


def told(stage: config.Stage, where: chips.Slice, quick: bool = False) -> dict:
    """What the compiler is told: what training tells it, or for bytes only to make no effort."""
    chip = where.chip.name
    return least_effort(chip) if quick else compiler_options.of_chip(chip, stage.model.dim)


def least_effort(chip: str) -> dict:
    """The one of QUICK that this jax knows; none for tpu7x: libtpu 0.0.42.1 aborts there over the
    collectives of sparse cores."""
    if chip == "tpu7x":
        return {}
    import jax

    return QUICK[0 if hasattr(jax.config, "jax_exec_time_optimization_effort") else 1]


# -- compiling -----------------------------------------------------------------------------------
def canonical(stage: config.Stage) -> config.Stage:
    """The stage without the numbers that change no byte: stages equal but for these are one."""
    data = replace(
        stage.data, mix={"any": 1.0}, already={}, infilling_rate=0.0, spm_rate=0.5, line_rate=0.0
    )
    data = replace(data, corpus="corpus", tokenizer="tokenizer.model", rows=None, seed=0, workers=0)
    optim = config.Optim(
        peak_lr=1e-4, warmup_steps=1, final_lr_ratio=0.1, beta1=0.9, beta2=0.95, eps=1e-5,
        weight_decay=0.1, clip_norm=1.0,
    )  # fmt: skip
    return config.Stage(
        name="plan", start_from=None, model=stage.model, data=data, optim=optim, steps=1_000,
        layout=stage.layout,
    )  # fmt: skip


def compiled(stage: config.Stage, where: chips.Slice, options: dict, cache: Path) -> Report:
    """What the compiler says of a stage, from the cache if it was asked before."""
    name, lowered = program(stage, where, options, cache)
    facts = load(cache / f"{name}.json")
    if facts is None:
        made, mesh = lowered or lower(stage, where)
        facts, text = compile_now(made, mesh, options)
        save(cache / f"{name}.hlo.gz", gzip.compress(text.encode()))
        save(cache / f"{name}.json", facts)
    if "too_big" in facts:
        return facts
    text = gzip.decompress((cache / f"{name}.hlo.gz").read_bytes()).decode()
    rounds = 1 if options in QUICK else None  # times mean nothing there, so neither do trips
    return facts | {"program": name, "regions": estimate.regions(text, facts, where, rounds)}


def program(stage: config.Stage, where: chips.Slice, options: dict, cache: Path):
    """The name of a stage's program, a hash of it and of what compiles it, and the program itself
    if it had to be lowered to know.

    Another hash, of the recipe and the source files, leads to the name without any work; the
    program's survives changes of the sources that do not change it.
    """
    asked = digest([config.to_json(stage), str(where), options, versions(), own_code()])
    name = load(cache / f"{asked}.alias.json")
    if name is not None:
        return name, None
    lowered, mesh = lower(stage, where)
    name = digest([lowered.as_text(), str(where), options, versions(), *where.wrap])
    save(cache / f"{asked}.alias.json", name)
    return name, (lowered, mesh)


def lower(stage: config.Stage, where: chips.Slice):
    """The real step for devices that are not there: abstract state and batch, state donated."""
    devices = where.topology()
    import jax

    from codellama_jax import optim, sharding, state, step

    check_mesh(stage, where)
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


def check_mesh(stage: config.Stage, where: chips.Slice) -> None:
    """Raises ValueError when the axes of the mesh do not fill the slice, with a layout whose do."""
    data, fsdp = arithmetic.ways(stage, where)
    asked = data * fsdp * stage.layout.tensor * stage.layout.context
    if asked != where.devices:
        nearest = " ".join(arithmetic.nearest(stage, where) or ["another slice"])
        raise ValueError(
            f"the mesh has data * fsdp * tensor * context = {asked} devices, "
            f"{where} has {where.devices}: try {nearest}"
        )


def check_rows(stage: config.Stage, where: chips.Slice, ways: int) -> None:
    """Raises ValueError when the rows of a microbatch do not divide, with a layout whose do."""
    rows = stage.data.rows_per_batch
    if rows % ways == 0:
        hint = f"layout.microbatches={rows // ways}"
    else:
        split = where.devices // math.gcd(rows, where.devices)
        hint = f"layout.microbatches=1 and layout.context={split}"
    check(
        rows % (stage.layout.microbatches * ways) == 0,
        f"{rows // stage.layout.microbatches} rows per microbatch do not divide among "
        f"data * fsdp = {ways} devices of {where}; with {hint} they would",
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


def too_big(stage: config.Stage, where: chips.Slice, facts: Report) -> str:
    """What does not fit, and what would by arithmetic: the nearest layout, a larger slice."""
    needs, has = facts.get("too_big", {}).values() or (0, 0)
    hints = []
    if nearest := arithmetic.nearest(stage, where):
        hints.append(" ".join(nearest))
    larger = arithmetic.smallest(stage, where.chip)
    if larger and larger.chips > where.chips:
        hints.append(f"a larger slice, such as {larger}")
    return (
        f"{stage.name} needs {needs:.1f} GiB a device, {where} has {has:.2f}: "
        f"try {', or '.join(hints) or 'another chip, with more memory'}"
    )


def kinds(facts: Report) -> list[str]:
    """The kinds of collectives of a program."""
    return sorted({each["kind"] for region in facts["regions"] for each in region["collectives"]})


def memory(facts: Report, chip: chips.Chip) -> Report:
    """GiB per device. The peak counts the arguments, but not what never lives at the same time."""
    made = {name: round(n / 2**30, 3) for name, n in facts["memory"].items()}
    return made | {
        "peak_bytes": facts["memory"]["peak"],
        "limit": chip.hbm_gib,
        "headroom": round(1 - made["peak"] / chip.hbm_gib, 4),
    }


# -- the cache -----------------------------------------------------------------------------------
def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "codellama_jax" / "plan"


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def own_code() -> str:
    here = Path(__file__).parent
    files = [here / f"{name}.py" for name in SOURCES]
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
    """Bytes as they are, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.write(path, value if isinstance(value, bytes) else json.dumps(value))


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
