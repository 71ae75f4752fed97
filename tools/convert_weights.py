"""Moves weights between Meta's, Hugging Face's and our own format, bit for bit, in little memory.

    python tools/convert_weights.py --from meta CodeLlama-7b --to orbax work/code-llama-7b
    python tools/convert_weights.py --from orbax work/instruct --to hf exported --verify
    python tools/convert_weights.py --from hf exported --to meta meta-4 --shards 4
    python tools/convert_weights.py --from hf Llama-2-7b-hf --to orbax work/llama2-7b \\
        --grow-vocab --tokenizer CodeLlama-7b/tokenizer.model

An Orbax folder is a stage of a workdir: a recipe starts from it by its name.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed


def main() -> int:
    args = arguments()
    from codellama_jax import convert, malloc

    # a twentieth of the time; tensors are larger and go back at once, so that memory stays small
    malloc.keep_freed(malloc.MOST)

    started = time.perf_counter()
    try:
        with Bar() as progress:
            convert.convert(
                getattr(args, "from"),
                args.to,
                shards=args.shards,
                shard_bytes=args.shard_gb,
                dtype=args.dtype,
                tokenizer=args.tokenizer,
                grow_vocab=args.grow_vocab,
                verify=args.verify,
                allow=tuple(args.allow),
                say=progress.say,
                progress=progress,
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, above all
        print(f"error: {error}; nothing is at {args.to[1]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; nothing is at {args.to[1]}", file=sys.stderr)
        return 130
    print(f"{time.perf_counter() - started:.0f} s")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pair = ("{meta,hf,orbax}", "FOLDER")
    parser.add_argument("--from", nargs=2, required=True, metavar=pair)
    parser.add_argument("--to", nargs=2, required=True, metavar=pair)
    parser.add_argument("--shards", type=int, default=1, help="files of a Meta folder: 1, 2, 4, 8")
    parser.add_argument("--shard-gb", type=gigabytes, default="5", help="largest Hugging Face file")
    parser.add_argument("--dtype", help="bfloat16, float16 or float32; left out: every bit stays")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model to put beside")
    parser.add_argument(
        "--grow-vocab",
        action="store_true",
        help="rows for the infilling pieces (or for --tokenizer); new ones are the old ones' mean",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read both sides again and compare SHA-256 sums"
    )
    parser.add_argument(
        "--allow", nargs="+", default=[], metavar="CHECK", help="pass what this check refuses"
    )
    return parser.parse_args()


def gigabytes(text: str) -> int:
    """Bytes. Raises ValueError for what is no number of them above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return int(value * 1e9)


class Bar:
    """A progress bar with bytes and speed, above which lines can be printed."""

    def __enter__(self) -> "Bar":
        from rich import progress

        self.bar = progress.Progress(
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("", total=None)
        self.bar.start()
        return self

    def __call__(self, done: int, whole: int) -> None:
        self.bar.update(self.task, completed=done, total=whole)

    def say(self, line: str) -> None:
        self.bar.print(line, markup=False, highlight=False, soft_wrap=True)

    def __exit__(self, *_) -> None:
        self.bar.stop()


if __name__ == "__main__":
    sys.exit(main())
