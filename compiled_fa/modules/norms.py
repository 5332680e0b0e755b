"""Layer norm and RMS norm, of a sum with dropout where that is asked for: PyTorch ops.

torch.compile fuses them into one kernel each, or into their neighbours'; called eagerly they are several. Arithmetic is
in fp32 (fp64 for fp64), and is rounded once.

Source: flash_attn 2.8's ops.triton.layer_norm, ops.layer_norm and ops.rms_norm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation
from .shared import wide


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """norm(residual + dropout(rowscale · x) + dropout(x1)) · weight + bias.

    Args:
        x: (..., D). x1, residual: as x, or None.
        weight, bias: (D,). weight1, bias1: (D,), of a second result from the same sum; None: there is none.
        eps: added to the variance.
        dropout_p: probability to drop an element of x, and of x1, on its own.
        rowscale: (...), factors of x's rows; not with x1.
        prenorm: return the sum, too, which is the next layer's residual.
        residual_in_fp32: without a residual, the sum that is returned is fp32; else it is of the residual's dtype, or
            of x's.
        zero_centered_weight: the weight is 1 + weight.
        is_rms_norm: divide by the root of the mean square, and subtract no mean.
        return_dropout_mask: return which elements of x and of x1 are kept, bool, each None where nothing is dropped.
        out_dtype: of the result; None: x's.
        out, residual_out: must be None.

    Returns:
        The result; or a tuple of it, the second result with weight1, the sum with prenorm, and the masks.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it.

    Source: flash_attn.ops.triton.layer_norm.layer_norm_fn.
    """
    for argument, given in (("out", out), ("residual_out", residual_out)):
        if given is not None:
            validation.refuse(argument, "None: results are new tensors, which autograd wants", "a tensor")
    for argument, given in (("residual", residual), ("x1", x1)):
        if given is not None and given.shape != x.shape:
            validation.refuse(argument, f"of x's shape, {tuple(x.shape)}", tuple(given.shape))
    if rowscale is not None:
        if x1 is not None:
            validation.refuse("rowscale", "None with x1", "a tensor")
        if rowscale.shape != x.shape[:-1]:
            validation.refuse("rowscale", f"of one element a row, {tuple(x.shape[:-1])}", tuple(rowscale.shape))
    total, mask = _dropped(wide(x) if rowscale is None else wide(x) * wide(rowscale)[..., None], dropout_p)
    mask1 = None
    if x1 is not None:
        other, mask1 = _dropped(wide(x1), dropout_p)
        total = total + other
    if residual is not None:
        total = total + residual
    results = [_normalised(total, weight, bias, eps, zero_centered_weight, is_rms_norm, out_dtype or x.dtype)]
    if weight1 is not None:
        results.append(_normalised(total, weight1, bias1, eps, zero_centered_weight, is_rms_norm, out_dtype or x.dtype))
    if prenorm:
        kept_in = x.dtype if residual is None else residual.dtype
        results.append(total.to(torch.float32 if residual is None and residual_in_fp32 else kept_in))
    if return_dropout_mask:
        return (*results, mask, mask1)
    return results[0] if len(results) == 1 else tuple(results)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    return_dropout_mask: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Any:
    """layer_norm_fn with is_rms_norm. Source: flash_attn.ops.triton.layer_norm.rms_norm_fn."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual,
        x1,
        weight1,
        bias1,
        eps,
        dropout_p,
        rowscale,
        prenorm,
        residual_in_fp32,
        zero_centered_weight,
        True,
        return_dropout_mask,
        out_dtype,
        out,
        residual_out,
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """Source: flash_attn.ops.layer_norm.layer_norm."""
    result: Tensor = layer_norm_fn(x, weight, bias, eps=epsilon)
    return result


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Source: flash_attn.ops.rms_norm.rms_norm."""
    result: Tensor = rms_norm_fn(x, weight, None, eps=epsilon)
    return result


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """norm(residual + layerscale · rowscale · dropout(x0)) · weight + bias.

    Args:
        x0: (..., D). residual: as x0, or None.
        rowscale: (...). layerscale: (D,).
        The rest: as layer_norm_fn.

    Returns:
        The result; or a tuple of it, the sum with prenorm, and the mask of what is kept, uint8.

    Source: flash_attn.ops.layer_norm.dropout_add_layer_norm.
    """
    return _dropout_add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
        return_dropout_mask, False,
    )  # fmt: skip


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """dropout_add_layer_norm without a mean. Source: flash_attn.ops.rms_norm.dropout_add_rms_norm."""
    return _dropout_add_norm(
        x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale, prenorm, residual_in_fp32,
        return_dropout_mask, True,
    )  # fmt: skip


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, with dropout and an addition before it where they are asked for.

    State dict: weight. Source: flash_attn.ops.triton.layer_norm.RMSNorm.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        zero_centered_weight: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered_weight = eps, zero_centered_weight
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_weight else 1.0)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        return rms_norm_fn(
            x,
            self.weight,
            None,
            residual=residual,
            eps=self.eps,
            dropout_p=self.drop.p if self.drop is not None and self.training else 0.0,
            prenorm=prenorm,
            residual_in_fp32=residual_in_fp32,
            zero_centered_weight=self.zero_centered_weight,
        )


class DropoutAddLayerNorm(nn.Module):
    """dropout_add_layer_norm with its parameters. State dict: weight, bias.

    Source: flash_attn.ops.layer_norm.DropoutAddLayerNorm.
    """

    is_rms_norm = False
    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        prenorm: bool = False,
        p: float = 0.0,
        eps: float = 1e-5,
        residual_in_fp32: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.prenorm, self.p, self.eps, self.residual_in_fp32 = prenorm, p, eps, residual_in_fp32
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        bias = None if self.is_rms_norm else nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, residual: Tensor | None = None) -> Any:
        return _dropout_add_norm(
            x0, residual, self.weight, self.bias, self.p if self.training else 0.0, self.eps, None, None, self.prenorm,
            self.residual_in_fp32, False, self.is_rms_norm,
        )  # fmt: skip


class DropoutAddRMSNorm(DropoutAddLayerNorm):
    """DropoutAddLayerNorm without a mean and without a bias. Source: flash_attn.ops.rms_norm.DropoutAddRMSNorm."""

    is_rms_norm = True


def _dropped(x: Tensor, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """x without what dropout drops, scaled, and what it keeps."""
    if not dropout_p:
        return x, None
    validation.dropout_probability(dropout_p)
    mask = torch.rand_like(x) >= dropout_p
    return torch.where(mask, x, 0.0) / (1.0 - dropout_p), mask


def _normalised(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    zero_centered_weight: bool,
    is_rms_norm: bool,
    dtype: torch.dtype,
) -> Tensor:
    factor, shift = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if zero_centered_weight:
        factor = factor + 1.0
    if not is_rms_norm:
        return F.layer_norm(x, x.shape[-1:], factor, shift, eps).to(dtype)
    y = F.rms_norm(x, x.shape[-1:], factor, eps)
    return (y if shift is None else y + shift).to(dtype)


def _dropout_add_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale: Tensor | None,
    layerscale: Tensor | None,
    prenorm: bool,
    residual_in_fp32: bool,
    return_dropout_mask: bool,
    is_rms_norm: bool,
) -> Any:
    total, mask = _dropped(wide(x0), dropout_p)
    if rowscale is not None:
        total = total * wide(rowscale)[..., None]
    if layerscale is not None:
        total = total * wide(layerscale)
    kept_in = torch.float32 if residual_in_fp32 else x0.dtype
    if residual is not None:
        total, kept_in = total + residual, residual.dtype
    found = [_normalised(total, weight, bias, epsilon, False, is_rms_norm, x0.dtype)]
    if prenorm:
        found.append(total.to(kept_in))
    if return_dropout_mask:
        found.append(torch.ones_like(x0, dtype=torch.uint8) if mask is None else mask.to(torch.uint8))
    return found[0] if len(found) == 1 else tuple(found)
