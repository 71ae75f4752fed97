"""Weights of Meta, of Hugging Face and ours: into each other, bit for bit, in little memory.

table         the one table of names, axes and rotary layout, read in every direction
weights       a model's weights as something to read tensor by tensor; casts, new rows
pth, safetensor             the two file formats, mapped and streamed
meta, huggingface, orbax    the three folder formats
hf_tokenizer  tokenizer.json from a SentencePiece model
settings      JSON beside weights, read as what may be anything
guard         which official model this is, and what is wrong with it
blocks        a tensor's bytes in pieces that fit the cache
proof         SHA-256 sums beside the weights
run           convert(), and the two ways between a folder and memory
"""

from codellama_jax.convert.run import FORMATS, check, convert, export_hf, read_params, variant

__all__ = ["FORMATS", "check", "convert", "export_hf", "read_params", "variant"]
