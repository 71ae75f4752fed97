"""Prepares a corpus: cleaned documents, their token counts and a manifest, for training.

    python tools/prepare_corpus.py --tokenizer tokenizer.model --out work/corpus --input ~/src
    python tools/prepare_corpus.py --tokenizer tokenizer.model --out work/corpus --workers 16 \\
        --input ~/src --input code=github.parquet --input language=wiki.jsonl.gz \\
        --evaluation HumanEval.jsonl.gz

--input takes directories of source files, .jsonl (.gz, .zst), .parquet and .array_record files or
directories of them, and TensorFlow data sets, by name or folder; without any, what every Python
brings is read. CORPUS= says which corpus the documents go to; without it, prose becomes `language`,
dialogues `dialogues`, the rest `code`. Of Python's docstrings `code_language` and `dialogues` are
made, and `python` is the Python of `code`.

It works in bounded memory and in parallel. Run again, it finds its work done, or goes on.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed


def main() -> int:
    args = arguments()
    from codellama_jax.data import pipeline
    from codellama_jax.tokenizer import Tokenizer

    try:
        with Bars() as bars:
            tokenizer, asked = Tokenizer(args.tokenizer), request(args)
            prepared = pipeline.prepare(
                args.out,
                tokenizer,
                asked,
                workers=args.workers or len(os.sched_getaffinity(0)),
                engine=engine(args),
                progress=bars.update,
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(prepared)
    return 0


def request(args: argparse.Namespace):
    from codellama_jax.data import filters, inputs, pipeline, sources

    fields = {name: (value,) for name, value in pairs(args.field, inputs.Fields, "--field")}
    types = {name: type(value) for name, value in vars(filters.Filters()).items()}
    limits = {
        name: types[name](float(value))
        for name, value in pairs(args.filter, filters.Filters, "--filter")
    }
    return pipeline.Request(
        inputs=tuple(inputs.Input.parse(text) for text in args.input or [sources.THIS_PYTHON]),
        fields=inputs.Fields(**fields),
        filters=filters.Filters(**limits, licences=tuple(args.licence)),
        function_chars=args.function_chars,
        forms=tuple(form for form in pipeline.FORMS if form not in args.without),
        jaccard=args.jaccard,
        evaluations=tuple(args.evaluation),
        mask_private=not args.keep_private,
        heldout_rate=args.heldout_rate,
        seed=args.seed,
    )


def engine(args: argparse.Namespace):
    """What runs the tasks; None: processes of our own."""
    from codellama_jax.data import beam

    if args.engine == "beam":
        if args.workers:
            raise ValueError("--workers has no effect with --engine beam, whose runner decides")
        return functools.partial(beam.run, options=args.beam_arg)
    if args.beam_arg:
        raise ValueError("--beam-arg has no effect without --engine beam")
    return None


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
    for flag, metavar, text in (
        ("--input", "[CORPUS=]PATH", "what to read; may be repeated, as all of these"),
        ("--evaluation", "FILE", "JSONL evaluation set: what shares 30 words with it is left out"),
        ("--licence", "NAME", "allowed licence; without any, all are"),
        ("--field", "NAME=KEY", "where a record has its text, dialog, path, language, licence"),
        ("--filter", "NAME=VALUE", "another threshold, e.g. line_chars=500; 0 switches it off"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=metavar, help=text)
    parser.add_argument(
        "--function-chars",
        type=int,
        default=0,
        metavar="N",
        help="cut code into functions of at most N characters, for short rows (the nano recipe: "
        "400), and keep the files as `code_files`; 0, the default: `code` is whole files",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=("docstrings", "dialogues"),
        help="make no such documents of Python's docstrings",
    )
    parser.add_argument("--heldout-rate", type=float, default=0.01, help="share of files held out")
    parser.add_argument(
        "--jaccard", type=float, default=0.8, help="similarity of near-duplicates; 0: exact ones"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is held out")
    parser.add_argument("--keep-private", action="store_true", help="keep keys and addresses")
    parser.add_argument("--workers", type=int, default=0, help="processes; default: one per core")
    parser.add_argument(
        "--engine",
        choices=("processes", "beam"),
        default="processes",
        help="what runs the tasks: processes of this machine, or Apache Beam (docs/data.md)",
    )
    parser.add_argument(
        "--beam-arg",
        action="append",
        default=[],
        metavar="--NAME=VALUE",
        help="for Beam, as in --beam-arg=--runner=DataflowRunner; may be repeated",
    )
    return parser.parse_args()


class Bars:
    """One line per round on a terminal: how much, speed, time left."""

    def __enter__(self) -> "Bars":
        from rich import progress

        columns = (
            progress.TextColumn("{task.description:16}"),
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        # No thread of its own: tensorflow-datasets changes how all threads import while it does.
        self._progress = progress.Progress(*columns, auto_refresh=False)
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
        self._progress.refresh()


def show(prepared) -> None:
    """Tables of what is there, and of what was left out of every language by every filter."""
    from rich.console import Console

    console, manifest = Console(), prepared.manifest
    console.print(corpora(prepared))
    console.print(by_language(manifest))
    for title, removed in (
        ("left out", manifest["removed"]),
        ("left out of what was made of documents", manifest["removed_pieces"]),
    ):
        if removed:
            console.print(left_out(title, removed))
    if masked := manifest["masked"]:
        found = ", ".join(f"{count:,} {kind}" for kind, count in masked.items())
        console.print(f"masked: {found}")
    origins = {entry["origin"] for entry in manifest["corpora"].values()}
    console.print(f"from {'; '.join(sorted(origins))}")


def table(title: str, **columns: str):
    """columns: "left" or "right"."""
    from rich.table import Table

    made = Table(title=title)
    for name, side in columns.items():
        made.add_column(name.replace("_", " "), justify=side)
    return made


def corpora(prepared):
    numbers = {name: "right" for name in ("documents", "held_out", "MB", "tokens")}
    made = table(str(prepared.folder), corpus="left", language="left", **numbers)
    for name, entry in prepared.manifest["corpora"].items():
        heldout = entry["heldout"]["languages"]
        for language, of in entry["train"]["languages"].items():
            out = heldout.get(language, {"documents": 0})["documents"]
            size = f"{of['bytes'] / 1e6:.2f}"
            counts = (f"{of['documents']:,}", f"{out:,}", size, f"{of['tokens']:,}")
            made.add_row(name, language, *counts)
    return made


def by_language(manifest: dict):
    """Documents: those read, those left out for each reason, by its letter, and the rest."""
    reasons = dict(zip("abcdefghijklmnopqrstuvwxyz", manifest["removed"].items(), strict=False))
    columns = {name: "right" for name in ("read", *reasons, "left")}
    made = table("documents by language", language="left", **columns)
    for language, of in manifest["read"].items():
        gone = [entry["languages"].get(language, 0) for _, entry in reasons.values()]
        counts = (of["documents"], *gone, of["documents"] - sum(gone))
        made.add_row(language, *(f"{count:,}" if count else "" for count in counts))
    made.caption = ", ".join(f"{letter}: {reason}" for letter, (reason, _) in reasons.items())
    return made


def left_out(title: str, removed: dict):
    made = table(title, reason="left", documents="right", MB="right", for_example="left")
    for reason, of in removed.items():
        size = f"{of['bytes'] / 1e6:.2f}"
        made.add_row(reason, f"{of['documents']:,}", size, ", ".join(of["examples"]))
    return made


if __name__ == "__main__":
    sys.exit(main())
