"""out and lse of the same queries over two sets of keys, made those of all keys.

With lse = log(exp(lse_a) + exp(lse_b)), out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b.
Source: online softmax (arXiv 1805.02867).
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Into out (B, S, H, Dv) and lse (B, H, S), which is of out's dtype: part and part_lse, of other keys."""
    total = torch.logaddexp(lse, part_lse)
    seen = total.masked_fill(total == -torch.inf, 0.0)  # rows without a key have out 0, and not 0 / 0
    out.mul_(_of_rows(torch.exp(lse - seen))).add_(part * _of_rows(torch.exp(part_lse - seen)))
    lse.copy_(total)


def _of_rows(weight: Tensor) -> Tensor:
    """(B, H, S) -> (B, S, H, 1)."""
    return weight.mT[..., None]
