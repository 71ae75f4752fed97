"""A tensor's bytes in pieces that fit the cache, to hash, to check and to write them."""

from collections.abc import Iterator

import numpy as np

SIZE = 1 << 20  # bytes; fits a core's second cache


def of(array: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of an array in its order, as contiguous pieces of about SIZE bytes."""
    if array.ndim == 0 or array.flags.c_contiguous:
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        yield from (flat[i : i + SIZE] for i in range(0, flat.size, SIZE))
    elif array.size:
        rows = max(1, SIZE * len(array) // array.nbytes)
        bits = array.view(f"u{array.dtype.itemsize}")  # numpy is slow with the other dtypes
        for i in range(0, len(array), rows):
            yield np.ascontiguousarray(bits[i : i + rows]).reshape(-1).view(np.uint8)
