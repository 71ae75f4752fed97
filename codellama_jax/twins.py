"""Small twins of the recipes' layouts: the same mesh on the same slice, two narrow layers.

They compile in seconds, so CI compiles them all: a change that makes a layout need more bytes, or
collectives of a kind it did not need, is seen before a real cell is compiled again. What they
needed last is in docs/pods_twins.json (tools/plan_pod.py --twins --record).
"""

import json
from dataclasses import replace
from pathlib import Path

from codellama_jax import chips, config, ledger, plan, whole
from codellama_jax.config import check

FILE = "pods_twins.json"
DIM, HEADS, FFN, VOCABULARY, LENGTH = 2_048, 16, 4_096, 4_096, 1_024


def twin(stage: config.Stage) -> config.Stage:
    """The stage with two narrow layers and short rows, as many of them."""
    model, context = stage.model, stage.layout.context
    kv_heads = HEADS // 2 if model.num_kv_heads < model.num_heads else HEADS
    model = replace(
        model, num_layers=2, dim=DIM, num_heads=HEADS, num_kv_heads=kv_heads, ffn_dim=FFN,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    length = LENGTH * (2 * context if context > 1 else 1)
    data = replace(stage.data, seq_len=length, batch_tokens=stage.data.rows_per_batch * length)
    return replace(stage, model=model, data=data)


def needs(stage: config.Stage, where: chips.Slice, cache: Path | None = None) -> dict:
    """What the twin of a stage needs, compiled with least effort: peak bytes, collectives."""
    report = plan.plan(twin(stage), where, quick=True, cache=cache)
    made = report["compiled"]
    return {
        "peak_bytes": report["memory"]["peak_bytes"],
        "kinds": report["kinds"],
        "cpu_seconds": made["cpu_seconds"],
        **{name: made[name] for name in ("jax", "libtpu")},
    }


def name_of(stage: config.Stage, size: str, where: str) -> str:
    rows = f"{stage.data.rows_per_batch}x{stage.data.seq_len}"
    return f"{size} {rows} {where} " + " ".join(plan.as_fields(stage.layout))


def read(folder: Path) -> dict[str, dict]:
    path = folder / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def record(folder: Path, name: str, new: dict) -> None:
    rows = dict(sorted((read(folder) | {name: new}).items()))
    whole.write(folder / FILE, json.dumps(rows, indent=1) + "\n")


def compare(name: str, new: dict, old: dict | None) -> str:
    """Says that a twin needs what it did; raises ValueError where it needs more.

    Twins of other versions of jax and libtpu are not compared.
    """
    check(old is not None, f"{name} has no twin yet: tools/plan_pod.py --twins --record")
    if any(new[part] != old[part] for part in ("jax", "libtpu")):
        return f"{name}: recorded with jax {old['jax']}, libtpu {old['libtpu']}, not compared"
    growth = new["peak_bytes"] / old["peak_bytes"] - 1
    check(
        growth <= ledger.MOST_GROWTH,
        f"the twin of {name} needs {growth:.1%} more bytes than it did: find out why, or record it",
    )
    kinds = sorted(set(new["kinds"]) - set(old["kinds"]))
    check(not kinds, f"the twin of {name} now has collectives it did not have: {', '.join(kinds)}")
    return f"{name}: twin {growth:+.1%}, no new collectives"
