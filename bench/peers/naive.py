"""Attention in three lines: the whole score matrix in memory, no more work than that takes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Case, Direction, Inputs
from .base import Peer, Prepared, dense

LARGEST_SCORES = 1 << 30  # bytes of a score matrix; a backward holds several


def _refusal(case: Case, direction: Direction, device_type: str) -> str | None:
    if case.varlen:
        return "dense only"
    if case.score_elements * case.dtype.itemsize > LARGEST_SCORES:
        return "its score matrix is too large"
    return None


def _prepare(inputs: Inputs) -> Prepared:
    case = inputs.case
    scale = case.head_dim**-0.5
    visible = inputs.visible(*case.lengths[0])
    hidden = ~visible if visible is not None else None
    bias = inputs.alibi_bias(*case.lengths[0])

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if case.heads_per_key > 1:
            k, v = (x.repeat_interleave(case.heads_per_key, dim=1) for x in (k, v))
        scores = (q * scale) @ k.mT
        if case.softcap:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        if bias is not None:
            scores = scores + bias
        if hidden is not None:
            scores = scores.masked_fill(hidden, float("-inf"))
        probs = torch.softmax(scores, -1)
        if dropout_p:
            probs = torch.dropout(probs, dropout_p, train=True)
        return (probs @ v).transpose(1, 2)

    checked = (lambda q, k, v: attend(q, k, v, 0.0)) if case.dropout_p else None
    return dense(inputs, lambda q, k, v: attend(q, k, v, case.dropout_p), checked)


NAIVE = Peer(_refusal, _prepare)
