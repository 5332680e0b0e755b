"""Forward and backward of one call: which calls are served, and the launches of each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...problem import Direction, Problem
from .. import nvidia
from . import in_graph, launching
from .launching import FORWARD, KEYS, QUERIES, Kernel, readable, terms_of
from .options import largest_head_dim, options_for

NAMES = {FORWARD: "forward", QUERIES: "queries", KEYS: "keys"}  # of kernels in the table of options


def unsupported_reason(
    device: torch.device, problem: Problem | None = None, direction: Direction = "forward"
) -> str | None:
    """Why this engine cannot serve a device, or a call on it; None: it can."""
    if (reason := nvidia.unsupported_reason(device)) is not None:
        return reason
    if problem is not None:
        dtype, capability = problem.q.dtype, nvidia.capability_of(device)
        if dtype == torch.float64:
            return "it computes in fp32, and these are fp64"
        if problem.packed is not None and problem.packed.block_table is not None:
            return "its kernels do not read keys in pages"
        if problem.bias is not None:
            return "its kernels add no bias"
        largest = max(problem.q.shape[-1], problem.v.shape[-1])
        if largest > (most := largest_head_dim(dtype, capability)):
            memory = f"{nvidia.shared_memory(capability)} KB of shared memory"
            return f"its tiles for {dtype} in {memory} end at head_dim {most}, and this is {largest}"
    return None


def defers(problem: Problem, direction: Direction, to: str) -> bool:
    """Is one of those after it, which tile in PyTorch ops, faster at a call that this one could serve? None is. When
    `fused` leaves a call to this one, it says itself."""
    return False


def inlines(problem: Problem, direction: Direction) -> bool:
    """In a graph of CUDA tensors a call is its launches, whatever the sizes."""
    return problem.q.device.type == "cuda" and in_graph.is_possible()


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out, shaped as q with v's head_dim, and lse, (B, H, Sq) or, packed, (H, T)."""
    q, k, v = problem.q, problem.k, problem.v
    *leading, rows, nheads, _ = q.shape
    shape, shape_of_lse = (*q.shape[:-1], v.shape[-1]), (*leading, nheads, rows)
    if isinstance(problem.batch, int) and problem.batch == 0:
        return q.new_zeros(shape), q.new_full(shape_of_lse, -math.inf, dtype=torch.float32)
    results = {"out": q.new_empty(shape), "lse": q.new_empty(shape_of_lse, dtype=torch.float32)}
    out, lse = _launch(FORWARD, problem, {"q": readable(q), "k": readable(k), "v": readable(v), **results})
    return out, lse


def backward(
    problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv. Probabilities come from the lse given, which may be merged over more keys than these."""
    q, k, v = problem.q, problem.k, problem.v
    if isinstance(problem.batch, int) and problem.batch == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    read = {"q": readable(q), "k": readable(k), "v": readable(v), "dout": readable(dout), "lse": lse.contiguous()}
    given = {"out": readable(out), "dlse": None if dlse is None else dlse.contiguous()}
    results = {"dq": _like(q), "delta": _like(lse)}
    dq, delta = _launch(QUERIES, problem, {**read, **given, **results})
    dk, dv = _launch(KEYS, problem, {**read, "delta": delta, "dk": _like(k), "dv": _like(v)})
    return dq, dk, dv


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch(kernel: Kernel, problem: Problem, tensors: Mapping[str, Tensor | None]) -> list[Tensor]:
    q, capability = problem.q, nvidia.capability_of(problem.q.device)
    nvidia.prepare(capability, q.dtype)
    largest = max(int(q.shape[-1]), int(problem.v.shape[-1]))
    options = options_for(NAMES[kernel], largest, q.dtype, terms_of(problem), capability)
    return launching.run(launching.launch_of(kernel, problem, tensors, options))
