"""One collective of a TPU program, read from its line of HLO text: kind, bytes, devices."""

import math
import re
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "send")
BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "bf16": 2, "f16": 2, "f32": 4, "f64": 8,
}  # fmt: skip

SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective of a computation, run once each time the computation is."""

    kind: str
    dtype: str
    size: int  # bytes of its larger side, per device
    group: tuple[int, ...]  # devices of its first group, as places in the mesh
    asynchronous: bool

    @property
    def wire_bytes(self) -> float:
        """Bytes a device sends: a ring moves all but its own part; an all-reduce does so twice."""
        others = (len(self.group) - 1) / len(self.group) if self.group else 1.0
        if self.kind == "all-reduce":
            return 2 * others * self.size
        return self.size * (1.0 if self.kind in ("collective-permute", "send") else others)


def read(op: str, body: str, asynchronous: bool) -> Collective | None:
    """The collective that this instruction begins, if it begins one."""
    kind = op.removesuffix("-start")
    if kind not in KINDS:
        return None
    group, shapes = group_of(body), shapes_of(body.split(f" {op}(", 1)[0])
    dtype = max(shapes, key=lambda shape: shape[1], default=("?", 0))[0]
    size = sum(n for _, n in shapes)  # one instruction may carry several arrays
    if kind == "reduce-scatter":
        size *= len(group) or 1
    if op == "all-gather-start":  # its type holds operands and results
        size = round(size / (1 + 1 / (len(group) or 1)))
    if op in ("collective-permute-start", "send"):
        size = max((n for _, n in shapes), default=0)
    return Collective(kind, dtype, size, group, asynchronous or op.endswith("-start"))


def shapes_of(text: str) -> list[tuple[str, int]]:
    return [
        (dtype, BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n))
        for dtype, dims in SHAPE.findall(text)
        if dtype in BYTES
    ]


def group_of(body: str) -> tuple[int, ...]:
    """The first replica group, in the four ways XLA writes groups; () where there are none.

    {{0,1},{2,3}}   [2,2]<=[4]T(1,0)   mesh['a'=2,'b'=2] {'b'}
    mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}
    """
    match = re.search(r"replica_groups=\{\{([\d,]+)\}", body)
    if match:
        return tuple(int(n) for n in match[1].split(","))
    match = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\S*)", body)
    if match:
        ids = device_ids(match[3]).reshape(int(match[1]), int(match[2]))
        return tuple(int(n) for n in ids[0])
    match = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))?\s*\{([^}]*)\}", body
    )
    if match:
        return mesh_group(match[1], match[2], match[3])
    if "replica_groups=" in body and "replica_groups={}" not in body:
        start = body.index("replica_groups=")
        raise ValueError(f"groups in a form that is not known: {body[start : start + 80]}")
    return ()


def device_ids(text: str):
    """The order that XLA writes as [4,16]T(1,0): 64 devices as an array of 4 x 16, transposed."""
    import numpy as np

    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    sizes = [int(n) for n in match[1].split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in match[2].split(",")]) if match[2] else ids


def mesh_group(axes: str, order: str | None, over: str) -> tuple[int, ...]:
    """The devices along the axes `over` from device 0.

    mesh_group("'a'=2,'b'=2", None, "'b'") -> (0, 1)
    mesh_group("'a'=2,'b'=2", "[2,2]T(1,0)", "'b'") -> (0, 2)
    """
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    names = re.findall(r"'([^']+)'", over)
    if ":" in over or not set(names) <= set(sizes):
        raise ValueError(f"groups in a form that is not known: mesh[{axes}] {{{over}}}")
    ids = device_ids(order or f"[{math.prod(sizes.values())}]").reshape(tuple(sizes.values()))
    place = tuple(slice(None) if name in names else 0 for name in sizes)
    return tuple(int(n) for n in ids[place].ravel())
