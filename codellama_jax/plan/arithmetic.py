"""What a stage needs on a slice by arithmetic alone: what to compile, not what to believe.

Bytes come within a fifth of the compiler's (tests/test_plan_arithmetic.py), seconds only order
layouts.
"""

from dataclasses import fields, replace

from codellama_jax import config
from codellama_jax.plan import chips

SPARED = 0.9  # share of the memory that arithmetic may fill
SPLITS = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (4, 1), (8, 1))  # (tensor, context); 8 K/V heads
PRODUCTS = 0.8  # share of the peak of matrix products with what is fused to them
ATTENTION = 0.65  # of attention kernels
COPIES = 1.2  # of the products' time, where a device's part of a weight is no whole tiles
TILE = 16  # rows, in 16 bits
MATRIX_PRODUCTS = 9  # of T x T x H for a row and head: 2 forward, 7 backward


def gib(stage: config.Stage, where: chips.Slice) -> float:
    """GiB a device with the stage's layout.

    State and gradients in float32, what remat keeps of each layer, one layer at work with the
    weights of the next, the logits.
    """
    model, layout = stage.model, stage.layout
    data, fsdp = ways(stage, where)
    rows = stage.data.rows_per_batch / layout.microbatches / (data * fsdp)
    tokens = rows * stage.data.seq_len / (layout.tensor * layout.context)
    state = 16 * model.num_params / (fsdp * layout.tensor * layout.context)
    weights = layer_weights(model) / layout.tensor
    work = 3 * 2 * weights + 2 * tokens * (4 * model.dim + 3 * model.ffn_dim)
    chunk = min(layout.loss_chunk, stage.data.seq_len) * rows / (layout.tensor * layout.context)
    logits = (4 * chunk + 2 * tokens) * model.vocab_size  # of a chunk, and the gradient of all
    kept_bytes = tokens * model.num_layers * kept(model, layout.remat)
    return (state + kept_bytes + work + logits) / 2**30


def kept(model: config.Model, remat: str) -> int:
    """Bytes per token and layer that are kept for the backward pass, in 16 bits each."""
    D, F = model.dim, model.ffn_dim
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim  # q, k, v, output
    widths = {
        "full": D,
        "attention": D + heads,
        "products": D + heads - model.num_heads * model.head_dim + 2 * D + 2 * F,
        "dots": D + heads + 2 * D + 2 * F,
        "none": 8 * D + heads + 4 * F,
    }
    return 2 * widths[remat]


def recomputed(model: config.Model, remat: str) -> float:
    """Weights of one layer whose products are made again: at most all but w2, the last of them."""
    D, F = model.dim, model.ffn_dim
    weights = {
        "full": layer_weights(model) - D * F,
        "attention": model.num_heads * model.head_dim * D + 2 * D * F,  # wo, w1, w3
    }
    return weights.get(remat, 0)


def seconds(stage: config.Stage, where: chips.Slice) -> float:
    """Seconds of a step with the stage's layout, roughly."""
    model, layout, chip = stage.model, stage.layout, where.chip
    peak, tokens = chip.peak_tflops * 1e12 * where.chips, stage.data.batch_tokens
    weights = model.num_layers * layer_weights(model)
    again = 2 * model.num_layers * recomputed(model, layout.remat)
    products = 6 * weights + again + 6 * model.dim * model.vocab_size
    kernel = MATRIX_PRODUCTS + 2 * (layout.remat in ("full", "products"))
    data, fsdp = ways(stage, where)
    shards = fsdp * layout.context
    if model.dim // shards % TILE:
        products *= COPIES
    scores = kernel * model.num_layers * model.num_heads * model.head_dim * stage.data.seq_len
    compute = tokens * (products / PRODUCTS + scores / ATTENTION) / peak
    link = 2 * chip.dims * chip.link_gbs * 1e9 / chip.devices
    gathered = 2 * layout.microbatches * 2 * weights / layout.tensor / link
    # over all devices of a slice gradients travel as all-reduces, which send them twice
    sent = 2 if shards * where.count == where.devices else 1
    reduced = sent * layout.microbatches * 2 * weights / layout.tensor / link
    share = tokens / (data * fsdp) / layout.context  # of a group of tensor devices
    neighbours = chip.link_gbs * 1e9 / chip.devices  # a tensor group lies on a line
    split = 8 * model.num_layers * share * model.dim * 2 * (1 - 1 / layout.tensor) / neighbours
    return compute + max(0.0, gathered - compute) + reduced + split


def ways(stage: config.Stage, where: chips.Slice) -> tuple[int, int]:
    """Devices of the axes data and fsdp."""
    layout = stage.layout
    others = layout.data * layout.tensor * layout.context
    return layout.data, layout.fsdp if layout.fsdp > 0 else max(1, where.devices // others)


def layer_weights(model: config.Model) -> float:
    """Weights of one layer."""
    both = 2 if not model.tied_embeddings else 1
    return (model.num_params - both * model.vocab_size * model.dim) / model.num_layers


# -- what could be tried -------------------------------------------------------------------------
def divides(stage: config.Stage, where: chips.Slice) -> bool:
    """Whether rows, heads and widths divide among the devices."""
    model, layout = stage.model, stage.layout
    data, fsdp = ways(stage, where)
    split = layout.tensor * layout.context
    return (
        data * fsdp * split == where.devices
        and stage.data.rows_per_batch % (layout.microbatches * data * fsdp) == 0
        and model.num_kv_heads % layout.tensor == 0
        and model.dim % (fsdp * layout.context) == 0
        and (layout.context == 1 or stage.data.seq_len % (256 * layout.context) == 0)
    )


def least(stage: config.Stage, where: chips.Slice) -> config.Layout | None:
    """The layout, everything recomputed, that splits rows least and still leaves a tenth of the
    memory free, or else the one that needs least; None where no rows divide."""
    tried = []
    for tensor, context in SPLITS:
        fsdp = max(1, where.devices // (where.count * tensor * context))
        rows = stage.data.rows_per_batch
        layout = replace(
            stage.layout, data=where.count, fsdp=fsdp, tensor=tensor, context=context,
            microbatches=max(1, rows // (where.count * fsdp)), remat="full",
        )  # fmt: skip
        if rows % layout.microbatches:
            continue
        made = replace(stage, layout=layout)
        if divides(made, where):
            tried.append((gib(made, where), layout))
    fits = [layout for need, layout in tried if need <= SPARED * where.chip.hbm_gib]
    return fits[0] if fits else min(tried, key=lambda pair: pair[0], default=(0, None))[1]


def smallest(stage: config.Stage, chip: chips.Chip) -> chips.Slice | None:
    """The smallest slice that fits by arithmetic, a tenth of the memory spared."""
    for where in chips.known(chip):
        layout = least(stage, where)
        if layout and gib(replace(stage, layout=layout), where) <= SPARED * chip.hbm_gib:
            return where
    return None


def candidates(stage: config.Stage, where: chips.Slice) -> list[config.Layout]:
    """Layouts worth a compile, the most promising first: meshes, microbatches and remat that divide
    and nearly fit."""
    found = []
    for tensor, context in SPLITS:
        inside = where.devices // where.count // (tensor * context)
        for data in {where.count * n for n in (1, 2, 4, 8)}:
            fsdp = max(1, inside * where.count // data)
            most = stage.data.rows_per_batch // (data * fsdp)
            for microbatches in {n for n in (1, 2, 4, 8, 16, most) if 1 <= n <= most}:
                if stage.data.rows_per_batch % microbatches:
                    continue
                for remat in ("full", "attention", "products", "dots"):
                    layout = replace(
                        stage.layout, data=data, fsdp=fsdp, tensor=tensor, context=context,
                        microbatches=microbatches, remat=remat,
                    )  # fmt: skip
                    found.append(layout)
    tried = [replace(stage, layout=layout) for layout in found]
    fits = [
        made
        for made in tried
        if divides(made, where) and gib(made, where) <= 1.05 * where.chip.hbm_gib
    ]
    return [made.layout for made in sorted(fits, key=lambda made: seconds(made, where))]


def nearest(stage: config.Stage, where: chips.Slice) -> list[str] | None:
    """What to set for a layout that fits, a tenth of the memory spared: the fewest changes, of
    equals the fastest. None where none fits."""
    data, fsdp = ways(stage, where)
    now = replace(stage.layout, data=data, fsdp=fsdp)
    found = []
    for layout in candidates(stage, where):
        if gib(replace(stage, layout=layout), where) <= SPARED * where.chip.hbm_gib:
            names = [f.name for f in fields(layout)]
            found.append(
                [f"layout.{n}={getattr(layout, n)}" for n in names
                 if getattr(layout, n) != getattr(now, n)]
            )  # fmt: skip
    return min(found, key=len, default=None)


def days(stage: config.Stage, where: chips.Slice, mfu: float) -> float:
    """Days of a stage at a share of the peak."""
    flops = stage.tokens * stage.model.flops_per_token(stage.data.seq_len)
    return flops / (mfu * where.chip.peak_tflops * 1e12 * where.chips) / 86_400
