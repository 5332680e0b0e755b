"""The arithmetic between the matrix products of a tile, in place on its buffers.

Shapes: p (sequence, key head) pairs, m queries, g query heads per key head, n keys.

    scores, dprobs (p, m, g, n)     row_max, row_sum, lse, delta (p, m, g)     accumulator (p, m, g, head_dim)

scores and dprobs may be of a smaller dtype than the others, that of the products: arithmetic is in the larger one.
`Indices` says where the tile lies, in the words of the score program.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from ...flattening import Flattened
from ...scores import ScoreProgram


@dataclass(frozen=True)
class Indices(Flattened):
    """int32, broadcastable to a tile: batch (p, 1, 1, 1), head (p, 1, g, 1), q_idx (m, 1, 1), kv_idx (n).

    dropout_low, dropout_high: (p, m, g, 1), what dropout's decisions in a row have in common (scores/dropout.py):
    hashed once a row, not once an element. None without dropout.
    bias: of the tile's scores, (p, m, g, n), of any strides but the last, which is 1; None without one.
    """

    batch: Tensor
    head: Tensor
    q_idx: Tensor
    kv_idx: Tensor
    dropout_low: Tensor | None = None
    dropout_high: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def names(cls, dropout: bool, bias: bool) -> tuple[str, ...]:
        """Of the fields that are present."""
        optional = {"dropout_low": dropout, "dropout_high": dropout, "bias": bias}
        return tuple(name for name in cls.__dataclass_fields__ if optional.get(name, True))

    @property
    def of_score(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the score program's functions."""
        return self.batch, self.head, self.q_idx, self.kv_idx


def _keep(program: ScoreProgram, indices: Indices) -> Tensor:
    if program.dropout is None or indices.dropout_low is None or indices.dropout_high is None:
        raise ValueError("this tile has no dropout")
    return program.dropout.keep_in_row((indices.dropout_low, indices.dropout_high), indices.kv_idx)


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
    accumulator: rescaled to the new maximum, ready for this tile's P·V; of head_dim 0 where there is none yet.
    """
    score = program.score(scores.to(row_max.dtype), *indices.of_score, indices.bias)
    if masked:
        score = torch.where(program.mask(*indices.of_score), score, -inf)
    new_max = torch.maximum(row_max, score.amax(-1))
    # A row that has met no key yet has maximum -inf: subtract 0 instead, so that exp gives 0 and not exp(nan).
    shift = torch.where(new_max == -inf, 0.0, new_max)
    # Rounded to the dtype of the products before they are summed: the sum is that of what multiplies V.
    probs = torch.exp(score - shift[..., None]).to(scores.dtype)
    rescale = torch.exp(row_max - shift)
    row_sum.copy_(row_sum * rescale + probs.to(row_sum.dtype).sum(-1))
    row_max.copy_(new_max)
    accumulator.mul_(rescale[..., None])
    # The softmax is normalised over all keys, dropped ones included: drop after the sum.
    scores.copy_(torch.where(_keep(program, indices), probs, 0.0) if program.dropout is not None else probs)


def softmax_finish(
    accumulator: Tensor, row_max: Tensor, row_sum: Tensor, keep_probability: float
) -> tuple[Tensor, Tensor]:
    """-> out, in place of the accumulator, and lse (lines 12 and 13: diag(l)^-1 O, and m + log l).

    Rows without a key: out 0, lse -inf.
    """
    empty = row_sum == 0.0
    total = row_sum.masked_fill(empty, 1.0)
    lse = (row_max + total.log()).masked_fill_(empty, -inf)
    return accumulator.div_(total.mul_(keep_probability)[..., None]), lse


def gradient_step(
    scores: Tensor,
    dprobs: Tensor,
    lse: Tensor,
    delta: Tensor,
    indices: Indices,
    program: ScoreProgram,
    masked: bool,
    keep_probability: Tensor | float,
    dscores: Tensor | None = None,
) -> None:
    """Probabilities and their gradient (FlashAttention-2, Algorithm 2, lines 11 to 14).

    scores: products q·k -> P with dropout, for dV. dprobs: dO·V -> gradient of the products, for dQ and dK.
    lse: +inf for rows without a key, so that their probabilities are 0. delta: rowsum(dO * O) - dlse.
    dscores: (p, m, g, n), to be filled with the gradient of the scores, a bias's; None: nobody wants it.
    """
    products, dprobabilities = scores.to(lse.dtype), dprobs.to(lse.dtype)
    score = program.score(products, *indices.of_score, indices.bias)
    if masked:
        score = torch.where(program.mask(*indices.of_score), score, -inf)
    probs = torch.exp(score - lse[..., None])
    dropped = probs
    if program.dropout is not None:
        keep = _keep(program, indices)
        dropped = torch.where(keep, probs, 0.0) / keep_probability
        dprobabilities = torch.where(keep, dprobabilities, 0.0) / keep_probability
    dscore = probs * (dprobabilities - delta[..., None])
    if dscores is not None:
        dscores.copy_(dscore)
    dprobs.copy_(program.product_gradient(dscore, products))
    scores.copy_(dropped)
