r"""What a stage needs on TPUs: bytes, seconds, chip-hours. Compiles the real step; needs no TPU.

    python tools/plan_pod.py --size 34b --stage long_context              what is known, and a plan
    python tools/plan_pod.py --size 7b --stage code --slice v5e:16x16     one slice, compiled
    python tools/plan_pod.py --size 34b --stage code --slice v5p:4x4x8 --set layout.tensor=2
    python tools/plan_pod.py --size 7b --stage code --slice v5e:16x16 --search 6
    python tools/plan_pod.py --size 34b --slice v5e:2x4 --generate 1 --context 100000
    python tools/plan_pod.py --outdated                                   rows of other programs
    python tools/plan_pod.py --fill                                       compiles and records them
    python tools/plan_pod.py --twins                                      small ones of all layouts

A compile takes one to five minutes of one or two cores and up to 3 GB; the answer is kept, and the
same question is answered at once. Needs the TPU compiler: pip install 'codellama_jax[aot]'.
docs/pods.md says how the time is estimated and what the estimate leaves out.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from codellama_jax import arithmetic, chips, config, launch, ledger, plan, plan_decode, twins
from recipes import code_llama

DOCS = Path(__file__).parents[1] / "docs"
USUAL_MFU = 0.5  # for days of a slice that was not compiled


def main() -> None:
    args = arguments()
    with launch.refusals():
        if args.outdated or args.fill:
            fill(args.fill)
        elif args.twins:
            compile_twins(args.record)
        elif args.generate:
            where, model = chips.Slice.parse(args.slice), config.SIZES[args.size]
            found = plan_decode.plan_generation(
                model, where, args.generate, args.context, quick=args.quick
            )
            if args.record:
                ledger.record_generation(DOCS, args.size, found)
            show(found, plan_decode.table, args.json)
        elif args.slice is None:
            stage = launch.pick(code_llama.stages(args.size), args.stage, args.size)
            plan_without_slice(stage, args)
        else:
            plan_slice(chips.Slice.parse(args.slice), args)


def plan_slice(where: chips.Slice, args) -> None:
    stage = launch.pick(code_llama.stages(args.size), args.stage, args.size)
    stage = laid_out(stage, args.size, where, args.set)
    if args.search:
        show(search(stage, where, args.search, args.json), ranking, args.json)
        return
    report = plan.plan(stage, where, quick=args.quick)
    if args.record:
        ledger.record(DOCS, ledger.row(args.size, report))
    show(report, plan.table, args.json)
    if args.check:
        print(ledger.compare(DOCS, ledger.row(args.size, report)), file=sys.stderr)


def show(found, table, as_json: bool) -> None:
    print(json.dumps(found, indent=1) if as_json else table(found))


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(config.SIZES))
    parser.add_argument("--stage", help="such as code; recipes/code_llama.py --list")
    parser.add_argument("--slice", metavar="CHIP:SHAPE", help="such as v5e:16x16 or 2xv5p:4x4x8")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="as in the recipe"
    )
    parser.add_argument(
        "--quick", action="store_true", help="bytes only: compiles in half the time"
    )
    parser.add_argument(
        "--search", type=int, metavar="N", help="compile the N most promising layouts, rank them"
    )
    parser.add_argument(
        "--generate", type=int, metavar="ROWS", help="reading and continuing so many prompts"
    )
    parser.add_argument("--context", type=int, metavar="TOKENS", help="of each prompt")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--record", action="store_true", help="put the answer into docs/pods.*")
    parser.add_argument("--check", action="store_true", help="fail where docs/pods.json was better")
    parser.add_argument(
        "--outdated",
        action="store_true",
        help="cells that docs/pods.json lacks, or of old programs or estimates",
    )
    parser.add_argument("--fill", action="store_true", help="compile and record these, all of them")
    parser.add_argument(
        "--twins", action="store_true", help="compile two narrow layers in every layout, for bytes"
    )
    args = parser.parse_args()
    ledgered = args.record or args.check
    what = args.size and (args.stage or args.generate)
    if args.outdated or args.fill or args.twins:
        return args
    if not what:
        parser.error("--size and --stage say what to plan; --outdated, --fill and --twins do not")
    if (args.generate is None) != (args.context is None) or args.generate and not args.slice:
        parser.error("--generate ROWS wants --context TOKENS and a --slice")
    if args.generate and (args.stage or args.set or args.search or args.check):
        parser.error("--generate takes no stage, and none of --set, --search, --check")
    if args.slice is None and (args.search or args.quick or ledgered):
        parser.error("--search, --quick, --record and --check compile: say for which --slice")
    if args.quick and (args.search or ledgered):
        parser.error("--search, --record and --check want times, which --quick does not give")
    if args.search is not None and (ledgered or args.search < 1):
        parser.error("--search N takes N >= 1 layouts, of which --record and --check take none")
    return args


def laid_out(stage: config.Stage, size: str, where: chips.Slice, settings: list[str]):
    """The stage with the recipe's layout for a slice, or else one that fits by arithmetic."""
    known = code_llama.layouts(stage, size).get(str(where))
    layout = known or (None if settings else arithmetic.least(stage, where)) or stage.layout
    stage = dataclasses.replace(stage, layout=layout)
    return launch.changed({stage.name: stage}, settings)[stage.name]


# -- without a slice -----------------------------------------------------------------------------
def plan_without_slice(stage: config.Stage, args) -> None:
    """Says what is known of a stage, and plans the smallest slice that fits."""
    known = [row for row in ledger.read(DOCS) if is_of(row, args.size, stage)]
    rows = survey(stage)
    proposed = propose(known, rows)
    config.check(proposed is not None, f"no slice fits {stage.name}: {args.size} needs more chips")
    if not args.json:
        print(surveyed(stage, known, rows))
        print(f"\nthe smallest that fits{' and is compiled' * bool(known)}: {proposed}\n")
    where = chips.Slice.parse(proposed)
    report = plan.plan(laid_out(stage, args.size, where, args.set), where)
    if args.json:
        print(json.dumps({"compiled": known, "arithmetic": rows, "plan": report}, indent=1))
    else:
        print(plan.table(report))


def is_of(row: dict, size: str, stage: config.Stage) -> bool:
    return (row["size"], row["stage"]) == (size, stage.name)


def survey(stage: config.Stage) -> list[dict]:
    """For each chip its slices by arithmetic, everything recomputed, and the smallest that fits."""
    rows = []
    for chip in chips.CHIPS.values():
        fits = arithmetic.smallest(stage, chip)
        for where in chips.known(chip):
            layout = arithmetic.least(stage, where)
            made = layout and dataclasses.replace(stage, layout=layout)
            rows.append(
                {
                    "slice": str(where),
                    "chips": where.chips,
                    "needs_gib": round(arithmetic.gib(made, where), 1) if made else None,
                    "has_gib": chip.hbm_gib,
                    "days": round(arithmetic.days(stage, where, USUAL_MFU), 1),
                    "layout": " ".join(plan.as_fields(layout)) if layout else None,
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


# -- search --------------------------------------------------------------------------------------
def search(stage: config.Stage, where: chips.Slice, most: int, quiet: bool) -> list[dict]:
    """The most promising layouts compiled, the fastest first; then those that do not fit."""
    found = []
    for layout in arithmetic.candidates(stage, where)[:most]:
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


# -- the whole ledger ----------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Cell:
    """A layout of the recipe that the ledger lacks, or has of an older program or estimate."""

    size: str
    stage: config.Stage
    where: chips.Slice
    why: str

    def record(self) -> None:
        """Compiles it in a process of its own: the compiler keeps what it took."""
        cell = ["--size", self.size, "--stage", self.stage.name, "--slice", str(self.where)]
        subprocess.run([sys.executable, __file__, *cell, "--record"])


def compile_twins(records: bool) -> None:
    """Compares the twin of every layout with docs/pods_twins.json, or writes that anew."""
    needed, known = {}, twins.read(DOCS)
    for size, stage, where in laid_out_stages():
        name = twins.name_of(stage, size, str(where))
        new = needed[name] = twins.needs(stage, where)
        said = f"{name}: {new['peak_bytes'] / 2**20:.0f} MiB, {', '.join(new['kinds'])}"
        print(said if records else twins.compare(name, new, known.get(name)), flush=True)
    if records:
        twins.record(DOCS, needed)


def laid_out_stages():
    """(size, stage, slice) of every layout of the recipe, once each."""
    for size in config.SIZES:
        for layouts in {
            id(found): (stage, found)
            for stage in code_llama.stages(size).values()
            if (found := code_llama.layouts(stage, size))
        }.values():
            stage, found = layouts
            for text, layout in found.items():
                yield size, dataclasses.replace(stage, layout=layout), chips.Slice.parse(text)


def fill(compiles: bool) -> None:
    """Names the cells that the ledger lacks; compiles and records them, one after another."""
    for cell in outdated():
        print(f"{cell.why:<15}{cell.size:>4} {cell.stage.name} on {cell.where}", flush=True)
        if compiles:
            cell.record()


def outdated() -> list[Cell]:
    """The cells of the recipe to be compiled. Lowers each program, which takes seconds."""
    found = []
    for size in config.SIZES:
        for stage in code_llama.stages(size).values():
            for text, layout in code_llama.layouts(stage, size).items():
                where, row = chips.Slice.parse(text), ledger.find(DOCS, size, stage, text, layout)
                if why := staleness(size, dataclasses.replace(stage, layout=layout), where, row):
                    found.append(Cell(size, stage, where, why))
    return found


def staleness(size: str, stage: config.Stage, where: chips.Slice, row: dict | None) -> str:
    """Why a row is to be made anew; "" where it is not."""
    if row is None:
        return "missing"
    cache = plan.cache_folder()
    program = plan.program(plan.canonical(stage), where, plan.told(stage, where), cache)[0]
    if row["program"] != program:
        return "other program"
    if plan.load(cache / f"{program}.json") is None:  # to compile it would show nothing new
        return ""
    now = ledger.row(size, plan.plan(stage, where))
    return "other estimate" if any(row[name] != now[name] for name in ledger.TIME) else ""


if __name__ == "__main__":
    main()
