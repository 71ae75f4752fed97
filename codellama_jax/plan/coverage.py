"""The whole ledger: every layout of a recipe, as compiled cells and as small twins.

`stages` gives the stages of a size by name, `layouts` the layouts of a stage and size by slice:
those of recipes/code_llama.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from codellama_jax import config
from codellama_jax.plan import cell, chips, ledger, program, store, twins

Stages = Callable[[str], dict[str, config.Stage]]
Layouts = Callable[[config.Stage, str], dict[str, config.Layout]]


@dataclass(frozen=True)
class Cell:
    """A layout of a recipe that the ledger lacks, or has of an older program or estimate."""

    size: str
    stage: config.Stage  # in that layout
    where: chips.Slice
    why: str


def outdated(folder: Path, stages: Stages, layouts: Layouts) -> list[Cell]:
    """The cells of a recipe to be compiled. Lowers each program, which takes seconds."""
    found = []
    for size in config.SIZES:
        for stage in stages(size).values():
            for text, layout in layouts(stage, size).items():
                laid_out, where = replace(stage, layout=layout), chips.Slice.parse(text)
                row = ledger.find(folder, size, stage, text, layout)
                if why := staleness(size, laid_out, where, row):
                    found.append(Cell(size, laid_out, where, why))
    return found


def forget_others(folder: Path, stages: Stages, layouts: Layouts) -> list[dict]:
    """Takes rows out of the ledger whose layout the recipe no longer has, once there are rows of
    the layouts that it has instead, and returns them."""

    def is_other(row: dict) -> bool:
        stage = stages(row["size"]).get(row["stage"])
        layout = layouts(stage, row["size"]).get(row["slice"]) if stage else None
        if layout is None:
            return True
        found = ledger.find(folder, row["size"], stage, row["slice"], layout)
        return found is not None and ledger.key(found) != ledger.key(row)

    return ledger.forget(folder, is_other)


def staleness(size: str, stage: config.Stage, where: chips.Slice, row: dict | None) -> str:
    """Why a row is to be made anew; "" where it is not."""
    if row is None:
        return "missing"
    cache, options = store.folder(), program.told(stage, where)
    name, _ = program.question(program.canonical(stage), where, options).name(cache)
    if row["program"] != name:
        return "other program"
    if store.load(cache / f"{name}.json") is None:  # to compile it would show nothing new
        return ""
    now = ledger.row(size, cell.plan(stage, where))
    return "other estimate" if any(row[name] != now[name] for name in ledger.TIME) else ""


def compile_twins(folder: Path, stages: Stages, layouts: Layouts, *, records: bool) -> None:
    """Compares the twin of every layout with folder/pods_twins.json, or writes that anew."""
    needed, known = {}, twins.read(folder)
    for size, stage, where in laid_out_stages(stages, layouts):
        name = twins.name_of(stage, size, str(where))
        new = needed[name] = twins.needs(stage, where)
        said = f"{name}: {new['peak_bytes'] / 2**20:.0f} MiB, {', '.join(new['kinds'])}"
        print(said if records else twins.compare(name, new, known.get(name)), flush=True)
    if records:
        twins.record(folder, needed)


def laid_out_stages(
    stages: Stages, layouts: Layouts
) -> Iterator[tuple[str, config.Stage, chips.Slice]]:
    """(size, stage, slice) of every layout of a recipe, once each."""
    for size in config.SIZES:
        for stage, found in {
            id(found): (stage, found)
            for stage in stages(size).values()
            if (found := layouts(stage, size))
        }.values():
            for text, layout in found.items():
                yield size, replace(stage, layout=layout), chips.Slice.parse(text)
