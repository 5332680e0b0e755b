"""Attention on int8 queries and keys in one Triton kernel, which on Turing takes its int8 and fp16 tensor cores."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantise import BLOCK_K, BLOCK_Q, Quantised

MAX_HEAD_DIM = 128  # beyond it, tiles of 128 rows do not fit in Turing's registers


@triton.jit
def _tiles(
    sums, total, largest, queries, q_scale, k, k_scale, v, row, first, end, seqlen_k, last_of_first,
    k_stride, v_stride, nheads_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys from `first` to `end`. MASKED: some query of the tile does not see some of these."""
    channel, channel_v, tile_row = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    # A tile's places are the same in every tile: 32 bits each, and 64 for where it begins.
    keys_at = tile_row[None, :] * k_stride + channel[:, None]
    values_at = tile_row[:, None] * v_stride + channel_v[None, :]
    for start in range(first, end, BLOCK_N):
        column = start + tile_row
        begin = tl.cast(start, tl.int64)
        inside = channel[:, None] < HEAD_DIM
        inside_v = channel_v[None, :] < HEAD_DIM_V
        if MASKED:
            inside &= column[None, :] < seqlen_k
            inside_v &= column[:, None] < seqlen_k
        keys = tl.load(k + begin * k_stride + keys_at, mask=inside, other=0)
        scale = q_scale * tl.load(k_scale + start // BLOCK_N * nheads_k)
        score = tl.dot(queries, keys, out_dtype=tl.int32).to(tl.float32) * scale
        if MASKED:
            seen = column[None, :] < seqlen_k
            if CAUSAL:
                seen &= column[None, :] <= row[:, None] + last_of_first
            score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(largest, tl.max(score, 1))
        pivot = tl.where(new == float("-inf"), 0.0, new)  # of a row that has seen no key
        weight, decay = tl.exp2(score - pivot[:, None]), tl.exp2(largest - pivot)
        total = total * decay + tl.sum(weight, 1)
        values = tl.load(v + begin * v_stride + values_at, mask=inside_v, other=0)
        sums = tl.dot(weight.to(tl.float16), values, sums * decay[:, None])
        largest = new
    return sums, total, largest


@triton.jit
def int8_attention(
    q, q_scale, k, k_scale, v, out, seqlen_q, seqlen_k, nheads, nheads_k, v_stride_batch, v_stride, v_stride_head,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    head_k = head // (nheads // nheads_k)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    channel, channel_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_row = ((batch * seqlen_q + row) * nheads + head)[:, None]
    inside = (row[:, None] < seqlen_q) & (channel[None, :] < HEAD_DIM)
    queries = tl.load(q + q_row * HEAD_DIM + channel[None, :], mask=inside, other=0)
    scale = tl.load(q_scale + (batch * tl.cdiv(seqlen_q, BLOCK_M) + block) * nheads + head)
    k += (batch * seqlen_k * nheads_k + head_k) * HEAD_DIM
    k_scale += batch * tl.cdiv(seqlen_k, BLOCK_N) * nheads_k + head_k
    v += batch * v_stride_batch + head_k * v_stride_head
    sums = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    total, largest = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    last_of_first = seqlen_k - seqlen_q  # the last key that query 0 sees
    end, whole = seqlen_k, seqlen_k
    if CAUSAL:
        end = tl.minimum(seqlen_k, (block + 1) * BLOCK_M + last_of_first)
        whole = tl.maximum(0, tl.minimum(seqlen_k, block * BLOCK_M + last_of_first + 1))
    whole = whole // BLOCK_N * BLOCK_N  # keys of tiles that all queries of the block see
    sums, total, largest = _tiles(
        sums, total, largest, queries, scale, k, k_scale, v, row, 0, whole, seqlen_k, last_of_first,
        nheads_k * HEAD_DIM, v_stride, nheads_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, False,
    )  # fmt: skip
    sums, total, largest = _tiles(
        sums, total, largest, queries, scale, k, k_scale, v, row, whole, end, seqlen_k, last_of_first,
        nheads_k * HEAD_DIM, v_stride, nheads_k, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, CAUSAL, True,
    )  # fmt: skip
    result = tl.where(total[:, None] == 0, 0.0, sums / total[:, None])
    inside = (row[:, None] < seqlen_q) & (channel_v[None, :] < HEAD_DIM_V)
    tl.store(out + q_row * HEAD_DIM_V + channel_v[None, :], result.to(out.dtype.element_ty), mask=inside)


def attend(q: Quantised, k: Quantised, v: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    """As tiles.attend. v's elements of a row are neighbours in memory."""
    batch, seqlen_q, nheads, head_dim = q.values.shape
    seqlen_k, nheads_k = k.values.shape[1:3]
    out = torch.empty(batch, seqlen_q, nheads, v.shape[-1], dtype=dtype, device=v.device)
    padded, padded_v = (max(32, triton.next_power_of_2(x)) for x in (head_dim, v.shape[-1]))
    grid = (triton.cdiv(seqlen_q, BLOCK_Q), nheads, batch)
    with torch.cuda.device_of(v):
        int8_attention[grid](
            q.values, q.scales, k.values, k.scales, v, out, seqlen_q, seqlen_k, nheads, nheads_k,
            v.stride(0), v.stride(1), v.stride(2), head_dim, v.shape[-1], padded, padded_v, BLOCK_Q, BLOCK_K, causal,
            num_warps=4 if max(padded, padded_v) <= 64 else 8, num_stages=2,
        )  # fmt: skip
    return out
