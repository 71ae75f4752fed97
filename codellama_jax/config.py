"""What a run is: Model, Data, Optim, Layout, and the Stage that holds them.

Everything here is frozen, checked when it is made, and travels as JSON inside each checkpoint. A
recipe (recipes/*.py) makes stages out of these; the next stage is `replace(previous, ...)`, so what
changes between two stages is all that is written. Numbers of the paper have no defaults.
"""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_origin, get_type_hints

K = 1_000
M = 1_000_000
B = 1_000_000_000

REMAT_POLICIES = ("none", "full", "attention", "products", "dots")
COMPUTE_DTYPES = ("float32", "bfloat16")
ATTENTIONS = ("auto", "xla", "splash", "cudnn")


def check(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class Model:
    """The shape of a Llama 2 decoder; with the weights, all that generation needs to know."""

    dim: int  # width of the residual stream
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # key/value heads; each serves num_heads / num_kv_heads query heads
    ffn_dim: int  # inner width of the SwiGLU
    vocab_size: int  # rows of the embedding: 32,000, or 32,016 with the infilling pieces
    rope_theta: float  # base of the rotary embedding: 1e4, or 1e6 after long context
    max_seq_len: int  # longest row the weights were trained on
    norm_eps: float  # of every RMSNorm
    tied_embeddings: bool = False  # the output projection is the embedding (not in Llama 2)

    def __post_init__(self):
        for name in (
            "dim", "num_layers", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size",
            "max_seq_len", "norm_eps",
        ):  # fmt: skip
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        check(
            self.dim % (2 * self.num_heads) == 0,
            f"dim={self.dim} is not an even multiple of num_heads={self.num_heads} (RoPE)",
        )
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}",
        )
        check(self.rope_theta > 1, f"rope_theta={self.rope_theta} must be larger than 1")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def num_params(self) -> int:
        """Number of weights, embeddings included."""
        qkv = self.dim * self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        wo = self.num_heads * self.head_dim * self.dim
        layer = qkv + wo + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = (1 if self.tied_embeddings else 2) * self.vocab_size * self.dim
        return self.num_layers * layer + embeddings + self.dim

    def flops_per_token(self, seq_len: int) -> float:
        """Floating point operations of forward and backward per trained token.

        6 per weight of a matrix product (the embedding lookup is none) plus 6 L N H T for causal
        attention: half of the full square, which is not computed by a causal kernel.
        """
        matmul_weights = self.num_params - self.vocab_size * self.dim * (not self.tied_embeddings)
        attention = 6 * self.num_layers * self.num_heads * self.head_dim * seq_len
        return 6.0 * matmul_weights + attention


@dataclass(frozen=True)
class Data:
    """What a stage reads. A batch is a pure function of these and of the step."""

    mix: dict[str, float]  # share of the tokens of each corpus; sums to 1
    seq_len: int  # tokens per row
    batch_tokens: int  # tokens per optimizer step
    infilling_rate: float  # share of whole documents that are infilled (paper: 0.9, section 2.3)
    spm_rate: float = 0.5  # of these, share in suffix-prefix-middle order (section 2.3)
    line_rate: float = 0.0  # of these, share cut at line ends instead of any character (ours)
    attend_across_documents: bool = False  # False: attention and positions restart per document
    corpus: str = "corpus"  # folder written by tools/prepare_corpus.py; relative to the workdir
    tokenizer: str = "tokenizer.model"  # relative to the workdir
    already: dict[str, int] = field(default_factory=dict)  # tokens that stages before have read of
    # each corpus: it goes on behind them; see mix.read_on
    rows: str | None = None  # folder in the corpus's, by tools/prepare_rows.py: tokenized ahead
    seed: int = 0
    workers: int = 0  # reader processes per host; 0 reads in threads

    def __post_init__(self):
        check(bool(self.mix), "mix is empty: name at least one corpus and its share")
        check(
            abs(sum(self.mix.values()) - 1) < 1e-6 and min(self.mix.values()) > 0,
            f"the shares of mix={self.mix} must be positive and sum to 1, "
            f"not {sum(self.mix.values()):g}",
        )
        check(self.seq_len > 0, f"seq_len={self.seq_len} must be positive")
        check(
            all(count >= 0 for count in self.already.values()),
            f"already={self.already} says how many tokens were read: none of it can be negative",
        )
        check(self.rows != "", "rows='' is no folder: name one, or leave it out")
        check(
            self.batch_tokens > 0 and self.batch_tokens % self.seq_len == 0,
            f"batch_tokens={self.batch_tokens} is not a whole number of rows of "
            f"seq_len={self.seq_len}; use a multiple",
        )
        for name in ("infilling_rate", "spm_rate", "line_rate"):
            rate = getattr(self, name)
            check(0 <= rate <= 1, f"{name}={rate} must lie between 0 and 1")
        for name in ("spm_rate", "line_rate"):
            default = {f.name: f.default for f in dataclasses.fields(Data)}[name]
            check(
                self.infilling_rate > 0 or getattr(self, name) == default,
                f"{name}={getattr(self, name)} has no effect while infilling_rate is 0",
            )

    @property
    def rows_per_batch(self) -> int:
        return self.batch_tokens // self.seq_len


@dataclass(frozen=True)
class Optim:
    """AdamW under a linear warm-up and a cosine (section 2.2 of the paper)."""

    peak_lr: float
    warmup_steps: int
    final_lr_ratio: float  # learning rate of the last step over peak_lr
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # on matrices, not on norms
    clip_norm: float  # largest global gradient norm

    def __post_init__(self):
        for name in ("peak_lr", "eps", "clip_norm"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        for name in ("warmup_steps", "weight_decay"):
            check(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be in [0, 1)")
        check(
            0 <= self.final_lr_ratio <= 1, f"final_lr_ratio={self.final_lr_ratio} must be in 0..1"
        )


@dataclass(frozen=True)
class Layout:
    """How a step lies on the devices. Changes speed and memory, never the loss."""

    data: int = 1  # mesh axis: replicas (across slices of a pod)
    fsdp: int = -1  # mesh axis: parameters split, gathered when used; -1 takes what is left
    tensor: int = 1  # mesh axis: heads, ffn and vocabulary split
    context: int = 1  # mesh axis: the sequence split
    microbatches: int = 1  # gradient accumulation: a batch is cut into this many, one after another
    compute_dtype: str = "bfloat16"
    remat: str = "full"  # what the backward pass recomputes: see model.REMAT
    attention: str = "auto"  # kernel; auto: splash on TPU, cuDNN on NVIDIA, xla elsewhere
    attention_block: int = 0  # queries, and keys, in a block of splash; 0: attention.SPLASH_BLOCK
    loss_chunk: int = 1_024  # positions per row whose float32 logits exist at once
    scan_layers: bool = True  # one compiled layer, looped; False unrolls (faster on one GPU)

    def __post_init__(self):
        for name, allowed in (
            ("remat", REMAT_POLICIES),
            ("compute_dtype", COMPUTE_DTYPES),
            ("attention", ATTENTIONS),
        ):
            value = getattr(self, name)
            check(value in allowed, f"{name}={value!r} is not one of {', '.join(allowed)}")
        for name in ("data", "tensor", "context", "microbatches", "loss_chunk"):
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.fsdp >= 1 or self.fsdp == -1, f"fsdp={self.fsdp} must be at least 1, or -1")
        block = self.attention_block
        check(
            block == 0 or block >= 128 and block.bit_count() == 1,
            f"attention_block={block} must be a power of two from 128 on, or 0 for the usual one",
        )


@dataclass(frozen=True)
class Stage:
    """One training stage: a row of a recipe."""

    name: str  # also the folder in the workdir
    start_from: (
        str | None
    )  # stage or checkpoint in the workdir whose weights start it; None: random
    model: Model
    data: Data
    optim: Optim
    steps: int
    layout: Layout = field(default_factory=Layout)
    seed: int = 0  # of the random weights
    log_every: int = 10  # steps
    eval_every: int = 1_000  # steps between held-out losses
    eval_rows: int = 128  # held-out rows per corpus in each
    save_every: int = 1_000  # steps between checkpoints; the last step is always kept
    keep_checkpoints: int = 2  # newest checkpoints kept
    profile_from: int = -1  # first of 3 steps to profile; -1: none
    stuck_after: int = 600  # seconds without a step after which the threads' stacks are shown

    def __post_init__(self):
        check(bool(self.name), "name='' is no folder: name the stage")
        check(
            self.data.seq_len <= self.model.max_seq_len,
            f"seq_len={self.data.seq_len} is longer than the model's "
            f"max_seq_len={self.model.max_seq_len}",
        )
        check(self.steps > 0, f"steps={self.steps} must be positive")
        check(
            self.optim.warmup_steps < self.steps,
            f"warmup_steps={self.optim.warmup_steps} must be less than steps={self.steps}",
        )
        rows, micro = self.data.rows_per_batch, self.layout.microbatches
        check(
            rows % micro == 0,
            f"a batch of {rows} rows does not divide into microbatches={micro}",
        )
        for name in (
            "log_every", "eval_every", "eval_rows", "save_every", "keep_checkpoints", "stuck_after",
        ):  # fmt: skip
            check(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        check(self.start_from != self.name, f"stage {self.name!r} cannot start from itself")

    @property
    def tokens(self) -> int:
        """Tokens the whole stage trains on."""
        return self.steps * self.data.batch_tokens


def override(value: Any, settings: dict[str, str]) -> Any:
    """Returns frozen dataclass `value` with the fields at dotted paths set from texts, all at once.

    override(stage, {"optim.peak_lr": "1e-4", "steps": "100"}). Raises ValueError for an unknown
    field (with the fields there are), for text that is not of the field's type, and for values
    that contradict each other.
    """
    return _override(value, {path: (path, text) for path, text in settings.items()})


def _override(value: Any, settings: dict[str, tuple[str, str]]) -> Any:
    """settings: what is left of each path -> the whole path, for messages, and the text."""
    hints, changes, inner = get_type_hints(type(value)), {}, {}
    for rest, (path, text) in settings.items():
        name, dot, below = rest.partition(".")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            have = ", ".join(sorted(hints))
            raise ValueError(f"{type(value).__name__} has no field {name!r}{hint} It has: {have}")
        group = dataclasses.is_dataclass(hints[name])
        if dot and not group:
            raise ValueError(f"{name!r} has no fields, so {path!r} does not exist")
        if group and not dot:
            fields = ", ".join(f"{name}.{f.name}" for f in dataclasses.fields(hints[name]))
            raise ValueError(f"{name!r} is a group; set one of its fields: {fields}")
        if group:
            inner.setdefault(name, {})[below] = (path, text)
        else:
            changes[name] = _parse(hints[name], path, text)
    changes |= {name: _override(getattr(value, name), below) for name, below in inner.items()}
    return replace(value, **changes)


def _parse(kind: Any, path: str, text: str) -> Any:
    """`text` as a value of type `kind`."""
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind is int:
            return int(text.replace("_", ""))
        if kind is float:
            return float(text)
        if get_origin(kind) is dict:
            parsed = json.loads(text)
            if not isinstance(parsed, dict):
                raise ValueError
            return {name: float(share) for name, share in parsed.items()}
        if type(None) in get_args(kind) and text.lower() == "none":
            return None
        return text
    except (ValueError, KeyError, TypeError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(
            kind, 'a JSON object of numbers, such as {"code": 1}'
        )
        raise ValueError(f"{path}={text!r} is not {wanted}") from None


def to_json(value: Any) -> dict:
    """A dataclass of this file as a JSON-ready dict."""
    return dataclasses.asdict(value)


def from_json(kind: type, values: dict) -> Any:
    """The inverse of to_json. Raises ValueError for missing or unknown fields."""
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    )
    check(
        not unknown,
        f"{kind.__name__} has no field {', '.join(unknown)}; was it made by newer code?",
    )
    check(not missing, f"{kind.__name__} needs {', '.join(missing)}")
    return kind(
        **{
            name: from_json(hints[name], v) if dataclasses.is_dataclass(hints[name]) else v
            for name, v in values.items()
        }
    )


# -- sizes -------------------------------------------------------------------------------------
# fmt: off
def _size(dim, num_layers, num_heads, num_kv_heads, ffn_dim, vocab_size) -> Model:
    return Model(dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
                 ffn_dim=ffn_dim, vocab_size=vocab_size,
                 rope_theta=1e4,      # Llama 2; the long-context stage sets 1e6
                 max_seq_len=4_096,   # Llama 2; the long-context stage sets 16,384
                 norm_eps=1e-5)


SIZES = {
    #             dim  layers heads  kv     ffn   vocab
    "7b":  _size(4_096,  32,   32,   32,  11_008, 32_016),
    "13b": _size(5_120,  40,   40,   40,  13_824, 32_016),
    "34b": _size(8_192,  48,   64,    8,  22_016, 32_000),  # trained without infilling
    "70b": _size(8_192,  80,   64,    8,  28_672, 32_016),
}
# fmt: on
