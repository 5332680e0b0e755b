"""What one does with sequences of unequal lengths without a varlen function: pad, loop, or nest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Case, Direction, Inputs
from .base import Peer, Prepared, packed

LARGEST_PADDED = 2 << 30  # bytes of a mask, or of q padded


def _alike(case: Case) -> bool:
    return all(q == k for q, k in case.lengths)


def _no_features(case: Case) -> str | None:
    if not case.varlen:
        return "for varlen cases"
    if not _alike(case) or case.window_size != (-1, -1) or case.softcap or case.alibi or case.dropout_p:
        return "self-attention without features only"
    return None


def _refuse_padded(case: Case, direction: Direction, device_type: str) -> str | None:
    rows = case.batch * case.max_seqlen_q
    itemsize = case.dtype.itemsize
    largest = max(rows * case.nheads * case.head_dim * itemsize, rows * case.max_seqlen_k if case.causal else 0)
    return _no_features(case) or ("its padded batch would be too large" if largest > LARGEST_PADDED else None)


def _prepare_padded(inputs: Inputs) -> Prepared:
    """One batch as long as the longest sequence, already padded, and a boolean mask that hides the padding."""
    case = inputs.case
    lengths = inputs.cu_seqlens_q.diff()
    exists = torch.arange(case.max_seqlen_q, device=inputs.device) < lengths[:, None]
    mask, visible = exists[:, None, None, :], inputs.visible(case.max_seqlen_q, case.max_seqlen_k)
    if visible is not None:
        mask = mask & visible

    def padded(rows: Tensor) -> Tensor:
        return rows.new_zeros(*exists.shape, *rows.shape[1:]).masked_scatter_(exists[..., None, None], rows)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = case.heads_per_key > 1
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=gqa).transpose(1, 2)

    q, k, v, dout = (padded(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    return Prepared((q, k, v), attend, dout, lambda x: x[exists])


def _prepare_loop(inputs: Inputs) -> Prepared:
    case = inputs.case
    lengths = [q for q, _ in case.lengths]
    gqa = case.heads_per_key > 1

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for sequence in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
            q_b, k_b, v_b = (x.transpose(0, 1)[None] for x in sequence)
            out = F.scaled_dot_product_attention(q_b, k_b, v_b, is_causal=case.causal, enable_gqa=gqa)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return packed(inputs, attend)


def _refuse_nested(case: Case, direction: Direction, device_type: str) -> str | None:
    if case.causal and device_type == "cpu":
        return "SDPA of nested tensors is not causal on a CPU"
    if case.heads_per_key > 1:
        return "SDPA of nested tensors has no GQA"
    return _no_features(case)


def _prepare_nested(inputs: Inputs) -> Prepared:
    case, offsets = inputs.case, inputs.cu_seqlens_q.long()

    def nested(rows: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(rows, offsets, max_seqlen=case.max_seqlen_q)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (nested(x).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=case.causal).transpose(1, 2)
        return out.values()

    return packed(inputs, attend)


PADDED = Peer(_refuse_padded, _prepare_padded)
LOOP = Peer(lambda case, direction, device: _no_features(case), _prepare_loop)
NESTED = Peer(_refuse_nested, _prepare_nested)
