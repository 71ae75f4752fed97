"""What a stage needs on TPUs that are not there: bytes, seconds, chip-hours. In reading order:

chips          the TPUs there are to rent, and a slice's devices without a TPU
arithmetic     what a stage needs by arithmetic alone: what to compile, not what to believe
program        the real step, lowered and compiled for a slice; store keeps what the compiler said
schedule       what a compiled program does in time, from its text; collective reads what moves
estimate       the seconds of a step, put together from a schedule; kernels has those of attention
cell           plan(): a stage on a slice, all of the above as one report
generation     the same of reading prompts and generating
shown          reports as lines to read
survey         all slices of a stage by arithmetic, and the smallest that fits
search         the most promising layouts of a slice compiled, the fastest first
ledger         docs/pods.json and its tables: what compiles said, and that it got no worse
twins          small twins of all layouts, which tests compile
coverage   every layout of a recipe against the ledger and the twins
"""

from codellama_jax.plan.cell import plan

__all__ = ["plan"]
