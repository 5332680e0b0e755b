"""The engines, and which of them serves a call.

engine.py     what an engine is
selection.py  which one serves
nvidia.py     what the engines of Triton kernels ask about a GPU

fused/     one Triton kernel each way, on CUDA: flex_attention's template
triton/    Triton kernels of our own, on CUDA: dropout in one pass, tensors of any size
split_kv/  few queries on many keys, and many short sequences: forward, on a CPU, without tiles
sdpa_cpu/  PyTorch's own flash kernel, on a CPU
tiled/     PyTorch ops on tiles: everything, anywhere
"""

from .engine import CannotServeError, Engine, Prepared
from .selection import ENGINES, Route, inlined, prepared, requested, select, use_engine

__all__ = [
    "ENGINES",
    "CannotServeError",
    "Engine",
    "Prepared",
    "Route",
    "inlined",
    "prepared",
    "requested",
    "select",
    "use_engine",
]
