"""Completes text, fills a gap or answers, at the shell, with any checkpoint.

    python tools/generate.py complete --checkpoint runs/nano/code --prompt 'def fib(n):'
    cat half.py | python tools/generate.py complete --checkpoint runs/nano/code
    python tools/generate.py infill --checkpoint runs/nano/code --prefix 'x = ' --suffix ' + 1'
    python tools/generate.py infill --checkpoint runs/nano/code --file gap.py --whole > filled.py
    python tools/generate.py chat --checkpoint runs/nano/instruct --prompt 'Reverse a list.'
    python tools/generate.py chat --checkpoint runs/nano/instruct         # a conversation

A checkpoint is a stage's folder of a run, or Meta's or Hugging Face's folder. The text is shown as
it is written. The file of --file marks the gap with <FILL>. Without a text, it is read from
standard input.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed

GAP = "<FILL>"


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        {"complete": complete, "infill": infill, "chat": chat}[args.command](args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    about, examples = __doc__.split("\n\n", 1)
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="folder with the weights")
    add("--tokenizer", metavar="FILE", help="tokenizer.model, if it is not beside the weights")
    add("--dtype", help="bfloat16, float16 or float32 (default: as stored)")
    add("--max-seq-len", type=int, metavar="N", help="read more than the model was trained on")
    add("--max-new-tokens", type=int, metavar="N", help="(default: 256, or what fits)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest (default: 0)")
    add("--top-p", type=float, help="mass of the nucleus (default: 0.9)")
    add("--seed", type=int, help="of the random numbers (default: 0)")
    add("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; repeatable")

    top = argparse.ArgumentParser(
        description=about, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(dest="command", required=True)
    add = commands.add_parser("complete", parents=[shared], help="what follows").add_argument
    add("--prompt", metavar="TEXT", help="default: standard input")
    add = commands.add_parser("infill", parents=[shared], help="what belongs between").add_argument
    add("--prefix", metavar="TEXT", help="what comes before the gap")
    add("--suffix", metavar="TEXT", help="what comes after it")
    add("--file", metavar="FILE", help=f"text with {GAP} at the gap; default: standard input")
    add("--suffix-first", action="store_true", help="SPM with token healing, not PSM")
    add("--truncate", action="store_true", help="leave out what is far from the gap if need be")
    add("--whole", action="store_true", help="print the prefix and the suffix too")
    add = commands.add_parser("chat", parents=[shared], help="an answer").add_argument
    add("--prompt", metavar="TEXT", help="default: standard input, at a terminal line by line")
    add("--system", metavar="TEXT", help="a system message")
    return top


def complete(args: argparse.Namespace) -> None:
    text = standard_input() if args.prompt is None else args.prompt
    show(load(args).complete(text, **sampling(args)))


def infill(args: argparse.Namespace) -> None:
    prefix, suffix = gap(args)
    middle = load(args).infill(
        prefix,
        suffix,
        suffix_first=args.suffix_first,
        truncate=args.truncate,
        **sampling(args),
    )
    show((part for text in ([prefix], middle, [suffix]) for part in text) if args.whole else middle)


def chat(args: argparse.Namespace) -> None:
    dialog = [{"role": "system", "content": args.system}] if args.system is not None else []
    llama = None
    for message in messages(args):
        llama = llama or load(args)
        dialog.append({"role": "user", "content": message})
        answer = show(llama.chat(dialog, **sampling(args)))
        dialog.append({"role": "assistant", "content": answer})


def messages(args: argparse.Namespace) -> Iterator[str]:
    """The user's messages: one, or line by line as long as someone sits there."""
    if args.prompt is not None:
        yield args.prompt
    elif sys.stdin.isatty():
        print("Type a message; end with Ctrl-D.", file=sys.stderr)
        while line := input_line():
            yield line
    else:
        yield standard_input()


def input_line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def gap(args: argparse.Namespace) -> tuple[str, str]:
    """The text before and after the gap."""
    sides = args.prefix, args.suffix
    if sides != (None, None):
        if None in sides or args.file is not None:
            raise ValueError("give both --prefix and --suffix, or one text with a gap as --file")
        return sides
    if args.file is None:
        text, name = standard_input(), "standard input"
    else:
        with open(args.file, encoding="utf-8", newline="") as file:
            text, name = file.read(), args.file
    if text.count(GAP) != 1:
        raise ValueError(f"{name} has {text.count(GAP)} times {GAP}; mark the gap with exactly one")
    prefix, _, suffix = text.partition(GAP)
    return prefix, suffix


def standard_input() -> str:
    if sys.stdin.isatty():
        print("Type the text; end with Ctrl-D.", file=sys.stderr)
    return sys.stdin.buffer.read().decode("utf-8")  # bytes: line ends stay what they are


def load(args: argparse.Namespace):
    from codellama_jax import generate  # here: JAX takes a second, --help does not

    generate.Sampling(args.max_new_tokens, args.temperature, args.top_p, args.seed)  # or it raises
    return generate.load(
        args.checkpoint, args.tokenizer, dtype=args.dtype, max_seq_len=args.max_seq_len
    )


def sampling(args: argparse.Namespace) -> dict:
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "stop": args.stop,
        "stream": True,
    }


def show(pieces: Iterator[str]) -> str:
    """Prints pieces as they come; returns them joined."""
    shown = []
    for piece in pieces:
        print(piece, end="", flush=True)
        shown.append(piece)
    text = "".join(shown)
    if sys.stdout.isatty() and not text.endswith("\n"):
        print()
    return text


if __name__ == "__main__":
    sys.exit(main())
