"""Cross entropy, a function and a module: PyTorch's with a scale, a penalty on lse, and fp32 arithmetic for any logits.

Source: flash_attn 2.8's ops.triton.cross_entropy and losses.cross_entropy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import validation
from ..modules.shared import refuse_group, wide

REDUCTIONS = ("mean", "none", "sum")


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


class CrossEntropyLoss(nn.Module):
    """The mean over rows that are not ignored, the sum, or the losses themselves, of cross_entropy_loss.

    Args:
        ignore_index, label_smoothing, logit_scale, lse_square_scale, inplace_backward: as cross_entropy_loss.
        reduction: "mean", "sum" or "none".
        process_group: must be None.
        return_z_loss: return the part of the loss that comes from lse_square_scale, too; it has no gradient.

    Source: flash_attn.losses.cross_entropy.CrossEntropyLoss.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ) -> None:
        super().__init__()
        refuse_group("process_group", process_group)
        if reduction not in REDUCTIONS:
            validation.refuse("reduction", f"one of {list(REDUCTIONS)}", repr(reduction))
        self.ignore_index, self.reduction, self.return_z_loss = ignore_index, reduction, return_z_loss
        self.label_smoothing, self.logit_scale, self.lse_square_scale = label_smoothing, logit_scale, lse_square_scale

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None) -> Any:
        """input (rows, classes), target (rows,) -> the loss; with return_z_loss (loss, z_loss)."""
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            self.label_smoothing,
            self.logit_scale,
            self.lse_square_scale,
            self.ignore_index,
        )
        if self.reduction == "mean":
            count = (target != self.ignore_index).sum()
            loss, z_loss = (rows.sum() / count for rows in losses)
        elif self.reduction == "sum":
            loss, z_loss = (rows.sum() for rows in losses)
        else:
            loss, z_loss = losses
        return (loss, z_loss) if self.return_z_loss else loss
