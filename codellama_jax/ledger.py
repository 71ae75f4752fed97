"""The ledger of compiled cells: docs/pods.json, and the table of it inside docs/pods.md.

A row is what one compile said of one stage on one slice (plan.plan), with its versions. Rows of the
same size, stage, slice and layout replace one another.
"""

import json
from pathlib import Path

from codellama_jax import config, plan

MOST_GROWTH = 0.02  # of the peak, against the ledger
BEGIN, END = "<!-- ledger -->", "<!-- /ledger -->"


def row(size: str, report: plan.Report) -> dict:
    """A flat row of the ledger."""
    memory, time, made = report["memory"], report["time"], report["compiled"]
    return {
        "size": size,
        **{name: report[name] for name in ("stage", "slice", "rows", "seq_len")},
        "layout": " ".join(plan.as_fields(config.Layout(**report["layout"]))),
        "mesh": " x ".join(f"{axis} {ways}" for axis, ways in report["mesh"].items()),
        **{f"{name}_gib": memory[name] for name in ("arguments", "temporaries", "peak", "limit")},
        "headroom": memory["headroom"],
        **{
            name: time[name]
            for name in (
                "compute_seconds", "kernels_seconds", "links_seconds", "exposed_seconds",
                "step_seconds", "binds", "mfu", "mfu_full_attention",
                "tokens_per_second_per_chip", "stage_days", "stage_chip_hours",
            )
        },
        "collectives": time["collectives"],
        "compile_seconds": made["seconds"],
        "compile_cpu_seconds": made["cpu_seconds"],
        **{name: made[name] for name in ("jax", "libtpu")},
    }  # fmt: skip


def record(folder: Path, new: dict) -> None:
    """Puts a row into folder/pods.json and the table of folder/pods.md."""
    rows = [old for old in read(folder) if key(old) != key(new)] + [new]
    rows.sort(key=lambda row: (list(config.SIZES).index(row["size"]), *key(row)[1:]))
    text = (folder / "pods.md").read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    write(folder / "pods.json", json.dumps(rows, indent=1) + "\n")
    write(folder / "pods.md", f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


def read(folder: Path) -> list[dict]:
    path = folder / "pods.json"
    return json.loads(path.read_text()) if path.exists() else []


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("size", "seq_len", "rows", "stage", "slice", "layout"))


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


def table(rows: list[dict]) -> str:
    """Markdown: one line per row."""
    columns = (
        "size | stage | slice | mesh | layout | peak GiB (free) | step s | "
        "compute + attention + exposed | gathered, reduced GB | MFU | chip-hours"
    )
    lines = [f"| {columns} |", "|" + "---|" * (columns.count("|") + 1)]
    for row in rows:
        moved = {
            kind: sum(c["gigabytes"] for c in row["collectives"] if c["kind"] == kind)
            for kind in ("all-gather", "all-reduce", "reduce-scatter")
        }
        reduced = moved["all-reduce"] + moved["reduce-scatter"]
        short = row["layout"].replace("layout.", "")
        cells = (
            row["size"], row["stage"], row["slice"], row["mesh"], f"`{short}`",
            f"{row['peak_gib']:.2f} ({row['headroom']:.0%})", f"{row['step_seconds']:.2f}",
            f"{row['compute_seconds']:.2f} + {row['kernels_seconds']:.2f} + "
            f"{row['exposed_seconds']:.2f}",
            f"{moved['all-gather']:.0f}, {reduced:.0f}", f"{row['mfu']:.1%}",
            f"{row['stage_chip_hours']:,}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Under a temporary name, then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
