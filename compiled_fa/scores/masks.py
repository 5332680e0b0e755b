"""Which keys a query sees: the window, causal as a special case of it, and the lengths.

Query i of seqlen_q queries stands at key position i + seqlen_k - seqlen_q: the last query at the last key, so causal is
aligned to the bottom right, as in flash_attn since 2.1. Kept (1) and masked (0) keys:

    causal, seqlen_q = 2, seqlen_k = 5     causal, seqlen_q = 5, seqlen_k = 2     window (1, 0), 4 queries, 4 keys
        1 1 1 1 0                              0 0                                    1 0 0 0
        1 1 1 1 1                              0 0                                    1 1 0 0
                                               0 0                                    0 1 1 0
                                               1 0                                    0 0 1 1
                                               1 1

Elementwise (`Window.contains`) this is a mask; on intervals of queries or keys (`Window.keys_seen_by_any` and its
siblings) it tells which tiles exist and which need no mask, without looking at elements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def query_position(q_idx: Tensor, seqlen_q: int | Tensor, seqlen_k: int | Tensor) -> Tensor:
    """Key position at which query q_idx stands (bottom right alignment)."""
    return q_idx + (seqlen_k - seqlen_q)


class Window(NamedTuple):
    """Keys from position - left to position + right, both included; None: unbounded on that side."""

    left: int | Tensor | None = None
    right: int | Tensor | None = None

    @classmethod
    def of(cls, causal: bool, window_left: int, window_right: int) -> Window:
        """flash_attn's arguments, where -1 is unbounded and causal allows right = 0 at most."""
        left = None if window_left < 0 else window_left
        right = None if window_right < 0 else window_right
        return cls(left, 0 if causal else right)

    def contains(self, position: Tensor, kv_idx: Tensor) -> Tensor:
        """Elementwise: does a query at this position see this key, lengths aside?"""
        inside = torch.ones_like(kv_idx, dtype=torch.bool)
        if self.left is not None:
            inside = inside & (kv_idx >= position - self.left)
        if self.right is not None:
            inside = inside & (kv_idx <= position + self.right)
        return inside

    # Half-open intervals [start, stop) of integers; one may come out empty or beyond the keys: the caller clips.

    def keys_seen_by_any(self, first: int, last: int, seqlen_k: int) -> tuple[int, int]:
        """Keys that some query at a position in first..last sees."""
        start = 0 if self.left is None else max(0, first - int(self.left))
        stop = seqlen_k if self.right is None else min(seqlen_k, last + int(self.right) + 1)
        return start, stop

    def keys_seen_by_all(self, first: int, last: int, seqlen_k: int) -> tuple[int, int]:
        """Keys that every query at a position in first..last sees: there a tile needs no mask."""
        start = 0 if self.left is None else max(0, last - int(self.left))
        stop = seqlen_k if self.right is None else min(seqlen_k, first + int(self.right) + 1)
        return start, stop
