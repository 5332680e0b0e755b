"""The score program: everything between q·k and the softmax, and the dropout after it.

`score`, `mask` and `keep` are functions of (score, batch, head, q_idx, kv_idx) on tensors of broadcastable shapes; a
bias is read by whoever computes, where it lies, and given to `score` as what these elements have of it. The
tiled engine calls them on whole tiles; torch's flex_attention takes `score` as its score_mod (with scale=1.0) and
`mask` as its mask_mod, unchanged (create_block_mask wants functools.partial(program.mask): it counts arguments, and a
bound method's self among them). Indices count within their own sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import masks, terms
from .dropout import Dropout
from .masks import Window

UNBOUNDED = Window()


def _of_batch(lengths: int | Tensor, batch: Tensor) -> int | Tensor:
    return lengths[batch] if isinstance(lengths, Tensor) and lengths.dim() else lengths


@dataclass(frozen=True)
class ScoreProgram:
    """One call's scores. A number may also be a tensor of no dimension, so that compiled code serves every value.

    seqlen_q, seqlen_k: an int for all sequences, or an int32 tensor (batch,) or ().
    softmax_scale: factor of q·k.
    softcap: bound c of c·tanh(score / c), or None.
    alibi_slopes: (batch, nheads), in the scores' dtype, or None.
    window: keys seen around a query's position.
    dropout: keep decisions, or None.
    """

    seqlen_q: int | Tensor
    seqlen_k: int | Tensor
    softmax_scale: float | Tensor
    softcap: float | Tensor | None = None
    alibi_slopes: Tensor | None = None
    window: Window = UNBOUNDED
    dropout: Dropout | None = None

    def _position(self, batch: Tensor, q_idx: Tensor) -> Tensor:
        return masks.query_position(q_idx, _of_batch(self.seqlen_q, batch), _of_batch(self.seqlen_k, batch))

    def score(
        self,
        product: Tensor,
        batch: Tensor,
        head: Tensor,
        q_idx: Tensor,
        kv_idx: Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """q·k -> the score that enters the softmax (a flex_attention score_mod). bias: of these elements."""
        score = terms.scaled(product, self.softmax_scale)
        if self.softcap is not None:
            score = terms.softcapped(score, self.softcap)
        if self.alibi_slopes is not None:
            score = terms.alibi(score, self.alibi_slopes[batch, head], self._position(batch, q_idx), kv_idx)
        return score if bias is None else terms.biased(score, bias)

    def reach(self, largest_product: float, slope: float, dtype: torch.dtype) -> float:
        """Distance in tokens from which ALiBi leaves a key no weight, for heads of at least this slope; inf: none.

        largest_product: bound of |q·k|. dtype: of the arithmetic.
        """
        bound = largest_product * abs(float(self.softmax_scale))
        if self.softcap is not None:
            bound = min(bound, float(self.softcap))
        return terms.alibi_reach(slope, bound, dtype)

    def product_gradient(self, dscore: Tensor, product: Tensor) -> Tensor:
        """Gradient of the score -> gradient of q·k. ALiBi and a bias only add, so they play no part."""
        if self.softcap is not None:
            capped = terms.softcapped(terms.scaled(product, self.softmax_scale), self.softcap)
            dscore = dscore * terms.softcap_derivative(capped, self.softcap)
        return terms.scaled(dscore, self.softmax_scale)

    def mask(self, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """True where the query sees the key (a flex_attention mask_mod)."""
        within = (q_idx < _of_batch(self.seqlen_q, batch)) & (kv_idx < _of_batch(self.seqlen_k, batch))
        return within & self.in_window(batch, head, q_idx, kv_idx)

    def in_window(self, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """`mask` where both indices are known to lie within the lengths."""
        return self.window.contains(self._position(batch, q_idx), kv_idx)

    def keep(self, batch: Tensor, head: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        """True where dropout keeps the probability; only where `dropout` is set."""
        if self.dropout is None:
            raise ValueError("this score program has no dropout")
        return self.dropout.keep(batch, head, q_idx, kv_idx)
