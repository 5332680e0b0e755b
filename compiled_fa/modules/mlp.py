"""MLPs: plain and gated. Source: flash_attn 2.8's modules.mlp, whose arguments and state dicts these have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activations import swiglu


class Mlp(nn.Module):
    """fc2(activation(fc1(x))).

    Args:
        in_features, hidden_features, out_features: hidden_features is four times in_features where it is None,
            out_features in_features.
        activation: of a tensor.
        bias1, bias2: do fc1 and fc2 have a bias?
        return_residual: return x, too.

    Source: flash_attn.modules.mlp.Mlp.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        bias1: bool = True,
        bias2: bool = True,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        self.activation, self.return_residual = activation, return_residual
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        y = self.fc2(self.activation(self.fc1(x)))
        return (y, x) if self.return_residual else y


class GatedMlp(nn.Module):
    """fc2(y · activation(gate)), y and gate being the halves of fc1(x): GLU, SwiGLU, GEGLU.

    Args:
        hidden_features: of a half; None: 8 / 3 of in_features. Rounded up to a multiple of multiple_of.
        activation: F.sigmoid is GLU, F.silu SwiGLU, F.gelu GEGLU.
        The rest: as Mlp.

    Source: flash_attn.modules.mlp.GatedMlp.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.sigmoid,
        bias1: bool = True,
        bias2: bool = True,
        multiple_of: int = 128,
        return_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_features = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden_features = -(-hidden_features // multiple_of) * multiple_of
        out_features = in_features if out_features is None else out_features
        self.activation, self.return_residual = activation, return_residual
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=bias1, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Any:
        y, gate = self.fc1(x).chunk(2, -1)
        y = self.fc2(swiglu(gate, y) if self.activation is F.silu else y * self.activation(gate))
        return (y, x) if self.return_residual else y
