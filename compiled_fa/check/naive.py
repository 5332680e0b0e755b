"""Attention as one would write it down: the reference that engines are held against.

It computes in the dtype of its inputs, with the whole score matrix in memory, and differentiates by autograd. Nothing
of the score program is used, but for dropout's keep decisions, which are given as a tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..scores import Dropout


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) -> out (B, Sq, H, Dv), lse (B, H, Sq).

    alibi_slopes: (H,) or (B, H). keep: bool (B, H, Sq, Sk), which probabilities dropout keeps.
    """
    seqlen_q, nheads, seqlen_k, nheads_k = *q.shape[1:3], *k.shape[1:3]
    heads_per_key = nheads // nheads_k
    k, v = k.repeat_interleave(heads_per_key, dim=2), v.repeat_interleave(heads_per_key, dim=2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(seqlen_q, device=q.device)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k, device=q.device)
    if alibi_slopes is not None:
        distance = (position - key).abs()
        slopes = alibi_slopes.to(torch.promote_types(scores.dtype, alibi_slopes.dtype))
        scores = scores - (slopes[..., None, None] * distance).to(scores.dtype)
    left, right = window_size
    hidden = torch.zeros(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
    if left >= 0:
        hidden |= key < position - left
    if right >= 0 or causal:
        hidden |= key > position + (0 if causal else right)
    scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1) if seqlen_k else scores.new_full(scores.shape[:-1], -math.inf)
    probs = torch.softmax(scores, -1).masked_fill(hidden, 0.0)  # rows without a key are nan before
    if keep is not None:
        probs = torch.where(keep, probs, 0.0) / (1.0 - dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v), lse


def keep_decisions(seed: Tensor, dropout_p: float, batch: int, nheads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """bool (batch, nheads, seqlen_q, seqlen_k): the probabilities that dropout keeps under this seed."""
    sizes = (batch, nheads, seqlen_q, seqlen_k)
    indices = [
        torch.arange(size, dtype=torch.int32, device=seed.device).view(-1, *[1] * (3 - at))
        for at, size in enumerate(sizes)
    ]
    return Dropout.of(dropout_p, seed).keep(*indices)
