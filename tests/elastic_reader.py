"""One host that reads its share of the batches: a process of tests/test_data_elastic.py."""

import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from codellama_jax import config
from codellama_jax.data import mix
from codellama_jax.tokenizer import Tokenizer

ROWS = 16


def data(workers: int = 0) -> config.Data:
    return config.Data(
        mix={"code": 0.85, "code_language": 0.08, "language": 0.07},
        seq_len=64,
        batch_tokens=ROWS * 64,
        infilling_rate=0.9,
        workers=workers,
    )


def digests(batch: dict) -> list[str]:
    """One per row, of all its arrays."""
    rows = len(batch["tokens"])
    return [
        hashlib.sha256(b"".join(batch[name][i].tobytes() for name in sorted(batch))).hexdigest()
        for i in range(rows)
    ]


def host(
    corpus_dir: str, tokenizer: str, out: str, start: int, steps: int, index: int, count: int,
    workers: int,
) -> None:  # fmt: skip
    """Writes a line per step to `out`: the digest of each of this host's rows."""
    os.setsid()  # so that it is killed with its workers
    batches = mix.batches(
        data(workers),
        corpus_dir,
        Tokenizer(tokenizer),
        steps=steps,
        start_step=start,
        process_index=index,
        process_count=count,
    )
    with open(out, "w") as file:
        for batch in batches:
            print(*digests(batch), file=file, flush=True)
