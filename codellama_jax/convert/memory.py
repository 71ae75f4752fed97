"""Memory for tensors that come and go: taken from the system once, and cut to the cache.

The system clears each page that it gives, which costs as much as filling it, and more in a virtual
machine. So while tensors stream, the memory of one that is no longer looked at is the next one's.
"""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

SMALL = 1 << 20  # bytes; the C library keeps what is smaller by itself
BLOCK = 1 << 20  # bytes; fits a core's second cache

_idle: list[np.ndarray] = []
_streams = 0
_lock = threading.Lock()


@contextmanager
def kept() -> Iterator[None]:
    """As long as this lasts, memory of `empty` is kept when its array goes."""
    global _streams
    with _lock:
        _streams += 1
    try:
        yield
    finally:
        with _lock:
            _streams -= 1
            if not _streams:
                _idle.clear()


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As numpy.empty, in memory that an array before may have had."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if nbytes < SMALL:
        return np.empty(shape, dtype)
    flat = np.asarray(_Lent(_take(nbytes)))
    return flat[:nbytes].view(dtype).reshape(shape)


class _Lent:
    """Owns a piece of memory as long as any array shows it, and then gives it back."""

    def __init__(self, memory: np.ndarray):
        self.memory = memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self):
        if _streams:
            _idle.append(self.memory)  # without the lock: this may run anywhere, even inside it


def _take(nbytes: int) -> np.ndarray:
    """The smallest idle piece that is large enough; if none is, all of them go for a new one."""
    with _lock:
        fitting = [memory for memory in list(_idle) if memory.nbytes >= nbytes]
        if fitting:
            found = min(fitting, key=len)
            for i, memory in enumerate(_idle):
                if memory is found:
                    return _idle.pop(i)
        _idle.clear()
    return np.empty(nbytes, np.uint8)


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of an array in its order, as contiguous pieces of about BLOCK bytes."""
    if array.ndim == 0 or array.flags.c_contiguous:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        yield from (flat[i : i + BLOCK] for i in range(0, flat.size, BLOCK))
    elif array.size:
        rows = max(1, BLOCK * len(array) // array.nbytes)
        bits = array.view(f"u{array.dtype.itemsize}")  # numpy is slow with the other dtypes
        for i in range(0, len(array), rows):
            yield np.ascontiguousarray(bits[i : i + rows]).reshape(-1).view(np.uint8)
