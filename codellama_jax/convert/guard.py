"""Which official model a folder holds, and what is wrong with it.

The settings beside published weights are often missing or wrong, and a wrong one (the base of the
rotary embedding above all) makes a model that loads and talks, only badly. So settings are held
against the tensors' shapes, against each other and against the official models. What is certain
is repaired with a line; everything else is refused, unless the user allows that one thing by name.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from codellama_jax import config
from codellama_jax.convert import table
from codellama_jax.convert.official import OFFICIAL, Official, describe

CHECKS = {
    "sizes": "width, layers or heads that contradict the tensors or the official model",
    "vocab_size": "a vocabulary size that contradicts the tensors",
    "n_kv_heads": "a number of key/value heads that contradicts the tensors",
    "ffn_dim": "a feed-forward width that contradicts the tensors",
    "rope_theta": "a rotary base that is missing or not the official model's",
    "context": "a context length that does not belong to the rotary base",
    "norm_eps": "a norm epsilon that is missing or not the official model's",
    "tokenizer": "a tokenizer whose size is not the vocabulary's",
    "extra": "tensors or settings that no Llama 2 has",
    "copies": "copies of one tensor that differ among shards, or shards that are one another's",
    "nonfinite": "NaN or infinity among the weights",
    "checksums": "tensors or a model that are not those the checksum table beside them names",
    "checklist": "files that are not those checklist.chk names, or that it leaves out",
}


class Findings:
    """Collects what is wrong; what the user allowed by name is said and passed."""

    def __init__(self, allow: tuple[str, ...] = (), say: Callable[[str], None] = print):
        unknown = sorted(set(allow) - set(CHECKS))
        if unknown:
            known = "\n".join(f"  {name:<11} {text}" for name, text in CHECKS.items())
            raise ValueError(f"cannot allow {', '.join(unknown)}; there are:\n{known}")
        self.allow, self.say = frozenset(allow), say
        self.used: set[str] = set()
        self.problems: list[str] = []

    def wrong(self, check: str, text: str) -> None:
        assert check in CHECKS, check
        if check in self.allow:
            self.used.add(check)
            self.say(f"allowed: {text}")
        else:
            self.problems.append(f"{text}  [--allow {check}]")

    def fatal(self, text: str) -> None:
        self.problems.append(text)

    def repaired(self, text: str) -> None:
        self.say(f"repaired: {text}")

    def settle(self) -> None:
        """Raises ValueError if anything was wrong so far."""
        if self.problems:
            lines = "".join(f"\n  - {problem}" for problem in self.problems)
            raise ValueError(f"these weights are not converted:{lines}")

    def close(self) -> None:
        """Raises ValueError if an exception was allowed that nothing needed."""
        self.settle()
        unused = sorted(self.allow - self.used)
        if unused:
            raise ValueError(f"--allow {', '.join(unused)} had no effect; leave it out")


@dataclass(frozen=True)
class Declared:
    """What a folder's settings say; None where they say nothing."""

    dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    ffn_dim: int | None = None
    vocab_size: int | None = None
    rope_theta: float | None = None
    max_seq_len: int | None = None
    norm_eps: float | None = None
    tied_embeddings: bool = False
    code_llama: bool = False  # has settings that only Code Llama's files have
    default_eps: float = 1e-5  # what the format's own code takes where it is missing


# -- settings against shapes -------------------------------------------------------------------

Shapes = dict[str, tuple[int, ...]]  # Hugging Face's name of each tensor -> its shape there
IGNORED = re.compile(r"(model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope\.freqs)")


def settle(
    declared: Declared, shapes: Shapes, findings: Findings, known: config.Model | None = None
) -> config.Model:
    """The model whose settings are `declared` and whose tensors have `shapes`.

    `known` is what we wrote down beside the weights when we made them, if we did: then it is the
    judge, not the official models. Raises ValueError for every contradiction that is not allowed.
    """
    declared = _fill_in(declared, _seen(shapes, declared, findings), findings)
    findings.settle()
    sizes = {f.name: getattr(declared, f.name) for f in fields(config.Model)}
    draft = config.Model(**sizes | {"rope_theta": 1e4, "max_seq_len": 4_096, "norm_eps": 1e-5})
    _check_tensors(draft, shapes, findings)
    findings.settle()
    if known is not None:
        model = _as_known(declared, draft, known, findings)
    else:
        model = _as_official(declared, draft, findings)
    findings.settle()
    return model


KEYS = {"num_kv_heads": "n_kv_heads", "ffn_dim": "ffn_dim", "vocab_size": "vocab_size"}


def _seen(shapes: Shapes, declared: Declared, findings: Findings) -> Declared:
    """The sizes that the tensors themselves have."""
    ranks = {row.hf.format(0): 1 if row.split is None else 2 for row in table.TABLE[:-1]}
    missing = [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank]
    if missing:
        findings.fatal(f"tensors are missing: {', '.join(missing)}")
        findings.settle()
    vocab_size, dim = shapes["model.embed_tokens.weight"]
    heads = declared.num_heads or 0
    if not heads or dim % (2 * heads):
        findings.fatal(f"the number of heads, {heads or 'missing'}, must divide the width {dim}")
        findings.settle()
    layers = {int(m[1]) for name in shapes if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    return Declared(
        dim=dim,
        num_layers=max(layers) + 1,
        num_heads=shapes["model.layers.0.self_attn.q_proj.weight"][0] * heads // dim,
        num_kv_heads=shapes["model.layers.0.self_attn.k_proj.weight"][0] * heads // dim,
        ffn_dim=shapes["model.layers.0.mlp.gate_proj.weight"][0],
        vocab_size=vocab_size,
    )


def _fill_in(declared: Declared, seen: Declared, findings: Findings) -> Declared:
    """`declared` with what is missing taken from the tensors, and contradictions found."""
    for name in ("dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size"):
        said, is_ = getattr(declared, name), getattr(seen, name)
        if said is None:
            findings.repaired(f"{KEYS.get(name, name)} is missing: {is_:,}, from the tensors")
        elif name == "vocab_size" and said == -1:
            findings.repaired(f"vocab_size is -1: {is_:,}, from the tensors")
        elif said != is_:
            check = KEYS.get(name, "sizes")
            findings.wrong(check, f"{name} is {said:,} in the settings, {is_:,} in the tensors")
        declared = replace(declared, **{name: is_})
    return declared


def _check_tensors(model: config.Model, shapes: Shapes, findings: Findings) -> None:
    lengths = table.sizes(model)
    expected = {t.hf: table.shape(t.row.hf_axes, lengths) for t in table.tensors(model)}
    missing = [name for name in expected if name not in shapes]
    if missing:
        findings.fatal(f"{len(missing)} tensors are missing: {_some(missing)}")
    extra = [name for name in shapes if name not in expected and not IGNORED.fullmatch(name)]
    if extra:
        findings.wrong("extra", f"{len(extra)} tensors too many: {_some(extra)}")
    for name, shape in expected.items():
        if name in shapes and shapes[name] != shape:
            findings.fatal(f"{name} has shape {shapes[name]}, not {shape}")
            break


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# -- settings that no shape shows: rotary base, context, epsilon -------------------------------


def _as_known(
    declared: Declared, draft: config.Model, known: config.Model, findings: Findings
) -> config.Model:
    late = {name: getattr(known, name) for name in ("rope_theta", "max_seq_len", "norm_eps")}
    for name, value in late.items():
        said = getattr(declared, name)
        if said is not None and said != value:
            check = "context" if name == "max_seq_len" else name
            findings.wrong(
                check, f"{name} is {said:g} in the settings, {value:g} in the checksum table"
            )
    model = replace(draft, **late)
    if model != known and not findings.problems:
        findings.wrong("checksums", f"the checksum table is of another model: {describe(known)}")
    return model


def _as_official(declared: Declared, draft: config.Model, findings: Findings) -> config.Model:
    key = (draft.dim, draft.num_layers, draft.ffn_dim)
    near = [o for o in OFFICIAL if (o.model.dim, o.model.num_layers, o.model.ffn_dim) == key]
    for name in ("num_heads", "num_kv_heads"):
        said = getattr(draft, name)
        if near and said != (wanted := getattr(near[0].model, name)):
            findings.wrong("sizes", f"{name} is {said}, but {wanted} in {near[0].name}")
    official = [o for o in near if o.vocab_size == draft.vocab_size]
    if declared.code_llama:
        official = [o for o in official if not o.name.startswith("Llama 2")]
    theta = _rope_theta(declared, official, findings)
    context = _context(declared, official, theta, findings)
    eps = _norm_eps(declared, near, findings)
    return replace(draft, rope_theta=theta, max_seq_len=context, norm_eps=eps)


def _rope_theta(declared: Declared, official: list[Official], findings: Findings) -> float:
    theta, context = declared.rope_theta, declared.max_seq_len
    names = " or ".join(f"{o.rope_theta:,.0f} in {o.name}" for o in official)
    if theta is not None:
        if official and theta not in {o.rope_theta for o in official}:
            findings.wrong("rope_theta", f"rope_theta is {theta:,.0f}; it is {names}")
        return theta
    if not official:
        findings.repaired("rope_theta is missing: 10,000, the default of the reference code")
        return 1e4
    fitting = [
        o
        for o in official
        if context in (None, o.max_seq_len) or (context, o.max_seq_len) == (2_048, 4_096)
    ]
    # Llama 2's own files leave the base out; Code Llama's never do.
    fitting = [o for o in fitting if o.name.startswith("Llama 2")] or fitting
    if len({o.rope_theta for o in fitting}) == 1:
        base = fitting[0].rope_theta
        findings.repaired(f"rope_theta is missing: {base:,.0f}, as in {fitting[0].name}")
        return base
    findings.wrong("rope_theta", f"rope_theta is missing; it is {names}")
    return 1e4


def _context(declared: Declared, official: list[Official], theta: float, findings: Findings) -> int:
    context = declared.max_seq_len
    lengths = {o.max_seq_len for o in official if o.rope_theta == theta}
    if context is None:
        chosen = lengths.pop() if len(lengths) == 1 else 16_384 if theta > 1e4 else 4_096
        findings.say(f"context: {chosen:,}, which goes with a rotary base of {theta:,.0f}")
        return chosen
    if context == 2_048 and 4_096 in lengths:
        findings.repaired("context is 2,048, a known slip in published files: 4,096")
        return 4_096
    if lengths and context not in lengths:
        wanted = " or ".join(f"{n:,}" for n in sorted(lengths))
        findings.wrong(
            "context",
            f"context {context:,} does not go with rope_theta {theta:,.0f} here; {wanted} does",
        )
    return context


def _norm_eps(declared: Declared, near: list[Official], findings: Findings) -> float:
    eps, default = declared.norm_eps, declared.default_eps
    if eps is None and (not near or default == near[0].model.norm_eps):
        findings.repaired(f"norm_eps is missing: {default:g}, the default of the format's own code")
        return default
    if near and (eps is None or not math.isclose(eps, near[0].model.norm_eps, rel_tol=1e-6)):
        said = "missing" if eps is None else f"{eps:g}"
        right = f"{near[0].model.norm_eps:g} in {near[0].name}"
        findings.wrong("norm_eps", f"norm_eps is {said}; it is {right}")
    return default if eps is None else eps


# -- values and tokenizer ----------------------------------------------------------------------


def check_tokenizer(size: int, model: config.Model, findings: Findings) -> None:
    """Finds a tokenizer of `size` pieces wrong for `model` unless it has as many rows."""
    if size != model.vocab_size:
        findings.wrong(
            "tokenizer",
            f"the tokenizer has {size:,} pieces, the weights have {model.vocab_size:,} rows; "
            "give the right one with --tokenizer, or --grow-vocab",
        )


def has_nonfinite(array: np.ndarray) -> bool:
    """Whether any element of a bf16, fp16 or fp32 array is NaN or infinite.

    Their exponent is then all ones: without its sign, the bit pattern is at least that of infinity.
    """
    bits = np.dtype(f"u{array.dtype.itemsize}")
    infinity = np.array(np.inf, array.dtype).view(bits)
    magnitude = np.array(np.iinfo(bits).max >> 1, bits)
    flat = np.ascontiguousarray(array).reshape(-1).view(bits)
    step = 1 << 15  # elements: stays in the cache
    masked = np.empty(min(step, flat.size), bits)
    for i in range(0, flat.size, step):
        part = flat[i : i + step]
        if np.bitwise_and(part, magnitude, out=masked[: part.size]).max() >= infinity:
            return True
    return False
