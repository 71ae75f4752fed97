"""Measures the converter: seconds, processor time and peak memory, against copying the same bytes.

    python tools/bench_convert.py --size 7b --workdir /tmp/bench            # 13.5 GB, three times
    python tools/bench_convert.py --size 34b --layers 4 --workdir /tmp/bench
    python tools/bench_convert.py --width 768 --layers 24 --trained --path orbax hf

Writes a model of random bits in Hugging Face's form and converts it along --path, each conversion
in a process of its own, after a `cp -r` of what it reads and one SHA-256 over it (OpenSSL's, one
thread), which together are the least that a conversion with proof can do; removes everything. Of
--repeat runs the fastest counts. Processor time is that of user and system, all threads, starting
Python included. Peak memory is that of the process, mapped pages included. With transformers
installed, its own way from a folder to a folder (load, save) is measured too. With --trained the
source is what the trainer writes, float32 weights and Adam's two moments; making it takes the
memory that training would.
"""

import argparse
import dataclasses
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed

from codellama_jax import config, malloc
from codellama_jax.convert import official, run, weights


def main() -> None:
    args = arguments()
    if args.convert:
        return one(*args.convert)
    model = dataclasses.replace(config.SIZES[args.size], rope_theta=1e6, max_seq_len=16_384)
    if args.layers:
        model = dataclasses.replace(model, num_layers=args.layers)
    if args.width:
        heads, ffn_dim = args.width // 128, 256 * -(-args.width * 8 // 3 // 256)
        model = dataclasses.replace(
            model, dim=args.width, num_heads=heads, num_kv_heads=heads, ffn_dim=ffn_dim
        )
    folder = Path(args.workdir) / "bench_convert"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        bench(model, args.path, folder, args.trained, args.repeat)
    finally:
        shutil.rmtree(folder)


def bench(model: config.Model, path: list[str], folder: Path, trained: bool, repeat: int) -> None:
    source = random_weights(model)
    if trained:
        source = weights.cast(source, np.dtype("float32"))
    largest = max(map(source.size, weights.table.tensors(model)))
    print(f"{official.describe(model)}\n{source.nbytes / 1e9:.2f} GB in {source.dtype}")
    limit = (3 * largest >> 20) + 1024
    print(f"largest tensor {largest >> 20:,} MiB; three of them and 1 GiB: {limit:,} MiB\n")
    (folder / path[0]).mkdir()
    if trained:
        save_trained(model, folder / path[0])
    else:
        run._write(source, path[0], folder / path[0], {})
    print(f"{'':24}{'-- seconds --':^36}{'-- CPU seconds --':^27}{'peak':>7}")
    print(
        f"{'':24}{'':>9}{'cp':>9}{'SHA-256':>9}{'ratio':>9}{'':>9}{'cp':>9}{'SHA-256':>9}{'MiB':>7}"
    )
    for before, after in zip(path, path[1:], strict=False):
        command = [sys.executable, __file__, "--convert", before, after, folder]
        against_cp(f"{before} -> {after}", folder / before, folder / "new", command, repeat)
        shutil.rmtree(folder / before)
        (folder / "new").rename(folder / after)
    if importlib.util.find_spec("transformers") and path[-1] == "hf":
        command = [sys.executable, "-c", TRANSFORMERS, folder / "hf", folder / "t"]
        against_cp("transformers, hf -> hf", folder / "hf", folder / "t", command, repeat)


def against_cp(name: str, source: Path, made: Path, command: list, repeat: int) -> None:
    """Runs `command`, which makes `made` of `source`, beside cp and SHA-256; prints a line."""
    copy = source.parent / "copy"
    runs = []
    for _ in range(repeat):
        shutil.rmtree(made, ignore_errors=True)
        os.sync()
        copied = measured(["cp", "-r", source, copy])
        shutil.rmtree(copy)
        hashed = measured([sys.executable, "-c", SHA256, source])
        os.sync()
        runs.append((copied, hashed, measured(command)))
    copied, hashed, converted = (
        min(kind, key=lambda run: run[0]) for kind in zip(*runs, strict=True)
    )
    peak = max(int(run[2][2].split("peak")[1]) for run in runs) >> 10
    ratio = converted[0] / (copied[0] + hashed[0])
    print(
        f"{name:24}{converted[0]:9.1f}{copied[0]:9.1f}{hashed[0]:9.1f}{ratio:9.2f}"
        f"{converted[1]:9.1f}{copied[1]:9.1f}{hashed[1]:9.1f}{peak:7,}",
        flush=True,
    )


def measured(command: list) -> tuple[float, float, str]:
    """(seconds, seconds of processors, what it printed) of a command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, done.stdout


SHA256 = """
import hashlib, sys
from pathlib import Path
for path in Path(sys.argv[1]).rglob("*"):
    if path.is_file():
        with open(path, "rb") as file:
            hashlib.file_digest(file, "sha256")
"""

TRANSFORMERS = """
import re, sys
from pathlib import Path
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
print("peak", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def one(before: str, after: str, folder: str) -> None:
    """One conversion, in this process; prints its peak memory in KiB."""
    malloc.keep_freed(malloc.MOST)  # as tools/convert_weights.py
    run.convert((before, f"{folder}/{before}"), (after, f"{folder}/new"), say=lambda line: None)
    print("peak", re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def random_weights(model: config.Model) -> weights.Weights:
    """Random bits, finite as bfloat16: the same 64 MB again and again, never the same tensor."""
    bits = np.random.default_rng(0).integers(0, 1 << 16, 1 << 25, np.uint16) & 0xBFFF
    lengths = weights.table.sizes(model)

    def read(tensor):
        shape = weights.table.shape(tensor.row.hf_axes, lengths)
        start = hash((tensor.hf, tensor.layer)) % (1 << 24)
        return np.resize(bits[start:], shape).view(ml_dtypes.bfloat16)

    return weights.Weights(model, np.dtype(ml_dtypes.bfloat16), read)


def save_trained(model: config.Model, folder: Path) -> None:
    """A checkpoint as the trainer saves it, with random weights."""
    from codellama_jax import checkpoint, optim, sharding, state

    adam = config.Optim(1e-3, 1, 0.1, 0.9, 0.95, 1e-8, 0.1, 1.0)
    mesh = sharding.make_mesh(config.Layout())
    made = state.random_state(model, optim.adamw(adam, 2), mesh, seed=0)
    recipe = {"model": config.to_json(model), "stage": None, "tokenizer_fingerprint": None}
    with checkpoint.Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(made, recipe)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=config.SIZES, default="7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the size has")
    parser.add_argument("--width", type=int, help="narrower than the size: a multiple of 128")
    parser.add_argument("--trained", action="store_true", help="start from a trainer's checkpoint")
    parser.add_argument("--repeat", type=int, default=1, help="runs, of which the fastest counts")
    parser.add_argument("--workdir", default="/tmp")
    parser.add_argument(
        "--path", nargs="+", choices=run.FORMATS, default=["hf", "orbax", "meta", "hf"]
    )
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)  # used by itself
    return parser.parse_args()


if __name__ == "__main__":
    main()
