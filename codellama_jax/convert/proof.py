"""Proof that nothing changed: a SHA-256 for every tensor, in a table beside the weights.

The hash is of the tensor in canonical form: Hugging Face's name and axes, little-endian bytes. So
the same weights have the same table in every format and any number of shards, and the hash of a
tensor in a safetensors file is that of its bytes there.
"""

import functools
import hashlib
import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from codellama_jax import config
from codellama_jax.convert import blocks, guard, settings, table
from codellama_jax.convert import weights as weights_
from codellama_jax.convert.weights import Weights, stream

NAME = "checksums.json"
FORMAT = "codellama_jax weights 1"


@dataclass(frozen=True)
class Checksums:
    """What the weights beside this table are."""

    model: config.Model
    dtype: str
    tensors: dict[str, str] = field(default_factory=dict)  # Hugging Face's name -> SHA-256

    def write(self, folder: Path) -> None:
        content = {
            "format": FORMAT,
            "hash": "SHA-256 of each tensor in Hugging Face's axes, little-endian",
            "model": config.to_json(self.model),
            "dtype": self.dtype,
            "tensors": {t.hf: self.tensors[t.hf] for t in table.tensors(self.model)},
        }
        (folder / NAME).write_text(json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> Checksums | None:
    """The table in `folder`, or None. Raises ValueError if it is damaged or of a newer kind."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        content = settings.parse(path.read_text())
        if content["format"] == FORMAT:
            model = config.from_json(config.Model, content["model"])
            return Checksums(model, content["dtype"], dict(content["tensors"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove it if the weights are good"
        ) from None
    raise ValueError(f"{path} is of kind {content['format']!r}, not {FORMAT!r}; use newer code")


def digest(array: np.ndarray) -> str:
    return examine(array)[0]


def examine(array: np.ndarray) -> tuple[str, bool]:
    """(SHA-256, whether an element is NaN or infinite), in one walk over the memory."""
    sha, nonfinite = hashlib.sha256(), False
    for block in blocks.of(array):
        sha.update(block)
        nonfinite = nonfinite or guard.has_nonfinite(block.view(array.dtype))
    return sha.hexdigest(), nonfinite


def checked(weights: Weights, expected: Checksums | None, findings: guard.Findings) -> Weights:
    """The same weights; reading a NaN, or a tensor that `expected` does not know, is refused."""
    sums: dict[str, str] = {}
    if expected is not None and expected.dtype != str(weights.dtype):
        findings.wrong(
            "checksums", f"{NAME} is of {expected.dtype} weights, these are {weights.dtype}"
        )
        findings.settle()

    def read_tensor(tensor: table.Tensor) -> np.ndarray:
        array = weights.read(tensor)
        if expected is None:
            nonfinite = guard.has_nonfinite(array)
        else:
            sums[tensor.hf], nonfinite = examine(array)
        if nonfinite:
            findings.wrong("nonfinite", f"{tensor.hf} has NaN or infinite elements")
        if expected is not None and sums[tensor.hf] != expected.tensors.get(tensor.hf):
            findings.wrong(
                "checksums", f"{tensor.hf} is not the tensor that {NAME} beside it names"
            )
        findings.settle()
        return array

    return replace(weights, read=read_tensor, sums=sums)


def summed(weights: Weights) -> tuple[Weights, dict[str, str]]:
    """The same weights, and a dict that gets the hash of every tensor that is read."""
    sums: dict[str, str] = {}

    def read_tensor(tensor: table.Tensor) -> np.ndarray:
        array = weights.read(tensor)
        sums[tensor.hf] = weights.sums.get(tensor.hf) or digest(array)
        return array

    return replace(weights, read=read_tensor), sums


def sums_of(weights: Weights) -> dict[str, str]:
    """The hash of every tensor, read once."""
    weights, sums = summed(weights)
    for _ in stream(weights):
        pass
    return sums


def check_params(params: dict, expected: Checksums, where: Path) -> None:
    """Raises ValueError unless JAX arrays, over any mesh, are the tensors that `expected` names.

    params: all weights, or some of them, in the stored dtype or a wider one. They were read from
    disk already: one tensor after the other is put together on the devices, and one of the
    processes hashes it. So no host reads more than its slices, nor anything twice. All processes
    must call this, and all get the same answer.
    """
    import jax
    from jax.experimental import multihost_utils

    stored, lengths = weights_.dtype(expected.dtype), table.sizes(expected.model)
    tensors = [t for t in table.tensors(expected.model) if weights_.has(params, t.row)]

    def is_right(tensor: table.Tensor, whole: jax.Array) -> bool:
        array = np.asarray(whole.addressable_data(0)).astype(stored)
        row = tensor.row
        array = table.rearrange(array, row.ours_axes, row.hf_axes, lengths)
        return digest(array) == expected.tensors.get(tensor.hf)

    verdicts = np.ones(len(tensors), bool)
    hashing: deque[tuple[int, Future[bool]]] = deque()
    with ThreadPoolExecutor(weights_.READERS) as hashers:
        for i, tensor in enumerate(tensors):
            whole = _whole(weights_.leaf(params, tensor.row), tensor.layer)
            if i % jax.process_count() == jax.process_index():
                hashing.append((i, hashers.submit(is_right, tensor, whole)))
            while hashing and (len(hashing) > weights_.READERS or i + 1 == len(tensors)):
                done, verdict = hashing.popleft()
                verdicts[done] = verdict.result()
    if jax.process_count() > 1:
        verdicts = multihost_utils.process_allgather(verdicts).all(axis=0)
    if not verdicts.all():
        name = tensors[int(verdicts.argmin())].hf
        raise ValueError(
            f"{where} is damaged: {name} is not the tensor that {NAME} beside it names; "
            "import the weights again"
        )


def _whole(leaf, layer: int | None):
    """A weight, or one layer of it, whole on each of its devices."""
    import jax

    place = leaf.sharding
    if isinstance(place, jax.sharding.NamedSharding):
        place = jax.sharding.NamedSharding(place.mesh, jax.sharding.PartitionSpec())
    return jax.block_until_ready(_gather(place, layer is None)(leaf, layer or 0))


@functools.cache
def _gather(place, everything: bool):
    import jax

    def gather(leaf, layer):
        return leaf if everything else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)

    return jax.jit(gather, out_shardings=place)


def differences(left: dict[str, str], right: dict[str, str]) -> list[str]:
    """The names whose hashes differ or that only one side has."""
    return sorted(n for n in left.keys() | right.keys() if left.get(n) != right.get(n))
