"""How long splash attention takes, from the compiler's own schedules of its kernels.

A kernel runs over a grid of blocks, queries by keys. Its time, in cycles, is

    blocks that the mask does not hide * block  +  rows of blocks * row  +  all blocks * step

A row of blocks is one block of keys in the kernel of their gradients, of queries in the others.

Each number is a count of instruction bundles (one a cycle) in the compiler's final schedule, or
what the matrix units need for the block's products where that is more. Waits for memory are not in
it. tools/bench_kernels.py compiles the kernels and prints this table.
"""

import math
from typing import NamedTuple

from codellama_jax.config import check
from codellama_jax.plan import chips

PARTS = ("dkv", "dq", "fwd")  # the gradient of keys and values, of queries; the output
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # of block x block x H each


class Cycles(NamedTuple):
    """Of one core, for heads of 128."""

    block: int  # a block of queries against a block of keys
    row: int  # beginning and ending a row of blocks
    step: int  # every step of the grid, also where the mask hides its block


Table = dict[str, dict[int, dict[str, Cycles]]]  # by chip, block and part

# fmt: off
SCHEDULED: Table = {  # jax 0.10.2, libtpu 0.0.42.1
    "v4": {
        512: {"fwd": Cycles(1713, 981, 437), "dq": Cycles(1938, 181, 442),
              "dkv": Cycles(2691, 373, 564)},
        1_024: {"fwd": Cycles(7097, 1966, 431), "dq": Cycles(7508, 373, 439),
                "dkv": Cycles(10558, 757, 571)},
    },
    "v5e": {
        512: {"fwd": Cycles(1210, 696, 189), "dq": Cycles(1533, 170, 150),
              "dkv": Cycles(2044, 318, 197)},
        1_024: {"fwd": Cycles(4512, 1377, 190), "dq": Cycles(6132, 332, 149),
                "dkv": Cycles(8176, 638, 203)},
    },
    "v5p": {
        512: {"fwd": Cycles(1163, 699, 354), "dq": Cycles(1535, 170, 207),
              "dkv": Cycles(2047, 289, 273)},
        1_024: {"fwd": Cycles(4638, 1379, 356), "dq": Cycles(6141, 332, 206),
                "dkv": Cycles(8188, 635, 269)},
    },
    "v6e": {
        512: {"fwd": Cycles(937, 346, 225), "dq": Cycles(1086, 91, 162),
              "dkv": Cycles(1320, 157, 222)},
        1_024: {"fwd": Cycles(3433, 702, 225), "dq": Cycles(4117, 171, 166),
                "dkv": Cycles(4782, 317, 224)},
    },
    "tpu7x": {
        512: {"fwd": Cycles(932, 325, 157), "dq": Cycles(1052, 78, 162),
              "dkv": Cycles(1303, 158, 219)},
        1_024: {"fwd": Cycles(3497, 686, 156), "dq": Cycles(4297, 160, 159),
                "dkv": Cycles(4374, 318, 219)},
    },
}
BALANCED: Table = {  # the same of rows split over the context axis: a mask of three operations more
    "v4": {
        512: {"fwd": Cycles(1952, 981, 437), "dq": Cycles(2231, 181, 442),
              "dkv": Cycles(2975, 373, 564)},
        1_024: {"fwd": Cycles(8210, 1966, 431), "dq": Cycles(8576, 373, 439),
                "dkv": Cycles(11592, 757, 571)},
    },
    "v5e": {
        512: {"fwd": Cycles(1144, 696, 189), "dq": Cycles(1608, 170, 150),
              "dkv": Cycles(2044, 318, 197)},
        1_024: {"fwd": Cycles(4546, 1377, 190), "dq": Cycles(6374, 332, 149),
                "dkv": Cycles(8176, 638, 199)},
    },
    "v5p": {
        512: {"fwd": Cycles(1186, 699, 354), "dq": Cycles(1598, 170, 207),
              "dkv": Cycles(2047, 289, 273)},
        1_024: {"fwd": Cycles(4709, 1379, 356), "dq": Cycles(6274, 332, 206),
                "dkv": Cycles(8188, 635, 269)},
    },
    "v6e": {
        512: {"fwd": Cycles(1189, 346, 225), "dq": Cycles(1375, 91, 162),
              "dkv": Cycles(1577, 157, 222)},
        1_024: {"fwd": Cycles(4059, 702, 225), "dq": Cycles(4916, 171, 166),
                "dkv": Cycles(5271, 317, 224)},
    },
    "tpu7x": {
        512: {"fwd": Cycles(1206, 325, 157), "dq": Cycles(1334, 78, 162),
              "dkv": Cycles(1359, 158, 219)},
        1_024: {"fwd": Cycles(4155, 686, 156), "dq": Cycles(5997, 160, 159),
                "dkv": Cycles(4516, 318, 218)},
    },
}
# fmt: on


def part_of(name: str) -> str:
    """The part of attention that a kernel of this name computes; an unknown one is refused."""
    part = next((part for part in PARTS if part in name), None)
    check(part is not None, f"no estimate for the kernel {name!r}: teach kernels.SCHEDULED")
    return part


def cycles(
    part: str,
    chip: chips.Chip,
    size: int,
    *,
    blocks: float,
    rows: float,
    steps: float,
    table: Table = SCHEDULED,
) -> float:
    """Cycles of one head on one core.

    Where the table lacks a size of block, those of the nearest count in proportion to its area.
    """
    known = table[chip.name]
    nearest = min(known, key=lambda other: abs(other - size))
    each = known[nearest][part]
    scale = (size / nearest) ** 2
    return blocks * each.block * scale + rows * each.row + steps * each.step


def seconds(chip: chips.Chip, cycles: float, pairs: float, group: int) -> float:
    """Of one call on one device: `pairs` of a row and a key/value head, each of `group` heads of so
    many cycles. The cores share the pairs, whole ones each."""
    return math.ceil(pairs / chip.cores) * group * cycles / (chip.clock_ghz * 1e9)


def ideal(part: str, chip: chips.Chip, size: int) -> float:
    """Cycles of a block's products alone, if matrix units never waited and none were half used."""
    per_cycle = chip.peak_tflops * 1e12 / (chip.devices * chip.cores * chip.clock_ghz * 1e9)
    return PRODUCTS[part] * 2 * size**2 * 128 / per_cycle
