"""The C library's memory: what is freed can be kept, for the next tensor of that size.

To give memory back to the system, and have it cleared anew, costs processor time.
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of malloc.h
MOST = 32 << 20  # bytes of the largest MMAP_THRESHOLD


def keep_freed(largest: int | None = None) -> None:
    """Lets glibc keep what this process frees: all of it, or pieces of up to `largest` bytes (MOST
    at most). Other C libraries have no mallopt; there nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
    if largest is None:
        mallopt(MMAP_MAX, 0)
    else:
        mallopt(MMAP_THRESHOLD, largest)
