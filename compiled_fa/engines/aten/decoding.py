"""Few queries on a long cache: keys in pieces, which the kernel takes as a batch, merged by lse (Flash-Decoding, Dao,
Haziza, Massa and Sizov 2023).

The kernel reads many short sequences twice as fast as a long one, and a cache in pages is in pieces to begin with:
pages that lie side by side are a batch as they are, whichever sequences they belong to.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import inf

import torch
from torch import Tensor

from ...problem import Packed, Problem
from ...scores import Window
from .kernel import attend_everything

FEW = 4  # queries
PIECE = 512  # keys
LEAST = 4  # pieces, of a cache that is not in pages
LARGE = 128  # keys of a page that is worth a call of its own; smaller ones that lie alone are copied side by side


def reads_pages(problem: Problem) -> bool:
    """One query a sequence, in a dtype that the kernel computes in?"""
    packed = problem.packed
    one_each = packed is not None and packed.max_seqlen_q <= 1 and problem.q.shape[0] == problem.batch
    return one_each and problem.q.dtype == problem.lse_dtype


def pays(problem: Problem) -> bool:
    """Of a dense call: are there pieces enough, and few queries, which see them all?"""
    batch, seqlen_q, *_ = problem.q.shape
    if seqlen_q > FEW or not (batch and seqlen_q and problem.k.shape[1] >= LEAST * PIECE):
        return False
    return problem.window_in_force == Window() and problem.q.dtype == problem.lse_dtype


def dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out (B, Sq, H, D) and lse (B, H, Sq)."""
    queries, k, v, scale = problem.q.transpose(1, 2), problem.k, problem.v, problem.softmax_scale
    batch, seqlen_k = k.shape[:2]
    count = seqlen_k // PIECE
    stop = count * PIECE
    parts = []
    side_by_side = all(x.stride(0) == stop * x.stride(1) for x in (k, v))
    for some in [slice(batch)] if side_by_side else [slice(b, b + 1) for b in range(batch)]:
        keys, values = (x[some, :stop].view(-1, PIECE, *x.shape[2:]) for x in (k, v))
        part = attend_everything(queries[some].repeat_interleave(count, 0), keys, values, scale)
        parts.append([x.view(-1, count, *x.shape[1:]) for x in part])
    out, lse = (torch.cat(x) for x in zip(*parts, strict=True))
    if stop < seqlen_k:
        rest = attend_everything(queries, k[:, stop:], v[:, stop:], scale)
        out, lse = (torch.cat([x, last[:, None]], 1) for x, last in zip((out, lse), rest, strict=True))
    out, lse = _merged(out, lse)
    return out.transpose(1, 2).contiguous(), lse


def paged(problem: Problem, packed: Packed, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """One query a sequence -> out (B, H, D) and lse (H, B)."""
    queries, k, v, scale = problem.q[:, :, None], problem.k, problem.v, problem.softmax_scale
    lengths, block_size = packed.cu_seqlens_k.diff(), k.shape[1]
    slots = max(1, -(-max(lengths.tolist(), default=0) // block_size))
    # By sequence and slot, its place there. Where there is no page, lse is -inf.
    out = queries.new_zeros(len(lengths), slots, *queries.shape[1:])
    lse = queries.new_full(out.shape[:-1], -inf)

    owner, slot = (torch.arange(slots) < (lengths // block_size)[:, None]).nonzero(as_tuple=True)
    blocks, order = block_table[owner, slot].sort()
    owner, slot = owner[order], slot[order]
    for chosen, run in _runs(blocks, block_size):
        where = owner[chosen], slot[chosen]
        keys, values = (x.index_select(0, blocks[chosen]) if run is None else x[run] for x in (k, v))
        out[where], lse[where] = attend_everything(queries[where[0]], keys, values, scale)
    for b, length in enumerate(lengths.tolist()):
        full, rows = divmod(length, block_size)
        if rows:  # in a last page that is not full
            keys, values = (x[int(block_table[b, full]), None, :rows] for x in (k, v))
            part_out, part_lse = attend_everything(queries[b, None], keys, values, scale)
            out[b, full], lse[b, full] = part_out[0], part_lse[0]
    out, lse = _merged(out, lse)
    return out[:, :, 0], lse[..., 0].mT.contiguous()


def _runs(blocks: Tensor, block_size: int) -> Iterator[tuple[slice | list[int], slice | None]]:
    """Of sorted block numbers: where consecutive ones are, and which; then, where small ones are alone, and None."""
    ends = [0, *((blocks[1:] != blocks[:-1] + 1).nonzero()[:, 0] + 1).tolist(), len(blocks)]
    numbers, alone = blocks.tolist(), []
    for start, stop in pairwise(ends):
        if stop - start > 1 or (stop > start and block_size >= LARGE):
            yield slice(start, stop), slice(numbers[start], numbers[stop - 1] + 1)
        elif stop > start:
            alone.append(start)
    at_once = max(1, PIECE // block_size)
    for start in range(0, len(alone), at_once):
        yield alone[start : start + at_once], None


def _merged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Of the parts in dimension 1: out (B, parts, H, Sq, D) and lse (B, parts, H, Sq). No key: 0 and -inf."""
    total = torch.logsumexp(lse, 1)
    weights = (lse - total.masked_fill(total == -inf, 0.0)[:, None]).exp()
    return (out * weights[..., None]).sum(1), total
