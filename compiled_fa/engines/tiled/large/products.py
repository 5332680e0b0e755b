"""Matrix products whose result is of a larger dtype than their operands.

Scores of fp16 operands are products in fp32: rounded to fp16 they could overflow. PyTorch has such products where
baddbmm's out_dtype is implemented, on CUDA; elsewhere operands are copied in fp32, once a call. So are those in bf16 on
CUDA devices before compute capability 8.0, which multiply no bf16, and emulate it more slowly than fp32 is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# Devices whose operators write results to rows that lie apart, in another dtype, and products over memory that holds
# anything, NaN too. On others a result is made, and then copied.
IN_PLACE = ("cpu", "cuda", "xpu")


@functools.cache
def widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Has PyTorch products in fp32 of operands in this dtype, on this device?"""
    if device.type not in ("cuda", "xpu") or (dtype == torch.bfloat16 and _emulates_bf16(device)):
        return False
    a, total = torch.ones(1, 8, 8, dtype=dtype, device=device), torch.zeros(1, 8, 8, device=device)
    try:
        _widening(total, a, a, 0.0, 1.0)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # it says that there is none
        return False
    return True


def _emulates_bf16(device: torch.device) -> bool:
    on_nvidia = device.type == "cuda" and torch.version.hip is None
    return on_nvidia and torch.cuda.get_device_capability(device) < (8, 0)


def dtype(inputs: Tensor, arithmetic: torch.dtype) -> torch.dtype:
    """Of the products' operands; arithmetic: of their results."""
    return inputs.dtype if inputs.dtype == arithmetic or widens(inputs.device, inputs.dtype) else arithmetic


def add(total: Tensor, a: Tensor, b: Tensor, accumulate: bool = False, alpha: float = 1.0) -> Tensor:
    """total = alpha * a b, batch by batch, or added to what it holds; one launch on devices that are IN_PLACE."""
    beta = float(accumulate)
    if a.dtype != total.dtype:
        return _widening(total, a, b, beta, alpha)
    if total.device.type in IN_PLACE:
        return torch.baddbmm(total, a, b, beta=beta, alpha=alpha, out=total)
    product = torch.bmm(a, b)
    return total.add_(product, alpha=alpha) if accumulate else torch.mul(product, alpha, out=total)


def into(found: Tensor, operator: Callable[..., Tensor], *operands: Tensor | float) -> None:
    """found = operator(*operands), in found's dtype."""
    if found.device.type in IN_PLACE:
        operator(*operands, out=found)
    else:
        found.copy_(operator(*operands))


def _widening(total: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float) -> Tensor:
    return torch.baddbmm(total, a, b, total.dtype, beta=beta, alpha=alpha, out=total)
