"""Linear layers and MLPs of two of them, as functions and modules. Source: flash_attn 2.8's ops.fused_dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation
from .activations import gelu_fwd, sqrelu_fwd
from .shared import refuse_group

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu_approx": gelu_fwd, "relu": F.relu, "sqrelu": sqrelu_fwd}


def fused_dense_func(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    return_residual: bool = False,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """x weightᵀ + bias; with return_residual (that, x). Source: flash_attn.ops.fused_dense.fused_dense_func."""
    refuse_group("process_group", process_group)
    out = F.linear(x, weight, bias)
    return (out, x) if return_residual else out


class FusedDense(nn.Linear):
    """nn.Linear that may return its input, too. Source: flash_attn.ops.fused_dense.FusedDense."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.return_residual = return_residual

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        return fused_dense_func(x, self.weight, self.bias, self.return_residual, process_group)


def fused_mlp_func(
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    activation: str = "gelu_approx",
    save_pre_act: bool = True,
    return_residual: bool = False,
    checkpoint_lvl: int = 0,
    heuristic: int = 0,
    process_group: Any = None,
    sequence_parallel: bool = True,
) -> Any:
    """activation(x weight1ᵀ + bias1) weight2ᵀ + bias2; with return_residual (that, x).

    activation: "gelu_approx", "relu" or "sqrelu". save_pre_act, checkpoint_lvl and heuristic are accepted; what is
    saved for backward is autograd's and torch.compile's choice.

    Source: flash_attn.ops.fused_dense.fused_mlp_func.
    """
    refuse_group("process_group", process_group)
    _known_activation(activation)
    out = F.linear(ACTIVATIONS[activation](F.linear(x, weight1, bias1)), weight2, bias2)
    return (out, x) if return_residual else out


class FusedMLP(nn.Module):
    """fused_mlp_func with its parameters. State dict: fc1.weight, fc1.bias, fc2.weight, fc2.bias.

    Source: flash_attn.ops.fused_dense.FusedMLP.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        bias1: bool = True,
        bias2: bool = True,
        activation: str = "gelu_approx",
        return_residual: bool = False,
        checkpoint_lvl: int = 0,
        heuristic: int | str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _known_activation(activation)
        hidden_features = hidden_features or in_features * 4
        self.activation, self.return_residual = activation, return_residual
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor, process_group: Any = None) -> Any:
        return fused_mlp_func(
            x, self.fc1.weight, self.fc2.weight, self.fc1.bias, self.fc2.bias, self.activation,
            return_residual=self.return_residual, process_group=process_group,
        )  # fmt: skip


def _known_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        validation.refuse("activation", f"one of {list(ACTIVATIONS)}", repr(activation))
