"""PyTorch's .pth and .bin files, read and written without PyTorch.

Such a file is a zip archive, uncompressed: a pickle that says what the tensors are called and how
each lies in a storage, and one member per storage with its bare bytes. A pickle is a program;
ours may call six names and nothing else, so a hostile file can at worst be refused. Bytes are
mapped, not read, and written one tensor at a time.
"""

import hashlib
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from codellama_jax.convert import blocks

STORAGES = {
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "HalfStorage": np.dtype(np.float16),
    "FloatStorage": np.dtype(np.float32),
}

MAX_PICKLE = 100_000_000  # bytes


class Entry(NamedTuple):
    """Where a tensor lies: enough to map it."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements
    offset: int  # of its first byte in the file

    def array(self) -> np.ndarray:
        """The tensor, mapped from the file: read when looked at, let go when dropped."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        span = _span(self.shape, self.strides)
        flat = np.memmap(self.path, self.dtype, "r", self.offset, (span,))
        steps = [s * self.dtype.itemsize for s in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


# -- reading -----------------------------------------------------------------------------------


def index(path: Path) -> dict[str, Entry]:
    """The tensors of a file that torch.save wrote from a dict, by name.

    Raises ValueError for a file that is no whole zip archive, holds anything but tensors, or
    whose tensors reach outside their storages.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _index(path, archive)
    except (zipfile.BadZipFile, EOFError, KeyError, struct.error) as error:
        raise ValueError(
            f"{path} is not a whole PyTorch file ({error}); is it truncated, or of PyTorch's "
            "format before 1.6?"
        ) from None


def _index(path: Path, archive: zipfile.ZipFile) -> dict[str, Entry]:
    members = {info.filename: info for info in archive.infolist()}
    name = next((n for n in members if n.endswith("/data.pkl")), None)
    if name is None:
        raise ValueError(f"{path} is a zip archive but not a PyTorch file: it has no data.pkl")
    root = name.removesuffix("data.pkl")
    if f"{root}byteorder" in members:
        with archive.open(f"{root}byteorder") as stream:
            order = stream.read(16)
        if order != b"little":
            raise ValueError(f"{path} has weights of byte order {order!r}; only b'little' is read")
    content = _load(path, archive, members[name])
    if not isinstance(content, dict) or not all(isinstance(t, _Lazy) for t in content.values()):
        raise ValueError(f"{path} holds something else than a dict of tensors")
    with open(path, "rb") as file:
        return {
            str(key): _entry(path, file, members, root, tensor) for key, tensor in content.items()
        }


def _load(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo):
    """What the pickle describes. Raises ValueError, whatever is in it."""
    if info.file_size > MAX_PICKLE:
        raise ValueError(f"{path}: {info.filename} has {info.file_size} bytes; no index is so long")
    try:
        with archive.open(info) as stream:
            return _Unpickler(stream).load()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception as error:  # untrusted bytes may fail in any way
        raise ValueError(f"{path}: {info.filename} is damaged ({error!r})") from None


def _entry(path: Path, file, members: dict, root: str, tensor: "_Lazy") -> Entry:
    info = members[f"{root}data/{tensor.key}"]
    size = tensor.dtype.itemsize
    inside = (
        min(tensor.offset, *tensor.shape, *tensor.strides, 0) == 0
        and len(tensor.shape) == len(tensor.strides)
        and (tensor.offset + _span(tensor.shape, tensor.strides)) * size <= info.file_size
    )
    if not inside:
        raise ValueError(f"{path}: a tensor reaches outside its storage {tensor.key}")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: storage {tensor.key} is compressed, as torch.save never does")
    file.seek(info.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path}: no storage at byte {info.header_offset}")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + 30 + name_length + extra_length + tensor.offset * size
    return Entry(path, tensor.dtype, tensor.shape, tensor.strides, start)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))


class _Lazy(NamedTuple):
    dtype: np.dtype
    key: str
    offset: int  # in elements of its storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Lazy:
    dtype, key = storage
    return _Lazy(dtype, key, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


class _Unpickler(pickle.Unpickler):
    """Knows tensors, their storages, and dicts of them. Refuses every other name."""

    def find_class(self, module, name):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        # A pickle may set attributes of what it names, so each of these is made anew.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _rebuild_tensor(*args)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module == "torch" and name in STORAGES:
            return name
        raise ValueError(
            f"the file asks for {module}.{name}, which no bf16, fp16 or fp32 weights need; "
            "nothing of it was run"
        )

    def persistent_load(self, pid):
        kind, storage, key, *_ = pid
        if kind != "storage" or storage not in STORAGES:
            raise ValueError(f"the file refers to {pid!r}, which is not a storage of weights")
        return STORAGES[storage], str(key)


# -- writing -----------------------------------------------------------------------------------


class Writer:
    """Writes one .pth file, a tensor at a time, in the order in which they were announced.

    with Writer(path, [(name, shape), ...], dtype) as file:
        file.add(array)        # for each, in that order
    file.md5                   # of the whole file
    """

    def __init__(self, path: Path, plan: Iterable[tuple[str, tuple[int, ...]]], dtype: np.dtype):
        self.plan, self.dtype, self.root = list(plan), np.dtype(dtype), path.stem
        self.file = _Hashing(path)
        self.archive = zipfile.ZipFile(self.file, "w", zipfile.ZIP_STORED)
        self.added = 0
        index = _pickle(self.plan, self.dtype)
        self._member("data.pkl", len(index), [index])
        self._member("byteorder", 6, [b"little"])

    def add(self, array: np.ndarray) -> None:
        name, shape = self.plan[self.added]
        assert array.shape == shape and array.dtype == self.dtype, (name, array.shape, shape)
        self.file.wait()
        self._member(f"data/{self.added}", array.nbytes, blocks.of(array))
        self.added += 1

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            assert self.added == len(self.plan), f"{self.added} of {len(self.plan)} tensors"
            self._member("version", 2, [b"3\n"])
            self.archive.close()
        else:
            with suppress(OSError, ValueError):  # it is thrown away; another error is on its way
                self.archive.close()
        self.file.close()

    @property
    def md5(self) -> str:
        return self.file.digest.hexdigest()

    def _member(self, name: str, size: int, content: Iterable) -> None:
        """Appends a member whose content starts at a multiple of 64 bytes, as PyTorch wants."""
        info = zipfile.ZipInfo(f"{self.root}/{name}")
        info.file_size = size
        zip64 = info.file_size * 1.05 > zipfile.ZIP64_LIMIT  # then zipfile adds 20 bytes
        header = 30 + len(info.filename) + 4 + 20 * zip64
        padding = -(self.file.tell() + header) % 64
        info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
        with self.archive.open(info, "w") as member:
            for block in content:
                member.write(block)


class _Hashing:
    """A file that is only appended to, and hashed on the way by a thread of its own."""

    def __init__(self, path: Path):
        self.file, self.digest, self.position = open(path, "wb"), hashlib.md5(), 0
        self.hasher = ThreadPoolExecutor(1)
        self.last: Future | None = None

    def write(self, content) -> int:
        self.last = self.hasher.submit(self.digest.update, content)
        self.file.write(content)
        self.position += len(content)
        return len(content)

    def wait(self) -> None:
        """Until all that was written is hashed, so that the memory of one tensor waits at most."""
        if self.last is not None:
            self.last.result()

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return False  # so that zipfile writes sizes behind the members and never goes back

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.hasher.shutdown()
        self.file.close()


def _pickle(plan: list[tuple[str, tuple[int, ...]]], dtype: np.dtype) -> bytes:
    """The pickle that torch.save would write for a dict of contiguous tensors."""
    storage = next(name for name, d in STORAGES.items() if d == dtype)
    return b"".join([b"\x80\x02}(", *_pickled_tensors(plan, storage), b"u."])


def _pickled_tensors(plan, storage: str) -> Iterator[bytes]:
    for key, (name, shape) in enumerate(plan):
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
        numel = int(np.prod(shape))
        yield _opcodes(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        yield b"(" + _opcodes("storage") + f"ctorch\n{storage}\n".encode()
        yield _opcodes(str(key)) + _opcodes("cpu") + _opcodes(numel) + b"tQ"
        yield _opcodes(0) + _opcodes(shape) + _opcodes(strides) + _opcodes(False)
        yield b"ccollections\nOrderedDict\n)RtR"


def _opcodes(value) -> bytes:
    """The opcodes that push a plain value, without a pickle's header and end."""
    return pickle.dumps(value, protocol=2)[2:-1]
