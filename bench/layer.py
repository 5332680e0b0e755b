"""Attention as a model calls it: between the projections of its layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .peers.base import Attend


def in_layer(attend: Attend, like: Tensor) -> Attend:
    """q, k, v (B, S, H, D) -> projections of each, attention, and a projection of what it gives.

    The weights are identities: they cost what weights cost, and leave results to be held against attention's. like:
    one of q, k and v, which are of one shape.
    """
    *_, nheads, head_dim = like.shape
    weight = torch.eye(nheads * head_dim, dtype=like.dtype, device=like.device)

    def projected(x: Tensor) -> Tensor:
        heads: Tensor = F.linear(x.flatten(-2), weight).unflatten(-1, (nheads, head_dim))
        return heads

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return projected(attend(projected(q), projected(k), projected(v)))

    return layer
