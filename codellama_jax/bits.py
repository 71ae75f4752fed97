"""Checksums of arrays on any mesh: are the bits that were read those that were written?

Disks and networks change bits, and what stores the chunks of a checkpoint does not notice.
"""

from typing import Any

import jax
import numpy as np


def checksums(tree: Any) -> dict[str, int]:
    """A checksum of the bits of each array of `tree`, by its path; the same on every mesh."""
    sums = jax.device_get(_sums(tree))
    leaves = jax.tree_util.tree_leaves_with_path(sums)
    return {jax.tree_util.keystr(path, simple=True, separator="."): int(s) for path, s in leaves}


@jax.jit
def _sums(tree: Any) -> Any:
    """Bits as integers, times odd numbers that differ by place, summed modulo 2^32."""

    def checksum(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
        place = np.uint32(0)
        for axis, size in enumerate(x.shape):
            place = place * np.uint32(size) + jax.lax.broadcasted_iota(np.uint32, x.shape, axis)
        return (bits * (2 * place + 1)).sum(dtype=np.uint32)

    return jax.tree.map(checksum, tree)
