"""The published models: Llama 2 and Code Llama, in every size.

Base and Instruct have the same shapes and settings; nothing but their weights tells them apart. The
settings of Code Llama 70B Python are inferred from its documents.
"""

from dataclasses import dataclass, replace

from codellama_jax import config


@dataclass(frozen=True)
class Official:
    name: str
    size: str
    vocab_size: int
    rope_theta: float
    max_seq_len: int

    @property
    def model(self) -> config.Model:
        return replace(
            config.SIZES[self.size],
            vocab_size=self.vocab_size,
            rope_theta=self.rope_theta,
            max_seq_len=self.max_seq_len,
        )


# fmt: off
OFFICIAL = (
    Official("Llama 2 7B (base or chat)",            "7b",  32_000, 1e4, 4_096),
    Official("Llama 2 13B (base or chat)",           "13b", 32_000, 1e4, 4_096),
    Official("Llama 2 70B (base or chat)",           "70b", 32_000, 1e4, 4_096),
    Official("Code Llama 7B (base or Instruct)",     "7b",  32_016, 1e6, 16_384),
    Official("Code Llama 13B (base or Instruct)",    "13b", 32_016, 1e6, 16_384),
    Official("Code Llama 7B Python",                 "7b",  32_000, 1e6, 16_384),
    Official("Code Llama 13B Python",                "13b", 32_000, 1e6, 16_384),
    Official("Code Llama 34B (base, Python or Instruct)", "34b", 32_000, 1e6, 16_384),
    Official("Code Llama 70B (base)",                "70b", 32_016, 1e6, 16_384),
    Official("Code Llama 70B (Python or Instruct)",  "70b", 32_016, 1e4, 4_096),
)
# fmt: on


def describe(model: config.Model) -> str:
    """One line: which official model this is, or that it is none; and its numbers."""
    names = [o.name for o in OFFICIAL if o.model == model]
    return (
        f"{names[0] if names else 'no official model'}: {model.num_params:,} parameters, "
        f"{model.num_layers} layers, width {model.dim:,}, {model.num_heads} heads over "
        f"{model.num_kv_heads} key/value heads, vocabulary {model.vocab_size:,}, "
        f"rotary base {model.rope_theta:,.0f}, context {model.max_seq_len:,}"
        + (", tied embeddings" if model.tied_embeddings else "")
    )
