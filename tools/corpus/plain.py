"""Kernels without dots, which the stage leaves as they are: norms, a softmax, a loss, running and scattered sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tools.corpus.case import Case, Inputs, halves

EPSILON = 1e-5


@triton.jit
def layer_norm(x, weight, bias, out, columns, EPSILON: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0) * columns
    values = tl.load(x + row + at, mask=at < columns, other=0).to(tl.float32)
    centred = tl.where(at < columns, values - tl.sum(values, 0) / columns, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / columns + EPSILON)
    result = centred / deviation * tl.load(weight + at, mask=at < columns) + tl.load(bias + at, mask=at < columns)
    tl.store(out + row + at, result.to(tl.float16), mask=at < columns)


def normalise(x: Tensor, weight: Tensor, bias: Tensor, num_warps: int) -> Tensor:
    """(rows, columns)."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    layer_norm[(len(x),)](x, weight, bias, out, x.shape[1], EPSILON, block, num_warps=num_warps)
    return out


@triton.jit
def loss_and_softmax(logits, target, out, columns, BLOCK: tl.constexpr):
    """Writes the gradient of the cross entropy: softmax minus one at the target."""
    at = tl.arange(0, BLOCK)
    row = tl.program_id(0)
    values = tl.load(logits + row * columns + at, mask=at < columns, other=float("-inf")).to(tl.float32)
    weight = tl.exp(values - tl.max(values, 0))
    result = weight / tl.sum(weight, 0) - tl.where(at == tl.load(target + row), 1.0, 0.0)
    tl.store(out + row * columns + at, result.to(tl.float16), mask=at < columns)


def loss_gradient(logits: Tensor, target: Tensor, num_warps: int) -> Tensor:
    """(rows, columns), (rows,) -> (rows, columns)."""
    out = torch.empty_like(logits)
    block = triton.next_power_of_2(logits.shape[1])
    loss_and_softmax[(len(logits),)](logits, target, out, logits.shape[1], block, num_warps=num_warps)
    return out


@triton.jit
def running_sum(x, out, length, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    before = 0.0
    for start in range(0, length, BLOCK):
        values = tl.load(x + start + at, mask=start + at < length, other=0)
        tl.store(out + start + at, before + tl.cumsum(values, 0), mask=start + at < length)
        before += tl.sum(values, 0)


def accumulate(x: Tensor, block: int, num_warps: int) -> Tensor:
    """(length,) fp32."""
    out = torch.empty_like(x)
    running_sum[(1,)](x, out, len(x), block, num_warps=num_warps)
    return out


@triton.jit
def scattered_sum(index, rows, out, count, columns, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count * columns
    goal = tl.load(index + at // columns, mask=inside, other=0)
    tl.atomic_add(out + goal * columns + at % columns, tl.load(rows + at, mask=inside, other=0), mask=inside)


def scatter(index: Tensor, rows: Tensor, goals: int, block: int, num_warps: int) -> Tensor:
    """(count,), (count, columns) -> (goals, columns), as the gradient of an embedding."""
    out = torch.zeros(goals, rows.shape[1], device=rows.device)
    grid = (triton.cdiv(rows.numel(), block),)
    scattered_sum[grid](index, rows, out, *rows.shape, block, num_warps=num_warps)
    return out


def _norm_inputs(rows: int, columns: int) -> Inputs:
    return {"x": halves(rows, columns) * 3 + 1, "weight": torch.rand(columns), "bias": torch.randn(columns)}


def _loss_inputs(rows: int, columns: int) -> Inputs:
    return {"logits": halves(rows, columns) * 4, "target": torch.randint(columns, (rows,))}


def _sum_inputs(length: int) -> Inputs:
    return {"x": torch.randn(length)}


def _scatter_inputs(count: int, goals: int, columns: int) -> Inputs:
    return {"index": torch.randint(goals, (count,)), "rows": torch.randn(count, columns)}


def _norm(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x.to(dtype), x.shape[1:], weight.to(dtype), bias.to(dtype), EPSILON)


def _loss(dtype: torch.dtype, logits: Tensor, target: Tensor) -> Tensor:
    return logits.to(dtype).softmax(1) - torch.nn.functional.one_hot(target, logits.shape[1]).to(dtype)


def _sums(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x.to(dtype).cumsum(0)


def _scattered(dtype: torch.dtype, index: Tensor, rows: Tensor) -> Tensor:
    return torch.zeros(SMALL_GOALS, rows.shape[1], dtype=dtype).index_add(0, index, rows.to(dtype))


SMALL_GOALS = 9
_NONE = frozenset[str]()
CASES = (
    Case("layer norm", normalise, _norm_inputs, _norm, {"rows": 3, "columns": 200}, {"num_warps": 4},
         {"rows": 64, "columns": 4096}, {"num_warps": 8}, _NONE),
    Case("gradient of cross entropy", loss_gradient, _loss_inputs, _loss, {"rows": 3, "columns": 200},
         {"num_warps": 4}, {"rows": 64, "columns": 4096}, {"num_warps": 8}, _NONE),
    Case("running sum", accumulate, _sum_inputs, _sums, {"length": 500}, {"block": 128, "num_warps": 4},
         {"length": 10_000}, {"block": 1024, "num_warps": 4}, _NONE, torch.float32),
    Case("scattered sum", scatter, _scatter_inputs, _scattered, {"count": 40, "goals": SMALL_GOALS, "columns": 24},
         {"goals": SMALL_GOALS, "block": 256, "num_warps": 4}, {"count": 1000, "goals": 100, "columns": 128},
         {"goals": 100, "block": 1024, "num_warps": 4}, _NONE, torch.float32),
)  # fmt: skip
