"""How large an error may be: twice naive attention's, plus a floor of rounding.

Errors are greatest absolute differences from float64. Naive attention in the same dtype sets the scale: what it loses
is what the format loses. The floor is for cases where it loses nothing, such as rows with a single key: one unit in the
last place of the result, and a few of the arithmetic's (fp32, fp64 for fp64 inputs) at the magnitude of the terms that
were added up to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
ROUNDINGS = 8.0


def error(result: Tensor, exact: Tensor) -> float:
    """Greatest absolute difference; equal infinities differ by nothing, NaN by infinity."""
    if exact.numel() == 0:
        return 0.0
    result, exact = result.detach().double(), exact.detach().double()
    difference = torch.where(result == exact, 0.0, (result - exact).abs())
    return float(difference.nan_to_num(nan=torch.inf).max())


def floor(exact: Tensor, magnitude: float, dtype: torch.dtype) -> float:
    finite = exact.detach().double().nan_to_num(posinf=0.0, neginf=0.0).abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps * largest + ROUNDINGS * torch.finfo(arithmetic).eps * magnitude


def budget(naive: Tensor, exact: Tensor, magnitude: float) -> float:
    """The error that a result may have, given naive attention's result in the dtype in question."""
    return FACTOR * error(naive, exact) + floor(exact, magnitude, naive.dtype)


def magnitudes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    softmax_scale: float,
    keep_probability: float,
    dlse: Tensor | None = None,
) -> dict[str, float]:
    """Magnitude of the terms whose sum is each result: what cancels in them leaves its rounding behind."""

    def largest(x: Tensor) -> float:
        return float(x.detach().double().abs().max()) if x.numel() else 0.0

    def longest_row(x: Tensor) -> float:
        return float(x.detach().double().norm(dim=-1).max()) if x.numel() else 0.0

    queries_per_key = max(1, q.shape[-3] * (q.shape[-2] // max(1, k.shape[-2]))) ** 0.5  # roundings add up like a walk
    score = abs(softmax_scale) * longest_row(q) * longest_row(k)
    # p is off by roundings of its score and of lse; dS = P (dP - delta) by those of dP and delta.
    probability = 1.0 + score
    dscore = longest_row(dout) * longest_row(v) / keep_probability * probability
    if dlse is not None:
        dscore += largest(dlse) * probability
    return {
        "out": largest(v) / keep_probability * probability,
        "lse": probability,
        "dq": abs(softmax_scale) * dscore * largest(k),
        "dk": abs(softmax_scale) * dscore * largest(q) * queries_per_key,
        "dv": largest(dout) / keep_probability * probability * queries_per_key,
    }
