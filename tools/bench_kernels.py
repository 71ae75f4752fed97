"""Cycles of the splash attention kernels, counted in the compiler's own schedules; needs no TPU.

    python tools/bench_kernels.py                    the table of codellama_jax/kernels.py
    python tools/bench_kernels.py v5e:512 v6e:1024   these only

libtpu writes the final instruction bundles of every kernel it compiles, one line each, region by
region of the control flow. The region with the matrix products is a block of queries against a
block of keys, the one after it the end of a row of blocks; the others are run at every step. Each
takes ten seconds to a minute of a core.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # runs from a clone that is not installed

from codellama_jax import chips, kernels

WANTED = {
    "v4": (512, 1_024), "v5e": (512, 1_024), "v5p": (512, 1_024), "v6e": (512, 1_024, 2_048),
    "tpu7x": (512, 1_024, 2_048),
}  # fmt: skip
SMALLEST = {2: "2x2", 3: "2x2x1"}  # slices, by the dimensions of the torus
LENGTH, HEADS, WIDTH = 4_096, 8, 128
BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +([A-Z]{2})?:")
PRODUCT = re.compile(r"\bvmatmul|\bvmatres|\bvmxu")


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--compile":
        compile_one(sys.argv[2], int(sys.argv[3]))
        return
    asked = sys.argv[1:] or [f"{chip}:{size}" for chip in WANTED for size in WANTED[chip]]
    for chip, size in (text.split(":") for text in asked):
        parts = measured(chip, int(size))
        shown = ", ".join(f'"{name}": {tuple(each)}' for name, each in parts.items())
        print(f"{chip} {size}: {{{shown}}}", flush=True)


def measured(chip: str, size: int) -> dict[str, kernels.Cycles]:
    """Compiles the kernels in a process of its own: what libtpu writes is set when it starts."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        subprocess.run(
            [sys.executable, __file__, "--compile", chip, str(size)],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        return {part: read(Path(folder), part, chips.CHIPS[chip], size) for part in kernels.PARTS}


def read(folder: Path, part: str, chip: chips.Chip, size: int) -> kernels.Cycles:
    found = [
        path
        for path in folder.glob(f"*splash_mha_{part}*final_bundles.txt")
        if "analysis" not in path.name
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} schedules of the kernel {part} in {folder}, not one")
    sizes = regions(found[0].read_text())
    block = max(range(len(sizes)), key=lambda i: sizes[i][1])
    row = sizes[block + 1][0]
    step = sum(bundles for bundles, _ in sizes[1:]) - sizes[block][0] - row
    return kernels.Cycles(max(sizes[block][0], round(kernels.ideal(part, chip, size))), row, step)


def regions(text: str) -> list[list[int]]:
    """[bundles, matrix products] of each region of a schedule, in its order."""
    found: list[list[int]] = []
    for line in text.splitlines():
        match = BUNDLE.match(line)
        if match is None:
            continue
        if match[1] or not found:
            found.append([0, 0])
        found[-1][0] += 1
        found[-1][1] += len(PRODUCT.findall(line))
    return found


def compile_one(chip: str, size: int) -> None:
    """Compiles forward and backward of attention for one device of a chip."""
    where = chips.Slice.parse(f"{chip}:{SMALLEST[chips.CHIPS[chip].dims]}")
    device = where.topology()[0]
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    attend = splash.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))] * HEADS),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(**{f"block_{name}": size for name in names}),
    )

    def total(q_NTH, k_NTH, v_NTH, segments_T):
        o_NTH = attend(q_NTH, k_NTH, v_NTH, splash.SegmentIds(q=segments_T, kv=segments_T))
        return jnp.sum(o_NTH.astype(jnp.float32))

    place = jax.sharding.SingleDeviceSharding(device)
    x_NTH = jax.ShapeDtypeStruct((HEADS, LENGTH, WIDTH), jnp.bfloat16, sharding=place)
    segments_T = jax.ShapeDtypeStruct((LENGTH,), jnp.int32, sharding=place)
    jax.jit(jax.grad(total, (0, 1, 2))).lower(x_NTH, x_NTH, x_NTH, segments_T).compile()


if __name__ == "__main__":
    main()
