"""Tokenizes the rows of a stage ahead of training; the reader then takes them from files.

    python tools/prepare_rows.py --recipe recipes/nano.py --stage code --workdir runs/nano \\
        --set data.rows=rows
    python recipes/nano.py --stage code --workdir runs/nano --set data.rows=rows

    python tools/prepare_rows.py --recipe recipes/code_llama.py --size 7b --stage code \\
        --workdir /data/run --workers 64 --set data.rows=rows

They lie in the corpus's folder, 2 bytes a token or less. The rows are the same with and without,
and rows that are not there (of later epochs) are made while they are read. Run again, it goes on
where it was, or finds its work done. It is worth it where hosts have few cores, or many runs read
the same rows: making rows takes one core for each million tokens per second.
"""

import argparse
import inspect
import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed


def main() -> int:
    args = arguments()
    from codellama_jax.data import materialise, storage
    from codellama_jax.tokenizer import Tokenizer

    try:
        stage = chosen(args)
        if stage.data.rows is None:
            raise ValueError("name the folder to write in the corpus's: --set data.rows=rows")
        workdir = storage.path(args.workdir)
        manifest = materialise.prepare(
            stage.data,
            workdir / stage.data.corpus,
            Tokenizer(workdir / stage.data.tokenizer),
            steps=stage.steps,
            epochs=args.epochs,
            workers=args.workers,
            progress=Lines(),
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    tokens = sum(entry["rows"] for entry in manifest["corpora"].values()) * stage.data.seq_len
    print(
        f"{tokens:,} tokens in {size / 1e6:,.1f} MB; train with --set data.rows={stage.data.rows}"
    )
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", required=True, metavar="FILE", help="one of recipes/, or yours")
    parser.add_argument("--size", help="of the model, where the recipe has several")
    parser.add_argument("--stage", required=True)
    parser.add_argument("--workdir", required=True, help="as for training: it holds the corpus")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="as for training"
    )
    parser.add_argument("--epochs", type=int, default=1, help="of each corpus, if read as often")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    return parser.parse_args()


def chosen(args: argparse.Namespace):
    """The stage of the recipe, changed by --set."""
    from codellama_jax import launch

    if not Path(args.recipe).is_file():
        raise ValueError(f"{args.recipe} is no recipe: there is no such file")
    stages = runpy.run_path(args.recipe)["stages"]
    if ("size" in inspect.signature(stages).parameters) != bool(args.size):
        raise ValueError(
            f"{args.recipe} has {'one size' if args.size else 'several sizes'}: "
            f"{'leave out --size' if args.size else 'name one by --size'}"
        )
    stage = launch.pick(stages(args.size) if args.size else stages(), args.stage, args.recipe)
    return launch.changed({stage.name: stage}, args.set)[stage.name]


class Lines:
    """A line when a corpus is begun or done, and every ten seconds between."""

    def __init__(self):
        self._began = self._told = time.monotonic()

    def __call__(self, name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._told > 10:
            self._told = now
            print(f"{name:16}{done:12,} of {total:,} rows, {now - self._began:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
