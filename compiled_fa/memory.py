"""Memory from the system, on a CPU, where getting it takes longer than using it (bench/NOTES.md).

Both ask; a system, or an allocator, that does not know what is meant gives memory as it always does.
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
    """like.new_empty(shape, dtype=dtype), for a result that will be written as a whole.

    Hundreds of megabytes are new memory at every call, of which Linux gives 4 KB at a time, unless asked for 2 MB.
    """
    result = like.new_empty(shape, dtype=dtype)
    advise = _advise()
    if result.device.type == "cpu" and result.nbytes >= LARGE and advise is not None:
        first = -(-result.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(first, result.data_ptr() + result.nbytes - first, mmap.MADV_HUGEPAGE)
    return result


@functools.cache
def keep_freed() -> None:
    """Let this process keep up to 64 MB that a call frees for the next one, instead of giving it back and asking again.

    glibc gives back free memory beyond twice the largest block that it had from the system, of up to LARGE, and has
    seen freed. This one is never written to: it takes no memory.
    """
    if sys.platform == "linux":
        torch.empty(LARGE - (1 << 16), dtype=torch.uint8, device="cpu")


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """madvise(2), which only gives advice: an error of it is no error of ours. None: not Linux."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise
