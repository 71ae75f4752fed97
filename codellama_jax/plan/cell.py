"""What a stage needs on a TPU slice, from compiling its real step for it. No TPU is needed.

    report = plan.plan(stage, chips.Slice.parse("v5e:16x16"))      # minutes, then kept in a cache

The compiler gives the bytes (program.py); estimate.py puts the time of a step together from its
schedule.
"""

from pathlib import Path
from typing import Any

from codellama_jax import config
from codellama_jax.config import check
from codellama_jax.plan import arithmetic, chips, estimate, program, store

HEADROOM = 0.05  # share of the memory that a layout of a recipe leaves free

Report = dict[str, Any]


def plan(
    stage: config.Stage, where: chips.Slice, *, quick: bool = False, cache: Path | None = None
) -> Report:
    """The JSON-ready report of one cell: a stage on a slice.

    `quick` compiles with least effort, for the bytes: such a report has no times. Raises ValueError
    when the stage does not divide or fit, with what would.
    """
    facts = program.compiled(
        program.canonical(stage), where, program.told(stage, where, quick), cache or store.folder()
    )
    check("memory" in facts, does_not_fit(stage, where, facts))
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


def does_not_fit(stage: config.Stage, where: chips.Slice, facts: Report) -> str:
    """What does not fit, and what would by arithmetic: the nearest layout, a larger slice."""
    if block := facts.get("too_big_block"):
        return (
            f"attention_block={stage.layout.attention_block} needs {block['needs']} MiB of vector "
            f"memory, {where.chip.name} gives {block['has']}: use a smaller one"
        )
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
