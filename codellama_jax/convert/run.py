"""From one folder of weights to another: checked, streamed, proved, and whole or absent.

source --read--> checked --grow, cast--> recorded --write--> DST.partial --verify--> DST
"""

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.convert import (
    guard,
    huggingface,
    meta,
    official,
    orbax,
    proof,
    table,
    vocabulary,
)
from codellama_jax.convert import weights as weights_
from codellama_jax.convert.weights import Weights

FORMATS = {"meta": meta, "hf": huggingface, "orbax": orbax}
MARKS = {"meta": "params.json", "hf": "config.json"}  # a file that only these have
SHARD_BYTES = 5_000_000_000  # largest file of a Hugging Face folder


def convert(
    source: tuple[str, str | os.PathLike],
    destination: tuple[str, str | os.PathLike],
    *,
    shards: int = 1,
    shard_bytes: int = SHARD_BYTES,
    dtype: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    grow_vocab: bool = False,
    verify: bool = False,
    allow: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
    progress: Callable[[int, int], None] = lambda done, whole: None,
) -> None:
    """Converts (format, folder) to (format, folder); formats are "meta", "hf" and "orbax".

    shards         files of a Meta folder (model-parallel): 1, 2, 4 or 8
    shard_bytes    largest file of a Hugging Face folder
    dtype          of what is written; None: as it was, and then every bit is
    tokenizer      tokenizer.model to put beside the weights instead of the source's
    grow_vocab     give the weights as many rows as `tokenizer` has, or as the source's has once
                   Code Llama's infilling pieces are added; new rows are the mean of the old ones
    verify         read both sides again afterwards and compare SHA-256 sums of every tensor
    allow          names of guard.CHECKS not to refuse
    progress       called with (bytes done, bytes in all)

    Raises ValueError for whatever is wrong. Then, and after a kill, nothing is at the destination.
    """
    (kind, folder), (to, dst) = source, destination
    _check_options(kind, to, shards, shard_bytes, tokenizer)
    _check_kind(kind, Path(folder))
    _check_free(Path(dst))
    findings = guard.Findings(tuple(allow), say)
    weights = FORMATS[kind].read(Path(folder), findings)
    say(f"source: {official.describe(weights.model)}, {weights.dtype}")
    if verify and kind == "meta":
        meta.check_checklist(Path(folder), findings)
        findings.settle()
    if tokenizer is not None:
        weights = replace(weights, tokenizer=(Path(tokenizer),))
    with tempfile.TemporaryDirectory() as temporary:
        if grow_vocab:
            weights = _grown(weights, tokenizer is None, Path(temporary), say)
        if to == "meta" and weights.model.tied_embeddings:
            weights = weights_.untied(weights)
            findings.repaired("Meta's format has no tied embeddings: the output is written too")
        weights = _rounded(weights, dtype, findings)
        _check_tokenizer(weights, findings)
        options = {"meta": {"shards": shards}, "hf": {"shard_bytes": shard_bytes}}.get(to, {})
        with new_folder(Path(dst), weights.nbytes) as partial:
            count = _counter(progress, weights.nbytes * (3 if verify else 1))
            sums = _write(count(weights), to, partial, options)
            findings.close()
            if verify:
                written = FORMATS[to].read(partial, guard.Findings(say=_silent))
                _verify(sums, count(weights), count(written))
    proved = "; both sides read again, all sums equal" if verify else ""
    say(f"written: {dst}, {len(sums)} tensors, {weights.nbytes:,} bytes{proved}")


# -- between a folder and memory ---------------------------------------------------------------


def read_params(
    path: str | os.PathLike,
    dtype: str | None = None,
    *,
    allow: tuple[str, ...] = (),
    say: Callable[[str], None] | None = None,
) -> tuple[config.Model, dict]:
    """(model, params) of a Meta, Hugging Face or Orbax folder: numpy arrays, stacked over layers.

    dtype: "bfloat16", "float16" or "float32"; None keeps the files' own. say: gets the lines about
    repairs; by default they go to standard error. Raises ValueError for weights that guard refuses
    and for tensors that are not those of a checksum table beside them.
    """
    findings = guard.Findings(allow, say or _to_stderr)
    weights = _rounded(_open(Path(path), findings), dtype, findings)
    params = weights_.to_params(weights)
    findings.close()
    return weights.model, params


def export_hf(
    params: dict,
    model: config.Model,
    dst: str | os.PathLike,
    tokenizer_path: str | os.PathLike | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes parameters that are in memory as a Hugging Face folder, tokenizer included.

    dtype: as in read_params. Raises ValueError if `dst` exists and is not empty, if a weight is
    not finite, or if the tokenizer has not as many pieces as `model` has rows.
    """
    findings = guard.Findings(say=_silent)
    tokenizer = () if tokenizer_path is None else (Path(tokenizer_path),)
    weights = replace(weights_.from_params(params, model), tokenizer=tokenizer)
    weights = _rounded(proof.checked(weights, None, findings), dtype, findings)
    _check_tokenizer(weights, findings)
    with new_folder(Path(dst), weights.nbytes) as partial:
        _write(weights, "hf", partial, {"shard_bytes": shard_bytes})


def check(path: str | os.PathLike) -> None:
    """Reads every tensor at `path` and compares it with the checksum table beside it.

    Raises ValueError naming the first tensor that is not finite or not the one in the table, and
    if there is no table. Reading into memory (read_params) does the same on the way.
    """
    folder = Path(path)
    weights = _open(folder, guard.Findings(say=_silent))
    if proof.read(folder) is None and proof.read(folder.parent) is None:
        raise ValueError(f"there is no {proof.NAME} beside {folder} to compare with")
    proof.sums_of(weights)


def variant(path: str | os.PathLike) -> str:
    """One line: which official model lies at `path`, or that it is none; and its numbers.

    Reads settings and headers, no weights. Raises ValueError for what does not fit together.
    """
    return official.describe(_open(Path(path), guard.Findings(say=_silent)).model)


def _open(folder: Path, findings: guard.Findings) -> Weights:
    """The weights in `folder`, whichever format it has."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    kinds = [kind for kind, name in MARKS.items() if (folder / name).exists()]
    return FORMATS[kinds[0] if kinds else "orbax"].read(folder, findings)


def _silent(line: str) -> None:
    pass


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


# -- steps -------------------------------------------------------------------------------------


def _check_options(kind: str, to: str, shards: int, shard_bytes: int, tokenizer) -> None:
    """Raises ValueError for a format there is not, and an option that the other has no use for."""
    if tokenizer is not None and vocabulary.size((Path(tokenizer),)) is None:
        raise ValueError(f"{tokenizer} is no tokenizer; give the path of a tokenizer.model")
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes={shard_bytes} must be above 0")
    for name in (kind, to):
        if name not in FORMATS:
            raise ValueError(f"{name!r} is not a format; there are {', '.join(FORMATS)}")
    if to != "meta" and shards != 1:
        raise ValueError(f"shards={shards} has no effect on {to!r}; only Meta's format has them")
    if to != "hf" and shard_bytes != SHARD_BYTES:
        raise ValueError(f"shard_bytes={shard_bytes} has no effect on {to!r}; only on 'hf'")


def _check_kind(kind: str, folder: Path) -> None:
    """Raises ValueError if there is no such folder, or plainly one of another format."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    found = [other for other, name in MARKS.items() if (folder / name).exists()]
    if found and kind not in found:
        raise ValueError(f"{folder} holds weights in the format {found[0]!r}, not {kind!r}")


def _check_free(dst: Path) -> None:
    """Raises ValueError if something is at `dst` that writing would replace."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst.absolute()} exists already; name a new folder, or remove it first")


def _grown(weights: Weights, add_pieces: bool, folder: Path, say: Callable) -> Weights:
    """The weights and their tokenizer, with more rows."""
    if add_pieces:
        weights = replace(weights, tokenizer=vocabulary.grow(weights.tokenizer, folder))
    old, new = weights.model.vocab_size, vocabulary.size(weights.tokenizer)
    say(f"vocabulary: {old:,} -> {new:,}, each new row the mean of the old ones")
    return weights_.grow(weights, new)


def _rounded(weights: Weights, dtype: str | None, findings: guard.Findings) -> Weights:
    """The weights in `dtype`. What becomes infinite on the way is found wrong."""
    if dtype is None or weights_.dtype(dtype) == weights.dtype:
        return weights
    exact = dtype == "float32"
    findings.say(
        f"dtype: {weights.dtype} -> {dtype}, "
        + ("exact" if exact else "rounded to nearest, ties to even")
    )
    return proof.checked(weights_.cast(weights, weights_.dtype(dtype)), None, findings)


def _check_tokenizer(weights: Weights, findings: guard.Findings) -> None:
    size = vocabulary.size(weights.tokenizer)
    if size is None:
        findings.say(
            "no tokenizer lies beside these weights, so none is written; --tokenizer adds one"
        )
    else:
        guard.check_tokenizer(size, weights.model, findings)
    findings.settle()


def _counter(progress: Callable[[int, int], None], whole: int) -> Callable[[Weights], Weights]:
    """A wrapper for weights: whatever is read from them counts as done, of `whole` bytes."""
    done, one_at_a_time = 0, threading.Lock()

    def counted(weights: Weights) -> Weights:
        def read(tensor: table.Tensor) -> np.ndarray:
            nonlocal done
            array = weights.read(tensor)
            with one_at_a_time:
                done += array.nbytes
                progress(done, whole)
            return array

        return replace(weights, read=read)

    return counted


def _write(weights: Weights, to: str, folder: Path, options: dict) -> dict[str, str]:
    """Writes a folder and its checksum table; returns the sums."""
    weights, sums = proof.summed(weights)
    FORMATS[to].write(weights, folder, **options)
    proof.Checksums(weights.model, str(weights.dtype), sums).write(folder)
    return sums


def _verify(sums: dict[str, str], source: Weights, written: Weights) -> None:
    """Raises ValueError unless both sides, read again, have these sums."""
    for side, weights in (("source", source), ("destination", written)):
        odd = proof.differences(sums, proof.sums_of(weights))
        if odd:
            raise ValueError(f"the {side}, read again, has other bits in {', '.join(odd[:3])}")


@contextmanager
def new_folder(dst: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `dst` that becomes `dst` when the block ends well, and else vanishes.

    Raises ValueError if `dst` is there already, or if the disk has not `nbytes` left.
    """
    dst = dst.absolute()
    _check_free(dst)
    partial = dst.with_name(f"{dst.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{dst.parent} cannot be made a folder: {error.strerror}") from None
    free = shutil.disk_usage(dst.parent).free
    if free < nbytes * 1.01:
        raise ValueError(f"{dst.parent} has {free:,} bytes left; {nbytes:,} are needed")
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
