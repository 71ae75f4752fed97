"""Measures the data path, in CPU seconds, so that a busy machine changes little.

    python tools/bench_data.py rows --corpus work/corpus --tokenizer work/tokenizer.model
    python tools/bench_data.py plan --documents 10000000
    python tools/bench_data.py duplicates --documents 4000

rows: tokens per second and core of read + infill + tokenize + row, padding, and beside it a stream
packer on Hugging Face tokenizers (the package `tokenizers`), which neither infills nor resumes; the
same rows read where they were tokenized ahead.
plan: start-up and memory of the plan for that many documents of synthetic lengths.
duplicates: recall on planted near-duplicates of similarity 0.85, false removals, speed.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rows", "plan", "duplicates"])
    parser.add_argument("--corpus", metavar="DIR", help="for rows")
    parser.add_argument("--tokenizer", metavar="FILE", help="for rows")
    parser.add_argument("--name", default="code", help="which of its corpora")
    parser.add_argument("--seq-len", type=int, default=4_096)
    parser.add_argument("--rows", type=int, default=200, help="to read")
    parser.add_argument("--documents", type=int, default=10_000_000, help="for plan, duplicates")
    args = parser.parse_args()
    if args.what == "rows" and not (args.corpus and args.tokenizer):
        parser.error("rows needs --corpus and --tokenizer")
    try:
        {"rows": rows, "plan": plan, "duplicates": duplicates}[args.what](args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


# -- rows -------------------------------------------------------------------------------------


def rows(args: argparse.Namespace) -> None:
    """Reading rows as training does, but for Grain's threads."""
    from codellama_jax.data import corpus, infilling
    from codellama_jax.data.rows import Rows
    from codellama_jax.tokenizer import Tokenizer

    tokenizer = Tokenizer(args.tokenizer)
    split = corpus.open(args.corpus, tokenizer).split(args.name, "train")
    rates = infilling.Rates(0.9 if tokenizer.middle_id is not None else 0.0)
    made = Rows(split, tokenizer, name=args.name, seed=0, seq_len=args.seq_len, rates=rates)
    number = min(args.rows, made.rows_per_epoch)
    made.row(0)
    began, filled, whole, infilled = time.process_time(), 0, 0, 0
    for index in range(number):
        filled += int((made.row(index)["segments"] > 0).sum())
    seconds = time.process_time() - began
    for index in range(number):
        for piece in made.describe(index):
            whole += piece.whole
            infilled += piece.mode != "plain"
    ours = filled / seconds
    print(f"{number} rows of {args.seq_len} tokens: {ours:,.0f} tokens/s/core")
    print(f"padding {1 - filled / (number * made.capacity):.3%}; {infilled} of {whole} documents")
    print(f"that lie whole in a row are infilled ({infilled / max(whole, 1):.1%})")
    written_ahead(made, number, filled)
    theirs = packer(split, args, filled)
    if theirs:
        print(f"Hugging Face tokenizers + a stream packer: {theirs:,.0f} tokens/s/core")
        print(f"ours / its {ours / theirs:.2f}")


def written_ahead(made, number: int, num_tokens: int) -> None:
    """The same rows from a file, as tools/prepare_rows.py writes them."""
    import numpy as np

    from codellama_jax.data import ahead, corpus

    dtype = np.dtype("<u2" if made.tokenizer.vocab_size <= 1 << 16 else "<u4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.array_record"
        corpus.write_shard(path, [ahead.encode(made.row(index), dtype) for index in range(number)])
        entry = {"first": 0, "rows": number, "dtype": dtype.str, "files": [path.name]}
        written = ahead.Ahead(Path(folder), made.name, entry, made.capacity)
        written.row(0)
        began = time.process_time()
        for index in range(number):
            written.row(index)
        seconds, size = time.process_time() - began, path.stat().st_size
    speed, share = num_tokens / seconds, size / num_tokens
    print(f"tokenized ahead: {speed:,.0f} tokens/s/core, {share:.2f} bytes a token on disk")


def packer(split, args: argparse.Namespace, num_tokens: int) -> float | None:
    """Tokens per second and core of a peer: documents encoded one by one, cut every T tokens."""
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, as ours
    try:
        import tokenizers
    except ImportError:
        print("no peer beside it: install the package tokenizers")
        return None
    import numpy as np

    from codellama_jax.convert import hf_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        hf_tokenizer.write(Path(args.tokenizer), Path(folder))
        peer = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    stream: list[int] = []
    began, done, document = time.process_time(), 0, 0
    while done < num_tokens:
        stream += peer.encode(split.record(document % len(split))["text"]).ids
        document += 1
        while len(stream) > args.seq_len:
            row = np.array(stream[: args.seq_len + 1], np.int32)
            del stream[: args.seq_len]
            done += len(row)
    return done / (time.process_time() - began)


# -- plan -------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> None:
    import numpy as np

    from codellama_jax.data.rows import ROOM, Plan

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lengths.npy"
        write_lengths(path, args.documents)
        before = peak_megabytes(reset=True)
        wall, cpu = time.perf_counter(), time.process_time()
        lengths = np.load(path, mmap_mode="r")
        settings = {"name": "code", "seed": 0, "capacity": args.seq_len + 1, "room": ROOM}
        made = Plan(lengths, **settings, keep=Path(folder))
        middle = made.rows_per_epoch // 2
        made.spans(0, middle)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        memory = peak_megabytes() - before
        began = time.process_time()
        for number in range(middle + 1, middle + 201):
            made.spans(0, number)
        each = (time.process_time() - began) / 200
        kept = made._block_starts(0).nbytes / 1e6
        again = time.process_time()
        Plan(lengths, **settings, keep=Path(folder)).spans(0, middle)
        again = time.process_time() - again
    print(f"{args.documents:,} documents, {made.rows_per_epoch:,} rows of {args.seq_len} tokens")
    print(f"to the first row: {cpu:.1f} CPU s ({wall:.1f} s); {each * 1e3:.2f} ms for one more")
    print(f"another process, or the same stage again: {again:.1f} CPU s to the first row")
    print(f"kept {kept:.1f} MB; peak {memory:,.0f} MB more, the mapped lengths' pages included")


def write_lengths(path: Path, count: int) -> None:
    """Lengths of documents as code has them: log-normal, half below 900 tokens."""
    import numpy as np

    lengths = np.lib.format.open_memmap(path, "w+", np.uint32, (count,))
    for start in range(0, count, 1 << 20):
        part = np.random.default_rng(start).lognormal(6.8, 1.2, min(1 << 20, count - start))
        lengths[start : start + len(part)] = np.clip(part, 3, 300_000)
    lengths.flush()


def peak_megabytes(*, reset: bool = False) -> float:
    """The most memory that this process had, since the last reset (on Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1_024


# -- duplicates -------------------------------------------------------------------------------


def duplicates(args: argparse.Namespace) -> None:
    """A quarter each: originals, near-duplicates at 0.85, at 0.6, and unrelated documents."""
    import numpy as np

    from codellama_jax.data import clean, duplicates, inputs, pipeline

    rng, count = random.Random(0), max(args.documents // 4, 1)
    words = [f"word{i}" for i in range(20_000)]
    originals = [rng.choices(words, k=300) for _ in range(count)]
    # a word that is changed takes 5 of 296 runs with it and brings 7, for it is three words
    near = [changed(text, 4, rng) for text in originals]
    far = [changed(text, 15, rng) for text in originals]
    apart = [rng.choices(words, k=300) for _ in range(count)]
    texts = [" ".join(text) for text in originals + near + far + apart]
    hashes, starts = clean.shingle_hashes(texts[:50] + texts[count : count + 50])
    sets = [np.unique(hashes[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    alike = np.mean([clean.jaccard(a, b) for a, b in zip(sets[:50], sets[50:], strict=False)])
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"text": text, "path": f"{n}.txt"}) for n, text in enumerate(texts)]
        (Path(folder) / "texts.jsonl").write_text("\n".join(lines))
        given = (inputs.Input(f"{folder}/texts.jsonl"),)
        began = time.process_time()
        asked = pipeline.Request(given, mask_private=False)
        made = pipeline.clean_documents(Path(folder) / "out", asked, workers=1)
        found = duplicates.of_unit(made, "read", 0)
        seconds = time.process_time() - began
    pairs = {tuple(sorted((place, kept))) for place, (_, kept) in found.items()}
    recall = sum((n, count + n) in pairs for n in range(count)) / count
    gone = np.array(sorted(found))
    wrong = np.mean(np.isin(np.arange(2 * count, 4 * count), gone))
    print(f"{len(texts):,} documents, planted near-duplicates of similarity {alike:.3f}")
    print(
        f"recall {recall:.2%}, false removals {wrong:.2%}, {len(texts) / seconds:,.0f} docs/s/core"
    )


def changed(words: list[str], number: int, rng: random.Random) -> list[str]:
    """The same words but for some, evenly spread."""
    made = list(words)
    for i in range(number):
        made[4 + i * (len(words) - 8) // number] = f"other{rng.random()}"
    return made


if __name__ == "__main__":
    sys.exit(main())
