"""What a compiled TPU program does in time, read from its scheduled HLO text.

The compiler's own totals are of no use: they count the body of a loop once and kernels not at all.
So the text is walked: every computation with the number of times it runs, and in it

    cycles       the sum of `estimated_cycles` of its instructions
    kernels      Pallas calls by name and block; they carry no cycles
    collectives  what moves between chips, by kind, type and group; these carry no cycles either
    order        all of these as they happen: a collective begins, and is awaited now or later

A loop says how often it runs by the constant in its condition. One asynchronous collective appears
as a start, fused steps and a done, each taking what the one before made: a region counts it once.
(Channels do not tell them apart: all that `jax.shard_map` makes share one.) A reduce-scatter is
written as an all-reduce whose slice is taken, in a fusion of its own: it sends half as much.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from codellama_jax.plan import collective
from codellama_jax.plan.collective import Collective

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
OPCODE = re.compile(r"(?<=[\s)}\]])([a-z][a-z0-9\-]*)\(")
CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
CONSTANT = re.compile(r" [su]32\[\][^ ]* constant\((\d+)\)")  # u32: loops over shards
BLOCK = re.compile(r'block_q(?:_d\w+)?\\*": *(\d+)')  # as splash attention notes it
CHANNEL = re.compile(r"channel_id=(\d+)")
# What these call runs beside what follows; the last two are for sparse cores, as libtpu 0.0.42 and
# 0.0.52 write them.
BESIDE = ("async-start", "call-start", "custom-call-start")
ENDED = re.compile(r'\}(, execution_thread="\w+")?')
SCATTERED = re.compile(r"all-reduce-scatter")  # the compiler's name of a reduce-scatter


# ("cycles", how many), ("kernel", its name), ("begin" or "end", a place among the collectives)
Event = tuple[str, int | str]


@dataclass
class Region:
    """A computation that runs `times` times: the program itself, or the body of a loop."""

    name: str
    times: int
    cycles: int = 0
    kernels: Counter = field(default_factory=Counter)
    collectives: list[Collective] = field(default_factory=list)
    order: list[Event] = field(default_factory=list)


def read(text: str, rounds: int | None = None) -> list[Region]:
    """The regions of a scheduled HLO module, the whole program first.

    rounds: how often loops run that end at a value and not at a constant. Raises ValueError for a
    text that is no scheduled module, and for such a loop where rounds is None.
    """
    computations, entry = split(text)
    if entry is None or "is_scheduled=true" not in text[:2_000]:
        raise ValueError("this is no scheduled HLO module: it has no entry, or no schedule")
    regions: list[Region] = []
    keys: dict[str, list[str]] = {}  # of each region's collectives: kind and channel
    begun: dict[str, list[int]] = {}  # the collectives that an instruction begins or carries on

    def meet(region: Region, key: str, found: Collective, role: str, carried: list[int]) -> int:
        """The place of a collective in a region. It is met where it starts, where products carry it
        on, and where it is done; in a loop that started it a round before, there first."""
        known = keys.setdefault(region.name, [])
        same = [place for place in carried if known[place] == key]
        if role == "start":
            order, of_key = region.order, (n for n, other in enumerate(known) if other == key)
            same = [n for n in of_key if ("end", n) in order and ("begin", n) not in order]
        if not same:
            known.append(key)
            region.collectives.append(found)
            same = [len(known) - 1]
        place = same[0]
        if role == "done" and found.asynchronous:
            region.order.append(("end", place))
        elif ("begin", place) not in region.order:
            region.order.append(("begin", place))
            region.order += [("end", place)] * (not found.asynchronous)
        return place

    def walk(
        name: str, region: Region, within_fusion: bool, asynchronous: bool,
        role: str = "", carried: Sequence[int] = (),
    ) -> list[int]:  # fmt: skip
        """Adds a computation to a region. Returns the places of the collectives in it.

        role: "start" or "done" where that is what its caller does; carried: those it takes over.
        """
        met: list[int] = []
        for line in computations.get(name, ()):
            match = INSTRUCTION.match(line)
            if match is None:
                continue
            body = match[2]
            opcode = OPCODE.search(" " + body)
            op = opcode[1] if opcode else ""
            if op == "while":
                loop = Region(
                    CALLED.search(body)[1], region.times * trips(computations, body, rounds)
                )
                regions.append(loop)
                walk(loop.name, loop, False, False)
                continue
            if not within_fusion and (cycles := CYCLES.search(body)):
                region.cycles += int(cycles[1])
                region.order.append(("cycles", int(cycles[1])))
            if op == "custom-call" and 'custom_call_target="tpu_custom_call"' in body:
                region.kernels[kernel_name(match[1], body)] += 1
                region.order.append(("kernel", kernel_name(match[1], body)))
            found = collective.read(op, body, asynchronous)
            if found is not None:
                channel = CHANNEL.search(body)
                key = f"{found.kind} {channel[1]}" if channel else f"{name} {match[1]}"
                if found.kind == "all-reduce" and SCATTERED.match(name):
                    found = replace(found, kind="reduce-scatter")
                begun[match[1]] = [meet(region, key, found, role or role_of(op, match[1]), carried)]
                met += begun[match[1]]
            elif op == "get-tuple-element" or op.endswith(("-update", "-done")):
                taken = [place for other in operands(op, body) for place in begun.get(other, ())]
                if op.endswith("-done"):
                    region.order += [("end", place) for place in taken]
                else:
                    begun[match[1]] = taken
            elif op in ("fusion", "call", "conditional", "custom-call", *BESIDE):
                overlapped = asynchronous or op in BESIDE or "async" in match[1]
                inner = within_fusion or op != "call" and op != "conditional"
                does = role or role_of(op, match[1])
                taken = [place for other in operands(op, body) for place in begun.get(other, ())]
                inside = [
                    place
                    for called in callees(body)
                    for place in walk(called, region, inner, overlapped, does, taken or carried)
                ]
                begun[match[1]] = [] if does == "done" else inside
                met += inside
        return met

    program = Region(entry, 1)
    regions.append(program)
    walk(entry, program, False, False)
    return regions


def split(text: str) -> tuple[dict[str, list[str]], str | None]:
    """The lines of each computation by name, and the name of the entry.

    A computation ends with a line of "}" and where it runs: kernels hold lines that only begin so.
    """
    computations: dict[str, list[str]] = {}
    entry, lines = None, None
    for line in text.splitlines():
        if lines is None:
            match = HEADER.match(line)
            if match:
                lines = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif ENDED.fullmatch(line):
            lines = None
        elif lines and not line.startswith("  "):  # an attribute that holds line breaks
            lines[-1] += line
        else:
            lines.append(line)
    return computations, entry


def trips(computations: dict[str, list[str]], loop: str, rounds: int | None = None) -> int:
    """How often a while runs: the largest constant of its condition; without one, `rounds`."""
    condition = CONDITION.search(loop)
    found = [
        int(value)
        for line in computations.get(condition[1] if condition else "", ())
        for value in CONSTANT.findall(line)
    ]
    if not found and rounds is not None:
        return rounds
    if not found:
        raise ValueError(f"no trip count in the condition of the loop {loop[:120]}")
    return max(found)


def role_of(op: str, name: str) -> str:
    """What an instruction does for an asynchronous collective, if it says so."""
    if op in BESIDE or "-start" in name or op.endswith("-start"):
        return "start"
    return "done" if "-done" in name else ""


def operands(op: str, body: str) -> list[str]:
    """The names of what an instruction takes."""
    return re.findall(r"%([\w.\-]+)", body.split(f" {op}(", 1)[1].split(")", 1)[0])


def callees(body: str) -> list[str]:
    names = CALLED.findall(body)
    for branches in BRANCHES.findall(body):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    return names


def kernel_name(name: str, body: str) -> str:
    """The function a Pallas call was made from, such as splash_mha_fwd, and its block's side."""
    match = re.search(r'kernel_name\W+([\w.\-]+)|op_name="[^"]*?([\w\-]+)"', body)
    found = match and (match[1] or match[2])
    if found in (None, "pallas_call"):
        found = name
    block = BLOCK.search(body)
    return re.sub(r"[.\d]+$", "", found) + (f" {block[1]}" if block else "")
