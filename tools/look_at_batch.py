"""Shows what a stage trains on: from the corpus alone, without an accelerator.

    python tools/look_at_batch.py --stage work/code --step 1200
    python tools/look_at_batch.py --stage work/code --step 1200 --row 3 --text
    python tools/look_at_batch.py --stage work/code --find src/main.py
    python tools/look_at_batch.py --stage work/code --plan --tokens-per-second 400000
    python tools/look_at_batch.py --corpus work/corpus --tokenizer work/tokenizer.model \\
        --mix code=0.85 code_language=0.08 language=0.07 --seq-len 256 --rows 32 --infilling 0.9 \\
        --step 0

--step rebuilds a batch. Per row: corpus, epoch, and for each document where it is from, which of
its tokens stand in the row, and how it was infilled (the characters where its middle begins and
ends); --text adds the text with its control tokens shown. --find says at which steps a file was
read, and --plan what a stage will read: documents, tokens, from which epoch to which, days.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed
os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerator may be held by the run that is looked at


def main() -> int:
    args = arguments()
    try:
        data, corpus_dir, tokenizer_path, steps = (
            from_stage(args) if args.stage else from_flags(args)
        )
        mixture = open_mixture(data, corpus_dir, tokenizer_path)
        if args.step is not None:
            show(mixture, tokenizer_path, step=args.step, only=args.row, text=args.text)
        elif args.find:
            find(mixture, args.find, steps)
        else:
            plan(mixture, steps, args.tokens_per_second)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--step", type=int, help="from 0: the batch that makes step K+1 of the weights of step K"
    )
    what.add_argument("--find", metavar="PATH", help="a file's path, as the corpus has it")
    what.add_argument("--plan", action="store_true", help="what the whole stage reads")
    parser.add_argument("--steps", type=int, help="of the stage, for --find and --plan")
    parser.add_argument("--tokens-per-second", type=float, help="of training, for --plan")
    parser.add_argument("--row", type=int, help="only this row of the batch")
    parser.add_argument("--text", action="store_true", help="show the text too")
    parser.add_argument("--stage", metavar="DIR", help="a stage's folder with a checkpoint")
    other = parser.add_argument_group("without a stage")
    other.add_argument("--corpus", metavar="DIR")
    other.add_argument("--tokenizer", metavar="FILE")
    other.add_argument("--mix", nargs="+", metavar="NAME=SHARE", default=[])
    other.add_argument("--seq-len", type=int, default=4_096)
    other.add_argument("--rows", type=int, default=8, help="rows of a batch")
    other.add_argument("--infilling", type=float, default=0.0, help="rate")
    other.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.step is not None and args.step < 0:
        parser.error(f"--step {args.step} is negative")
    if args.step is None and (args.text or args.row is not None):
        parser.error("--text and --row go with --step")
    if args.step is not None and args.steps is not None:
        parser.error("--steps goes with --find and --plan")
    if args.tokens_per_second is not None and not (args.plan and args.tokens_per_second > 0):
        parser.error("--tokens-per-second goes with --plan, and is positive")
    if args.step is None and not args.stage and not args.steps:
        parser.error("--find and --plan need the --steps of the stage")
    if not args.stage and not (args.corpus and args.tokenizer and args.mix):
        parser.error("name a --stage, or --corpus, --tokenizer and --mix")
    return args


def from_stage(args: argparse.Namespace) -> tuple:
    from codellama_jax import checkpoint, config
    from codellama_jax.data import storage

    workdir = storage.path(args.stage).parent
    saved = checkpoint.read_recipe(args.stage)["stage"]
    if saved is None:
        raise ValueError(f"{args.stage} holds imported weights: it was not trained on a corpus")
    stage = config.from_json(config.Stage, saved)
    data, steps = stage.data, args.steps or stage.steps
    return data, workdir / data.corpus, workdir / data.tokenizer, steps


def from_flags(args: argparse.Namespace) -> tuple:
    from codellama_jax import config

    try:
        mix = {name: float(share) for name, share in (item.split("=") for item in args.mix)}
    except ValueError:
        raise ValueError(f"--mix {' '.join(args.mix)}: write NAME=SHARE for each") from None
    data = config.Data(
        mix=mix,
        seq_len=args.seq_len,
        batch_tokens=args.seq_len * args.rows,
        infilling_rate=args.infilling,
        seed=args.seed,
    )
    return data, args.corpus, args.tokenizer, args.steps


def open_mixture(data, corpus_dir, tokenizer_path):
    from dataclasses import replace

    from codellama_jax.data import mix
    from codellama_jax.tokenizer import Tokenizer

    data = replace(data, rows=None)  # the corpus says more than rows that are only tokens
    return mix.open_mixture(data, corpus_dir, Tokenizer(tokenizer_path))


def find(mixture, path: str, steps: int) -> None:
    """At which steps a file is read."""
    found = mixture.steps_of(path, steps)
    print(f"{path} is read in {len({place[0] for place in found})} of {steps:,} steps")
    for step, row, name, epoch in found:
        print(f"   step {step}, row {row}: {name}, epoch {epoch}")


def plan(mixture, steps: int, tokens_per_second: float | None) -> None:
    """What a stage reads, and how long that takes."""
    data = mixture.data
    counts = mixture.schedule.counts(steps * data.rows_per_batch)
    epochs = mixture.epochs(steps)
    total = steps * data.batch_tokens
    print(f"{steps:,} steps of {data.batch_tokens:,} tokens: {total:,} tokens")
    titles = (
        ("documents", 13),
        ("tokens", 17),
        ("read", 17),
        ("share", 9),
        ("from", 9),
        ("epochs", 9),
    )
    print(f"{'corpus':16}" + "".join(f"{title:>{width}}" for title, width in titles))
    for number, (rows, count) in enumerate(zip(mixture.rows, counts, strict=True)):
        lengths, began = rows.documents.lengths, mixture.first(number) / rows.rows_per_epoch
        print(
            f"{rows.name:16}{len(lengths):13,}{int(lengths.sum(dtype='int64')):17,}"
            f"{count * data.seq_len:17,}{count / sum(counts):9.3%}{began:9.3f}"
            f"{began + epochs[rows.name]:9.3f}"
        )
    if tokens_per_second:
        print(f"{total / tokens_per_second / 86_400:.2f} days at {tokens_per_second:,.0f} tokens/s")


def show(mixture, tokenizer_path, *, step: int, only: int | None, text: bool) -> None:
    from codellama_jax.tokenizer import Tokenizer

    data, tokenizer = mixture.data, Tokenizer(tokenizer_path)
    if only is not None and not 0 <= only < data.rows_per_batch:
        raise ValueError(f"--row {only}: the batch has rows 0 to {data.rows_per_batch - 1}")
    for place in range(data.rows_per_batch) if only is None else [only]:
        name, pieces = mixture.describe(step * data.rows_per_batch + place)
        used = sum(len(piece.tokens) for piece in pieces)
        padding = data.seq_len + 1 - used
        print(f"row {place}: {name}, epoch {pieces[0].epoch}, {used} tokens, {padding} padding")
        for piece in pieces:
            print("   " + describe(piece))
            if text:
                shown = tokenizer.decode(piece.tokens, control_text=True)
                print("".join(f"      | {line}\n" for line in shown.split("\n")), end="")


def describe(piece) -> str:
    """One document of a row in a line."""
    record = piece.record
    part = f" ({record['part']})" if record["part"] else ""
    extent = "whole" if piece.whole else f"tokens {piece.start}-{piece.end} of {piece.length}"
    cuts = f" middle {piece.cuts[0]}-{piece.cuts[1]}" if piece.cuts else ""
    return (
        f"#{piece.document} {record['source']}: {record['path']}{part}, {record['language']}, "
        f"{record['licence']}; {extent}, {piece.mode}{cuts}"
    )


if __name__ == "__main__":
    sys.exit(main())
