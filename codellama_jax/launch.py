"""The command line of a recipe: list its stages, change fields, train."""

import argparse
import dataclasses
import faulthandler
import importlib.util
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from codellama_jax import cluster, config, stop
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
    flags.add_argument(
        "--wait",
        type=int,
        default=300,
        metavar="SECONDS",
        help="for a host that is missing at the start, before it is named (300)",
    )
    args = flags.parse_args()
    faulthandler.enable()  # shows where Python was when a library crashes
    with refusals(args.traceback):
        if args.list:
            for size in [args.size] if args.size else sizes:
                show(size, changed(stages(size), args.set))
            return
        check(args.size is not None, f"--size is missing; there are {', '.join(sizes)}")
        rows = stages(args.size)
        check(args.stage is not None, f"--stage is missing; {args.size} has {', '.join(rows)}")
        check(args.workdir is not None, "--workdir is missing: where checkpoints go (may be gs://)")
        check_bucket(args.workdir)
        chosen = {args.stage: laid_out(pick(rows, args.stage, args.size), args, layouts)}
        stage = changed(chosen, args.set)[args.stage]
        cluster.join(args.wait)
        check_devices(args.slice)
        from codellama_jax import train

        keep_compiled(args.workdir)
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
    made.add_argument(
        "--traceback", action="store_true", help="show where an error was raised, not only what"
    )
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


def check_devices(where: str | None) -> None:
    """Raises ValueError when the devices that were found are not as many as those of --slice."""
    if where is None:
        return
    import jax

    from codellama_jax.plan import chips

    wanted, found = chips.Slice.parse(where).devices, jax.device_count()
    kind, processes = jax.devices()[0].device_kind, jax.process_count()
    check(
        found == wanted,
        f"--slice {where} has {wanted} devices, this run has {found} ({kind}, "
        f"processes: {processes}): start the recipe on every host of such a slice, or "
        "leave --slice out and lay the stage out by --set layout.*",
    )


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


def check_bucket(workdir: str) -> None:
    """Raises ValueError for a gs:// workdir without the library that reads and writes there."""
    check(
        not workdir.startswith("gs://") or importlib.util.find_spec("gcsfs") is not None,
        f"--workdir {workdir} needs gcsfs: pip install gcsfs",
    )


def keep_compiled(workdir: str | Path) -> None:
    """Keeps compiled programs in <workdir>/compiled: a later call need not compile them again.

    JAX_COMPILATION_CACHE_DIR names another folder; JAX_ENABLE_COMPILATION_CACHE=false keeps none.
    """
    import jax

    from codellama_jax import checkpoint

    if jax.config.jax_compilation_cache_dir is None:
        folder = checkpoint.absolute(workdir) / "compiled"
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))


class refusals:
    """Turns what a user or a machine did wrong into one sentence and exit status 2.

    traceback=True shows where it was raised. A signal ends with status 128 + its number.
    """

    def __init__(self, traceback: bool = False):
        self._traceback = traceback

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, _) -> None:
        if kind is None or issubclass(kind, SystemExit):
            return
        if issubclass(kind, stop.Stopped | KeyboardInterrupt):
            said = f"{error}. " if str(error) else ""
            print(f"{said}To go on: python {shlex.join(sys.argv)}", file=sys.stderr)
            raise SystemExit(128 + getattr(error, "signum", signal.SIGINT)) from None
        refused = issubclass(kind, ValueError | FloatingPointError | OSError)
        if refused and not self._traceback:
            print(f"error: {error}", file=sys.stderr)
            cluster.end(str(error), 2)
            raise SystemExit(2) from None
        if cluster.many():
            traceback.print_exception(error)
            cluster.end(f"{kind.__name__}: {str(error)[:300]}. {cluster.LOST}", 1, after=10)


def _short(count: int) -> str:
    for unit, size in (("T", 1_000 * config.B), ("B", config.B), ("M", config.M), ("k", config.K)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
