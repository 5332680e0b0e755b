"""Attention as one would write it down: the reference that engines are held against.

It computes in the dtype of its inputs, with the whole score matrix in memory, and differentiates by autograd. Nothing
of the score program is used, but for dropout's keep decisions, which are given as a tensor.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..scores import Dropout


def key_positions(seqlen_q: int, seqlen_k: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Where queries stand among the keys, (Sq, 1), and the keys, (Sk,): the last query at the last key."""
    return (
        torch.arange(seqlen_q, device=device)[:, None] + seqlen_k - seqlen_q,
        torch.arange(seqlen_k, device=device),
    )


def visible_keys(
    seqlen_q: int, seqlen_k: int, causal: bool, window_size: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """bool (Sq, Sk): which keys a query sees."""
    position, key = key_positions(seqlen_q, seqlen_k, device)
    left, right = window_size
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= key >= position - left
    if right >= 0 or causal:
        seen &= key <= position + (0 if causal else right)
    return seen


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
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hk, Dv) -> out (B, Sq, H, Dv), lse (B, H, Sq).

    alibi_slopes: (H,) or (B, H). keep: bool (B, H, Sq, Sk), which probabilities dropout keeps.
    bias: broadcastable to (B, H, Sq, Sk): bool, True where a key is seen, or added to scores.
    """
    seqlen_q, nheads, seqlen_k, nheads_k = *q.shape[1:3], *k.shape[1:3]
    heads_per_key = nheads // nheads_k
    k, v = k.repeat_interleave(heads_per_key, dim=2), v.repeat_interleave(heads_per_key, dim=2)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q * scale, k)
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        position, key = key_positions(seqlen_q, seqlen_k, q.device)
        slopes = alibi_slopes.to(torch.promote_types(scores.dtype, alibi_slopes.dtype))
        scores = scores - (slopes[..., None, None] * (position - key).abs()).to(scores.dtype)
    hidden = ~visible_keys(seqlen_q, seqlen_k, causal, window_size, q.device)
    if bias is not None and bias.dtype == torch.bool:
        hidden = hidden | ~bias
    elif bias is not None:
        scores, hidden = scores + bias.to(scores.dtype), hidden | (bias == -math.inf)
    scores = scores.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(scores, -1) if seqlen_k else scores.new_full(scores.shape[:-1], -math.inf)
    probs = torch.softmax(scores, -1).masked_fill(hidden, 0.0)  # rows without a key are nan before
    if keep is not None:
        probs = torch.where(keep, probs, 0.0) / (1.0 - dropout_p)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v), lse


def keep_decisions(
    seed: Tensor,
    dropout_p: float,
    batch: int,
    nheads: int,
    seqlen_q: int,
    seqlen_k: int,
    first: tuple[int, int, int] = (0, 0, 0),
) -> Tensor:
    """bool (batch, nheads, seqlen_q, seqlen_k): the probabilities that dropout keeps under this seed.

    first: numbers of the first sequence, head and query.
    """
    starts, sizes = (*first, 0), (batch, nheads, seqlen_q, seqlen_k)
    indices = [
        torch.arange(start, start + size, dtype=torch.int32, device=seed.device).view(-1, *[1] * (3 - at))
        for at, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    return Dropout.of(dropout_p, seed).keep(*indices)
