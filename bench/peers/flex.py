"""torch.nn.attention.flex_attention, compiled. Its block mask is made before the clock starts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..cases import Case, Direction, Inputs
from .base import Peer, Prepared

LARGEST_MASK = 1 << 30  # elements: to make a block mask, a dense one is made


def _refusal(case: Case, direction: Direction, device_type: str) -> str | None:
    if device_type == "cpu" and direction != "forward":
        return "forward only on a CPU"
    if case.dropout_p:
        return "has no dropout"
    if case.compiled:
        return "its own compilation is all there is: see the eager case"
    rows_q, rows_k = _sizes(case)
    if rows_q * rows_k > LARGEST_MASK:
        return "its mask would be too large to make"
    return None


def _sizes(case: Case) -> tuple[int, int]:
    """Rows of q and k as flex sees them: packed sequences are one long one, with a mask between them."""
    if case.varlen:
        return sum(q for q, _ in case.lengths), sum(k for _, k in case.lengths)
    return case.lengths[0]


def _mask_mod(inputs: Inputs) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """flex_attention's mask_mod; None where every query sees every key."""
    case = inputs.case
    left, right = case.window
    starts_q, starts_k = inputs.cu_seqlens_q, inputs.cu_seqlens_k
    rows_q, rows_k = _sizes(case)
    if case.varlen:
        lengths_q, lengths_k = starts_q.diff(), starts_k.diff()
        sequences = torch.arange(case.batch, device=inputs.device)
        sequence_q = sequences.repeat_interleave(lengths_q)
        sequence_k = sequences.repeat_interleave(lengths_k)
        # Positions within the sequence, queries aligned to the bottom right.
        position_q = torch.arange(rows_q, device=inputs.device) - (starts_q[1:] - lengths_k)[sequence_q]
        position_k = torch.arange(rows_k, device=inputs.device) - starts_k[:-1][sequence_k]

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        position, key = (position_q[q_idx], position_k[kv_idx]) if case.varlen else (q_idx + rows_k - rows_q, kv_idx)
        seen = sequence_q[q_idx] == sequence_k[kv_idx] if case.varlen else key >= 0
        if left >= 0:
            seen = seen & (key >= position - left)
        if right >= 0:
            seen = seen & (key <= position + right)
        return seen

    return mask_mod if case.varlen or case.banded else None


def _prepare(inputs: Inputs) -> Prepared:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, slopes = inputs.case, inputs.alibi_slopes
    rows_q, rows_k = _sizes(case)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        if case.softcap:
            score = case.softcap * torch.tanh(score / case.softcap)
        if slopes is not None:
            score = score - slopes[h] * (q_idx + rows_k - rows_q - kv_idx).abs()
        return score

    mask_mod = _mask_mod(inputs)
    mask = create_block_mask(mask_mod, None, None, rows_q, rows_k, device=inputs.device) if mask_mod else None
    scores = score_mod if case.softcap or case.alibi else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, scores, mask, enable_gqa=case.heads_per_key > 1).transpose(1, 2)

    def batched(rows: Tensor) -> Tensor:
        return rows[None] if case.varlen else inputs.batched(rows)

    q, k, v, dout = (batched(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    return Prepared((q, k, v), attend, dout)


FLEX = Peer(_refusal, _prepare)
