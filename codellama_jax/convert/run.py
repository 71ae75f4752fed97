"""From one folder of weights to another: checked, streamed, proved, and whole or absent.

source --read--> checked --cast, grow--> recorded --write--> DST.partial --verify--> DST
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.convert import guard, huggingface, meta, orbax, proof, table
from codellama_jax.convert import weights as weights_
from codellama_jax.convert.weights import Weights

FORMATS = ("meta", "hf", "orbax")
READ = {"meta": meta.read, "hf": huggingface.read, "orbax": orbax.read}


def format_of(folder: Path) -> str:
    """Which of FORMATS lies in `folder`. Raises ValueError if none does."""
    if (folder / "params.json").exists():
        return "meta"
    if (folder / "config.json").exists():
        return "hf"
    if folder.is_dir():
        orbax.find(folder)  # raises
        return "orbax"
    raise ValueError(f"there is no folder {folder}")


def variant(path: str | os.PathLike) -> str:
    """One line: which official model lies at `path`, or that it is none; and its numbers.

    Reads settings and headers, no weights. Raises ValueError for what does not fit together.
    """
    folder = Path(path)
    findings = guard.Findings(say=lambda _: None)
    return guard.describe(READ[format_of(folder)](folder, findings).model)


def read_params(
    path: str | os.PathLike,
    dtype: str | None = None,
    *,
    allow: tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> tuple[config.Model, dict]:
    """(model, params) of a Meta, Hugging Face or Orbax folder: numpy arrays, stacked over layers.

    dtype: "bfloat16", "float16" or "float32"; None keeps the files' own. Raises ValueError for
    weights that guard refuses and for tensors that are not those of a checksum table beside them.
    """
    folder = Path(path)
    findings = guard.Findings(allow, say)
    weights = READ[format_of(folder)](folder, findings)
    if dtype is not None:
        weights = weights_.cast(weights, weights_.dtype(dtype))
    params = weights_.to_params(weights)
    findings.close()
    return weights.model, params


def export_hf(
    params: dict,
    model: config.Model,
    dst: str | os.PathLike,
    tokenizer_path: str | os.PathLike | None,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes parameters that are in memory as a Hugging Face folder, tokenizer included.

    dtype: as in read_params. Raises ValueError if `dst` exists and is not empty, if a weight is
    not finite, or if the tokenizer has not as many pieces as `model` has rows.
    """
    tokenizer = () if tokenizer_path is None else (Path(tokenizer_path),)
    weights = weights_.from_params(params, model)
    if dtype is not None:
        weights = weights_.cast(weights, weights_.dtype(dtype))
    findings = guard.Findings(say=print)
    weights = with_tokenizer(weights, tokenizer, findings)
    _write(proof.checked(weights, None, findings), "hf", Path(dst), shard_bytes=shard_bytes)


def convert(
    source: tuple[str, str | os.PathLike],
    destination: tuple[str, str | os.PathLike],
    *,
    shards: int = 1,
    shard_bytes: int = 5_000_000_000,
    dtype: str | None = None,
    tokenizer: str | os.PathLike | None = None,
    grow_vocab: int | None = None,
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
    grow_vocab     rows of the vocabulary afterwards; new rows are the mean of the old ones
    verify         read both sides again afterwards and compare SHA-256 sums of every tensor
    allow          names of guard.CHECKS not to refuse
    progress       called with (bytes done, bytes in all)

    Raises ValueError for whatever is wrong. Then, and after a kill, nothing is at the destination.
    """
    (kind, folder), (to, dst) = source, destination
    findings = guard.Findings(tuple(allow), say)
    original = READ[kind](Path(folder), findings)
    say(f"source: {guard.describe(original.model)}, {original.dtype}")
    if verify and kind == "meta":
        meta.check_checklist(Path(folder), findings)
        findings.settle()
    weights = original
    if grow_vocab is not None:
        weights = weights_.grow(weights, grow_vocab)
        say(f"vocabulary: {original.model.vocab_size:,} -> {grow_vocab:,}, new rows the mean")
    if dtype is not None and weights_.dtype(dtype) != weights.dtype:
        weights = weights_.cast(weights, weights_.dtype(dtype))
        say(f"dtype: {original.dtype} -> {dtype}, to nearest, ties to even")
        weights = proof.checked(weights, None, findings)
    chosen = weights.tokenizer if tokenizer is None else (Path(tokenizer),)
    weights = with_tokenizer(weights, chosen, findings)
    findings.settle()
    sums = _write(
        weights,
        to,
        Path(dst),
        shards=shards,
        shard_bytes=shard_bytes,
        verify=verify,
        close=findings.close,
        progress=progress,
    )
    say(f"written: {dst}, {len(sums)} tensors, {weights.nbytes:,} bytes" + verified(verify))


def verified(verify: bool) -> str:
    return "; both sides read again, all sums equal" if verify else ""


def with_tokenizer(weights: Weights, paths: tuple[Path, ...], findings: guard.Findings) -> Weights:
    """The weights with these tokenizer files. Finds a SentencePiece file of another size wrong."""
    from dataclasses import replace

    model_file = next((path for path in paths if path.name.endswith(".model")), None)
    if model_file is not None:
        from codellama_jax import tokenizer

        guard.check_tokenizer(tokenizer.Tokenizer(model_file).vocab_size, weights.model, findings)
    elif not paths:
        findings.say("no tokenizer found: none is written")
    findings.settle()
    return replace(weights, tokenizer=paths)


def _write(
    weights: Weights,
    to: str,
    dst: Path,
    *,
    shards: int = 1,
    shard_bytes: int = 5_000_000_000,
    verify: bool = False,
    close: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, whole: None,
) -> dict[str, str]:
    """Writes a folder whole or not at all; returns the SHA-256 sums of what is in it."""
    if to == "meta":
        meta.check_shards(weights.model, shards)
    sums: dict[str, str] = {}
    recorded = _counted(proof.recorded(weights, sums), progress)
    with new_folder(dst, weights.nbytes) as folder:
        if to == "meta":
            for path in weights.tokenizer:
                shutil.copyfile(path, folder / path.name)
            meta.write(recorded, folder, shards)
        elif to == "hf":
            huggingface.write_tokenizer(weights, folder)
            huggingface.write(recorded, folder, shard_bytes)
        else:
            orbax.write_tokenizer(weights, folder)
            orbax.write(recorded, folder)
        proof.Checksums(weights.model, str(weights.dtype), sums).write(folder)
        close()
        if verify:
            written = READ[to](folder, guard.Findings(say=lambda _: None))
            for side, again in (("source", weights), ("destination", written)):
                odd = proof.differences(sums, proof.sums_of(again))
                if odd:
                    raise ValueError(f"the {side} gives other bits when read again: {odd[:3]}")
    return sums


def _counted(weights: Weights, progress: Callable[[int, int], None]) -> Weights:
    from dataclasses import replace

    done = 0

    def read(tensor: table.Tensor) -> np.ndarray:
        nonlocal done
        array = weights.read(tensor)
        done += array.nbytes
        progress(done, weights.nbytes)
        return array

    return replace(weights, read=read)


@contextmanager
def new_folder(dst: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `dst` that becomes `dst` when the block ends well, and else vanishes.

    Raises ValueError if `dst` is there already, or if the disk has not `nbytes` left.
    """
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} exists already; name a new folder, or remove it first")
    partial = dst.with_name(f"{dst.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    dst.parent.mkdir(parents=True, exist_ok=True)
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
