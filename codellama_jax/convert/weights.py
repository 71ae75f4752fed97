"""A model's weights, wherever they lie: what every format reads into and writes from.

`Weights.read` gives one tensor at a time in Hugging Face's axes, which is our canonical form: it is
plain, both other formats are one rearrangement away, and a checksum of it is a checksum of the
bytes in a safetensors file. The functions here wrap `read`, so casts, new rows and checks happen to
each tensor as it flows by.
"""

import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from codellama_jax import config
from codellama_jax.convert import table

READERS = min(8, os.cpu_count() or 1)  # threads
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

TOKENIZER_FILES = (
    "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """The weights of one model, read tensor by tensor."""

    model: config.Model
    dtype: np.dtype  # of every tensor
    read: Callable[[table.Tensor], np.ndarray]  # in Hugging Face's axes
    tokenizer: tuple[Path, ...] = ()  # tokenizer.model, or Hugging Face's own files
    layers_together: bool = False  # the source stores a weight's layers in one block
    sums: dict[str, str] = field(default_factory=dict)  # hashes that `read` computed on its way

    def order(self) -> list[table.Tensor]:
        """Every tensor: in the order of the forward pass, or all layers of a weight together."""
        tensors = list(table.tensors(self.model))
        if self.layers_together:
            tensors.sort(key=lambda t: table.TABLE.index(t.row))
        return tensors

    @property
    def nbytes(self) -> int:
        return self.model.num_params * self.dtype.itemsize

    def shape(self, tensor: table.Tensor) -> tuple[int, ...]:
        return table.shape(tensor.row.hf_axes, table.sizes(self.model))

    def size(self, tensor: table.Tensor) -> int:
        """Bytes of a tensor."""
        return math.prod(self.shape(tensor)) * self.dtype.itemsize


def dtype(name: str) -> np.dtype:
    """The numpy dtype called `name`. Raises ValueError for others than weights have here."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files in `folder` that are a tokenizer's."""
    return tuple(folder / name for name in TOKENIZER_FILES if (folder / name).exists())


def copy_tokenizer(files: tuple[Path, ...], folder: Path) -> None:
    """Puts a tokenizer's files into `folder`, a SentencePiece model as tokenizer.model."""
    for path in files:
        name = "tokenizer.model" if path.suffix == ".model" else path.name
        shutil.copyfile(path, folder / name)


def stream(weights: Weights, to: str = "hf_axes") -> Iterator[tuple[table.Tensor, np.ndarray]]:
    """Each tensor in its order, stored as the pattern `to` of the table's row says.

    Threads read ahead, and check, hash and rearrange what they read, while this one is used: one
    tensor at least, and more as long as they have fewer bytes than the largest there is.
    """
    lengths, order = table.sizes(weights.model), weights.order()
    most = max(map(weights.size, order))

    def read(tensor: table.Tensor) -> np.ndarray:
        row = tensor.row
        return table.rearrange(weights.read(tensor), row.hf_axes, getattr(row, to), lengths)

    coming: deque[tuple[table.Tensor, Future]] = deque()
    ahead = 0  # bytes
    threads = 1 if weights.layers_together else READERS
    with ThreadPoolExecutor(threads) as readers:
        try:
            for tensor in order:
                while len(coming) > 1 and ahead + weights.size(tensor) > most:
                    first, array = coming.popleft()
                    ahead -= weights.size(first)
                    yield first, array.result()
                    del array
                coming.append((tensor, readers.submit(read, tensor)))
                ahead += weights.size(tensor)
            while coming:
                first, array = coming.popleft()
                yield first, array.result()
                del array
        finally:
            for _, array in coming:
                array.cancel()


# -- between disk and memory -------------------------------------------------------------------


def from_params(params: dict, model: config.Model) -> Weights:
    """The weights in our nested dict of (numpy or JAX) arrays, stacked over layers."""
    lengths = table.sizes(model)
    leaves = {row.ours: leaf(params, row) for row in table.rows(model)}
    kinds = {str(stacked.dtype) for stacked in leaves.values()}
    if len(kinds) > 1:
        raise ValueError(f"the parameters are of several dtypes ({kinds}); cast them to one")

    def read(tensor: table.Tensor) -> np.ndarray:
        stacked = leaves[tensor.row.ours]
        array = np.asarray(stacked if tensor.layer is None else stacked[tensor.layer])
        assert array.shape == table.shape(tensor.row.ours_axes, lengths), tensor
        return table.rearrange(array, tensor.row.ours_axes, tensor.row.hf_axes, lengths)

    return Weights(model, dtype(kinds.pop()), read)


def to_params(weights: Weights) -> dict:
    """Our nested dict of numpy arrays, stacked over layers."""
    model = weights.model
    params: dict = {}
    for tensor, array in stream(weights, "ours_axes"):
        row = tensor.row
        if tensor.layer is None:
            _put(params, row, np.array(array))  # a copy: not a map of a file that may go away
        else:
            if tensor.layer == 0:
                _put(params, row, np.empty((model.num_layers, *array.shape), array.dtype))
            leaf(params, row)[tensor.layer] = array
    return params


def has(params: dict, row: table.Row) -> bool:
    """Whether the array that the table's row means is in a nested dict."""
    for key in row.ours.split("."):
        params = params.get(key, {})
    return not isinstance(params, dict)


def leaf(params: dict, row: table.Row):
    """The array of a nested dict that the table's row means."""
    for key in row.ours.split("."):
        params = params[key]
    return params


def _put(params: dict, row: table.Row, array: np.ndarray) -> None:
    *path, last = row.ours.split(".")
    for key in path:
        params = params.setdefault(key, {})
    params[last] = array


# -- changes on the way ------------------------------------------------------------------------


def cast(weights: Weights, to: np.dtype) -> Weights:
    """The same weights rounded to dtype `to`, to nearest, ties to even; exact when it is wider."""
    if to == weights.dtype:
        return weights

    def read(tensor: table.Tensor) -> np.ndarray:
        array = weights.read(tensor)
        with np.errstate(over="ignore"):  # the check of finite numbers follows the cast
            return array.astype(to)

    return replace(weights, dtype=np.dtype(to), read=read, sums={})


def untied(weights: Weights) -> Weights:
    """The same weights with the embedding a second time, as the output."""
    embedding = next(t for t in table.tensors(weights.model) if t.row.ours == "tok_embeddings")

    def read(tensor: table.Tensor) -> np.ndarray:
        return weights.read(embedding if tensor.row.ours == "output" else tensor)

    return replace(weights, model=replace(weights.model, tied_embeddings=False), read=read)


def grow(weights: Weights, vocab_size: int) -> Weights:
    """The same weights with a longer vocabulary: each new row is the mean of the old ones.

    So a new token starts as an average token, in the embedding as in the output. The mean is
    taken in float64 and rounded once. Raises ValueError if `vocab_size` is smaller than before.
    """
    old = weights.model.vocab_size
    if vocab_size <= old:
        raise ValueError(f"the vocabulary has {old} rows; it cannot grow to {vocab_size}")

    def read(tensor: table.Tensor) -> np.ndarray:
        array = weights.read(tensor)
        if "V" not in tensor.row.hf_axes:
            return array
        total = sum(part.sum(axis=0, dtype=np.float64) for part in np.array_split(array, 64))
        new = np.broadcast_to((total / old).astype(array.dtype), (vocab_size - old, array.shape[1]))
        return np.concatenate([array, new])

    model = replace(weights.model, vocab_size=vocab_size)
    return replace(weights, model=model, read=read, sums={})
