"""Whether freed memory goes back to the system, which makes the next tensor pay for page faults."""

from __future__ import annotations

import ctypes

__all__ = ["CACHED", "KEPT", "RETURNED", "keep"]

RETURNED, KEPT = "returned", "kept"  # what glibc does by default with the memory of large tensors, and after `keep`
CACHED = "cached"  # what torch does with that of CUDA tensors
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep() -> bool:
    """Make this process keep what it frees, for good; return whether the C library can be told to (glibc can).

    It is what MALLOC_MMAP_THRESHOLD_=1073741824 and MALLOC_TRIM_THRESHOLD_=2147483647 do in the environment.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    mapped = mallopt(MMAP_THRESHOLD, 2**30) or mallopt(MMAP_THRESHOLD, 2**25)  # the most that older ones take
    return bool(mapped and mallopt(TRIM_THRESHOLD, 2**31 - 1))
