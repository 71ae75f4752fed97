"""The ledger of compiled cells: docs/pods.json, and the table of it inside docs/pods.md.

A row is what one compile said of one stage on one slice (plan.plan), with its versions and the hash
of its program. Rows of the same size, stage, slice and layout replace one another.
"""

import json
from pathlib import Path

from codellama_jax import config, plan, whole

MOST_GROWTH = 0.02  # of the peak, against the ledger
BEGIN, END = "<!-- ledger -->", "<!-- /ledger -->"
MEMORY = ("arguments", "temporaries", "peak", "limit")
TIME = (
    *("compute_seconds", "kernels_seconds", "links_seconds", "exposed_seconds", "step_seconds"),
    *("binds", "mfu", "mfu_full_attention", "tokens_per_second_per_chip"),
    *("stage_days", "stage_chip_hours", "collectives"),
)


def row(size: str, report: plan.Report) -> dict:
    """A flat row of the ledger."""
    memory, time, made = report["memory"], report["time"], report["compiled"]
    return {
        "size": size,
        **{name: report[name] for name in ("stage", "slice", "rows", "seq_len")},
        "layout": " ".join(plan.as_fields(config.Layout(**report["layout"]))),
        "mesh": " x ".join(f"{axis} {ways}" for axis, ways in report["mesh"].items()),
        **{f"{name}_gib": memory[name] for name in MEMORY},
        "headroom": memory["headroom"],
        **{name: time[name] for name in TIME},
        "compile_seconds": made["seconds"],
        "compile_cpu_seconds": made["cpu_seconds"],
        **{name: made[name] for name in ("jax", "libtpu")},
        "program": report["program"],
    }


# -- reading and writing -------------------------------------------------------------------------
def record(folder: Path, new: dict) -> None:
    """Puts a row into folder/pods.json and the table of folder/pods.md."""
    others = [old for old in read(folder) if key(old) != key(new)]
    if any(old.get("in_ci") for old in read(folder) if key(old) == key(new)):
        new = new | {"in_ci": True}  # marked by hand: tests compile these cells
    rows = [*others, new]
    rows.sort(key=lambda row: (list(config.SIZES).index(row["size"]), *key(row)[1:]))
    text = (folder / "pods.md").read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    whole.write(folder / "pods.json", json.dumps(rows, indent=1) + "\n")
    whole.write(folder / "pods.md", f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def read(folder: Path) -> list[dict]:
    path = folder / "pods.json"
    return json.loads(path.read_text()) if path.exists() else []


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("size", "seq_len", "rows", "stage", "slice", "layout"))


def find(folder: Path, size: str, stage: config.Stage, where: str, layout: config.Layout):
    """The row of a cell, or None."""
    fields = " ".join(plan.as_fields(layout))
    wanted = (size, stage.data.seq_len, stage.data.rows_per_batch, stage.name, where, fields)
    return next((row for row in read(folder) if key(row) == wanted), None)


# -- comparing -----------------------------------------------------------------------------------
def compare(folder: Path, new: dict) -> str:
    """Says that a fresh row agrees with the ledger's; raises ValueError where it got worse.

    Worse is a peak 2% higher, or a kind of collective that was not there.
    """
    old = next((row for row in read(folder) if key(row) == key(new)), None)
    name = f"{new['size']} {new['stage']} on {new['slice']} ({new['layout']})"
    config.check(old is not None, f"the ledger has no row of {name}; make one with --record")
    growth = new["peak_gib"] / old["peak_gib"] - 1
    config.check(
        growth <= MOST_GROWTH,
        f"{name} needs {new['peak_gib']:.2f} GiB, {growth:.1%} more than the ledger's "
        f"{old['peak_gib']:.2f}: find out why, or --record it",
    )
    kinds = {row["kind"] for row in new["collectives"]} - {
        row["kind"] for row in old["collectives"]
    }
    config.check(
        not kinds,
        f"{name} now has collectives that the ledger's does not: {', '.join(sorted(kinds))}",
    )
    return f"{name}: peak {growth:+.1%} against the ledger, no new collectives"


# -- for people ----------------------------------------------------------------------------------
COLUMNS = (
    "size | stage | slice | mesh | layout | peak GiB (free) | step s | "
    "compute + attention + exposed | gathered, reduced GB | MFU (full square) | days | chip-hours"
)


def table(rows: list[dict]) -> str:
    """Markdown: one line per row."""
    lines = [f"| {COLUMNS} |", "|" + "---|" * (COLUMNS.count("|") + 1)]
    return "\n".join([*lines, *("| " + " | ".join(cells(row)) + " |" for row in rows)])


def cells(row: dict) -> tuple[str, ...]:
    moved = {
        kind: sum(c["gigabytes"] for c in row["collectives"] if c["kind"] == kind)
        for kind in ("all-gather", "all-reduce", "reduce-scatter")
    }
    reduced = moved["all-reduce"] + moved["reduce-scatter"]
    parts = (row[f"{name}_seconds"] for name in ("compute", "kernels", "exposed"))
    return (
        *(row["size"], row["stage"], row["slice"], row["mesh"]),
        f"`{row['layout'].replace('layout.', '')}`",
        f"{row['peak_gib']:.2f} ({row['headroom']:.0%})",
        f"{row['step_seconds']:.2f}",
        " + ".join(f"{seconds:.2f}" for seconds in parts),
        f"{moved['all-gather']:.0f}, {reduced:.0f}",
        f"{row['mfu']:.1%} ({row['mfu_full_attention']:.1%})",
        f"{row['stage_days']:,.1f}",
        f"{row['stage_chip_hours']:,}",
    )
