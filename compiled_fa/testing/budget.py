"""How large an error may be: twice naive attention's, plus a floor of rounding.

Errors are greatest absolute differences from float64. Naive attention in the same dtype sets the scale: what it loses
is what the format loses. The floor is for cases where it loses nothing, such as rows with a single key: one unit in the
last place of the result, and a few of the arithmetic's (fp32, fp64 for fp64 inputs) at the magnitude of the terms that
were added up to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cases import Inputs
from .run import Results, run_naive

FACTOR = 2.0
ROUNDINGS = 8.0


def error(result: Tensor, exact: Tensor) -> float:
    """Greatest absolute difference; equal infinities differ by nothing, NaN by infinity."""
    if exact.numel() == 0:
        return 0.0
    result, exact = result.detach().double(), exact.detach().double()
    difference = torch.where(result == exact, 0.0, (result - exact).abs())
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def floor(exact: Tensor, magnitude: float, dtype: torch.dtype) -> float:
    finite = exact.detach().double().nan_to_num(posinf=0.0, neginf=0.0).abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(dtype).eps * largest + ROUNDINGS * torch.finfo(arithmetic).eps * magnitude


def budget(naive: Tensor, exact: Tensor, magnitude: float) -> float:
    """The error that a result may have, given naive attention's result in the dtype in question."""
    return FACTOR * error(naive, exact) + floor(exact, magnitude, naive.dtype)


def magnitudes(inputs: Inputs[Any]) -> dict[str, float]:
    """Magnitude of the terms whose sum is each result: what cancels in them leaves its rounding behind."""
    case, q, k, v = inputs.case, inputs.q, inputs.k, inputs.v

    def largest(x: Tensor) -> float:
        return float(x.detach().double().abs().max()) if x.numel() else 0.0

    def longest_row(x: Tensor) -> float:
        return float(x.detach().double().norm(dim=-1).max()) if x.numel() else 0.0

    keep_probability, scale = 1.0 - case.dropout_p, abs(case.scale)
    queries_per_key = max(1, q.shape[0] * case.heads_per_key) ** 0.5  # roundings add up like a walk
    score = scale * longest_row(q) * longest_row(k)
    bias = inputs.bias if inputs.bias is not None and inputs.bias.is_floating_point() else None
    if bias is not None:
        score += largest(bias.nan_to_num(neginf=0.0))
    # p is off by roundings of its score and of lse; dS = P (dP - delta) by those of dP and delta.
    probability = 1.0 + score
    dscore = longest_row(inputs.dout) * longest_row(v) / keep_probability * probability
    if inputs.dlse is not None:
        dscore += largest(inputs.dlse) * probability
    found = {
        "out": largest(v) / keep_probability * probability,
        "lse": probability,
        "dq": scale * dscore * largest(k),
        "dk": scale * dscore * largest(q) * queries_per_key,
        "dv": largest(inputs.dout) / keep_probability * probability * queries_per_key,
    }
    if bias is not None:
        # delta is made of out, which is rounded to the case's dtype: a score's gradient has that, too.
        wide = torch.promote_types(case.dtype, torch.float32)
        rounding = torch.finfo(case.dtype).eps / (ROUNDINGS * torch.finfo(wide).eps)
        of_delta = longest_row(inputs.dout) * longest_row(v) / keep_probability * rounding
        scores = case.batch * case.nheads * case.max_seqlen_q * case.max_seqlen_k
        found["dbias"] = (dscore + of_delta) * (scores / max(1, bias.numel())) ** 0.5
    return found


class Expected(NamedTuple):
    """A result in float64, the error of naive attention in the case's dtype, and the error that is allowed."""

    exact: Tensor
    naive: float
    allowed: float

    @classmethod
    def of(cls, naive: Tensor, exact: Tensor, magnitude: float) -> Expected:
        return cls(exact, error(naive, exact), budget(naive, exact, magnitude))

    def allows(self, found: float, slack: float = 1.0) -> bool:
        """Is this error within `slack` times the budget? Infinite ones never are, though naive attention overflow."""
        return found < torch.inf and found <= slack * self.allowed


def expected(inputs: Inputs[Any], gradients: bool = True) -> dict[str, Expected]:
    """Of a case's results, by name: all, or without gradients."""
    gradients = gradients and not inputs.case.page_size
    exact, naive = (run_naive(inputs, dtype, gradients) for dtype in (torch.float64, inputs.case.dtype))
    if "dbias" in naive and naive["dbias"].dtype.itemsize > inputs.case.dtype.itemsize:
        naive["dbias"] = naive["dbias"].to(inputs.case.dtype)  # it was computed in no more
    sizes = magnitudes(inputs)
    return {name: Expected.of(naive[name], x, sizes[name]) for name, x in exact.items()}


def check_against_float64(inputs: Inputs[Any], results: Results) -> None:
    """Raises AssertionError for a result, packed and by name, that is not within its budget."""
    wanted = expected(inputs, gradients=not results.keys() <= {"out", "lse"})
    for name, result in results.items():
        of = wanted[name]
        if result.shape != of.exact.shape:
            raise AssertionError(f"{name}: shape {tuple(result.shape)}, wanted {tuple(of.exact.shape)}")
        found = error(result, of.exact)
        if not of.allows(found):
            raise AssertionError(f"{name}: error {found:.3e}, naive {of.naive:.3e}, allowed {of.allowed:.3e}")
