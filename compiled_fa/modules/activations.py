"""Activations, as PyTorch ops, which torch.compile fuses. Source: flash_attn 2.8's ops.activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .shared import wide


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) · y. Source: flash_attn.ops.activations.swiglu."""
    return (F.silu(wide(x)) * wide(y)).to(x.dtype)


def sqrelu_fwd(x: Tensor) -> Tensor:
    """relu(x)². Source: flash_attn.ops.activations.sqrelu_fwd."""
    return F.relu(x).square()


def gelu_fwd(x: Tensor) -> Tensor:
    """gelu by tanh. Source: flash_attn.ops.activations.gelu_fwd."""
    return F.gelu(x, approximate="tanh")


def bias_gelu(y: Tensor, bias: Tensor) -> Tensor:
    """gelu by tanh of y + bias, in y's dtype. Source: flash_attn.ops.activations.bias_gelu."""
    return F.gelu(y + bias, approximate="tanh").to(y.dtype)
