"""Prepares a corpus: cleaned documents, their token counts and a manifest, for training.

    python tools/prepare_corpus.py --tokenizer tokenizer.model --out work/corpus
    python tools/prepare_corpus.py --tokenizer tokenizer.model --out work/corpus \\
        --code-dir ~/src/project --code-dir ~/src/other

Without --code-dir it is made of what every Python brings: the standard library, its docstrings and
its reference prose. Run again, it finds its work done.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed


def main() -> int:
    args = arguments()
    from codellama_jax.data import corpus, gather
    from codellama_jax.tokenizer import Tokenizer

    try:
        request = gather.Request(
            code_dirs=tuple(args.code_dir),
            function_chars=args.function_chars,
            heldout_rate=args.heldout_rate,
            jaccard=args.jaccard,
            seed=args.seed,
        )
        with Bars() as bars:
            tokenizer = Tokenizer(args.tokenizer)
            prepared = corpus.prepare(args.out, tokenizer, request, progress=bars.update)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(prepared)
    return 0


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
    parser.add_argument("--heldout-rate", type=float, default=0.04, help="share of files held out")
    parser.add_argument(
        "--jaccard", type=float, default=0.8, help="similarity of near-duplicates, 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is held out")
    return parser.parse_args()


class Bars:
    """One line per corpus on a terminal: documents, speed, time left."""

    def __enter__(self) -> "Bars":
        from rich import progress

        columns = (
            progress.TextColumn("{task.description:14}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        self._progress = progress.Progress(*columns)
        self._tasks: dict = {}
        self._reading = self._progress.add_task("reading", total=None)
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
    origins = {entry["origin"] for entry in prepared.manifest["corpora"].values()}
    console.print(f"from {'; '.join(sorted(origins))}")


if __name__ == "__main__":
    sys.exit(main())
