"""Memory for results.

Outputs and gradients of hundreds of megabytes are new memory at every call: a page of 4 KB at a time, the system takes
longer to give it than a kernel to write it. On Linux one may ask for pages of 2 MB (bench/NOTES.md); a system that has
none, or that gives them to everybody, is asked in vain.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGE = 32 << 20  # bytes, from which glibc takes every block from the system and gives it back when it is freed


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """like.new_empty(shape, dtype=dtype), to be written as a whole."""
    result = like.new_empty(shape, dtype=dtype)
    advise = _advise()
    if result.device.type == "cpu" and result.nbytes >= LARGE and advise is not None:
        first = -(-result.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(first, result.data_ptr() + result.nbytes - first, mmap.MADV_HUGEPAGE)
    return result


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """madvise(2), which only gives advice: an error of it is no error of ours. None: not Linux."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
