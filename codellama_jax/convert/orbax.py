"""Orbax checkpoints: read from any mesh's, and written as the trainer would write step 0.

Orbax saves arrays that are whole in memory. Here they never are: a stacked weight is written layer
by layer, straight into the chunk files of the Zarr array that Orbax will restore. A chunk is a
slice of one layer along the width, so hosts that hold slices of a weight read little else.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np

from codellama_jax import config, tokenizer
from codellama_jax.convert import blocks, guard, official, proof, settings, table
from codellama_jax.convert.weights import Weights, copy_tokenizer, dtype, stream, tokenizer_files
from codellama_jax.tokenizer import json_file

CHUNK_BYTES = 32 << 20  # of a chunk, at most, where the width divides so far
ZARR_DTYPES = {"bfloat16": "bfloat16", "float16": "<f2", "float32": "<f4"}


# -- reading -----------------------------------------------------------------------------------


def read(folder: Path, findings: guard.Findings) -> Weights:
    """The weights of a checkpoint, or of the newest step in a stage's folder."""
    step = find(folder)
    model = _model(step / "recipe" / "metadata")
    arrays = {row.ours: _open(step / "params", row, model) for row in table.rows(model)}
    kinds = {str(array.dtype.numpy_dtype) for array in arrays.values()}
    if len(kinds) > 1:
        raise ValueError(f"{step}: the weights are of several dtypes: {', '.join(sorted(kinds))}")
    kind = dtype(kinds.pop())
    if _is_ours(step / "params", model, kind):
        reader, together = _mapped(step / "params", model, kind), False
    else:
        # The trainer's chunks may hold several layers of a part of a weight.
        stacked = [arrays[row.ours] for row in table.TABLE if row.stacked]
        together = max(array.chunk_layout.read_chunk.shape[0] for array in stacked) > 1
        reader = _reader(arrays, model)
    files = tokenizer_files(step.parent)
    weights = Weights(model, kind, reader, files, layers_together=together)
    known = proof.read(step.parent) if step.name == "0" else None
    if known is not None and known.model != model:
        about = official.describe(known.model)
        findings.wrong("checksums", f"the checksum table is of another model: {about}")
        findings.settle()
    return proof.checked(weights, known, findings)


def _model(recipe: Path) -> config.Model:
    """The model that a recipe names."""
    content = settings.read(recipe)
    try:
        return config.from_json(config.Model, content["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{recipe} does not name its model ({error!r})") from None


def _reader(arrays: dict, model: config.Model):
    """Weights.read for stacked arrays: reads as many layers at once as a chunk holds."""
    lengths = table.sizes(model)
    held: dict[tuple[str, int], np.ndarray] = {}

    def layer(name: str, number: int) -> np.ndarray:
        count = arrays[name].chunk_layout.read_chunk.shape[0]
        if count == 1:
            return _read(arrays[name][number])
        start = number - number % count
        if (name, start) not in held:
            held.clear()
            held[name, start] = _read(arrays[name][start : start + count])
        return held[name, start][number - start]

    def read_tensor(tensor: table.Tensor) -> np.ndarray:
        row = tensor.row
        if tensor.layer is None:
            array = _read(arrays[row.ours])
        else:
            array = layer(row.ours, tensor.layer)
        return table.rearrange(array, row.ours_axes, row.hf_axes, lengths)

    return read_tensor


def _mapped(params: Path, model: config.Model, kind: np.dtype):
    """Weights.read for files that `write` made, without a copy: maps of the slices of a layer."""
    lengths = table.sizes(model)

    def read_tensor(tensor: table.Tensor) -> np.ndarray:
        row = tensor.row
        shape = table.shape(row.ours_axes, lengths)
        axis, number = _pieces(row, shape, kind.itemsize)
        shape = tuple(n // number if i == axis else n for i, n in enumerate(shape))
        names = _chunk_names(tensor, axis, number, len(shape))
        slices = [_map(params / row.ours / name, kind, shape) for name in names]
        if number == 1:
            return table.rearrange(slices[0], row.ours_axes, row.hf_axes, lengths)
        whole = np.empty(table.shape(row.hf_axes, lengths), kind)
        places = np.split(whole, number, axis=0 if row.hf_axes.startswith("D") else 1)
        part = lengths | {"D": model.dim // number}
        for x, place in zip(slices, places, strict=True):
            table.rearrange(x, row.ours_axes, row.hf_axes, part, place)
        return whole

    return read_tensor


def _map(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A chunk's file, mapped. Raises ValueError if it is not there, or not as long as it must."""
    size, wanted = path.stat().st_size if path.exists() else 0, int(np.prod(shape)) * kind.itemsize
    if size != wanted:
        raise ValueError(f"{path} has {size:,} bytes instead of {wanted:,}; the copy is not whole")
    return np.memmap(path, kind, "r", shape=shape)


def _read(view) -> np.ndarray:
    """What a TensorStore shows, in memory of numpy's, whose large pages are cheaper to get."""
    import tensorstore

    array = np.empty(view.shape, view.dtype.numpy_dtype)
    tensorstore.array(array).write(view).result()
    return array


def find(folder: Path) -> Path:
    """The step folder meant by `folder`: itself, or the newest step in it."""
    if (folder / "params").is_dir():
        return folder
    steps = [p for p in folder.glob("*") if p.name.isdigit() and (p / "params").is_dir()]
    if not steps:
        raise ValueError(f"there is no Orbax checkpoint in {folder}: no <step>/params")
    return max(steps, key=lambda p: int(p.name))


def _open(params: Path, row: table.Row, model: config.Model):
    """The stacked array of `row`, as a TensorStore that reads what it is asked for."""
    import tensorstore

    about = settings.read(params / "_METADATA")
    store: dict[str, Any] = {"driver": "file", "path": f"{params.resolve()}/{row.ours}/"}
    if about.get("use_ocdbt"):
        base = f"file://{params.resolve()}/"
        store = {"driver": "ocdbt", "base": base, "path": f"{row.ours}/"}
    driver = "zarr3" if about.get("use_zarr3") else "zarr"
    try:
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
        context = tensorstore.Context({"file_io_mode": {"mode": "memmap"}})
        array = tensorstore.open(spec, read=True, context=context).result()
    except ValueError as error:
        reason = str(error).partition(" [tensorstore_spec")[0]  # behind it are all its settings
        raise ValueError(f"{params} has no whole {row.ours} ({reason})") from None
    expected = table.shape(row.ours_axes, table.sizes(model))
    expected = (model.num_layers, *expected) if row.stacked else expected
    if array.shape != expected:
        raise ValueError(
            f"{params}: {row.ours} has shape {array.shape}; the recipe beside it makes {expected}"
        )
    return array


# -- writing -----------------------------------------------------------------------------------


def write(weights: Weights, folder: Path) -> None:
    """Writes `weights` into the empty `folder` as step 0 of a stage of that name."""
    model = weights.model
    copy_tokenizer(weights.tokenizer, folder)
    step = folder / "0"
    (step / "params").mkdir(parents=True)
    for row in table.rows(model):
        (step / "params" / row.ours).mkdir()
        about = _array_metadata(row, model, str(weights.dtype))
        _write_json(step / "params" / row.ours / ".zarray", about)
    for tensor, array in stream(weights, "ours_axes"):
        _write_chunks(step / "params" / tensor.row.ours, tensor, array)
    _write_json(step / "params" / "_METADATA", _tree_metadata(model))
    (step / "recipe").mkdir()
    _write_json(step / "recipe" / "metadata", _recipe(weights))
    handlers = "orbax.checkpoint._src.handlers"
    _write_json(
        step / "_CHECKPOINT_METADATA",
        {
            "item_handlers": {
                "params": f"{handlers}.pytree_checkpoint_handler.PyTreeCheckpointHandler",
                "recipe": f"{handlers}.json_checkpoint_handler.JsonCheckpointHandler",
            },
            "metrics": {},
        },
    )
    for place in (step / "params", step / "recipe", step):  # what makes it whole in object stores
        (place / "commit_success.txt").write_text("written by codellama_jax\n")


def _pieces(row: table.Row, shape: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """(axis, number) of the slices of one layer: along the width, of CHUNK_BYTES at most."""
    axis = row.ours_axes.replace("(two h)", "H").split().index("D")
    number, nbytes = 1, int(np.prod(shape)) * itemsize
    while nbytes > number * CHUNK_BYTES and shape[axis] % (2 * number) == 0:
        number *= 2
    return axis, number


def _chunk_names(tensor: table.Tensor, axis: int, number: int, ndim: int) -> list[str]:
    """The files of a tensor's slices: each is called after its place in the stacked array."""
    layer = [] if tensor.layer is None else [tensor.layer]
    places = [[i if n == axis else 0 for n in range(ndim)] for i in range(number)]
    return [".".join(map(str, layer + place)) for place in places]


def _write_chunks(folder: Path, tensor: table.Tensor, array: np.ndarray) -> None:
    axis, number = _pieces(tensor.row, array.shape, array.dtype.itemsize)
    names = _chunk_names(tensor, axis, number, array.ndim)
    for name, part in zip(names, np.split(array, number, axis=axis), strict=True):
        with open(folder / name, "wb") as file:
            for block in blocks.of(part):
                file.write(block)


def _array_metadata(row: table.Row, model: config.Model, kind: str) -> dict:
    """What Zarr says of a stacked array."""
    shape = table.shape(row.ours_axes, table.sizes(model))
    axis, number = _pieces(row, shape, dtype(kind).itemsize)
    chunk = [n // number if i == axis else n for i, n in enumerate(shape)]
    return {
        "zarr_format": 2,
        "shape": [model.num_layers, *shape] if row.stacked else list(shape),
        "chunks": [1, *chunk] if row.stacked else chunk,
        "dtype": ZARR_DTYPES[kind],
        "compressor": None,  # weights do not compress
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }


def _is_ours(params: Path, model: config.Model, kind: np.dtype) -> bool:
    """Whether the arrays lie in files as `write` makes them."""
    for row in table.rows(model):
        path = params / row.ours / ".zarray"
        if not path.exists() or json.loads(path.read_text()) != _array_metadata(
            row, model, str(kind)
        ):
            return False
    return True


def _tree_metadata(model: config.Model) -> dict:
    """What Orbax writes about a nested dict of arrays."""
    tree = {}
    for row in table.rows(model):
        path = tuple(row.ours.split("."))
        tree[str(path)] = {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],
            "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
        }
    return {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _recipe(weights: Weights) -> dict:
    fingerprint = None
    for path in reversed(weights.tokenizer):  # a tokenizer.model counts before a tokenizer.json
        if path.suffix == ".model":
            fingerprint = tokenizer.Tokenizer(path).fingerprint
        elif path.name == "tokenizer.json":
            fingerprint = json_file.fingerprint(str(path))
    versions = {}
    for package in ("codellama_jax", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "model": config.to_json(weights.model),
        "stage": None,
        "tokenizer_fingerprint": fingerprint,
        "code_version": versions.pop("codellama_jax"),
        "versions": versions,
    }


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content))
