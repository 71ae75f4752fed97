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

from codellama_jax import config, launch
from codellama_jax.plan import (
    arithmetic,
    cell,
    chips,
    coverage,
    generation,
    ledger,
    search,
    shown,
    survey,
)
from recipes import code_llama

DOCS = Path(__file__).parents[1] / "docs"
RECIPE = code_llama.stages, code_llama.layouts


def main() -> None:
    args = arguments()
    with launch.refusals():
        if args.outdated or args.fill:
            fill(args.fill)
        elif args.twins:
            coverage.compile_twins(DOCS, *RECIPE, records=args.record)
        elif args.generate:
            where, model = chips.Slice.parse(args.slice), config.SIZES[args.size]
            found = generation.plan_generation(
                model, where, args.generate, args.context, quick=args.quick
            )
            if args.record:
                ledger.record_generation(DOCS, args.size, found)
            show(found, shown.generation_table, args.json)
        elif args.slice is None:
            stage = launch.pick(code_llama.stages(args.size), args.stage, args.size)
            plan_without_slice(stage, args)
        else:
            plan_slice(chips.Slice.parse(args.slice), args)


def plan_slice(where: chips.Slice, args) -> None:
    stage = launch.pick(code_llama.stages(args.size), args.stage, args.size)
    stage = laid_out(stage, args.size, where, args.set)
    if args.search:
        found = search.search(stage, where, args.search, args.json)
        show(found, search.ranking, args.json)
        return
    report = cell.plan(stage, where, quick=args.quick)
    if args.record:
        ledger.record(DOCS, ledger.row(args.size, report))
    show(report, shown.table, args.json)
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
    parser.add_argument(
        "--fill", action="store_true", help="compile and record these; forget others"
    )
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
    known = [row for row in ledger.read(DOCS) if survey.is_of(row, args.size, stage)]
    rows = survey.survey(stage)
    proposed = survey.propose(known, rows)
    config.check(proposed is not None, f"no slice fits {stage.name}: {args.size} needs more chips")
    if not args.json:
        print(survey.surveyed(stage, known, rows))
        print(f"\nthe smallest that fits{' and is compiled' * bool(known)}: {proposed}\n")
    where = chips.Slice.parse(proposed)
    report = cell.plan(laid_out(stage, args.size, where, args.set), where)
    if args.json:
        print(json.dumps({"compiled": known, "arithmetic": rows, "plan": report}, indent=1))
    else:
        print(shown.table(report))


def fill(compiles: bool) -> None:
    """Names the cells that the ledger lacks; compiles and records them, one after another."""
    cells = coverage.outdated(DOCS, *RECIPE)
    if not cells:
        print("every layout of the recipe is in docs/pods.json as it compiles now")
    for found in cells:
        print(f"{found.why:<15}{found.size:>4} {found.stage.name} on {found.where}", flush=True)
        if compiles:  # in a process of its own: the compiler keeps what it took
            which = ["--size", found.size, "--stage", found.stage.name, "--slice", found.where]
            subprocess.run([sys.executable, __file__, *map(str, which), "--record"])
    if compiles:
        for row in coverage.forget_others(DOCS, *RECIPE):
            print(f"{'forgotten':<15}{row['size']:>4} {row['stage']} on {row['slice']}", flush=True)


if __name__ == "__main__":
    main()
