"""What flash_attn has kernels for beside attention: norms, activations, products, a loss. Here they are PyTorch ops.

torch.compile fuses them into one kernel each, or into their neighbours'; called eagerly they are several. Arithmetic of
norms, activations and the loss is in fp32 (fp64 for fp64), and is rounded once.

Source: flash_attn 2.8's ops.triton.layer_norm, ops.layer_norm, ops.rms_norm, ops.activations, ops.fused_dense and
ops.triton.cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def refuse_group(argument: str, group: Any) -> None:
    """For arguments of tensor parallelism."""
    if group is not None:
        validation.refuse(argument, "None: tensor parallelism is left to torch.distributed.tensor.parallel", group)


# Norms


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


# Activations


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


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu_approx": gelu_fwd, "relu": F.relu, "sqrelu": sqrelu_fwd}


# Products


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


# Loss


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Cross entropy of logit_scale · logits, with a penalty on the size of their lse.

    Args:
        logits: (rows, classes). labels: integers (rows,); those of ignore_index give 0.
        precomputed_lse: (rows,), accepted: lse is computed from the logits all the same.
        label_smoothing: the part of a label that all classes share.
        logit_scale: above 0.
        lse_square_scale: factor of the penalty, lse², also known as z-loss.
        inplace_backward: accepted; logits are never written to.

    Returns:
        (losses, z_losses), fp32 (fp64 for fp64), (rows,): losses contain z_losses, which have no gradient.

    Source: flash_attn.ops.triton.cross_entropy.cross_entropy_loss.
    """
    refuse_group("process_group", process_group)
    validation.tensor("logits", logits, "rows, classes")
    validation.tensor("labels", labels, "rows")
    if labels.shape[0] != logits.shape[0]:
        validation.refuse("labels", f"of one element a row of logits, {logits.shape[0]}", labels.shape[0])
    if not logit_scale > 0.0:
        validation.refuse("logit_scale", "above 0", logit_scale)
    scaled, labels = wide(logits) * logit_scale, labels.long()
    losses = F.cross_entropy(
        scaled, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    if not lse_square_scale:
        return losses, torch.zeros_like(losses)
    penalty = lse_square_scale * torch.logsumexp(scaled, -1).square()
    z_losses = torch.where(labels == ignore_index, 0.0, penalty)
    return losses + z_losses, z_losses.detach()
