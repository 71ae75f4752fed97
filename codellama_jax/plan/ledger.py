"""The ledger of compiled cells: docs/pods.json, and the table of it inside docs/pods.md.

A row is what one compile said of one stage on one slice (cell.plan), with its versions and the hash
of its program. Rows of the same size, stage, slice and layout replace one another. What reading and
generating need (generation.py) is kept beside it, in docs/pods_generation.json and a table of its
own.
"""

import json
from collections.abc import Callable
from pathlib import Path

from codellama_jax import config, whole
from codellama_jax.plan import cell, shown

MOST_GROWTH = 0.02  # of the peak and of what collectives move, against the ledger
LEDGER, GENERATION = "pods.json", "pods_generation.json"
VERSIONS = ("jax", "libtpu")
MEMORY = ("arguments", "temporaries", "peak", "limit")
TIME = (
    *("compute_seconds", "kernels_seconds", "links_seconds", "exposed_seconds", "step_seconds"),
    *("binds", "mfu", "mfu_full_attention", "tokens_per_second_per_chip"),
    *("stage_days", "stage_chip_hours", "collectives"),
)


def row(size: str, report: cell.Report) -> dict:
    """A flat row of the ledger."""
    memory, time, made = report["memory"], report["time"], report["compiled"]
    return {
        "size": size,
        **{name: report[name] for name in ("stage", "slice", "rows", "seq_len")},
        "layout": " ".join(shown.as_fields(config.Layout(**report["layout"]))),
        "mesh": " x ".join(f"{axis} {ways}" for axis, ways in report["mesh"].items()),
        **{f"{name}_gib": memory[name] for name in MEMORY},
        "headroom": memory["headroom"],
        **{name: time[name] for name in TIME},
        "compile_seconds": made["seconds"],
        "compile_cpu_seconds": made["cpu_seconds"],
        **{name: made[name] for name in VERSIONS},
        "program": report["program"],
    }


# -- reading and writing -------------------------------------------------------------------------
def record(folder: Path, new: dict) -> None:
    """Puts a row into folder/pods.json and the table of folder/pods.md."""
    rows = read(folder)
    if any(old.get("in_ci") for old in rows if key(old) == key(new)):
        new = new | {"in_ci": True}  # marked by hand: tests compile these cells
    rows = [*(old for old in rows if key(old) != key(new)), new]
    rows.sort(key=lambda row: (order(row), *key(row)[1:]))
    write(folder, LEDGER, "ledger", rows, table(rows))


def forget(folder: Path, unwanted: Callable[[dict], bool]) -> list[dict]:
    """Takes rows out of folder/pods.json and the table of folder/pods.md, and returns them."""
    rows = read(folder)
    kept = [row for row in rows if not unwanted(row)]
    write(folder, LEDGER, "ledger", kept, table(kept))
    return [row for row in rows if unwanted(row)]


def write(folder: Path, file: str, mark: str, rows: list[dict], shown: str) -> None:
    """Rows as JSON, and their table between two marks of folder/pods.md."""
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, rest = (folder / "pods.md").read_text().split(begin)
    _, after = rest.split(end)
    whole.write(folder / file, json.dumps(rows, indent=1) + "\n")
    whole.write(folder / "pods.md", f"{before}{begin}\n{shown}\n{end}{after}")


def read(folder: Path, file: str = LEDGER) -> list[dict]:
    path = folder / file
    return json.loads(path.read_text()) if path.exists() else []


def order(row: dict) -> int:
    return list(config.SIZES).index(row["size"])


def key(row: dict) -> tuple:
    return tuple(row[name] for name in ("size", "seq_len", "rows", "stage", "slice", "layout"))


def find(folder: Path, size: str, stage: config.Stage, where: str, layout: config.Layout):
    """The row of a cell, or None."""
    fields = " ".join(shown.as_fields(layout))
    wanted = (size, stage.data.seq_len, stage.data.rows_per_batch, stage.name, where, fields)
    return next((row for row in read(folder) if key(row) == wanted), None)


# -- reading prompts and generating --------------------------------------------------------------
SERVED = (
    *("step_seconds", "memory_seconds", "compute_seconds", "kernels_seconds", "exposed_seconds"),
    *("binds", "tokens_per_second", "mfu"),
)


def record_generation(folder: Path, size: str, found: dict[str, cell.Report]) -> None:
    """Puts what generation.py said of prefill and decode into the table of folder/pods.md."""
    new = [served(size, report) for report in found.values()]
    names = ("size", "slice", "rows", "context", "program")
    keys = [[row[name] for name in names] for row in new]
    rows = [r for r in read(folder, GENERATION) if [r[name] for name in names] not in keys]
    rows = sorted([*rows, *new], key=lambda r: (order(r), r["context"], r["slice"], r["rows"]))
    write(folder, GENERATION, "generation", rows, generation_table(rows))


def served(size: str, report: cell.Report) -> dict:
    """A flat row of one program."""
    memory, made = report["memory"], report["compiled"]
    return {
        "size": size,
        "program": report["stage"],
        **{name: report[name] for name in ("slice", "rows")},
        "context": report["seq_len"],
        "mesh": " x ".join(f"{axis} {ways}" for axis, ways in report["mesh"].items()),
        **{f"{name}_gib": memory[name] for name in MEMORY},
        "headroom": memory["headroom"],
        **{name: report["time"][name] for name in SERVED},
        "compile_seconds": made["seconds"],
        "compile_cpu_seconds": made["cpu_seconds"],
        **{name: made[name] for name in VERSIONS},
    }


def generation_table(rows: list[dict]) -> str:
    """Markdown: one line per program."""
    columns = (
        *("size", "program", "rows x context", "slice", "mesh", "peak GiB (free)"),
        *("seconds", "memory; compute + attention + exposed", "binds", "tokens/s", "MFU"),
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        parts = (row[f"{name}_seconds"] for name in ("compute", "kernels", "exposed"))
        shown = (
            *(row["size"], row["program"], f"{row['rows']} x {row['context']:,}"),
            *(row["slice"], row["mesh"], f"{row['peak_gib']:.2f} ({row['headroom']:.0%})"),
            f"{row['step_seconds']:.4g}",
            f"{row['memory_seconds']:.4g}; " + " + ".join(f"{seconds:.4g}" for seconds in parts),
            *(row["binds"], f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}"),
        )
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


# -- comparing -----------------------------------------------------------------------------------
def compare(folder: Path, new: dict) -> str:
    """Says that a fresh row agrees with the ledger's; raises ValueError where it got worse."""
    old = next((row for row in read(folder) if key(row) == key(new)), None)
    name = f"{new['size']} {new['stage']} on {new['slice']} ({new['layout']})"
    config.check(old is not None, f"the ledger has no row of {name}; make one with --record")
    said = no_worse(name, needs(new), needs(old))
    if of_one_compiler(new, old):
        most = MOST_GROWTH * moved(old)
        for what, how in (("moves", (True, False)), ("moves synchronously", (False,))):
            now, before = moved(new, how), moved(old, how)
            config.check(
                now - before <= most,
                f"{name} {what} {now:.1f} GB between chips, {before:.1f} in what is recorded: "
                "find out why, or --record it",
            )
    return said


def moved(row: dict, asynchronous: tuple[bool, ...] = (True, False)) -> float:
    """GB that a device sends in a step, by collectives that are asynchronous or are not."""
    return sum(c["gigabytes"] for c in row["collectives"] if c["asynchronous"] in asynchronous)


def of_kinds(row: dict, *kinds: str) -> float:
    """GB that a device sends in a step, by collectives of these kinds."""
    return sum(c["gigabytes"] for c in row["collectives"] if c["kind"] in kinds)


def of_one_compiler(new: dict, old: dict) -> bool:
    return all(new[part] == old[part] for part in VERSIONS)


def needs(row: dict) -> dict:
    """What is compared of a row."""
    return {
        "peak_bytes": row["peak_gib"] * 2**30,
        "kinds": sorted({each["kind"] for each in row["collectives"]}),
        **{name: row[name] for name in VERSIONS},
    }


def no_worse(name: str, new: dict, old: dict) -> str:
    """Says that `new` needs what `old` did. Raises ValueError where its peak is 2% higher, or it
    has a kind of collective that was not there. Other compilers' figures are not compared.
    """
    if not of_one_compiler(new, old):
        return f"{name}: recorded with jax {old['jax']}, libtpu {old['libtpu']}, not compared"
    growth = new["peak_bytes"] / old["peak_bytes"] - 1
    config.check(
        growth <= MOST_GROWTH,
        f"{name} needs {new['peak_bytes'] / 2**30:.2f} GiB, {growth:.1%} more than the "
        f"{old['peak_bytes'] / 2**30:.2f} recorded: find out why, or --record it",
    )
    kinds = sorted(set(new["kinds"]) - set(old["kinds"]))
    config.check(not kinds, f"{name} now has collectives that it did not have: {', '.join(kinds)}")
    return f"{name}: peak {growth:+.1%} of what is recorded, no new collectives"


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
    gathered = of_kinds(row, "all-gather")
    reduced = of_kinds(row, "all-reduce", "reduce-scatter")
    parts = (row[f"{name}_seconds"] for name in ("compute", "kernels", "exposed"))
    return (
        *(row["size"], row["stage"], row["slice"], row["mesh"]),
        f"`{row['layout'].replace('layout.', '')}`",
        f"{row['peak_gib']:.2f} ({row['headroom']:.0%})",
        f"{row['step_seconds']:.2f}",
        " + ".join(f"{seconds:.2f}" for seconds in parts),
        f"{gathered:.0f}, {reduced:.0f}",
        f"{row['mfu']:.1%} ({row['mfu_full_attention']:.1%})",
        f"{row['stage_days']:,.1f}",
        f"{row['stage_chip_hours']:,}",
    )
