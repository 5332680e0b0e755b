"""Cross entropy as a module: nn.CrossEntropyLoss with a scale, a penalty on lse, and fp32 arithmetic for any logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import validation
from ..modules.fused import cross_entropy_loss, refuse_group

REDUCTIONS = ("mean", "none", "sum")


class CrossEntropyLoss(nn.Module):
    """The mean over rows that are not ignored, the sum, or the losses themselves, of modules.fused.cross_entropy_loss.

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
