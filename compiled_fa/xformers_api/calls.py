"""A mask over packed sequences as calls of flash_attn_varlen_func.

Its masks stand at the bottom right: the last query at the last key. Where the mask wanted stands at the top left, keys
that no query sees and queries that see no key are set aside, as sequences of their own without queries or without keys,
so that nothing is copied. What is left of a sequence has as many queries as keys, where both corners are one, or more
queries by some number: a window moved by that number says the same. A call has one window, so there is a call for each
such number, in which all other sequences give 0, and the results are added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

Interval = tuple[int, int]  # rows from, and up to but without


class Band(NamedTuple):
    """Which keys a query sees: from its position - left up to position + right; -1: unbounded. Positions are places
    in its sequence, counted from the first query and the first key (top_left), or from the last ones."""

    left: int = -1
    right: int = -1
    top_left: bool = False

    def visible(self, seqlen_q: int, seqlen_k: int, device: torch.device | str | None) -> Tensor:
        """bool (seqlen_q, seqlen_k)."""
        query = torch.arange(seqlen_q, device=device)[:, None]
        key = torch.arange(seqlen_k, device=device) + (0 if self.top_left else seqlen_q - seqlen_k)
        seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
        if self.left >= 0:
            seen &= key >= query - self.left
        if self.right >= 0:
            seen &= key <= query + self.right
        return seen

    def at_bottom_right(self, seqlen_q: int, seqlen_k: int) -> tuple[int, int, tuple[int, int]]:
        """-> how many of the first queries and keys count, and the window_size that says the same of those.

        At the top left only bands with right = 0 (causal ones) are wanted.
        """
        if not self.top_left:
            return seqlen_q, seqlen_k, (self.left, self.right)
        keys = min(seqlen_k, seqlen_q)
        queries = seqlen_q if self.left < 0 else min(seqlen_q, keys + self.left)
        more = queries - keys
        return queries, keys, (self.left - more if self.left >= 0 else -1, more)


@dataclass(frozen=True)
class Call:
    """flash_attn_varlen_func's arguments."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    window_size: tuple[int, int]

    def to(self, device: torch.device) -> Call:
        return replace(self, cu_seqlens_q=self.cu_seqlens_q.to(device), cu_seqlens_k=self.cu_seqlens_k.to(device))


def _call(pieces: list[tuple[int, int]], window_size: tuple[int, int], device: torch.device) -> Call:
    """pieces: the lengths of queries and keys of sequences that lie behind one another."""
    pieces = [piece for piece in pieces if piece != (0, 0)] or [(0, 0)]
    queries, keys = (list(side) for side in zip(*pieces, strict=True))
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([0, *accumulate(side)], dtype=torch.int32, device=device) for side in (queries, keys)
    )
    return Call(cu_seqlens_q, cu_seqlens_k, max(queries), max(keys), window_size)


def calls_of(
    queries: Sequence[Interval], keys: Sequence[Interval], total_k: int, band: Band, device: torch.device
) -> list[Call]:
    """Sequence i is rows queries[i] of the queries, which lie behind one another, and rows keys[i] of the keys, which
    may have gaps between them; total_k: all rows of the keys."""
    wanted = [band.at_bottom_right(q[1] - q[0], k[1] - k[0]) for q, k in zip(queries, keys, strict=True)]
    found = []
    for window_size in dict.fromkeys(window for *_, window in wanted):
        pieces, next_k = [], 0
        for (first_q, end_q), (first_k, _), (count_q, count_k, own) in zip(queries, keys, wanted, strict=True):
            if own != window_size:
                pieces.append((end_q - first_q, 0))
                continue
            pieces += [(0, first_k - next_k), (count_q, count_k), (end_q - first_q - count_q, 0)]
            next_k = first_k + count_k
        pieces.append((0, total_k - next_k))
        found.append(_call(pieces, window_size, device))
    return found
