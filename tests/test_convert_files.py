"""The two file formats: read as others write them, written as others read them, never run."""

import json
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from codellama_jax.convert import pth, safetensor

DTYPES = [ml_dtypes.bfloat16, np.float16, np.float32]
FILES = {"pth": pth, "safetensors": safetensor}


def arrays(dtype, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (3, 5), "norm": (7,), "empty": (0, 4), "b": (2, 3, 4), "last": (1, 65)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write(kind, path, tensors):
    plan = [(name, array.shape) for name, array in tensors.items()]
    with FILES[kind].Writer(path, plan, next(iter(tensors.values())).dtype) as file:
        for array in tensors.values():
            file.add(array)
    return path


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_read(tmp_path, kind, dtype):
    tensors = arrays(dtype)
    index = FILES[kind].index(write(kind, tmp_path / "x", tensors))
    assert list(index) == list(tensors)
    for name, array in tensors.items():
        read = index[name].array()
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()


def test_a_transposed_array_is_written_as_it_reads(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T
    for kind, module in FILES.items():
        assert (module.index(write(kind, tmp_path / kind, {"x": x}))["x"].array() == x).all()


# -- safetensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_safetensors_library_reads_ours_and_we_read_its(tmp_path, dtype):
    tensors = arrays(dtype)
    theirs = safetensors.numpy.load_file(write("safetensors", tmp_path / "ours", tensors))
    safetensors.numpy.save_file(tensors, tmp_path / "theirs")
    ours = safetensor.index(tmp_path / "theirs")
    for name, array in tensors.items():
        assert theirs[name].tobytes() == ours[name].array().tobytes() == array.tobytes()
    with safetensors.safe_open(tmp_path / "ours", "np") as file:
        assert file.metadata() == {"format": "pt"}  # without it transformers refuses the file


def bare(path, header, body=b""):
    text = json.dumps(header).encode() if isinstance(header, dict) else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


# fmt: off
@pytest.mark.parametrize(("header", "body", "reason"), [
    (b"<html>", b"", "no JSON header"),
    ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", "is it truncated"),
    ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234", "does not fill"),
    ({"x": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}, b"1234", "only BF16, F16, F32"),
    ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678", "leaves a gap"),
    ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
      "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234", "overlaps"),
    ({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"", "does not fill"),
    ({"x": {"shape": [1]}}, b"", "not a tensor's"),
    ({"x": 7}, b"", "not a tensor's"),
])
# fmt: on
def test_a_bad_safetensors_file_is_refused(tmp_path, header, body, reason):
    with pytest.raises(ValueError, match=reason):
        safetensor.index(bare(tmp_path / "x", header, body))


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        safetensor.index(tmp_path / "x")


# -- .pth --------------------------------------------------------------------------------------


def with_pickle(path, content, storages=(b"",)):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", content)
        for i, storage in enumerate(storages):
            archive.writestr(f"x/data/{i}", storage)
    return path


class Runs:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_pickle_that_wants_to_run_something_is_refused_and_runs_nothing(tmp_path):
    runs = Runs(tmp_path / "trace")
    for hostile in (runs, {"x": runs}, [eval], os.path.join):
        path = with_pickle(tmp_path / "x.pth", pickle.dumps(hostile, 2))
        with pytest.raises(ValueError, match="nothing of it was run|something else"):
            pth.index(path)
    assert not runs.trace.exists()
    pickle.loads(pickle.dumps(runs, 2))
    assert runs.trace.exists()  # that is what it would have done


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.integers(0, 400))
def test_a_damaged_pickle_is_refused_whatever_is_in_it(tmp_path_factory, noise, at):
    path = tmp_path_factory.mktemp("pth") / "x.pth"
    good = pth._pickle([("x", (2, 2)), ("y", (3,))], np.dtype(np.float32))
    at = min(at, len(good))
    damaged = good[:at] + noise + good[at + len(noise) :]
    try:
        index = pth.index(with_pickle(path, damaged, (bytes(16), bytes(12))))
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(entry.array().nbytes <= 16 for entry in index.values())


def tensor(offset=0, shape=(2, 2), strides=(2, 1), key="0", storage="FloatStorage"):
    p = pth._opcodes
    return b"".join([
        b"\x80\x02}(", p("t"), b"ctorch._utils\n_rebuild_tensor_v2\n((", p("storage"),
        f"ctorch\n{storage}\n".encode(), p(key), p("cpu"), p(4), b"tQ", p(offset), p(shape),
        p(strides), p(False), b"ccollections\nOrderedDict\n)RtRu.",
    ])  # fmt: skip


def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path):
    assert "t" in pth.index(with_pickle(tmp_path / "x", tensor(), (bytes(16),)))
    transposed = tensor(strides=(1, 2))
    numbers = np.arange(4, dtype=np.float32)
    read = pth.index(with_pickle(tmp_path / "x", transposed, (numbers.tobytes(),)))["t"].array()
    assert read.tolist() == [[0, 2], [1, 3]] and not read.flags.writeable
    bad = [
        {"offset": 1}, {"offset": -1}, {"shape": (2, 3)}, {"strides": (3, 1)}, {"shape": (-2, 2)},
        {"strides": (-2, 1)}, {"shape": (2,)}, {"key": "1"}, {"key": "../0"},
    ]  # fmt: skip
    for change in bad:
        with pytest.raises(ValueError):
            pth.index(with_pickle(tmp_path / "x", tensor(**change), (bytes(16),)))


def test_integers_doubles_and_compressed_storages_are_refused(tmp_path):
    for storage in ("LongStorage", "DoubleStorage"):
        with pytest.raises(ValueError, match=f"torch.{storage}"):
            pth.index(with_pickle(tmp_path / "x", tensor(storage=storage), (bytes(32),)))
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", tensor())
        archive.writestr("x/data/0", bytes(16))
    with pytest.raises(ValueError):
        pth.index(tmp_path / "x")


def test_a_file_of_pytorch_before_1_6_says_so(tmp_path):
    (tmp_path / "x").write_bytes(pickle.dumps(119547037146038801333356))
    with pytest.raises(ValueError, match="format before 1.6"):
        pth.index(tmp_path / "x")


def test_tensors_start_where_pytorch_wants_them(tmp_path):
    """Multiples of 64 bytes, so that it can map them."""
    index = pth.index(write("pth", tmp_path / "x.pth", arrays(np.float16)))
    assert all(entry.offset % 64 == 0 for entry in index.values())
