"""How long splash attention takes, from the compiler's own schedules of its kernels.

A kernel runs over a grid of blocks, queries by keys. Its time, in cycles, is

    blocks that the mask does not hide * block  +  rows of blocks * row  +  all blocks * step

Each number is a count of instruction bundles (one a cycle) in the compiler's final schedule, or
what the matrix units need for the block's products where that is more. Waits for memory are not in
it. tools/bench_kernels.py compiles the kernels and prints this table.
"""

from typing import NamedTuple

from codellama_jax import chips
from codellama_jax.config import check

PARTS = ("dkv", "dq", "fwd")  # the gradient of keys and values, of queries; the output
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # of block x block x H each


class Cycles(NamedTuple):
    """Of one core, for heads of 128."""

    block: int  # a block of queries against a block of keys
    row: int  # the end of a row of blocks
    step: int  # every step of the grid, also where the mask hides its block


# fmt: off
SCHEDULED: dict[str, dict[int, dict[str, Cycles]]] = {  # jax 0.10.2, libtpu 0.0.42.1
    "v5e": {
        512: {"fwd": Cycles(1199, 502, 404), "dq": Cycles(1533, 103, 180),
              "dkv": Cycles(2044, 202, 275)},
        1_024: {"fwd": Cycles(4843, 991, 591), "dq": Cycles(6132, 201, 243),
                "dkv": Cycles(8176, 394, 402)},
    },
    "v5p": {
        512: {"fwd": Cycles(1179, 506, 659), "dq": Cycles(1535, 103, 262),
              "dkv": Cycles(2047, 202, 390)},
        1_024: {"fwd": Cycles(4850, 993, 847), "dq": Cycles(6141, 201, 327),
                "dkv": Cycles(8188, 394, 516)},
    },
    "v6e": {
        512: {"fwd": Cycles(945, 248, 355), "dq": Cycles(1095, 56, 161),
              "dkv": Cycles(1324, 105, 238)},
    },
}
STAND_INS = {"v4": "v5p", "tpu7x": "v6e"}  # not counted yet: those of a chip with the same units
# fmt: on


def part_of(name: str) -> str:
    """The part of attention that a kernel of this name computes; an unknown one is refused."""
    part = next((part for part in PARTS if part in name), None)
    check(part is not None, f"no estimate for the kernel {name!r}: teach kernels.SCHEDULED")
    return part


def cycles(
    part: str, chip: chips.Chip, size: int, *, blocks: float, rows: float, steps: float
) -> float:
    """Cycles of one head on one device; its cores share the heads.

    Where the table lacks a size of block, those of the nearest count in proportion to its area;
    where it lacks a chip, those of its stand-in.
    """
    known = SCHEDULED[STAND_INS.get(chip.name, chip.name)]
    nearest = min(known, key=lambda other: abs(other - size))
    each = known[nearest][part]
    scale = (size / nearest) ** 2
    return (blocks * each.block * scale + rows * each.row + steps * each.step) / chip.cores


def ideal(part: str, chip: chips.Chip, size: int) -> float:
    """Cycles of a block's products alone, if matrix units never waited and none were half used."""
    per_cycle = chip.peak_tflops * 1e12 / (chip.devices * chip.cores * chip.clock_ghz * 1e9)
    return PRODUCTS[part] * 2 * size**2 * 128 / per_cycle
