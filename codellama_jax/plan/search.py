"""The most promising layouts of a stage on a slice, compiled and ranked."""

from dataclasses import replace

from codellama_jax import config
from codellama_jax.plan import arithmetic, cell, chips, shown


def search(stage: config.Stage, where: chips.Slice, most: int, quiet: bool) -> list[dict]:
    """The most promising layouts compiled, the fastest first; then those that do not fit."""
    found = []
    for layout in arithmetic.candidates(stage, where)[:most]:
        fields = " ".join(shown.as_fields(layout))
        try:
            report = cell.plan(replace(stage, layout=layout), where)
        except ValueError as error:
            report = {"layout": config.to_json(layout), "refused": str(error)}
        found.append(report | {"fields": fields})
        if not quiet:
            print(one_line(found[-1]), flush=True)
    return sorted(found, key=lambda report: report.get("time", {}).get("step_seconds", 1e9))


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
