"""Forward and backward of one call: its tensors, tables and numbers put together, and through one compiled graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import turing
from ...inductor import lowering
from ...inductor.graphs import is_known, is_traced
from ...problem import Direction, Problem
from ...scores import Dropout
from ...scores.dropout import threshold as dropout_threshold
from .. import nvidia
from . import kernels, pages, tables
from .blocks import BLOCK, stored
from .flex import SMALLEST_HEAD_DIM, Graph
from .kernels import Spec, canonical
from .mods import Features, Layout
from .options import largest_head_dim, options_for
from .paged import PagedSpec

LARGEST_TENSOR = 2**31  # kernels index with 32 bits
WIDE = ("q", "k", "v", "dout", "out")  # of a kernel's tensors, in its order, those with rows of heads


def unsupported_reason(
    device: torch.device, problem: Problem | None = None, direction: Direction = "forward"
) -> str | None:
    """Why this engine cannot serve a device, or a call on it; None: it can."""
    if (reason := nvidia.unsupported_reason(device)) is not None:
        return reason
    capability = nvidia.capability_of(device)
    if problem is not None:
        if direction == "backward" and problem.bias_gradient:
            return "its kernel would add to a bias's gradient in an order that changes from run to run"
        if problem.q.dtype == torch.float64:
            return "it computes in fp32, and these are fp64"
        largest = max(problem.q.shape[-1], problem.v.shape[-1])
        most = largest_head_dim(problem.q.dtype, capability)
        if largest > most:
            memory = f"{nvidia.shared_memory(capability)} KB of shared memory"
            return f"its tiles for {problem.q.dtype} in {memory} end at head_dim {most}, and this is {largest}"
        for elements in _extents(problem, direction):
            if elements >= LARGEST_TENSOR:
                return f"it indexes tensors that lie within less than 2**31 elements, and this takes {elements}"
    return None


def _extents(problem: Problem, direction: Direction) -> list[int]:
    """Elements from the first to the last of the tensors given, and of those made of them: out and its gradient,
    queries laid out as a batch, keys gathered from pages, and all of these where head_dim is padded."""
    q, k, v, packed = problem.q, problem.k, problem.v, problem.packed
    queries, keys = math.prod(q.shape[:-2]), math.prod(k.shape[:-2])
    gathered = 0
    if direction == "forward" and (found := pages.plan(problem)) is not None:
        rows = found.blocks * found.splits * found.block_rows * k.shape[-2]
        return [*map(_extent, (q, k, v)), rows * max(q.shape[-1], v.shape[-1]), queries * q.shape[-2] * v.shape[-1]]
    if packed is not None and tables.layout_of(problem, direction) == "padded":
        queries = problem.batch * packed.max_seqlen_q
    if packed is not None and packed.block_table is not None:
        gathered = math.prod(packed.block_table.shape) * k.shape[1]
    columns = max(q.shape[-1], v.shape[-1], SMALLEST_HEAD_DIM)
    made = [queries * q.shape[-2] * columns, *(rows * k.shape[-2] * columns for rows in (keys, gathered))]
    given = (q, k, v) if problem.bias is None else (q, k, v, problem.bias)
    return [*map(_extent, given), *made]


def _extent(x: Tensor) -> int:
    """Elements from a tensor's first to its last, gaps between rows and all."""
    return 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))


def defers(problem: Problem, direction: Direction, to: str) -> bool:
    """Is another engine faster at a call that this one could serve?

    With dropout the template takes two passes over the keys, the triton engine's kernel one. Without it nobody has
    timed that engine on a card, and flex_attention's kernels were: so they serve.
    """
    return to == "triton" and problem.dropout_p > 0.0 and problem.dropout_seed is not None


def inlines(problem: Problem, direction: Direction) -> bool:
    """In a graph of CUDA tensors a call is the template's operators and those of its tables, whatever the sizes: layers
    share the tables, since common subexpressions are computed once."""
    return problem.q.device.type == "cuda"


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out, shaped as q with v's head_dim, and lse, (B, H, Sq) or, packed, (H, T)."""
    if _nothing_to_see(problem):
        *leading, rows, heads = problem.q.shape[:-1]
        out = problem.q.new_zeros((*problem.q.shape[:-1], problem.v.shape[-1]))
        return out, problem.q.new_full((*leading, heads, rows), -math.inf, dtype=torch.float32)
    out, lse = _run("forward", problem, {})
    return out, lse


def backward(
    problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv. Probabilities come from the lse given, which may be merged over more keys than these. A bias's
    gradient is not to be had."""
    if _nothing_to_see(problem):
        return torch.zeros_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    given = {"dout": dout, "out": out, "lse": lse.contiguous()}
    given |= {} if dlse is None else {"dlse": dlse.contiguous()}
    dq, dk, dv = _run("backward", problem, given)
    return dq, dk, dv


def _nothing_to_see(problem: Problem) -> bool:
    table = None if problem.packed is None else problem.packed.block_table
    no_pages = table is not None and table.shape[1] == 0
    return problem.q.numel() == 0 or problem.k.numel() == 0 or problem.batch == 0 or no_pages


def _run(direction: Direction, problem: Problem, gradients: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """gradients: what backward takes besides."""
    q, device = problem.q, problem.q.device
    capability = nvidia.capability_of(device)
    nvidia.prepare(capability, q.dtype)
    # Of a graph's sizes, these are in its code: heads and their dimensions.
    nheads, nheads_k = int(q.shape[-2]), int(problem.k.shape[-2])
    head_dims = int(q.shape[-1]), int(problem.v.shape[-1])
    layout = tables.layout_of(problem, direction)
    features = _features(problem, layout)
    if layout == "paged":
        return _run_paged(problem, features)
    options = options_for(direction, max(head_dims), q.dtype, features, capability)
    given = {"q": q, "k": problem.k, "v": problem.v, **gradients, **_of_the_call(problem, features)}
    if is_traced(q):
        # All of it becomes part of someone's graph, numbers as they are.
        given |= {**tables.traced(problem, layout), **_numbers(problem, features)}
        given |= {"bias": stored(given["bias"])} if features.bias else {}
        return Graph(direction, features, _divisible(problem, layout), options)(given)
    wide = {name: canonical(x) for name, x in given.items() if name in WIDE}
    stream = tables.stream_of(device)
    given |= {**tables.tables_of(problem, layout, stream), **wide}
    given |= {name: tables.number(x, device, stream) for name, x in _numbers(problem, features).items()}
    spec = Spec(
        direction,
        features,
        q.dtype,
        nheads,
        nheads_k,
        *head_dims,
        tuple((x.stride(-3), x.stride(-2)) for x in wide.values()),
        _divisible(problem, layout),
        options,
        "pages" in given,
        "skipped" in given,
        "dlse" in given,
        None if problem.bias is None else problem.bias.dtype,
    )
    return kernels.run(spec, given)


def _run_paged(problem: Problem, features: Features) -> tuple[Tensor, ...]:
    """Forward on keys where they lie."""
    found, device = pages.planned(problem), problem.q.device
    stream = tables.stream_of(device)
    q, k, v = canonical(problem.q), found.k.view(problem.k), found.v.view(problem.v)
    given = {"q": q, "k": k, "v": v, **_slopes(problem), **tables.tables_of(problem, "paged", stream)}
    given |= {name: tables.number(x, device, stream) for name, x in _numbers(problem, features).items()}
    spec = PagedSpec(
        features,
        q.dtype,
        int(q.shape[-2]),
        int(k.shape[-2]),
        int(q.shape[-1]),
        int(v.shape[-1]),
        tuple((x.stride(0), x.stride(1)) for x in (q, k, v)),
        k.shape[0] % found.keys == 0,
        found.options,
        found.splits > 1,
    )
    return kernels.run(spec, given)


def _features(problem: Problem, layout: Layout) -> Features:
    dropout = problem.dropout_p > 0.0 and problem.dropout_seed is not None
    bias = () if problem.bias is None else _varying(problem.bias)
    group = problem.heads_per_key if layout == "paged" else 1
    return Features(problem.softcap > 0.0, problem.alibi_slopes is not None, dropout, layout, bias, group)


def _varying(bias: Tensor) -> tuple[bool, ...]:
    """With which of its dimensions it varies."""
    sides = zip(bias.shape, bias.stride(), strict=True)
    return tuple(not (is_known(size == 1) or is_known(stride == 0)) for size, stride in sides)


def _numbers(problem: Problem, features: Features) -> dict[str, Any]:
    numbers: dict[str, Any] = {"softmax_scale": float(problem.softmax_scale)}
    if features.softcap:
        numbers["softcap"] = problem.softcap
    if features.dropout:
        numbers |= {"threshold": dropout_threshold(problem.dropout_p), "keep": 1.0 - problem.dropout_p}
    return numbers


def _of_the_call(problem: Problem, features: Features) -> dict[str, Tensor]:
    """Tensors that are the call's own, besides its rows."""
    given = _slopes(problem)
    if problem.bias is not None:
        bias = problem.bias[tuple(slice(None) if varies else 0 for varies in features.bias)]
        given["bias"] = bias if not bias.dim() or is_known(bias.stride(-1) == 1) else bias.contiguous()
    if features.dropout and problem.dropout_seed is not None:
        given["seed"] = Dropout.of(problem.dropout_p, problem.dropout_seed).seed
    if problem.packed is not None and problem.packed.block_table is not None:
        given["pages"] = problem.packed.block_table.contiguous()
    return given


def _slopes(problem: Problem) -> dict[str, Tensor]:
    slopes = problem.alibi_slopes
    return {} if slopes is None else {"alibi_slopes": slopes.expand(problem.batch, -1).contiguous()}


def _divisible(problem: Problem, layout: Layout) -> bool:
    """Are there whole blocks only?"""
    if layout == "padded" or (problem.packed is not None and problem.packed.block_table is not None):
        return False
    q, k = (problem.q.shape[1], problem.k.shape[1]) if layout == "dense" else (problem.q.shape[0], problem.k.shape[0])
    return is_known(q % BLOCK == 0) and is_known(k % BLOCK == 0)


def _before_graphs() -> None:
    """A graph that Inductor has in its caches may be loaded without being traced: then nothing here is called."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == nvidia.TURING and not turing.missing():
        turing.enable()


lowering.prepare(_before_graphs)
