"""A chunk's bias, tile by tile: where it lies, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import Problem, bias_part
from .chunks import Chunk, Span


def tile(bias: Tensor, chunk: Chunk, queries: Span, keys: Span) -> Tensor:
    """What a tile has of a problem's bias, or of its gradient: a view, broadcastable to (sequences, key heads, queries,
    query heads of a key head, keys)."""
    sequences = slice(chunk.sequences[0], chunk.sequences[-1] + 1)  # of a dense call they are consecutive
    part = bias_part(bias, sequences, chunk.query_heads, slice(*queries), slice(*keys))
    heads = (chunk.nheads_k, chunk.heads_per_key) if part.shape[1] > 1 else (1, 1)
    by_key_head: Tensor = part.unflatten(1, heads)
    return by_key_head.transpose(2, 3)


class BiasGradient:
    """The gradient of a bias: that of the scores, summed over what was broadcast in the dtype of the arithmetic. Of a
    bias as large as the scores each element is stored once, in the bias's own."""

    def __init__(self, problem: Problem, bias: Tensor, dtype: torch.dtype) -> None:
        (batch, seqlen_q, nheads, _), seqlen_k = problem.q.shape, problem.k.shape[1]
        whole = tuple(bias.shape) == (batch, nheads, seqlen_q, seqlen_k)
        self._bias = bias
        self._total = bias.new_zeros(bias.shape, dtype=bias.dtype if whole else dtype)

    @classmethod
    def of(cls, problem: Problem, dtype: torch.dtype) -> BiasGradient | None:
        """None: it is not wanted."""
        if problem.bias is None or not problem.bias_gradient:
            return None
        return cls(problem, problem.bias, dtype)

    def add(self, dscores: Tensor, chunk: Chunk, queries: Span, keys: Span) -> None:
        """dscores: of a tile, (sequences, key heads, queries, query heads of a key head, keys)."""
        into = tile(self._total, chunk, queries, keys)
        sizes = zip(into.shape, dscores.shape, strict=True)
        broadcast = [dim for dim, (size, full) in enumerate(sizes) if size < full]
        into.add_(dscores.sum(broadcast, keepdim=True) if broadcast else dscores)

    def finished(self) -> Tensor:
        return self._total.to(self._bias.dtype)
