"""Forward and backward of one call: into the layout of the template, through its kernel, and back."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from ... import turing
from ...messages import say_once
from ...problem import Direction, Problem
from . import flex
from .layouts import Layout, canonical, layout_of, padded
from .mods import Features
from .options import capability_of, options_for

LARGEST_HEAD_DIM = 256
LARGEST_WIDE_HEAD_DIM = 128  # of bf16 and fp32 on Turing, whose operands take twice the shared memory
LARGEST_TENSOR = 2**30  # kernels index with 32 bits, and block-aligned copies are larger than the tensors
TURING = (7, 5)


def unsupported_reason(
    device: torch.device, problem: Problem | None = None, direction: Direction = "forward"
) -> str | None:
    """Why this engine cannot serve a device, or a call on it; None: it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, and this is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if capability_of(device) == TURING and (missing := turing.missing()):
        return missing
    if capability_of(device) < TURING:
        return f"it needs compute capability 7.5, and this device has {'.'.join(map(str, capability_of(device)))}"
    if problem is not None:
        if problem.q.dtype == torch.float64:
            return "it computes in fp32, and these are fp64"
        largest = max(problem.q.shape[-1], problem.v.shape[-1])
        if largest > LARGEST_HEAD_DIM:
            return f"it has tiles for head_dim up to {LARGEST_HEAD_DIM}, and this is {largest}"
        wide = problem.q.dtype != torch.float16
        if capability_of(device) == TURING and wide and largest > LARGEST_WIDE_HEAD_DIM:
            ends = f"its tiles for {problem.q.dtype} end at head_dim {LARGEST_WIDE_HEAD_DIM}"
            return f"on Turing {ends}, and this is {largest}"
        elements = max(problem.q.numel(), problem.k.numel(), problem.v.numel())
        if elements >= LARGEST_TENSOR:
            return f"it indexes tensors of less than 2**30 elements, and this has {elements}"
    return None


def defers(problem: Problem, direction: Direction, to: str) -> bool:
    """Is another engine faster at a call that this one could serve? None is known to be."""
    return False


def inlines(problem: Problem, direction: Direction) -> bool:
    """Its kernels are compiled by themselves."""
    return False


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out, shaped as q with v's head_dim, and lse, (B, H, Sq) or, packed, (H, T)."""
    out_shape = (*problem.q.shape[:-1], problem.v.shape[-1])
    if problem.q.numel() == 0 or problem.k.numel() == 0:
        *leading, rows, heads = problem.q.shape[:-1]
        lse = problem.q.new_full((*leading, heads, rows), -math.inf, dtype=torch.float32)
        return problem.q.new_zeros(out_shape), lse
    _prepare(problem)
    layout = layout_of(problem)
    q, k, v = _loaded(layout, problem)
    spec = _spec("forward", layout.features, problem, layout, (q, k, v))
    out, lse = flex.run(spec, [q, k, v, *layout.block_tables, *layout.buffers.flatten()])
    if problem.dropout_p > 0.0:
        # The kernel normalised over the kept keys. The softmax is over all of them, whose lse a second pass finds:
        # out = exp(lse_kept - lse) / (1 - p) * out_kept. Its v is a sliver of v, to have less to multiply.
        features = layout.features.without_dropout()
        sliver = canonical(v[..., : padded(v[..., :1]).shape[-1]])
        spec = _spec("forward", features, problem, layout, (q, k, sliver))
        _, lse_all = flex.run(spec, [q, k, sliver, *layout.block_tables, *layout.buffers.without_dropout().flatten()])
        factor = torch.exp(lse - lse_all.clamp(min=torch.finfo(torch.float32).min)) / (1.0 - problem.dropout_p)
        out, lse = (out * factor[..., None]).to(out.dtype), lse_all
    out = layout.store_queries(out[..., : problem.v.shape[-1]])
    return out, _stored_rows(layout, lse, problem)


def backward(
    problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv. Probabilities come from the lse given, which may be merged over more keys than these."""
    if problem.q.numel() == 0 or problem.k.numel() == 0:
        return torch.zeros_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    _prepare(problem)
    layout = layout_of(problem)
    q, k, v = _loaded(layout, problem)
    delta = (dout.float() * out.float()).sum(-1)  # FlashAttention-2, Algorithm 2, line 4; (B, S, H) or (T, H)
    if dlse is not None:
        delta = delta - dlse.mT
    if problem.dropout_p > 0.0:
        dout = dout / (1.0 - problem.dropout_p)
    douts = canonical(layout.load_queries(padded(dout)))
    # Rows that only fill up a block: lse +inf makes their probabilities 0.
    lses = layout.load_queries(lse.mT[..., None], fill=math.inf)[..., 0].contiguous()
    deltas = layout.load_queries(delta[..., None])[..., 0].contiguous()
    spec = _spec("backward", layout.features, problem, layout, (q, k, v, douts))
    dq, dk, dv = flex.run(spec, [q, k, v, douts, lses, deltas, *layout.block_tables, *layout.buffers.flatten()])
    return (
        layout.store_queries(dq[..., : problem.q.shape[-1]]),
        layout.store_keys(dk[..., : problem.k.shape[-1]]),
        layout.store_keys(dv[..., : problem.v.shape[-1]]),
    )


def _prepare(problem: Problem) -> None:
    """Turing's tensor cores, for this engine's kernels and every other Triton kernel of the process."""
    if capability_of(problem.q.device) == TURING:
        turing.enable()
        if problem.q.dtype == torch.bfloat16:
            say_once("Turing has no tensor cores for bfloat16: it works, slowly; float16 is fast")


def _loaded(layout: Layout, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    q = canonical(layout.load_queries(padded(problem.q)))
    return q, canonical(layout.load_keys(padded(problem.k))), canonical(layout.load_keys(padded(problem.v)))


def _stored_rows(layout: Layout, per_row: Tensor, problem: Problem) -> Tensor:
    """lse, (1, H, rows) or (B, H, S), in the layout of the op."""
    rows = layout.store_queries(per_row[..., None])[..., 0]
    return rows.mT.contiguous()


def _spec(
    direction: Direction,
    features: Features,
    problem: Problem,
    layout: Layout,
    tensors: tuple[Tensor, ...],
) -> flex.Spec:
    q, k, v = tensors[:3]
    return flex.Spec(
        direction,
        features,
        q.dtype,
        q.shape[1],
        k.shape[1],
        q.shape[-1],
        v.shape[-1],
        tuple((x.stride(2), x.stride(1)) for x in tensors),
        layout.divisible,
        options_for(direction, max(q.shape[-1], v.shape[-1]), q.dtype, features, capability_of(q.device)),
    )
