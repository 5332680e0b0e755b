"""Launches: a kernel's arguments by name, from a problem and tensors, and what is fixed in its code.

A kernel is compiled for a dtype, head_dims, a set of terms, whether rows are packed, and which strides are multiples of
16: lengths, batch, heads and every number of the score program are arguments.
"""

from __future__ import annotations

import contextlib
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
from . import in_graph, loading
from .program import Terms

SMALLEST_COLUMNS = 16  # tl.dot takes no less
LARGEST_ROW_STRIDE = 1 << 23  # elements: places within a tile, of 256 rows at most, are counted in 32 bits


@dataclass(frozen=True)
class Kernel:
    """module: forward or backward. rows: whose tiles its programs are: "q" or "k". written: its results."""

    module: str
    function: str
    rows: str
    written: tuple[str, ...]


FORWARD = Kernel("forward", "attention_forward", "q", ("out", "lse"))
QUERIES = Kernel("backward", "attention_backward_queries", "q", ("dq", "delta"))
KEYS = Kernel("backward", "attention_backward_keys", "k", ("dk", "dv"))

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


@dataclass(frozen=True)
class Launch:
    """arguments: by name. constants: what is fixed in the code. programs: how many there are."""

    kernel: Kernel
    terms: Terms
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    programs: Any
    num_warps: int
    num_stages: int

    @property
    def function(self) -> Any:
        """The Triton function. Raises CannotServeError where a term has no Triton code."""
        return getattr(loading.module(self.kernel.module, self.terms), self.kernel.function)

    @property
    def keywords(self) -> dict[str, Any]:
        """All that Triton is given."""
        return {**self.arguments, **self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


def launch_of(kernel: Kernel, problem: Problem, tensors: Mapping[str, Tensor | None], options: TileOptions) -> Launch:
    """tensors: those with rows of heads, (B, S, H, D) or (T, H, D), and lse, dlse and delta, by the kernel's names."""
    terms, packed = terms_of(problem), problem.packed
    q, k, v = problem.q, problem.k, problem.v
    block_m, block_n, num_warps, num_stages = options
    seqlen_q, seqlen_k = (0, 0) if packed is not None else (q.shape[1], k.shape[1])
    longest_q, longest_k = (seqlen_q, seqlen_k) if packed is None else (packed.max_seqlen_q, packed.max_seqlen_k)
    rows, longest, block = (q, longest_q, block_m) if kernel.rows == "q" else (k, longest_k, block_n)
    if packed is not None:
        longest = torch.sym_max(longest, 1)  # rows that belong to no sequence are written by the programs of the last
    tiles, nheads = (longest + block - 1) // block, rows.shape[-2]
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
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
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
        "rows": rows.shape[0],
    }
    constants = {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "HEAD_DIM": int(q.shape[-1]),
        "HEAD_DIM_V": int(v.shape[-1]),
        "COLUMNS": columns(int(q.shape[-1])),
        "COLUMNS_V": columns(int(v.shape[-1])),
        "DROPOUT": terms.dropout,
        # Products of fp32 are of fp32, as PyTorch's are unless it is asked for less.
        "PRECISION": "ieee",
    }
    return Launch(kernel, terms, arguments, constants, tiles * nheads * problem.batch, num_warps, num_stages)


def run(launch: Launch) -> list[Tensor]:
    """-> its results: the tensors given, written to, or in a graph others.

    Raises CannotServeError where the kernel cannot be compiled for the device, or be launched there.
    """
    function, q, grid = launch.function, launch.arguments["q"], (launch.programs,)
    written = launch.kernel.written
    if is_traced(q):
        return list(in_graph.launch(function, grid, launch.keywords, written).values())
    results = [launch.arguments[name] for name in written]
    if launch.programs == 0:
        return results
    kind = *launch.constants.values(), launch.num_warps, launch.num_stages, launch.arguments["cu_seqlens_q"] is None
    failures = _failures.get((launch.kernel, launch.terms, q.dtype, q.device, kind), list)
    if not failures:
        try:
            with _current(q.device):
                function[grid](**launch.keywords)
            return results
        except Exception as error:  # shared memory that the device does not have is an error of many kinds
            name = f"{launch.kernel.function} for head_dim {q.shape[-1]}"
            failures.append(f"{name} could not be launched ({type(error).__name__}: {error})")
    raise CannotServeError(failures[0])


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, whichever the tensors are on."""
    here = device.type != "cuda" or device.index in (None, torch.cuda.current_device())
    return contextlib.nullcontext() if here else torch.cuda.device(device)


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
