"""One launch of a kernel: its arguments by name, from a problem and tensors; what is fixed in its code.

A kernel is compiled for a dtype, head_dims, a set of terms, whether rows are packed, and which strides are multiples of
16: lengths, batch, heads and every number of the score program are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...caches import Cache
from ...inductor.graphs import is_traced
from ...problem import Problem
from ...scores import Dropout
from ...scores.arguments import UNBOUNDED
from ...scores.dropout import threshold
from ...tuning import TileOptions
from ..engine import CannotServeError
from . import loading
from .program import Terms

SMALLEST_COLUMNS = 16  # tl.dot takes no less
LARGEST_ROW_STRIDE = 1 << 23  # elements: places within a tile, of 256 rows at most, are counted in 32 bits


@dataclass(frozen=True)
class Kernel:
    """module: forward or backward. rows: whose tiles its programs are: "q" or "k"."""

    module: str
    function: str
    rows: str


FORWARD = Kernel("forward", "attention_forward", "q")
QUERIES = Kernel("backward", "attention_backward_queries", "q")
KEYS = Kernel("backward", "attention_backward_keys", "k")

# Why kernels cannot be launched on a device, which is as slow to find out as they are to be compiled; empty: they can.
_failures: Cache[object, list[str]] = Cache("failures of kernels", entries=256)


def terms_of(problem: Problem) -> Terms:
    dropout = problem.dropout_p > 0.0 and problem.dropout_seed is not None
    return Terms(problem.softcap > 0.0, problem.alibi_slopes is not None, dropout)


def readable(x: Tensor) -> Tensor:
    """Rows as the kernels read them, of any strides but for the last dimension's; others are copied."""
    *_, row, _, last = x.stride()
    if (last == 1 or x.shape[-1] == 1) and row <= LARGEST_ROW_STRIDE:
        return x
    return x.contiguous()


def launch(kernel: Kernel, problem: Problem, tensors: Mapping[str, Tensor | None], options: TileOptions) -> None:
    """tensors: those with rows of heads, (B, S, H, D) or (T, H, D), and lse, dlse and delta, by the kernel's names.

    Raises CannotServeError where the kernel cannot be compiled for the device, or be launched there.
    """
    terms, packed = terms_of(problem), problem.packed
    q, k, v = problem.q, problem.k, problem.v
    block_m, block_n, num_warps, num_stages = options
    if packed is None:
        longest_q, longest_k = q.shape[1], k.shape[1]
    else:
        longest_q, longest_k = packed.max_seqlen_q, packed.max_seqlen_k
    longest, block, nheads = (
        (longest_q, block_m, q.shape[-2]) if kernel.rows == "q" else (longest_k, block_n, k.shape[-2])
    )
    if packed is not None:
        longest = torch.sym_max(longest, 1)  # rows that belong to no sequence are written by the programs of the last
    tiles = (longest + block - 1) // block
    programs = tiles * nheads * problem.batch
    if isinstance(programs, int) and programs == 0:
        return
    left, right = (UNBOUNDED if side is None else min(side, UNBOUNDED) for side in problem.window)
    slopes = None if problem.alibi_slopes is None else problem.alibi_slopes.float().expand(problem.batch, -1)
    seed = Dropout.of(problem.dropout_p, problem.dropout_seed).seed if terms.dropout else None  # type: ignore[arg-type]
    arguments: dict[str, Any] = {
        **tensors,
        **_strides(tensors, packed is not None),
        "cu_seqlens_q": None if packed is None else packed.cu_seqlens_q,
        "cu_seqlens_k": None if packed is None else packed.cu_seqlens_k,
        "alibi_slopes": slopes,
        "alibi_slopes_stride_0": 0 if slopes is None else slopes.stride(0),
        "alibi_slopes_stride_1": 0 if slopes is None else slopes.stride(1),
        "seed": seed,
        "seqlen_q": 0 if packed is not None else longest_q,
        "seqlen_k": 0 if packed is not None else longest_k,
        "softmax_scale": float(problem.softmax_scale),
        "softcap": float(problem.softcap),
        "window_left": left,
        "window_right": right,
        "threshold": threshold(problem.dropout_p),
        "kept": 1.0 - problem.dropout_p,
        "nheads": nheads,
        "group": problem.heads_per_key,
        "tiles": tiles,
        "batches": problem.batch,
        "rows": (q if kernel.rows == "q" else k).shape[0],
    }
    fixed = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "HEAD_DIM": int(q.shape[-1]),
        "HEAD_DIM_V": int(v.shape[-1]),
        "COLUMNS": columns(int(q.shape[-1])),
        "COLUMNS_V": columns(int(v.shape[-1])),
        "DROPOUT": terms.dropout,
        # Products of fp32 are of fp32, as PyTorch's are unless it is asked for less.
        "PRECISION": "ieee",
        "num_warps": num_warps,
        "num_stages": num_stages,
    }
    function = getattr(loading.module(kernel.module, terms), kernel.function)
    if is_traced(q):
        from torch.library import wrap_triton

        wrap_triton(function)[(programs,)](**arguments, **fixed)
        return
    failures = _failures.get((kernel, terms, q.dtype, packed is None, *fixed.values(), q.device), list)
    if not failures:
        try:
            function[(programs,)](**arguments, **fixed)
            return
        except Exception as error:  # shared memory that the device does not have is an error of many kinds
            name = f"{kernel.function} for head_dim {q.shape[-1]}"
            failures.append(f"{name} could not be launched ({type(error).__name__}: {error})")
    raise CannotServeError(failures[0])


def columns(head_dim: int) -> int:
    """Of a tile in registers: a power of two."""
    return max(SMALLEST_COLUMNS, 1 << (head_dim - 1).bit_length())


def _strides(tensors: Mapping[str, Tensor | None], packed: bool) -> dict[str, Any]:
    """By the kernels' names. Of a dimension of size 1 no stride is read: 0 is one that is a multiple of 16."""
    found: dict[str, Any] = {}
    for name, x in tensors.items():
        if x is None or name in ("delta", "dlse"):  # as lse
            continue
        strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
        batch = () if packed else (f"stride_{name}_batch",)
        dimensions = (
            (*batch, f"stride_{name}_head") if name == "lse" else (*batch, f"stride_{name}_row", f"stride_{name}_head")
        )
        found |= {f"stride_{name}_batch": 0} | dict(zip(dimensions, strides, strict=False))
    return found
