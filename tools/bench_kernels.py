"""Cycles of the splash attention kernels, counted in the compiler's own schedules; needs no TPU.

    python tools/bench_kernels.py                               the tables of plan/kernels.py
    python tools/bench_kernels.py v5e:512 v6e:1024:balanced     these only

libtpu writes the final instruction bundles of every kernel it compiles, one line each. Branches
skip the pieces that most steps of the grid do not run: with the most matrix products a block of
queries against a block of keys, the others the beginning and the end of a row of blocks. What no
branch skips is run at every step. Each takes ten seconds of a core.
"""

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed

from codellama_jax import attention, compiler_options
from codellama_jax.plan import chips, kernels

SIZES = (512, 1_024)
SMALLEST = {2: "2x2", 3: "2x2x1"}  # slices, by the dimensions of the torus
LENGTH, HEADS, WIDTH = 4_096, 2, 128
BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})?:")
PRODUCT = re.compile(r"\bvmatmul|\bvmatres|\bvmxu")
BRANCH = re.compile(r"sbr\.rel \(.*?target = \$region(\d+)")
TARGET = re.compile(r"empty region (\d+)")


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] == "--compile":
        compile_one(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    asked = sys.argv[1:] or [
        f"{chip}:{size}{order}"
        for order in ("", ":balanced")
        for chip in chips.CHIPS
        for size in SIZES
    ]
    for text in asked:
        match = re.fullmatch(rf"({'|'.join(chips.CHIPS)}):(\d+)(:balanced)?", text)
        if match is None:
            sys.exit(f"{text!r} is neither CHIP:BLOCK nor CHIP:BLOCK:balanced, as v5e:1024 is")
        parts = measured(match[1], int(match[2]), context=2 if match[3] else 1)
        shown = ", ".join(f'"{name}": {tuple(each)}' for name, each in parts.items())
        print(f"{text}: {{{shown}}}", flush=True)


def measured(chip: str, size: int, context: int) -> dict[str, kernels.Cycles]:
    """Compiles the kernels in a process of its own: what libtpu writes is set when it starts."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        subprocess.run(
            [sys.executable, __file__, "--compile", chip, str(size), str(context)],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        return {part: read(Path(folder), part, chips.CHIPS[chip], size) for part in kernels.PARTS}


def read(folder: Path, part: str, chip: chips.Chip, size: int) -> kernels.Cycles:
    found = [
        path
        for path in folder.glob(f"*splash_mqa_{part}*final_bundles.txt")
        if "analysis" not in path.name
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} schedules of the kernel {part} in {folder}, not one")
    _, *loop = pieces(found[0].read_text())  # what is before the loop runs once
    deepest = max(piece.depth for piece in loop)
    skipped = [piece for piece in loop if piece.depth == deepest]
    block = max(skipped, key=lambda piece: piece.products).bundles
    row = sum(piece.bundles for piece in skipped) - block
    step = sum(piece.bundles for piece in loop) - block - row
    return kernels.Cycles(max(block, round(kernels.ideal(part, chip, size))), row, step)


@dataclasses.dataclass
class Piece:
    """Instructions between two branches, or their targets."""

    depth: int  # branches that skip it
    bundles: int = 0
    products: int = 0


def pieces(text: str) -> list[Piece]:
    """The pieces of a schedule, in its order."""
    found, over = [Piece(0)], []
    for line in text.splitlines():
        match = BUNDLE.match(line)
        if match is None:
            continue
        if match[1] == "PF":  # a target: what its branch skips ends here
            ended = [over.index(region) for region in TARGET.findall(line) if region in over]
            over = over[: min(ended, default=len(over))]
        if match[1]:
            found.append(Piece(len(over)))
        found[-1].bundles += 1
        found[-1].products += len(PRODUCT.findall(line))
        if branch := BRANCH.search(line):
            over = [*over, branch[1]]
            found.append(Piece(len(over)))
    return found


def compile_one(chip: str, size: int, context: int) -> None:
    """Compiles forward and backward of attention for one device of a chip; with context > 1 rows
    are in the order in which as many devices share them."""
    where = chips.Slice.parse(f"{chip}:{SMALLEST[chips.CHIPS[chip].dims]}")
    device = where.topology()[0]
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    attend = jax.vmap(attention.splash_kernel(LENGTH, size, 1, context), (0, 0, 0, None))

    def total(q_KGTH, k_KTH, v_KTH, segments_T):
        o_KGTH = attend(q_KGTH, k_KTH, v_KTH, splash.SegmentIds(q=segments_T, kv=segments_T))
        return jnp.sum(o_KGTH.astype(jnp.float32))

    place = jax.sharding.SingleDeviceSharding(device)
    k_KTH = jax.ShapeDtypeStruct((HEADS, LENGTH, WIDTH), jnp.bfloat16, sharding=place)
    q_KGTH = jax.ShapeDtypeStruct((HEADS, 1, LENGTH, WIDTH), jnp.bfloat16, sharding=place)
    segments_T = jax.ShapeDtypeStruct((LENGTH,), jnp.int32, sharding=place)
    lowered = jax.jit(jax.grad(total, (0, 1, 2))).lower(q_KGTH, k_KTH, k_KTH, segments_T)
    lowered.compile(compiler_options=compiler_options.of_chip(chip, dim=4_096))


if __name__ == "__main__":
    main()
