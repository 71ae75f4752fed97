"""The most promising layouts of a stage on a slice, compiled and ranked; then the fastest of them
with attention in other blocks."""

from dataclasses import replace

from codellama_jax import config
from codellama_jax.plan import arithmetic, cell, chips, shown

BLOCKS = (512, 1_024, 2_048)  # queries, and keys, of attention


def search(stage: config.Stage, where: chips.Slice, most: int, quiet: bool) -> list[dict]:
    """The most promising layouts compiled, the fastest first; then those that do not fit."""
    found = [
        tried(stage, where, layout, quiet) for layout in arithmetic.candidates(stage, where)[:most]
    ]
    if any("time" in report for report in found):
        best = config.Layout(**min(found, key=seconds)["layout"])
        others = (replace(best, attention_block=block) for block in BLOCKS)
        found += [tried(stage, where, layout, quiet) for layout in others]
    return sorted(found, key=seconds)


def seconds(report: dict) -> float:
    return report.get("time", {}).get("step_seconds", float("inf"))


def tried(stage: config.Stage, where: chips.Slice, layout: config.Layout, quiet: bool) -> dict:
    """The report of a layout, or why it is refused; said at once unless quiet."""
    try:
        report = cell.plan(replace(stage, layout=layout), where)
    except ValueError as error:
        report = {"layout": config.to_json(layout), "refused": str(error)}
    report |= {"fields": " ".join(shown.as_fields(layout))}
    if not quiet:
        print(one_line(report), flush=True)
    return report


def ranking(found: list[dict]) -> str:
    return "\n".join(["", "fastest first", *(one_line(report) for report in found)])


def one_line(report: dict) -> str:
    if "refused" in report:
        return f"{'refused':>26}  {report['fields']}: {report['refused']}"
    time, memory = report["time"], report["memory"]
    return (
        f"{time['step_seconds']:8.3f} s {time['mfu']:6.1%} {memory['peak']:6.2f} GiB  "
        f"{report['fields']}"
    )
