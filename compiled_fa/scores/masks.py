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

from math import ceil, inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

Position = Any  # int or Tensor: a position, or the positions of many tiles


def query_position(q_idx: Tensor, seqlen_q: int | Tensor, seqlen_k: int | Tensor) -> Tensor:
    """Key position at which query q_idx stands (bottom right alignment)."""
    return q_idx + (seqlen_k - seqlen_q)


def within(kv_idx: Tensor, start: int | Tensor, stop: int | Tensor) -> Tensor:
    """Elementwise: is this key in the interval [start, stop) that a query sees?"""
    return (kv_idx >= start) & (kv_idx < stop)


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

    def narrowed(self, reach: float) -> Window:
        """To keys at a distance of at most `reach`."""
        if reach == inf:
            return self
        reach = ceil(reach)
        left = reach if self.left is None else min(self.left, reach)
        return Window(left, reach if self.right is None else min(self.right, reach))

    def in_force(self, seqlen_q: int, seqlen_k: int) -> Window:
        """Without the sides that hide nothing in sequences of at most these lengths."""
        left = None if self.left is None or self.left >= seqlen_k - 1 else self.left
        right = None if self.right is None or self.right >= seqlen_q - 1 else self.right
        return Window(left, right)

    # Half-open intervals [start, stop), empty where start >= stop; of ints, or of tensors for many tiles at once.

    def keys_seen_by_any(self, first: Position, last: Position, seqlen_k: Position) -> tuple[Position, Position]:
        """Keys that some query at a position in first..last sees."""
        return self._interval(first, last, 0, seqlen_k)

    def keys_seen_by_all(self, first: Position, last: Position, seqlen_k: Position) -> tuple[Position, Position]:
        """Keys that every query at a position in first..last sees: there a tile needs no mask."""
        return self._interval(last, first, 0, seqlen_k)

    def positions_that_see_any(
        self, first: Position, last: Position, lowest: Position, highest: Position
    ) -> tuple[Position, Position]:
        """Positions in lowest..highest (exclusive) that see some key in first..last."""
        return Window(self.right, self.left)._interval(first, last, lowest, highest)

    def positions_that_see_all(
        self, first: Position, last: Position, lowest: Position, highest: Position
    ) -> tuple[Position, Position]:
        """Positions in lowest..highest (exclusive) that see every key in first..last."""
        return Window(self.right, self.left)._interval(last, first, lowest, highest)

    def _interval(
        self, of_left: Position, of_right: Position, lowest: Position, highest: Position
    ) -> tuple[Position, Position]:
        """lowest..highest, cut to of_left - left on the left and to of_right + right on the right."""
        start = lowest if self.left is None else _larger(of_left - self.left, lowest)
        stop = highest if self.right is None else _smaller(of_right + self.right + 1, highest)
        return start, stop


def _larger(a: Position, b: Position) -> Position:
    return torch.as_tensor(a).clamp(min=b) if isinstance(a, Tensor) or isinstance(b, Tensor) else max(a, b)


def _smaller(a: Position, b: Position) -> Position:
    return torch.as_tensor(a).clamp(max=b) if isinstance(a, Tensor) or isinstance(b, Tensor) else min(a, b)
