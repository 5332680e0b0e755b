"""Attention: dense, and of one query or many to keys and values in pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tools.corpus.case import Case, Inputs, halves

LOG2_E = 1.4426950408889634


@triton.jit
def weights_of(score, largest, total):
    """One step of the online softmax: the weights, what earlier sums are to be multiplied by, the new state."""
    new = tl.maximum(largest, tl.max(score, 1))
    pivot = tl.where(new == float("-inf"), 0.0, new)  # of a row without a key so far
    weight = tl.exp2(score - pivot[:, None])
    decay = tl.exp2(largest - pivot)
    return weight, decay, new, total * decay + tl.sum(weight, 1)


@triton.jit
def dense_attention(
    q, k, v, out, seqlen, nheads, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    row, channel = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
    head = tl.program_id(1) * HEAD_DIM
    stride = nheads * HEAD_DIM
    queries = tl.load(q + head + row[:, None] * stride + channel[None, :], mask=row[:, None] < seqlen, other=0)
    largest, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    end = tl.minimum(seqlen, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else seqlen
    for start in range(0, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        keys = tl.load(k + head + column[None, :] * stride + channel[:, None], mask=column[None, :] < seqlen, other=0)
        score = tl.dot(queries, keys) * scale
        seen = column[None, :] < seqlen
        if CAUSAL:
            seen &= column[None, :] <= row[:, None]
        weight, decay, largest, total = weights_of(tl.where(seen, score, float("-inf")), largest, total)
        values = tl.load(v + head + column[:, None] * stride + channel[None, :], mask=column[:, None] < seqlen, other=0)
        sums = tl.dot(weight.to(tl.float16), values, sums * decay[:, None])
    at = head + row[:, None] * stride + channel[None, :]
    tl.store(out + at, (sums / total[:, None]).to(tl.float16), mask=row[:, None] < seqlen)


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, tile: tuple[int, int], num_warps: int, num_stages: int
) -> Tensor:
    """(S, H, D) each -> (S, H, D)."""
    seqlen, nheads, head_dim = q.shape
    out = torch.empty_like(q)
    dense_attention[(triton.cdiv(seqlen, tile[0]), nheads)](
        q, k, v, out, seqlen, nheads, head_dim**-0.5 * LOG2_E, head_dim, *tile, causal,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


@triton.jit
def paged_attention(
    q, pages_k, pages_v, block_table, lengths, out, nheads_k, queries, table_width, scale,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows of the tile are the queries of one sequence, for all query heads that share a key head."""
    sequence, head = tl.program_id(1), tl.program_id(2)
    row, channel, slot = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM), tl.arange(0, PAGE)
    query, valid = row // HEADS, row < queries * HEADS
    at = ((sequence * queries + query) * nheads_k + head) * HEADS + row % HEADS
    rows = tl.load(q + at[:, None] * HEAD_DIM + channel[None, :], mask=valid[:, None], other=0)
    length = tl.load(lengths + sequence)
    largest, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for number in range(tl.cdiv(length, PAGE)):
        page = tl.load(block_table + sequence * table_width + number).to(tl.int64)
        token = page * PAGE + slot
        inside = number * PAGE + slot < length
        keys_at = (token[None, :] * nheads_k + head) * HEAD_DIM + channel[:, None]
        keys = tl.load(pages_k + keys_at, mask=inside[None, :], other=0)
        last_seen = length - queries + query  # the queries are the sequence's last tokens
        seen = inside[None, :] & (number * PAGE + slot[None, :] <= last_seen[:, None])
        score = tl.where(seen, tl.dot(rows, keys) * scale, float("-inf"))
        weight, decay, largest, total = weights_of(score, largest, total)
        values_at = (token[:, None] * nheads_k + head) * HEAD_DIM + channel[None, :]
        values = tl.load(pages_v + values_at, mask=inside[:, None], other=0)
        sums = tl.dot(weight.to(tl.float16), values, sums * decay[:, None])
    result = (sums / total[:, None]).to(tl.float16)
    tl.store(out + at[:, None] * HEAD_DIM + channel[None, :], result, mask=valid[:, None])


def attend_pages(
    q: Tensor, pages_k: Tensor, pages_v: Tensor, block_table: Tensor, lengths: Tensor, rows: int, num_warps: int,
    num_stages: int,
) -> Tensor:  # fmt: skip
    """(B, Sq, H, D), pages (number, page, Hk, D), (B, pages of a sequence), (B,) -> (B, Sq, H, D); causal."""
    batch, queries, nheads, head_dim = q.shape
    page, nheads_k = pages_k.shape[1:3]
    out = torch.empty_like(q)
    heads = nheads // nheads_k
    paged_attention[(triton.cdiv(queries * heads, rows), batch, nheads_k)](
        q, pages_k, pages_v, block_table, lengths, out, nheads_k, queries, block_table.shape[1],
        head_dim**-0.5 * LOG2_E, heads, head_dim, page, rows, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _dense(seqlen: int, nheads: int, head_dim: int) -> Inputs:
    return {name: halves(seqlen, nheads, head_dim) for name in "qkv"}


def _paged(lengths: list[int], queries: int, heads: int, nheads_k: int, head_dim: int, page: int) -> Inputs:
    width = max(-(-length // page) for length in lengths)
    number = width * len(lengths)
    return {
        "q": halves(len(lengths), queries, heads * nheads_k, head_dim),
        "pages_k": halves(number, page, nheads_k, head_dim),
        "pages_v": halves(number, page, nheads_k, head_dim),
        "block_table": torch.randperm(number, dtype=torch.int32).reshape(len(lengths), width),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }


def _softmax_of(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, first: int | None) -> Tensor:
    """(S, H, D) of one sequence. first: keys that its first query sees, one more each; None for all."""
    q, k, v = (x.to(dtype).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    score = q @ k.mT * q.shape[-1] ** -0.5
    if first is not None:
        unseen = torch.ones(score.shape[-2:], dtype=torch.bool).triu(first)
        score = score.masked_fill(unseen, float("-inf"))
    return (score.softmax(-1) @ v).transpose(0, 1)


def _full(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _softmax_of(dtype, q, k, v, None)


def _causal(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _softmax_of(dtype, q, k, v, 1)


def _of_pages(
    dtype: torch.dtype, q: Tensor, pages_k: Tensor, pages_v: Tensor, block_table: Tensor, lengths: Tensor
) -> Tensor:
    found = []
    for queries, table, length in zip(q, block_table.long(), lengths.tolist(), strict=True):
        k, v = (pages[table].flatten(0, 1)[:length] for pages in (pages_k, pages_v))
        found.append(_softmax_of(dtype, queries, k, v, length - len(queries) + 1))
    return torch.stack(found)


_FULL_DENSE = {"seqlen": 1024, "nheads": 4, "head_dim": 64}
_PAGES = {"heads": 4, "nheads_k": 2, "head_dim": 32, "page": 16}
_FULL_PAGES = {"heads": 8, "nheads_k": 2, "head_dim": 128, "page": 32}

CASES = (
    Case("attention", attend, _dense, _full, {"seqlen": 90, "nheads": 2, "head_dim": 32},
         {"causal": False, "tile": (32, 32), "num_warps": 2, "num_stages": 2}, _FULL_DENSE,
         {"causal": False, "tile": (128, 32), "num_warps": 4, "num_stages": 2}),
    Case("attention, causal, head_dim 128", attend, _dense, _causal, {"seqlen": 90, "nheads": 1, "head_dim": 64},
         {"causal": True, "tile": (32, 16), "num_warps": 2, "num_stages": 2}, {**_FULL_DENSE, "head_dim": 128},
         {"causal": True, "tile": (128, 32), "num_warps": 8, "num_stages": 2}),
    Case("paged attention, one query", attend_pages, _paged, _of_pages, {"lengths": [40, 7], "queries": 1, **_PAGES},
         {"rows": 16, "num_warps": 1, "num_stages": 2}, {"lengths": [500, 700], "queries": 1, **_FULL_PAGES},
         {"rows": 16, "num_warps": 4, "num_stages": 2}),
    Case("paged attention, many queries", attend_pages, _paged, _of_pages,
         {"lengths": [40, 21], "queries": 20, **_PAGES}, {"rows": 32, "num_warps": 2, "num_stages": 2},
         {"lengths": [500, 700], "queries": 300, **_FULL_PAGES}, {"rows": 64, "num_warps": 4, "num_stages": 2}),
)  # fmt: skip
