"""Fits a rule of a tuning table to timings: which of two ways to serve a call is the faster?

A choice costs what it loses: nothing where both take alike, much where one takes twice as long. So what is least, over
the weights, is the regret: the sum of |ln(seconds of the one / seconds of the other)| over the calls that the rule
gives to the slower.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import torch
from torch import Tensor

from compiled_fa.tuning import AT_EVERY_CALL, AT_NO_CALL, Rule

FARTHEST = 1.5  # of a logarithm: how much slower still is no matter
SOFTNESS = 0.15  # of the step from one way to the other, so that it has a slope
TRUE_RATIO = 0.02  # the weight of being right about the ratio itself: it guides where few calls lie
RIDGE = 1e-2  # of standardised weights: what calls do not tell stays small


class Timed(NamedTuple):
    """A call by both ways. features: of its `Sizes`; ratio: ln(seconds of the one / seconds of the other)."""

    features: tuple[float, ...]
    ratio: float


def fit(calls: Sequence[Timed]) -> Rule:
    """The rule of least regret on these calls."""
    if all(call.ratio >= 0.0 for call in calls):
        return AT_NO_CALL
    if all(call.ratio <= 0.0 for call in calls):
        return AT_EVERY_CALL
    sizes = torch.tensor([call.features for call in calls], dtype=torch.float64)
    ratios = torch.tensor([call.ratio for call in calls], dtype=torch.float64).clamp(-FARTHEST, FARTHEST)
    mean, scale = sizes.mean(0), sizes.std(0)
    varies = scale > 1e-9
    standard = torch.where(varies, (sizes - mean) / torch.where(varies, scale, 1.0), 0.0)
    standard[:, 0] = 1.0
    weights = _least_regret(standard, ratios) / torch.where(varies, scale, 1.0)
    weights[1:] = torch.where(varies[1:], weights[1:], 0.0)
    weights[0] -= weights[1:] @ mean[1:]
    names = [field.name for field in fields(Rule)]
    return Rule(**{name: round(weight, 3) for name, weight in zip(names, weights.tolist(), strict=True)})


def _least_regret(standard: Tensor, ratios: Tensor) -> Tensor:
    """Weights of standardised features, from those of least squares on."""
    normal = standard.T @ standard + 1e-2 * torch.eye(standard.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(normal, standard.T @ ratios).requires_grad_()
    search = torch.optim.LBFGS([weights], max_iter=400, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        found = standard @ weights
        taken = torch.sigmoid(-found / SOFTNESS)
        lost = taken * ratios.clamp(min=0.0) + (1.0 - taken) * (-ratios).clamp(min=0.0)
        far = (found - ratios).square()
        total: Tensor = lost.mean() + TRUE_RATIO * far.mean() + RIDGE * weights[1:].square().sum()
        total.backward()
        return total

    with torch.enable_grad():
        search.step(loss)
    found: Tensor = weights.detach()
    return found


def regrets(rule: Rule, calls: Sequence[Timed]) -> list[float]:
    """Of each call: seconds of the way that the rule takes / seconds of the faster."""
    return [math.exp(max(0.0, call.ratio if rule.favours(call.features) else -call.ratio)) for call in calls]


def mean_regret(rule: Rule, calls: Sequence[Timed]) -> float:
    found = regrets(rule, calls)
    return sum(found) / len(found)
