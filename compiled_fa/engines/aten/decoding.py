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
PAGE = 128  # keys of a page that is worth a call of its own

Part = tuple[Tensor, Tensor, Tensor]  # of some keys: whose they are (parts,), out (parts, H, Sq, D), lse (parts, H, Sq)


def reads_pages(problem: Problem) -> bool:
    """One query a sequence, pages of a size, and a dtype that the kernel computes in?"""
    packed = problem.packed
    one_each = packed is not None and packed.max_seqlen_q <= 1 and problem.q.shape[0] == problem.batch
    return one_each and problem.k.shape[1] >= PAGE and problem.q.dtype == problem.lse_dtype


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
    everyone = torch.arange(batch)
    parts: list[Part] = []
    side_by_side = all(x.stride(0) == stop * x.stride(1) for x in (k, v))
    for some in [slice(batch)] if side_by_side else [slice(b, b + 1) for b in range(batch)]:
        keys, values = (x[some, :stop].view(-1, PIECE, *x.shape[2:]) for x in (k, v))
        owner = everyone[some].repeat_interleave(count)
        parts.append((owner, *attend_everything(queries[owner], keys, values, scale)))
    if stop < seqlen_k:
        parts.append((everyone, *attend_everything(queries, k[:, stop:], v[:, stop:], scale)))
    out, lse = _merged(parts, queries)
    return out.transpose(1, 2).contiguous(), lse


def paged(problem: Problem, packed: Packed, block_table: Tensor) -> tuple[Tensor, Tensor]:
    """One query a sequence -> out (B, H, D) and lse (H, B)."""
    queries, k, v, scale = problem.q[:, :, None], problem.k, problem.v, problem.softmax_scale
    lengths, block_size = packed.cu_seqlens_k.diff(), k.shape[1]
    parts: list[Part] = []
    owner, slot = (torch.arange(block_table.shape[1]) < (lengths // block_size)[:, None]).nonzero(as_tuple=True)
    blocks, order = block_table[owner, slot].sort()
    owner = owner[order]
    for places, pages in _runs(blocks):
        parts.append((owner[places], *attend_everything(queries[owner[places]], k[pages], v[pages], scale)))
    for b, length in enumerate(lengths.tolist()):
        full, rows = divmod(length, block_size)
        if rows:  # in a last page that is not full
            keys, values = (x[int(block_table[b, full]), None, :rows] for x in (k, v))
            parts.append((torch.tensor([b]), *attend_everything(queries[b, None], keys, values, scale)))
    out, lse = _merged(parts, queries)
    return out[:, :, 0], lse[..., 0].mT.contiguous()


def _runs(blocks: Tensor) -> Iterator[tuple[slice, slice]]:
    """Of sorted block numbers: where consecutive ones are, and which."""
    ends = [0, *((blocks[1:] != blocks[:-1] + 1).nonzero()[:, 0] + 1).tolist(), len(blocks)]
    numbers = blocks.tolist()
    for start, stop in pairwise(ends):
        if start < stop:
            yield slice(start, stop), slice(numbers[start], numbers[stop - 1] + 1)


def _merged(parts: list[Part], queries: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of queries (B, H, Sq, D) -> out, in the shape of queries, and lse (B, H, Sq). No key: 0 and -inf."""
    greatest = queries.new_full(queries.shape[:-1], -inf)
    total, out = torch.zeros_like(greatest), queries.new_zeros(queries.shape)
    if parts:
        owner, part_out, part_lse = (torch.cat(x) for x in zip(*parts, strict=True))
        greatest.scatter_reduce_(0, owner[:, None, None].expand_as(part_lse), part_lse, "amax")
        weights = (part_lse - greatest[owner]).exp()
        total.index_add_(0, owner, weights)
        out.index_add_(0, owner, part_out * weights[..., None])
        out /= total.masked_fill(total == 0.0, 1.0)[..., None]
    return out, greatest + total.log()
