"""Attention on int8 queries and keys in PyTorch's ops: all queries against one block of keys after another."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantise import BLOCK_K, BLOCK_Q, Quantised


def attend(q: Quantised, k: Quantised, v: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    """int8 (B, Sq, H, D) and (B, Sk, Hk, D), v fp16 (B, Sk, Hk, Dv) -> (B, Sq, H, Dv) in dtype. q times k: powers of 2.

    Products of int8 are exact in fp32 up to a head_dim of 1,040. Weights are rounded to fp16, as a tensor core takes
    them; sums are fp32.
    """
    seqlen_q, seqlen_k = q.values.shape[1], k.values.shape[1]
    nheads_k = k.values.shape[2]
    # (B, Hk, heads of a key head, Sq, D), so that keys are not repeated
    queries = q.values.float().transpose(1, 2).unflatten(1, (nheads_k, -1))
    q_scales = q.scales.repeat_interleave(BLOCK_Q, 1)[:, :seqlen_q].transpose(1, 2).unflatten(1, (nheads_k, -1))
    keys, values = k.values.float().transpose(1, 2), v.float().transpose(1, 2)
    rows = queries.shape[:-1]
    largest, total = queries.new_full(rows, -torch.inf), queries.new_zeros(rows)
    sums = queries.new_zeros((*rows, v.shape[-1]))
    row = torch.arange(seqlen_q, device=v.device)
    for number, start in enumerate(range(0, seqlen_k, BLOCK_K)):
        tile = slice(start, min(start + BLOCK_K, seqlen_k))
        first = max(0, start - (seqlen_k - seqlen_q)) if causal else 0  # the first query that sees the first key
        if first >= seqlen_q:
            break
        score = queries[..., first:, :] @ keys[:, :, None, tile].mT
        score *= (q_scales[..., first:] * k.scales[:, number, :, None, None])[..., None]
        if causal:
            column = torch.arange(tile.start, tile.stop, device=v.device)
            score.masked_fill_(column > row[first:, None] + (seqlen_k - seqlen_q), -torch.inf)
        before = largest[..., first:]
        new = torch.maximum(before, score.amax(-1))
        pivot = new.masked_fill(new == -torch.inf, 0.0)  # of a row that has seen no key
        weight, decay = (score - pivot[..., None]).exp2(), (before - pivot).exp2()
        total[..., first:] = total[..., first:] * decay + weight.sum(-1)
        product = weight.half().float() @ values[:, :, None, tile]
        sums[..., first:, :] = sums[..., first:, :] * decay[..., None] + product
        largest[..., first:] = new
    out = torch.where(total[..., None] == 0, 0.0, sums / total[..., None])
    return out.flatten(1, 2).transpose(1, 2).to(dtype).contiguous()
