"""Completing, infilling and chatting. In reading order:

face               load and CodeLlama: text in, text out
request            what is asked of a model, and what has come of it, row by row
weights            weights as decoding wants them
batches            requests through the compiled programs, in batches of like length
decode             the compiled programs: prompts in, tokens out
cached_attention   attention of new queries over a cache
"""

from codellama_jax.generate.face import CodeLlama, Generation, load
from codellama_jax.generate.request import Sampling

__all__ = ["CodeLlama", "Generation", "Sampling", "load"]
