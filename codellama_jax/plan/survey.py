"""What is known of a stage, and what arithmetic says of every slice: which to plan first."""

from dataclasses import replace

from codellama_jax import config
from codellama_jax.plan import arithmetic, chips, shown

USUAL_MFU = 0.5  # for days of a slice that was not compiled


def is_of(row: dict, size: str, stage: config.Stage) -> bool:
    return (row["size"], row["stage"]) == (size, stage.name)


def survey(stage: config.Stage) -> list[dict]:
    """For each chip its slices by arithmetic, everything recomputed, and the smallest that fits."""
    rows = []
    for chip in chips.CHIPS.values():
        fits = arithmetic.smallest(stage, chip)
        for where in chips.known(chip):
            layout = arithmetic.least(stage, where)
            made = layout and replace(stage, layout=layout)
            rows.append(
                {
                    "slice": str(where),
                    "chips": where.chips,
                    "needs_gib": round(arithmetic.gib(made, where), 1) if made else None,
                    "has_gib": chip.hbm_gib,
                    "days": round(arithmetic.days(stage, where, USUAL_MFU), 1),
                    "layout": " ".join(shown.as_fields(layout)) if layout else None,
                    "smallest": where == fits,
                }
            )
    return rows


def propose(known: list[dict], rows: list[dict]) -> str | None:
    """The smallest slice of the ledger; without one the smallest by arithmetic of v5e, v5p, v6e."""
    if known:
        return min(known, key=lambda row: chips.Slice.parse(row["slice"]).chips)["slice"]
    fits = [row for row in rows if row["smallest"] and row["slice"].startswith(("v5", "v6"))]
    return min(fits, key=lambda row: row["chips"])["slice"] if fits else None


def surveyed(stage: config.Stage, known: list[dict], rows: list[dict]) -> str:
    lines = [
        f"{stage.name}: {stage.steps:,} steps of {stage.data.rows_per_batch:,} rows of "
        f"{stage.data.seq_len:,}",
        "",
        f"compiled, in docs/pods.json{'' if known else ': none'}",
    ]
    for row in known:
        lines.append(
            f"{row['slice']:>14}  {row['peak_gib']:6.2f} of {row['limit_gib']:5.2f} GiB  "
            f"{row['step_seconds']:7.2f} s a step  MFU {row['mfu']:.1%}  "
            f"{row['stage_days']:8,.1f} days  {row['stage_chip_hours']:9,} chip-hours"
        )
    lines += ["", f"by arithmetic, everything recomputed; days at an MFU of {USUAL_MFU:.0%}"]
    for chip in chips.CHIPS:
        of_chip = [row for row in rows if row["slice"].startswith(f"{chip}:") and row["layout"]]
        first = next((i for i, row in enumerate(of_chip) if row["smallest"]), None)
        if first is None:
            lines.append(f"{chip:>14}  no slice fits")
            continue
        for row in of_chip[first : first + 1] + of_chip[-1:]:
            lines.append(
                f"{row['slice']:>14}  {row['needs_gib']:6.1f}  of {row['has_gib']:5.2f} GiB  "
                f"{row['days']:10,.1f} days  {row['layout']}"
            )
    return "\n".join(lines)
