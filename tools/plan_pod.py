r"""What a stage needs on TPUs: bytes, seconds, chip-hours. Compiles the real step; needs no TPU.

    python tools/plan_pod.py --size 7b --stage code                       which slices fit
    python tools/plan_pod.py --size 7b --stage code --slice v5e:16x16     one of them, compiled
    python tools/plan_pod.py --size 34b --stage code --slice v5p:4x4x8 --set layout.tensor=2
    python tools/plan_pod.py --size 7b --stage code --slice v5e:16x16 --search

A compile takes one to five minutes of one or two cores and up to 3 GB; the answer is kept, and the
same question is answered at once. Needs the TPU compiler: pip install 'codellama_jax[aot]'.
docs/pods.md says how the time is estimated and what the estimate leaves out.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from codellama_jax import chips, config, launch, ledger, plan
from recipes import code_llama

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    args = arguments()
    with launch.refusals():
        where = chips.Slice.parse(args.slice) if args.slice else None
        stages = code_llama.stages(args.size)
        stage = launch.pick(stages, args.stage, args.size)
        if where is not None:
            layout = code_llama.layouts(stage, args.size).get(str(where), stage.layout)
            stage = dataclasses.replace(stage, layout=layout)
        stage = launch.changed({stage.name: stage}, args.set)[stage.name]
        if where is None:
            print(json.dumps(survey(stage), indent=1) if args.json else surveyed(stage))
        elif args.search:
            found = search(stage, where, args.json)
            print(json.dumps(found, indent=1) if args.json else ranking(found))
        else:
            report = plan.plan(stage, where, quick=args.quick)
            if args.record:
                ledger.record(DOCS, ledger.row(args.size, report))
            print(json.dumps(report, indent=1) if args.json else plan.table(report))
            if args.check:
                print(ledger.compare(DOCS, ledger.row(args.size, report)), file=sys.stderr)


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(config.SIZES), required=True)
    parser.add_argument("--stage", required=True, help="such as code; recipes/code_llama.py --list")
    parser.add_argument("--slice", metavar="CHIP:SHAPE", help="such as v5e:16x16 or 2xv5p:4x4x8")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="as in the recipe"
    )
    parser.add_argument(
        "--quick", action="store_true", help="bytes only: compiles in half the time"
    )
    parser.add_argument("--search", action="store_true", help="compile many layouts, and rank them")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true", help="put the answer into docs/pods.*")
    parser.add_argument("--check", action="store_true", help="fail where docs/pods.json was better")
    args = parser.parse_args()
    ledgered = args.record or args.check
    if args.slice is None and (args.search or args.quick or ledgered):
        parser.error("--search, --quick, --record and --check compile: say for which --slice")
    if args.quick and (args.search or ledgered):
        parser.error("--search, --record and --check want times, which --quick does not give")
    if args.search and ledgered:
        parser.error("--record and --check take one layout, not all that --search tries")
    return args


def survey(stage: config.Stage) -> list[dict]:
    """For each chip its slices by arithmetic, and the smallest that fits."""
    rows = []
    for chip in chips.CHIPS.values():
        fits = plan.smallest(stage, chip)
        for where in chips.known(chip):
            needs = plan.by_arithmetic(stage, where)
            rows.append(
                {
                    "slice": str(where),
                    "chips": where.chips,
                    "needs_gib": round(needs[0], 1) if needs else None,
                    "tensor": needs[1] if needs else None,
                    "has_gib": chip.hbm_gib,
                    "smallest": where == fits,
                }
            )
    return rows


def surveyed(stage: config.Stage) -> str:
    lines = [f"{stage.name}: GiB a device by arithmetic, not compiled; give one by --slice", ""]
    for row in survey(stage):
        start = f"{row['slice']:>14} {row['chips']:6} chips "
        if row["needs_gib"] is None:
            lines.append(f"{start} {stage.data.rows_per_batch} rows do not divide")
            continue
        mark = "   <- smallest that fits" if row["smallest"] else ""
        lines.append(
            f"{start}{row['needs_gib']:8.1f} of {row['has_gib']:5.2f} with tensor "
            f"{row['tensor']}{mark}"
        )
    return "\n".join(lines)


def search(stage: config.Stage, where: chips.Slice, quiet: bool) -> list[dict]:
    """Every candidate layout, the fastest first; then those that do not fit."""
    found = []
    for layout in plan.candidates(stage, where):
        fields = " ".join(plan.as_fields(layout))
        try:
            report = plan.plan(dataclasses.replace(stage, layout=layout), where)
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


if __name__ == "__main__":
    main()
