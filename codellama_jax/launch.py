"""The command line of a recipe: list its stages, change fields, train."""

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from codellama_jax import config
from codellama_jax.config import check

Stages = dict[str, config.Stage]


def main(
    stages: Callable[[str], Stages],
    sizes: tuple[str, ...],
    description: str,
    layouts: Callable[[config.Stage, str], dict[str, config.Layout]],
) -> None:
    """Runs one stage of a recipe: --size, --stage, --slice, --workdir, --set a.b=value, --list."""
    flags = parser(description, sizes)
    flags.add_argument("--slice", help="TPUs to lay the stage out for, such as v5e:16x16")
    args = flags.parse_args()
    with refusals():
        if args.list:
            for size in [args.size] if args.size else sizes:
                show(size, changed(stages(size), args.set))
            return
        check(args.size is not None, f"--size is missing; there are {', '.join(sizes)}")
        rows = stages(args.size)
        check(args.stage is not None, f"--stage is missing; {args.size} has {', '.join(rows)}")
        check(args.workdir is not None, "--workdir is missing: where checkpoints go (may be gs://)")
        chosen = {args.stage: laid_out(pick(rows, args.stage, args.size), args, layouts)}
        stage = changed(chosen, args.set)[args.stage]
        start_processes()
        from codellama_jax import train

        train.train(stage, args.workdir)


def parser(description: str, sizes: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The flags every recipe has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if sizes:
        made.add_argument("--size", choices=sizes, help="size of the model")
    made.add_argument("--stage", help="stage to train; see --list")
    made.add_argument("--workdir", help="folder for checkpoints, metrics and the corpus")
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field of the stage, such as optim.peak_lr=1e-4; may be repeated",
    )
    made.add_argument("--list", action="store_true", help="print every stage on one line, and stop")
    return made


def laid_out(stage: config.Stage, args: argparse.Namespace, layouts: Callable) -> config.Stage:
    """The stage with the recipe's layout for --slice."""
    if args.slice is None:
        return stage
    have = layouts(stage, args.size)
    check(
        args.slice in have,
        f"{args.size} {stage.name} has no layout for slice {args.slice!r}, only for "
        f"{', '.join(have) or 'none'}; plan one with tools/plan_pod.py and give it by --set",
    )
    return dataclasses.replace(stage, layout=have[args.slice])


def pick(stages: Stages, name: str, where: str) -> config.Stage:
    check(name in stages, f"{where} has no stage {name!r}; it has {', '.join(stages)}")
    return stages[name]


def changed(stages: Stages, settings: list[str]) -> Stages:
    """The stages with every FIELD=VALUE applied to all of them."""
    fields = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        check(bool(equals), f"--set {setting!r} is not of the form field=value")
        fields[path] = text
    return {name: config.override(stage, fields) for name, stage in stages.items()}


def show(title: str, stages: Stages) -> None:
    """One line per stage."""
    from rich.console import Console
    from rich.table import Table

    columns = "stage|starts from|tokens|steps|batch|row|peak lr|RoPE base|infilling|mix"
    table = Table(*columns.split("|"), title=title, title_justify="left", box=None)
    for stage in stages.values():
        table.add_row(
            stage.name,
            stage.start_from or "nothing",
            _short(stage.tokens),
            f"{stage.steps:,}",
            _short(stage.data.batch_tokens),
            f"{stage.data.seq_len:,}",
            f"{stage.optim.peak_lr:g}",
            f"{stage.model.rope_theta:g}",
            f"{stage.data.infilling_rate:g}",
            " ".join(f"{name} {share:.0%}" for name, share in stage.data.mix.items()),
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def make_folder(folder: Path) -> None:
    """Makes the workdir; raises ValueError when that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror or error}") from error


def copy_file(source: Path, target: Path) -> None:
    """Copies under a temporary name, then renames: a copy is whole or absent."""
    temporary = target.with_name(target.name + ".tmp")
    shutil.copyfile(source, temporary)
    temporary.replace(target)


def start_processes() -> None:
    """Joins the other hosts of a pod or cluster, if this process was started as one of many.

    On a cluster that JAX does not know, set JAX_NUM_PROCESSES, JAX_PROCESS_ID (0, 1, ...) and
    JAX_COORDINATOR_ADDRESS (host:port of process 0).
    """
    import jax

    number = int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    if number > 1:
        for name in ("JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"):
            check(name in os.environ, f"JAX_NUM_PROCESSES={number} needs {name}, too")
        process = int(os.environ["JAX_PROCESS_ID"])
        jax.distributed.initialize(num_processes=number, process_id=process)
    elif (
        "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
        or int(os.environ.get("SLURM_NTASKS", "1")) > 1
    ):
        jax.distributed.initialize()


class refusals:
    """Turns what a user or a machine did wrong into one sentence and exit status 2."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        if kind is not None and issubclass(kind, ValueError | FloatingPointError | OSError):
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def _short(count: int) -> str:
    for unit, size in (("T", 1_000 * config.B), ("B", config.B), ("M", config.M), ("k", config.K)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
