"""Prepares a corpus: cleaned documents, their token counts and a manifest, for training.

    python tools/prepare_corpus.py --tokenizer tokenizer.model --out work/corpus
    python tools/prepare_corpus.py --tokenizer tokenizer.model --out work/corpus \\
        --code-dir ~/src/project --code-dir ~/src/other
    python tools/prepare_corpus.py --tokenizer tokenizer.model --out work/corpus --workers 16 \\
        --input ~/src --input code=github.parquet --input language=wiki.jsonl.gz \\
        --evaluation HumanEval.jsonl.gz

--input is for corpora of any size: whole files, in bounded memory, in parallel. It takes
directories of source files, .jsonl (.gz, .zst), .parquet and .array_record files or directories of
them, and TensorFlow data sets, by name or folder. CORPUS= says which corpus the documents go to;
without it, prose becomes `language`, the rest `code`, and `python` is the Python of `code`.

Without --input it is made in memory: functions, docstrings and dialogues too, for small models, of
the --code-dir or of what every Python brings. Run again, it finds its work done, or goes on.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed


def main() -> int:
    args = arguments()
    from codellama_jax.tokenizer import Tokenizer

    try:
        with Bars(in_bytes=bool(args.input)) as bars:
            tokenizer = Tokenizer(args.tokenizer)
            make = from_inputs if args.input else in_memory
            prepared = make(args, tokenizer, bars.update)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(prepared)
    return 0


def in_memory(args: argparse.Namespace, tokenizer, progress):
    from codellama_jax.data import corpus, gather

    for name in ("evaluation", "licence", "field", "filter", "keep_private", "workers"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect without --input")
    request = gather.Request(
        code_dirs=tuple(args.code_dir),
        function_chars=args.function_chars,
        heldout_rate=0.04 if args.heldout_rate is None else args.heldout_rate,
        jaccard=args.jaccard,
        seed=args.seed,
    )
    return corpus.prepare(args.out, tokenizer, request, progress=progress)


def from_inputs(args: argparse.Namespace, tokenizer, progress):
    from codellama_jax.data import filters, inputs, pipeline

    for name in ("code_dir", "function_chars"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --input")
    fields = {name: (value,) for name, value in pairs(args.field, inputs.Fields, "--field")}
    types = {name: type(value) for name, value in vars(filters.Filters()).items()}
    limits = {
        name: types[name](float(value))
        for name, value in pairs(args.filter, filters.Filters, "--filter")
    }
    request = pipeline.Request(
        inputs=tuple(inputs.Input.parse(text) for text in args.input),
        fields=inputs.Fields(**fields),
        filters=filters.Filters(**limits, licences=tuple(args.licence)),
        jaccard=args.jaccard,
        evaluations=tuple(args.evaluation),
        mask_private=not args.keep_private,
        heldout_rate=0.01 if args.heldout_rate is None else args.heldout_rate,
        seed=args.seed,
    )
    workers = args.workers or len(os.sched_getaffinity(0))
    return pipeline.prepare(args.out, tokenizer, request, workers=workers, progress=progress)


def pairs(given: list[str], settings: type, flag: str) -> list[list[str]]:
    """NAME=VALUE, of names that the settings have."""
    from dataclasses import fields

    names = [field.name for field in fields(settings) if field.name != "licences"]
    for text in given:
        if "=" not in text or text.split("=")[0] not in names:
            raise ValueError(f"{flag} {text}: write NAME=VALUE, of {', '.join(names)}")
    return [text.split("=", 1) for text in given]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="a tokenizer.model")
    parser.add_argument(
        "--code-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="tree of source files instead of Python's own; may be repeated",
    )
    parser.add_argument(
        "--function-chars",
        type=int,
        default=0,
        metavar="N",
        help="cut code into functions of at most N characters, for short rows (the nano recipe: "
        "560); 0, the default, keeps whole files",
    )
    parser.add_argument("--heldout-rate", type=float, help="share of files held out")
    parser.add_argument(
        "--jaccard", type=float, default=0.8, help="similarity of near-duplicates, 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is held out")
    large = parser.add_argument_group("from inputs of any size")
    for flag, metavar, text in (
        ("--input", "[CORPUS=]PATH", "what to read; may be repeated, as all of these"),
        ("--evaluation", "FILE", "JSONL evaluation set: what shares 30 words with it is left out"),
        ("--licence", "NAME", "allowed licence; without any, all are"),
        ("--field", "NAME=KEY", "where a record has its text, path, language, licence or source"),
        ("--filter", "NAME=VALUE", "another threshold, e.g. line_chars=500; 0 switches it off"),
    ):
        large.add_argument(flag, action="append", default=[], metavar=metavar, help=text)
    large.add_argument("--keep-private", action="store_true", help="keep keys and addresses")
    large.add_argument("--workers", type=int, default=0, help="processes; default: one per core")
    return parser.parse_args()


class Bars:
    """One line per corpus or task on a terminal: how much, speed, time left."""

    def __init__(self, *, in_bytes: bool):
        self._in_bytes = in_bytes

    def __enter__(self) -> "Bars":
        from rich import progress

        columns = (
            progress.TextColumn("{task.description:14}"),
            progress.BarColumn(),
            progress.DownloadColumn() if self._in_bytes else progress.MofNCompleteColumn(),
            *([progress.TransferSpeedColumn()] if self._in_bytes else []),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        self._progress = progress.Progress(*columns)
        self._tasks: dict = {}
        self._reading = self._progress.add_task("looking", total=None)
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.update(self._reading, total=1, completed=1)
        self._progress.stop()

    def update(self, name: str, done: int, total: int) -> None:
        self._progress.update(self._reading, total=1, completed=1)
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done)


def show(prepared) -> None:
    """Tables of what is there and of what was left out."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{prepared.folder}")
    for title in ("corpus", "language", "documents", "held out", "MB", "tokens"):
        table.add_column(title, justify="left" if title in ("corpus", "language") else "right")
    for name, entry in prepared.manifest["corpora"].items():
        heldout = entry["heldout"]["languages"]
        for language, of in entry["train"]["languages"].items():
            out = heldout.get(language, {"documents": 0})["documents"]
            size = f"{of['bytes'] / 1e6:.2f}"
            counts = (f"{of['documents']:,}", f"{out:,}", size, f"{of['tokens']:,}")
            table.add_row(name, language, *counts)
    removed = Table(title="left out")
    for title in ("reason", "documents", "MB", "for example"):
        removed.add_column(title, justify="left" if title[0] in "rf" else "right")
    for reason, of in prepared.manifest["removed"].items():
        size = f"{of['bytes'] / 1e6:.2f}"
        removed.add_row(reason, f"{of['documents']:,}", size, ", ".join(of["examples"]))
    console = Console()
    console.print(table)
    console.print(removed)
    masked = prepared.manifest.get("masked", {})
    if masked:
        found = ", ".join(f"{count:,} {kind}" for kind, count in masked.items())
        console.print(f"masked: {found}")
    origins = {entry["origin"] for entry in prepared.manifest["corpora"].values()}
    console.print(f"from {'; '.join(sorted(origins))}")


if __name__ == "__main__":
    sys.exit(main())
