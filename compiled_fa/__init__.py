"""The flash_attn 2 functions as PyTorch ops: FlashAttention for every machine PyTorch runs on.

    interface.py      the six functions: what people call
    ops.py            torch.ops.compiled_fa.*: what torch.compile and autograd see
    validation.py     every check of an argument
    seed.py           dropout's seed; forward_mode.py, tangent.py: forward-mode AD; batching.py: torch.func.vmap
    engines/          who computes: fused (one Triton kernel each way, on CUDA), sdpa_cpu (PyTorch's kernel, on a CPU),
                      tiled (anything, anywhere)
    inductor.py       graphs compiled by Inductor and called without guards
    lowering.py       what Inductor makes of our ops in other people's graphs
    warmup.py         compiling ahead; progress.py: what a terminal is told meanwhile
    hardware.py       what this machine's processor does well; memory.py: how its system gives memory fast
    untiled.py        which calls on a CPU need no tiles
    without_numpy.py  torch, imported quietly
    turing/           tensor cores on Turing for every Triton kernel of the process
    scores/           what a score is: scale, softcap, ALiBi, window, lengths, dropout

Shape letters, here and everywhere: B batch, Sq and Sk lengths, H and Hk query and key heads, D head_dim, Dv head_dim of
v, T total tokens of packed sequences.
"""

from . import without_numpy as without_numpy  # before all that imports torch
from .engines import use_engine
from .interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "use_engine",
    "warmup",
]
