"""What reading prompts and generating need on a TPU slice, compiled from the programs of generate.

    found = generation.plan_generation(SIZES["34b"], chips.Slice.parse("v5e:2x4"), 1, 100_000)
    found["prefill"], found["decode"]     # reports like those of cell.plan

Weights lie split over `tensor`, rows over `data`; nothing is gathered. So a slice has at most
num_kv_heads devices for a row. The time of a program is the larger of two:

    compute   as for training (estimate.py): the compiler's cycles, the attention kernel's own, and
              links that nothing hides
    memory    weights and cache once through the chip's memory, for each token or chunk read

Reading takes as many rounds as the prompt has chunks (decode.chunk_of); generating is given for one
token, a share of a call that adds decode.DECODE_CHUNK.
"""

import math
from pathlib import Path
from typing import Any

from codellama_jax import config
from codellama_jax.config import check
from codellama_jax.plan import arithmetic, cell, chips, estimate, kernels, program, store

ANSWER = 512  # tokens that the cache has room for after the prompt
SOURCES = (*program.SOURCES, "generate/cached_attention", "generate/decode", "plan/generation")

Report = dict[str, Any]


def plan_generation(
    model: config.Model,
    where: chips.Slice,
    batch: int,
    context: int,
    *,
    tensor: int | None = None,
    quick: bool = False,
    cache: Path | None = None,
) -> dict[str, Report]:
    """The JSON-ready reports of "prefill" and "decode" for `batch` prompts of `context` tokens.

    tensor: devices that share a row; None: all, up to one for each key/value head. `quick` compiles
    with least effort, for the bytes: such reports have no times. Raises ValueError when rows or
    heads do not divide, or when it does not fit, with what would.
    """
    layout = layout_of(model, where, batch, tensor)
    options = program.least_effort(where.chip.name) if quick else {}
    cache = cache or store.folder()
    made = {}
    for name in ("prefill", "decode"):
        asked = (name, model, layout, where, batch, context)
        facts, text = question(*asked, options).answer(cache)
        check("memory" in facts, _too_big(*asked, facts))
        report = {
            "stage": name,
            "slice": str(where),
            "chips": where.chips,
            "rows": batch,
            "seq_len": context,
            "layout": config.to_json(layout),
            "mesh": facts["mesh"],
            "memory": cell.memory(facts, where.chip),
            "compiled": facts["compiled"],
        }
        if not quick:
            report["time"] = _time(name, model, where, batch, context, facts, text)
        made[name] = report
    return made


def layout_of(
    model: config.Model, where: chips.Slice, batch: int, tensor: int | None = None
) -> config.Layout:
    """Rows over data, heads over tensor. Raises ValueError where they do not divide."""
    tensor = tensor or math.gcd(model.num_kv_heads, where.devices)
    check(
        model.num_kv_heads % tensor == 0 and where.devices % tensor == 0,
        f"tensor={tensor} does not divide {model.num_kv_heads} key/value heads and "
        f"{where.devices} devices; use tensor={math.gcd(model.num_kv_heads, where.devices)}",
    )
    data = where.devices // tensor
    check(
        batch % data == 0,
        f"batch={batch} does not divide among {data} groups of {tensor} devices on {where}: "
        f"use batch={-(-batch // data) * data}, or a slice of {tensor * math.gcd(batch, data)} "
        "devices",
    )
    return config.Layout(data=data, fsdp=1, tensor=tensor)


# -- compiling -----------------------------------------------------------------------------------
def question(name, model, layout, where, batch, context, options) -> program.Question:
    """What a program needs on a slice, to be asked of the compiler or of the cache."""
    shapes = [name, config.to_json(model), config.to_json(layout), str(where), batch, context]
    asked = (name, model, layout, where, batch, context)
    return program.Question([*shapes, options], where, options, SOURCES, lambda: lower(*asked))


def lower(
    name: str,
    model: config.Model,
    layout: config.Layout,
    where: chips.Slice,
    batch: int,
    context: int,
):
    """decode.prefill or decode.decode for devices that are not there, and their mesh."""
    devices = where.topology()
    import jax
    import numpy as np

    from codellama_jax import sharding
    from codellama_jax.generate import decode

    mesh = sharding.make_mesh(layout, devices)
    params = abstract_weights(model, mesh)

    def rows(dtype, *shape):
        return _shape(mesh, jax.ShapeDtypeStruct((batch, *shape), dtype), "batch")

    prompt = decode.bucket(context)
    tokens_BT, lengths_B = rows(np.int32, prompt), rows(np.int32)
    sizes = {"model": model, "room": decode.bucket(ANSWER)}
    with jax.set_mesh(mesh), program.without_places():
        if name == "prefill":
            return decode.prefill.lower(params, tokens_BT, lengths_B, **sizes), mesh
        kept = jax.eval_shape(
            lambda *args: decode.prefill(*args, **sizes), params, tokens_BT, lengths_B
        )
        caches = [
            decode.Cache(*(_shape(mesh, x, "batch", "kv_heads") for x in cache))
            for cache in kept.caches
        ]
        rest = (_shape(mesh, kept.logits_BV, "batch"), lengths_B, _shape(mesh, kept.step))
        draw = decode.Draw(np.float32(0), np.float32(1), np.zeros(decode.MAX_STOP_IDS, np.int32))
        points_BC, done_B = rows(np.float32, decode.DECODE_CHUNK), rows(np.bool_)
        lowered = decode.decode.lower(
            *(params, decode.Rows(caches, *rest), draw, points_BC, done_B, 1),
            model=model,
            prompt_room=prompt,
        )
        return lowered, mesh


def abstract_weights(model: config.Model, mesh) -> dict:
    """bfloat16 weights as shapes, as generate.weights.unstack leaves them: "layers" a list."""
    import jax

    from codellama_jax import state

    shapes, axes = state.abstract_params(model), state.param_axes(model)
    state.param_shardings(model, mesh)  # refuses what does not divide

    def weight(shape, names):
        first = int(names[:1] == ("layers",))
        one = jax.ShapeDtypeStruct(shape.shape[first:], jax.numpy.bfloat16)
        return _shape(mesh, one, *names[first:])

    made = jax.tree.map(weight, shapes, axes)
    return made | {"layers": [made["layers"]] * model.num_layers}


def _shape(mesh, shape, *axes):
    """The shape, lying where its logical axes say."""
    import jax

    from codellama_jax import sharding

    place = jax.sharding.NamedSharding(mesh, sharding.spec(*axes))
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _too_big(name, model, layout, where, batch, context, facts) -> str:
    found = facts.get("too_big", {"needs": 0.0, "has": 0.0})
    fewer = batch > 1 and (batch // 2) % layout.data == 0
    larger = _larger(model, where, batch, found["needs"])
    hints = [f"batch={batch // 2}"] * fewer + ["a shorter context"]
    return (
        f"{name} of {batch} rows of {context} tokens needs {found['needs']:.1f} GiB a device, "
        f"{where} has {found['has']:.2f}: try {', '.join(hints)}, or "
        f"{f'a larger slice, such as {larger}' if larger else 'a chip with more memory'}"
    )


def _larger(model, where, batch, needs) -> chips.Slice | None:
    """The smallest slice among whose devices the same bytes fit, a tenth spared."""
    for other in chips.known(where.chip):
        share = needs * where.devices / other.devices
        try:
            layout_of(model, other, batch)
        except ValueError:
            continue
        if other.devices > where.devices and share <= arithmetic.SPARED * where.chip.hbm_gib:
            return other
    return None


# -- the estimate --------------------------------------------------------------------------------
def _time(name, model, where, batch, context, facts, text) -> Report:
    """Seconds of one call: all chunks of the prompts, or one token for every row."""
    from codellama_jax.generate import decode

    prompt = decode.bucket(context)
    chunks = -(-context // decode.chunk_of(prompt, "splash"))
    rounds, share = (chunks, 1) if name == "prefill" else (decode.DECODE_CHUNK,) * 2
    facts = facts | {"regions": estimate.regions(text, facts, where, rounds)}

    def of_kernel(name: str) -> float:
        return _reading(model, where, facts["mesh"], batch, context)

    total = estimate.seconds_of(where, facts, of_kernel)
    total = {part: value / share for part, value in total.items()}  # of a call that adds so many
    chip, devices = where.chip, where.chip.devices
    reads = facts["memory"]["arguments"] + _cache_bytes(model, facts["mesh"], batch, prompt, name)
    total["memory"] = rounds / share * reads / (chip.hbm_gbs / devices * 1e9)
    total["step"] = max(total["step"], total["memory"])
    tokens = batch * (context if name == "prefill" else 1)
    forward = model.flops_per_token(context if name == "prefill" else 2 * context) / 3
    peak = chip.peak_tflops * 1e12 * where.chips
    times = {f"{part}_seconds": round(value, 6) for part, value in total.items()}
    return times | {
        "binds": "memory" if total["step"] == total["memory"] else estimate.binds(total),
        "tokens_per_second": round(tokens / total["step"], 1),
        "tokens_per_second_per_chip": round(tokens / total["step"] / where.chips, 1),
        "mfu": round(tokens * forward / total["step"] / peak, 4),
        "collectives": [
            row | {part: row[part] / share for part in ("gigabytes", "seconds", "calls")}
            for row in estimate.collectives(facts, chip)
        ],
    }


def _reading(model, where, mesh, batch, context) -> float:
    """Seconds of one call of the attention kernel, the chunks of a prompt taken together.

    Counted as the forward kernel of training, whose blocks compare segments in addition.
    """
    from codellama_jax.generate import cached_attention, decode

    prompt = decode.bucket(context)
    chunk = decode.chunk_of(prompt, "splash")
    queries, keys = cached_attention.blocks(chunk, prompt)
    read = -(-context // chunk) * chunk
    ends = range(queries, read + 1, queries)  # of the blocks of queries
    cycles = kernels.cycles(
        "fwd",
        where.chip,
        1_024,
        blocks=sum(-(-end // keys) for end in ends) * queries * keys / 1_024**2,
        rows=read / 1_024,
        steps=len(ends) * prompt / keys,
    )
    pairs = batch * model.num_kv_heads / mesh.get("data", 1) / mesh.get("tensor", 1)
    group = model.num_heads // model.num_kv_heads
    return kernels.seconds(where.chip, cycles, pairs, group) / (read // chunk)


def _cache_bytes(model, mesh, batch, prompt, name) -> float:
    """Of a device, where the program makes the cache itself; decode is given it."""
    from codellama_jax.generate import decode

    if name == "decode":
        return 0.0
    ways = mesh.get("data", 1) * mesh.get("tensor", 1)
    slots = prompt + decode.bucket(ANSWER)
    return 2 * 2 * model.num_layers * batch * model.num_kv_heads * slots * model.head_dim / ways
