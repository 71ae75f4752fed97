"""Where the time of a stage went, over all the calls that it took.

<folder>/goodput.json holds one record per call: the step it began with, the newest it reached, and
seconds spent on each of KINDS. What a kill or a preemption costs is in it: steps that the next call
had to do again, its start, its compiling.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from etils import epath

from codellama_jax import whole

KINDS = {  # of time that is no training
    "start": "start",  # opening the corpus, reading the checkpoint
    "compile": "compiling",  # the first step
    "data": "waiting for data",
    "evaluation": "held-out losses",
    "checkpoint": "checkpoints",
}
WRITE_EVERY = 10.0  # seconds


@dataclass(frozen=True)
class Call:
    """One process that worked on a stage."""

    first_step: int  # it went on from
    last_step: int  # newest that it finished
    seconds: float  # of all of it
    spent: dict[str, float]  # seconds of each of KINDS; the rest is training

    @property
    def training(self) -> float:
        return max(self.seconds - sum(self.spent.values()), 0.0)


@dataclass(frozen=True)
class Goodput:
    """The sum of all calls."""

    calls: int
    seconds: float
    spent: dict[str, float]  # KINDS, "steps" and "lost": steps that were done again
    lost_steps: int

    @property
    def share(self) -> float:
        """Of the seconds, those of steps that were kept."""
        return self.spent["steps"] / self.seconds if self.seconds else 0.0


class Clock:
    """Measures one call while it is open, and keeps the record on disk up to date."""

    def __init__(self, folder: epath.PathLike, writes: bool = True):
        self.path, self.writes = epath.Path(folder) / "goodput.json", writes
        self.began = self._written = time.monotonic()
        self.spent = dict.fromkeys(KINDS, 0.0)
        self.first_step = self.step = 0
        self._started = False
        self._before: list[Call] = []

    def __enter__(self) -> "Clock":
        if self.writes:
            self._before = read(self.path.parent)
        return self

    def __exit__(self, *_) -> None:
        self._write()

    def starts(self, step: int) -> None:
        """The call goes on from `step`; all until now was its start."""
        self.first_step = self.step = step
        self.spent["start"] = time.monotonic() - self.began
        self._started = True
        self._write()  # a call that is killed early counts, too

    def ended(self, step: int) -> None:
        """Notes that `step` is done."""
        self.step = step
        if time.monotonic() - self._written > WRITE_EVERY:
            self._write()

    @contextlib.contextmanager
    def spends(self, kind: str) -> Iterator[None]:
        """Counts the time inside as `kind`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[kind] += time.monotonic() - began

    def _write(self) -> None:
        if not self.writes:
            return
        seconds = time.monotonic() - self.began
        spent = self.spent if self._started else self.spent | {"start": seconds}
        now = Call(self.first_step, self.step, seconds, spent)
        calls = [dataclasses.asdict(call) for call in [*self._before, now]]
        whole.write(self.path, json.dumps(calls, indent=1))
        self._written = time.monotonic()


def read(folder: epath.PathLike) -> list[Call]:
    """The calls that worked on the stage in `folder`; none for one made by older code."""
    path = epath.Path(folder) / "goodput.json"
    return [Call(**call) for call in json.loads(path.read_text())] if path.exists() else []


def summary(calls: list[Call]) -> Goodput:
    """The sum of `calls`, which are in the order in which they ran."""
    spent = {kind: sum(call.spent.get(kind, 0.0) for call in calls) for kind in KINDS}
    lost_steps, lost = 0, 0.0
    worked = [call for call in calls if call.last_step > call.first_step]
    for call, later in zip(worked, worked[1:], strict=False):
        again = max(call.last_step - max(later.first_step, call.first_step), 0)
        lost_steps += again
        lost += call.training * again / (call.last_step - call.first_step)
    spent["lost"] = lost
    spent["steps"] = sum(call.training for call in calls) - lost
    return Goodput(len(calls), sum(call.seconds for call in calls), spent, lost_steps)


def words(goodput: Goodput) -> str:
    """One line: "214 s in 2 calls: 85% steps, 6% compiling, ..."; what is under 1% is left out."""
    names = {"steps": "steps"} | KINDS | {"lost": f"{goodput.lost_steps:,} steps done again"}
    parts = [
        f"{goodput.spent[kind] / goodput.seconds:.0%} {name}"
        for kind, name in names.items()
        if goodput.spent[kind] >= 0.01 * goodput.seconds
    ]
    calls = f" in {goodput.calls} calls" if goodput.calls > 1 else ""
    return f"{goodput.seconds:,.0f} s{calls}: {', '.join(parts)}"


def seconds(workdir: epath.PathLike, stages: list[str]) -> float:
    """What training these stages took in all calls together."""
    folders = [epath.Path(workdir) / name for name in stages]
    return sum(summary(read(folder)).seconds for folder in folders)
