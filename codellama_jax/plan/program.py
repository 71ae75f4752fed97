"""The real step of a stage, lowered and compiled for TPUs that are not there.

A program is named by a hash of its own text and of what compiles it, and what the compiler said is
kept under that name (store.py), so that the same question is answered at once.
"""

import contextlib
import gzip
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codellama_jax import compiler_options, config
from codellama_jax.config import check
from codellama_jax.plan import arithmetic, chips, estimate, store

# Least effort, for bytes only: the schedule means nothing then. As jax 0.10 says it, and 0.12.
QUICK = ({"exec_time_optimization_effort": -1.0}, {"optimization_level": "O0"})
SOURCES = (  # what a program is made of; the estimate is made anew each time
    *("attention", "config", "model", "optim", "sharding", "state", "step"),
    *("plan/chips", "plan/program"),
)

Report = dict[str, Any]


def told(stage: config.Stage, where: chips.Slice, quick: bool = False) -> dict:
    """What the compiler is told: what training tells it, or for bytes only to make no effort."""
    chip = where.chip.name
    return least_effort(chip) if quick else compiler_options.of_chip(chip, stage.model.dim)


def least_effort(chip: str) -> dict:
    """The one of QUICK that this jax knows; none for tpu7x: libtpu 0.0.42.1 aborts there over the
    collectives of sparse cores."""
    if chip == "tpu7x":
        return {}
    import jax

    return QUICK[0 if hasattr(jax.config, "jax_exec_time_optimization_effort") else 1]


# -- compiling -----------------------------------------------------------------------------------
def canonical(stage: config.Stage) -> config.Stage:
    """The stage without the numbers that change no byte: stages equal but for these are one."""
    data = replace(
        stage.data, mix={"any": 1.0}, already={}, infilling_rate=0.0, spm_rate=0.5, line_rate=0.0
    )
    data = replace(data, corpus="corpus", tokenizer="tokenizer.model", rows=None, seed=0, workers=0)
    optim = config.Optim(
        peak_lr=1e-4, warmup_steps=1, final_lr_ratio=0.1, beta1=0.9, beta2=0.95, eps=1e-5,
        weight_decay=0.1, clip_norm=1.0,
    )  # fmt: skip
    return config.Stage(
        name="plan", start_from=None, model=stage.model, data=data, optim=optim, steps=1_000,
        layout=stage.layout,
    )  # fmt: skip


def compiled(stage: config.Stage, where: chips.Slice, options: dict, cache: Path) -> Report:
    """What the compiler says of a stage, from the cache if it was asked before."""
    facts, text = question(stage, where, options).answer(cache)
    if "memory" not in facts:  # it does not fit
        return facts
    rounds = 1 if options in QUICK else None  # times mean nothing there, so neither do trips
    return facts | {"regions": estimate.regions(text, facts, where, rounds)}


def question(stage: config.Stage, where: chips.Slice, options: dict) -> "Question":
    """What a stage needs on a slice, to be asked of the compiler or of the cache."""
    leads = [config.to_json(stage), str(where), options]
    return Question(leads, where, options, SOURCES, lambda: lower(stage, where))


@dataclass(frozen=True)
class Question:
    """A program for a slice, and what leads to it."""

    leads: list  # JSON: equal leads and equal source files lead to the same program
    where: chips.Slice
    options: dict  # of the compiler
    sources: Sequence[str]  # see store.own_code
    lower: Callable  # () -> the lowered program and its mesh

    def name(self, cache: Path):
        """The name of the program, a hash of it and of what compiles it, and the program itself if
        it had to be lowered to know.

        Another hash, of the leads and the source files, leads to the name without any work; the
        program's survives changes of the sources that do not change it.
        """
        name = store.load(self.alias(cache))
        if name is not None:
            return name, None
        lowered, mesh = self.lower()
        told = [str(self.where), self.options, store.versions(), *self.where.wrap]
        name = store.digest([lowered.as_text(), *told])
        store.save(self.alias(cache), name)
        return name, (lowered, mesh)

    def alias(self, cache: Path) -> Path:
        """The file that says the program's name where it was asked for before."""
        asked = store.digest([*self.leads, store.versions(), store.own_code(self.sources)])
        return cache / f"{asked}.alias.json"

    def is_answered(self, cache: Path) -> bool:
        return (cache / f"{store.load(self.alias(cache))}.json").exists()

    def answer(self, cache: Path) -> tuple[Report, str]:
        """What the compiler says of the program, and its schedule ("" where it does not fit)."""
        name, lowered = self.name(cache)
        facts = store.load(cache / f"{name}.json")
        if facts is None:
            facts, text = compile_now(*(lowered or self.lower()), self.options)
            store.save(cache / f"{name}.hlo.gz", gzip.compress(text.encode()))
            store.save(cache / f"{name}.json", facts)
        text = gzip.decompress((cache / f"{name}.hlo.gz").read_bytes()).decode()
        return facts | {"program": name}, text


def lower(stage: config.Stage, where: chips.Slice):
    """The real step for devices that are not there: abstract state and batch, state donated."""
    devices = where.topology()
    import jax

    from codellama_jax import optim, sharding, state, step

    check_mesh(stage, where)
    mesh = sharding.make_mesh(stage.layout, devices)
    check_rows(stage, where, mesh.shape["data"] * mesh.shape["fsdp"])
    train_state = state.abstract_state(stage.model, optim.adamw(stage.optim, stage.steps), mesh)
    train_step = jax.jit(step.make_train_step(stage, "tpu"), donate_argnums=0)
    with jax.set_mesh(mesh), without_places():
        return train_step.lower(train_state, abstract_batch(stage, mesh)), mesh


@contextlib.contextmanager
def without_places():
    """Programs lowered in here do not say which files and lines they come from. Kernels do, inside
    their code, and the hash of a program must not depend on where a library is installed."""
    import jax

    name = "jax_traceback_in_locations_limit"
    before = jax.config.values[name]
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def abstract_batch(stage: config.Stage, mesh) -> dict:
    """The batch of a stage as shapes that know where they lie."""
    import jax
    import numpy as np

    from codellama_jax import sharding

    rows, place = stage.data.rows_per_batch, sharding.batch_sharding(mesh)
    shapes = {name: (rows, stage.data.seq_len + 1) for name in ("tokens", "segments", "positions")}
    made = {name: jax.ShapeDtypeStruct(s, np.int32, sharding=place) for name, s in shapes.items()}
    made["loss_mask"] = jax.ShapeDtypeStruct(shapes["tokens"], np.bool_, sharding=place)
    return made | {"corpus": jax.ShapeDtypeStruct((rows,), np.int32, sharding=place)}


def check_mesh(stage: config.Stage, where: chips.Slice) -> None:
    """Raises ValueError when the axes of the mesh do not fill the slice, with a layout whose do."""
    data, fsdp = arithmetic.ways(stage, where)
    asked = data * fsdp * stage.layout.tensor * stage.layout.context
    if asked != where.devices:
        nearest = " ".join(arithmetic.nearest(stage, where) or ["another slice"])
        raise ValueError(
            f"the mesh has data * fsdp * tensor * context = {asked} devices, "
            f"{where} has {where.devices}: try {nearest}"
        )


def check_rows(stage: config.Stage, where: chips.Slice, ways: int) -> None:
    """Raises ValueError when the rows of a microbatch do not divide, with a layout whose do."""
    rows = stage.data.rows_per_batch
    if rows % ways == 0:
        hint = f"layout.microbatches={rows // ways}"
    else:
        split = where.devices // math.gcd(rows, where.devices)
        hint = f"layout.microbatches=1 and layout.context={split}"
    check(
        rows % (stage.layout.microbatches * ways) == 0,
        f"{rows // stage.layout.microbatches} rows per microbatch do not divide among "
        f"data * fsdp = {ways} devices of {where}; with {hint} they would",
    )


def compile_now(lowered, mesh, options: dict) -> tuple[Report, str]:
    """What the compiler says of the bytes, and the schedule it made (HLO text)."""
    import jax

    began, cpu = time.monotonic(), time.process_time()
    made: Report = {"mesh": {name: n for name, n in mesh.shape.items() if n > 1}}
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if refused := refusal(str(error)):
            return made | refused, ""
        raise
    sizes = program.memory_analysis()
    made |= {
        "compiled": {
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "options": options,
            **store.versions(),
        },
        "memory": {
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "host": sizes.host_temp_size_in_bytes,
            "peak": sizes.peak_memory_in_bytes,
        },
        "places": [[int(x) for x in device.coords] for device in mesh.devices.flat],
        "slices": [int(getattr(device, "slice_index", 0)) for device in mesh.devices.flat],
    }
    return made, program.as_text()


def refusal(error: str) -> Report:
    """What did not fit by a compiler's error: "too_big" for a device (GiB), or the "too_big_block"
    of a kernel for its vector memory (MiB); empty for other errors."""
    found = re.search(r"\(([\d.]+)G\) exceeds available HBM \(([\d.]+)G\)", error)
    if found:
        return {"too_big": {"needs": float(found[1]), "has": float(found[2])}}
    found = re.search(r"memory space vmem\. Used ([\d.]+)M of ([\d.]+)M", error)
    return {"too_big_block": {"needs": float(found[1]), "has": float(found[2])}} if found else {}
