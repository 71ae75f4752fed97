"""Code Llama in JAX: data, training, generation, evals and weights, from a laptop to TPU pods.

The public face, which stays stable. What it names is imported when it is first used, so that
`import codellama_jax` and the help of the command lines cost nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from codellama_jax import prompts
    from codellama_jax.generate import CodeLlama, load
    from codellama_jax.tokenizer import Tokenizer

__all__ = ["CodeLlama", "Tokenizer", "load", "prompts"]

_HOMES = {"CodeLlama": "generate", "load": "generate", "Tokenizer": "tokenizer"}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"codellama_jax has no {name!r}; it has {', '.join(__all__)}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"codellama_jax.{_HOMES[name]}"), name)
    return importlib.import_module(f"codellama_jax.{name}")


def __dir__() -> list[str]:
    return __all__
