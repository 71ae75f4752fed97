"""Small twins of the recipes' layouts: the same mesh axes, two narrow layers, short rows.

They compile in seconds, so CI compiles them all: a change that makes a layout need more bytes, or
collectives of a kind it did not need, is seen before a real cell is compiled again. What they
needed last is in docs/pods_twins.json (tools/plan_pod.py --twins --record).

A flat slice shrinks to 16 chips, fsdp with it, and data where that is not enough: routing one
all-to-all among 256 chips takes the compiler 15 seconds, whatever its size.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

from codellama_jax import config, whole
from codellama_jax.config import check
from codellama_jax.plan import arithmetic, cell, chips, ledger, shown

FILE = "pods_twins.json"
DIM, HEADS, FFN, VOCABULARY, LENGTH = 2_048, 16, 4_096, 4_096, 256
FLAT = (4, 4)  # chips of a twin's slice that has two dimensions


def twin(stage: config.Stage, where: chips.Slice) -> tuple[config.Stage, chips.Slice]:
    """The stage and the slice in small: as many rows a device, but short ones."""
    model, layout = stage.model, stage.layout
    kv_heads = HEADS // 2 if model.num_kv_heads < model.num_heads else HEADS
    model = replace(
        model, num_layers=2, dim=DIM, num_heads=HEADS, num_kv_heads=kv_heads, ffn_dim=FFN,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    small = replace(where, shape=FLAT) if where.chip.dims == 2 else where
    fewer = where.chips // small.chips
    replicas, fsdp = arithmetic.ways(stage, where)
    less = math.gcd(fsdp, fewer)
    layout = replace(layout, fsdp=fsdp // less, data=replicas * less // fewer)
    length = LENGTH * (2 * layout.context if layout.context > 1 else 1)
    rows = stage.data.rows_per_batch // fewer
    data = replace(stage.data, seq_len=length, batch_tokens=rows * length)
    return replace(stage, model=model, data=data, layout=layout), small


def needs(stage: config.Stage, where: chips.Slice, cache: Path | None = None) -> dict:
    """What the twin of a stage needs, compiled with least effort: peak bytes, collectives."""
    report = cell.plan(*twin(stage, where), quick=True, cache=cache)
    made = report["compiled"]
    return {
        "peak_bytes": report["memory"]["peak_bytes"],
        "kinds": report["kinds"],
        "cpu_seconds": made["cpu_seconds"],
        **{name: made[name] for name in ledger.VERSIONS},
    }


def name_of(stage: config.Stage, size: str, where: str) -> str:
    rows = f"{stage.data.rows_per_batch}x{stage.data.seq_len}"
    return f"{size} {rows} {where} " + " ".join(shown.as_fields(stage.layout))


def read(folder: Path) -> dict[str, dict]:
    path = folder / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def record(folder: Path, needed: dict[str, dict]) -> None:
    """Writes what the twins of all layouts need, by name."""
    whole.write(folder / FILE, json.dumps(dict(sorted(needed.items())), indent=1) + "\n")


def compare(name: str, new: dict, old: dict | None) -> str:
    """Says that a twin needs what it did; raises ValueError where it needs more."""
    check(old is not None, f"{name} has no twin yet: tools/plan_pod.py --twins --record")
    return ledger.no_worse(f"the twin of {name}", new, old)
