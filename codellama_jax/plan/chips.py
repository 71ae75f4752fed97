"""The TPUs there are to rent: their peaks, memory and links, and a slice's devices without a TPU.

Sources: docs.cloud.google.com/tpu (v4, v5e, v5p, v6e, tpu7x) and the scaling book's table of TPUs.
`hbm_gib` is what the compiler (libtpu 0.0.42) allows itself, found by compiling too much. Clocks
are those at which `mxus` units of `mxu` x `mxu` give the published peak.

JAX sees a v4 or v5p chip as one device (two cores, "megacore") and a tpu7x chip as two.
"""

import math
import os
import re
from dataclasses import dataclass

from codellama_jax.config import check


@dataclass(frozen=True)
class Chip:
    """One kind of TPU chip. Units: TFLOP/s, GHz, GiB, GB/s."""

    name: str  # as in slices, such as v5e:16x16
    peak_tflops: float  # bfloat16, per chip
    clock_ghz: float  # of the matrix units; turns the compiler's cycles into seconds
    mxu: int  # side of a matrix unit
    devices: int  # JAX devices per chip
    cores: int  # per device; kernels split their heads among them
    hbm_gib: float  # usable by a program, per device
    hbm_gbs: float  # per chip
    link_gbs: float  # one link between chips, one way
    dims: int  # of the torus
    wraps_at: int  # dimensions of a multiple of this size are rings, see Slice.rings
    largest: int  # chips in the biggest slice
    dcn_gbs: float  # between slices, per chip, one way


# fmt: off
CHIPS = {chip.name: chip for chip in (
    #     name     peak  clock mxu dev cor  hbm GiB   GB/s   link dims wraps largest   dcn
    Chip("v4",      275, 1.05, 128,  1,   2,  30.75, 1_200,    45,  3,   4,   4_096,  3.125),
    Chip("v5e",     197, 1.50, 128,  1,   1,  15.75,   819,    45,  2,  16,     256,  3.125),
    Chip("v5p",     459, 1.75, 128,  1,   2,  95.74, 2_765,    90,  3,   4,   8_960,  6.25),
    Chip("v6e",     918, 1.75, 256,  1,   1,  31.25, 1_638,    90,  2,  16,     256,  12.5),
    Chip("tpu7x", 2_307, 2.20, 256,  2,   1,  94.75, 7_380,   100,  3,   4,   9_216,  12.5),
)}
# fmt: on

FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # v5e, v6e
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")


@dataclass(frozen=True)
class Slice:
    """Chips joined by their own links; `count` such slices are joined by the data centre's network.

    Written v5e:16x16, or 2xv5e:16x16 for two of them.
    """

    chip: Chip
    shape: tuple[int, ...]  # chips
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Slice":
        match = re.fullmatch(r"(?:(\d+)x)?(v\w+?|tpu\w+?):(\d+(?:x\d+)+)", text)
        check(
            match is not None and match[2] in CHIPS,
            f"{text!r} is no slice; write chip:shape, such as v5e:16x16, v5p:4x4x8 or "
            f"2xv6e:16x16 for two slices. The chips are {', '.join(CHIPS)}",
        )
        chip, shape = CHIPS[match[2]], tuple(int(size) for size in match[3].split("x"))
        count, chips = int(match[1] or 1), math.prod(shape)
        check(
            len(shape) == chip.dims and chips >= 1 and count >= 1,
            f"{text!r}: a slice of {chip.name} has {chip.dims} dimensions, such as "
            f"{'16x16' if chip.dims == 2 else '4x4x8'}",
        )
        check(chips <= chip.largest, f"{text!r}: {chip.name} has {chip.largest} chips a slice")
        return cls(chip, shape, count)

    def __str__(self) -> str:
        shape = "x".join(str(size) for size in self.shape)
        return f"{self.count}x" * (self.count > 1) + f"{self.chip.name}:{shape}"

    @property
    def chips(self) -> int:
        return self.count * math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which dimensions are rings; the others are lines.

        Of v5e and v6e each one of 16. Of the others all, in slices of whole cubes of 4 x 4 x 4,
        which optical switches join; none in smaller ones.
        """
        whole = tuple(size % self.chip.wraps_at == 0 for size in self.shape)
        return whole if self.chip.dims == 2 else (all(whole),) * self.chip.dims

    @property
    def wrap(self) -> tuple[bool, ...]:
        """The rings that libtpu has to be told of: it knows those of flat slices, but takes cubes
        for lines, where it moves weights by all-reduces of three times the bytes."""
        return self.rings if self.chip.dims == 3 and any(self.rings) else ()

    def topology(self) -> list:
        """Its devices, for compiling only. Raises ValueError without libtpu.

        libtpu locks the machine to one process unless told otherwise, and asks Google Cloud where
        it is; both are settings of the environment, read when it is loaded.
        """
        for name, value in {
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: silences a warning
            "TPU_WORKER_HOSTNAMES": "localhost",
        }.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        try:
            import libtpu  # noqa: F401
        except ImportError:
            raise ValueError(
                "planning for TPUs needs their compiler: pip install 'codellama_jax[aot]'"
            ) from None
        options: dict = {"chip_config_name": "megacore"} if self.chip.name == "v4" else {}
        if self.wrap:
            options["wrap"] = self.wrap
        if self.count > 1:
            options["num_slices"] = self.count
        if math.prod(self.shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        shape = "x".join(str(size) for size in self.shape)
        name = f"{self.chip.name}:{shape}"
        try:
            made = topologies.get_topology_desc(topology_name=name, platform="tpu", **options)
        except Exception as error:  # jaxlib's own kind
            shapes = ", ".join(FLAT if self.chip.dims == 2 else CUBES)
            raise ValueError(
                f"the compiler knows no slice {name}; {self.chip.name} comes as {shapes}"
            ) from error
        check(
            len(made.devices) == self.devices,
            f"{self} should have {self.devices} devices, the compiler says {len(made.devices)}",
        )
        return list(made.devices)


def known(chip: Chip) -> list[Slice]:
    """The single slices one can rent, small to large."""
    shapes = FLAT if chip.dims == 2 else CUBES
    return [Slice.parse(f"{chip.name}:{shape}") for shape in shapes]
