"""Plans as lines to read, and layouts as settings."""

import dataclasses
from typing import Any

from codellama_jax import config

Report = dict[str, Any]


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


def generation_table(reports: dict[str, Report]) -> str:
    """The reports as lines to read."""
    lines = []
    for name, report in reports.items():
        memory, mesh = report["memory"], " x ".join(f"{k} {n}" for k, n in report["mesh"].items())
        lines.append(
            f"{name} on {report['slice']}: {report['chips']} chips, mesh {mesh or 'of one'}, "
            f"{report['rows']:,} rows of {report['seq_len']:,}"
        )
        lines.append(
            f"memory     peak {memory['peak']:.2f} of {memory['limit']} GiB a device, "
            f"{memory['headroom']:.1%} free (arguments {memory['arguments']:.2f}, temporaries "
            f"{memory['temporaries']:.2f})"
        )
        if "time" in report:
            time = report["time"]
            lines.append(
                f"time       {time['step_seconds']:.4f} s = the larger of memory "
                f"{time['memory_seconds']:.4f} and compute {time['compute_seconds']:.4f} + "
                f"attention {time['kernels_seconds']:.4f} + exposed links "
                f"{time['exposed_seconds']:.4f}; {time['binds']} binds; "
                f"{time['tokens_per_second']:,.0f} tokens/s, MFU {time['mfu']:.1%}"
            )
        made = report["compiled"]
        lines.append(
            f"compiled   in {made['seconds']:.0f} s ({made['cpu_seconds']:.0f} s of CPU) by jax "
            f"{made['jax']}, libtpu {made['libtpu']}"
        )
    return "\n".join(lines)


def as_fields(layout: config.Layout) -> list[str]:
    """What --set needs to be told to get this layout."""
    default = config.Layout()
    return [
        f"layout.{f.name}={getattr(layout, f.name)}"
        for f in dataclasses.fields(layout)
        if getattr(layout, f.name) != getattr(default, f.name)
    ]
