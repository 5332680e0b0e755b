"""tanh in compiled steps: by one exp, which makes softcap's forward 0.83 of what it is with the vector library's tanh
(bench/NOTES.md).

tanh x = x + x³ p(x²) up to |x| = 1/2, where p is the polynomial of degree 3 that fits best, with a relative error of
1.5e-8; (1 - e) / (1 + e), e = exp(-2 |x|), with x's sign beyond, where nothing cancels. Both are within 2.25 units in
the last place of fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

P = (-0.33333140857849036, 0.13325822074277233, -0.05304220525955025, 0.017235477419583946)


def tanh(x: Tensor) -> Any:
    """Of an fp32 tensor; NotImplemented of others, which are then left as they are."""
    if x.dtype != torch.float32:
        return NotImplemented
    square = x * x
    small = x + x * square * (P[0] + square * (P[1] + square * (P[2] + square * P[3])))
    decay = torch.exp(-2.0 * x.abs())
    large = (1.0 - decay) / (1.0 + decay)
    return torch.where(x.abs() < 0.5, small, torch.where(x < 0.0, -large, large))


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {torch.ops.aten.tanh.default: tanh}
