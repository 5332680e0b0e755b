"""The triton engine: kernels of our own, written in Triton, for dense and packed calls.

attention.py  which calls are served; forward and backward of one
launching.py  one launch: its arguments, and what is fixed in its code
options.py    tile sizes, warps and stages
loading.py    the kernels for a set of terms: the next three put together
program.py    the score program as Triton functions, traced from its PyTorch ops
printing.py   a traced graph of elementwise operators as Triton functions
forward.py, backward.py, tiles.py     the kernels: Triton code, which is imported only where Triton is

They read cu_seqlens themselves and find their tiles from it, so that a call makes no tables and no copies; all numbers
of the score program are arguments; dropout takes no pass of its own.
"""

from ..engine import nothing_prepared
from .attention import backward, defers, forward, inlines, unsupported_reason

__all__ = ["backward", "defers", "forward", "inlines", "name", "prepared", "unsupported_reason"]

name = "triton"

prepared = nothing_prepared
