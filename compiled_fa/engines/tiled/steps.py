"""The arithmetic between the matrix products of a tile, in place on its buffers.

Shapes: p (sequence, key head) pairs, g query heads per key head, m queries, n keys.

    scores, dprobs (p, g, m, n)     row_max, row_sum, lse, delta (p, g, m)     accumulator (p, g, m, head_dim)

`Indices` says where the tile lies, in the words of the score program.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ...scores import ScoreProgram


class Indices(NamedTuple):
    """int32, broadcastable to a tile: batch (p, 1, 1, 1), head (p, g, 1, 1), q_idx (m, 1), kv_idx (n).

    dropout_row: two of (p, g, m, 1), what dropout's decisions in a row have in common (scores/dropout.py): hashed once
    a row, not once an element. None without dropout.
    """

    batch: Tensor
    head: Tensor
    q_idx: Tensor
    kv_idx: Tensor
    dropout_row: tuple[Tensor, Tensor] | None = None


def _keep(program: ScoreProgram, indices: Indices) -> Tensor:
    if program.dropout is None or indices.dropout_row is None:
        raise ValueError("this tile has no dropout")
    return program.dropout.keep_in_row(indices.dropout_row, indices.kv_idx)


def softmax_step(
    scores: Tensor,
    row_max: Tensor,
    row_sum: Tensor,
    accumulator: Tensor,
    indices: Indices,
    program: ScoreProgram,
    masked: bool,
) -> None:
    """One step of the online softmax (FlashAttention-2, Algorithm 1, lines 9 and 10).

    scores: products q·k -> probabilities not yet normalised, dropped ones 0. row_max, row_sum: brought up to date.
    accumulator: rescaled to the new maximum, ready for this tile's P·V.
    """
    score = program.score(scores, *indices[:4])
    if masked:
        score = torch.where(program.mask(*indices[:4]), score, -inf)
    new_max = torch.maximum(row_max, score.amax(-1))
    # A row that has met no key yet has maximum -inf: subtract 0 instead, so that exp gives 0 and not exp(nan).
    shift = torch.where(new_max == -inf, 0.0, new_max)
    probs = torch.exp(score - shift[..., None])
    rescale = torch.exp(row_max - shift)
    row_sum.copy_(row_sum * rescale + probs.sum(-1))
    row_max.copy_(new_max)
    accumulator.mul_(rescale[..., None])
    # The softmax is normalised over all keys, dropped ones included: drop after the sum.
    scores.copy_(torch.where(_keep(program, indices), probs, 0.0) if program.dropout is not None else probs)


def softmax_finish(
    accumulator: Tensor, row_max: Tensor, row_sum: Tensor, keep_probability: float
) -> tuple[Tensor, Tensor]:
    """-> out (lines 12 and 13: diag(l)^-1 O, and m + log l). Rows without a key: out 0, lse -inf."""
    empty = row_sum == 0.0
    total = row_sum.masked_fill(empty, 1.0)
    out = accumulator / (total * keep_probability)[..., None]
    return out, (row_max + total.log()).masked_fill_(empty, -inf)


def gradient_step(
    scores: Tensor,
    dprobs: Tensor,
    lse: Tensor,
    delta: Tensor,
    indices: Indices,
    program: ScoreProgram,
    masked: bool,
    keep_probability: Tensor | float,
) -> None:
    """Probabilities and their gradient (FlashAttention-2, Algorithm 2, lines 11 to 14).

    scores: products q·k -> P with dropout, for dV. dprobs: dO·V -> gradient of the products, for dQ and dK.
    lse: +inf for rows without a key, so that their probabilities are 0. delta: rowsum(dO * O) - dlse.
    """
    score = program.score(scores, *indices[:4])
    if masked:
        score = torch.where(program.mask(*indices[:4]), score, -inf)
    probs = torch.exp(score - lse[..., None])
    dropped = probs
    if program.dropout is not None:
        keep = _keep(program, indices)
        dropped = torch.where(keep, probs, 0.0) / keep_probability
        dprobs_kept = torch.where(keep, dprobs, 0.0) / keep_probability
        dscore = probs * (dprobs_kept - delta[..., None])
    else:
        dscore = probs * (dprobs - delta[..., None])
    dprobs.copy_(program.product_gradient(dscore, scores))
    scores.copy_(dropped)
