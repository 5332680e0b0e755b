"""Forward: a softmax a row where a tile holds all of its keys; else the online one (FlashAttention-2, Algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ....problem import Problem
from ....scores.dropout import Row
from ..chunks import Chunk, Span, spans
from ..tiles import TileSizes
from . import operands, products
from .budget import within
from .call import Call
from .rims import Rims
from .sizes import padded


def forward(problem: Problem, tiles: TileSizes | None = None) -> tuple[Tensor, Tensor]:
    """-> out, shaped as q with v's head_dim, and lse, (B, H, Sq) or, packed, (H, T).

    tiles: sizes to use in place of those that fit the budget.
    """
    return within(problem.q.device, lambda nbytes: _forward(problem, nbytes, tiles))


def _forward(problem: Problem, nbytes: int, tiles: TileSizes | None) -> tuple[Tensor, Tensor]:
    call = Call(problem, "forward", nbytes, tiles)
    q, v = problem.q, problem.v
    out = call.results(q, (*q.shape[:-1], v.shape[-1]))
    lse = call.lse()
    with call.scratch:
        for chunk in call.chunks:
            _forward_chunk(call, chunk, out, lse)
    return call.finished(out), call.finished_lse(lse)


def _forward_chunk(call: Call, chunk: Chunk, out: Tensor, lse: Tensor) -> None:
    problem, heads = call.problem, chunk.heads_per_key
    rows, columns = operands.sides(call, chunk)
    q = rows.operand(problem.q, call.product_dtype)
    k = columns.operand(problem.k, call.product_dtype).mT
    v = columns.operand(problem.v, call.product_dtype)
    rims, dropout = Rims(call, chunk, columns), call.dropout_rows(chunk)
    of_out, of_lse = rows.room(out), rows.room(lse)
    # Of all rows: the greatest score, and the sum of the probabilities that are not yet normalised.
    tops, totals = (call.scratch.take(name, tuple(of_lse.shape), call.dtype) for name in ("tops", "totals"))
    for q_start, q_stop in reversed(chunk.query_spans()):  # causal: the largest tiles first, so that no buffer grows
        these = slice(q_start, q_stop)
        softmax = _Softmax(call, chunk, rims, dropout, (q_start, q_stop), tops[:, :, these], totals[:, :, these])
        needed, full = chunk.keys_seen(q_start, q_stop)
        passing = spans(*needed, chunk.tiles.keys)
        for keys in passing:
            of_rows = slice(q_start * heads, q_stop * heads)
            softmax.add(q[:, of_rows], k[..., slice(*keys)], v[:, slice(*keys)], keys, full, len(passing) == 1)
        softmax.finish(of_out[:, :, these])
    torch.add(tops, totals.log_(), out=of_lse)  # line 13: m + log l; -inf for rows without a key
    rows.put(of_out, out)
    rows.put(of_lse, lse)


class _Softmax:
    """The softmax of some rows of a chunk, times V, while keys pass by.

    top, total: the greatest score, and the sum of P, of these rows, (n, Hk, m, g, 1): to be filled.
    """

    def __init__(
        self, call: Call, chunk: Chunk, rims: Rims, dropout: Row | None, queries: Span, top: Tensor, total: Tensor
    ) -> None:
        self._call, self._chunk, self._rims, self._dropout, self._queries = call, chunk, rims, dropout, queries
        self._top, self._total = top, total
        self._some_row_empty = rims.some_row_empty(queries[0]) or call.problem.bias is not None
        # The greatest score so far; P·V, (pairs, rows, head_dim_v + 1), with the sum of P in the last column, so that
        # they are rescaled together.
        self._so_far: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, q: Tensor, k: Tensor, v: Tensor, keys: Span, full: Span, alone: bool) -> None:
        """Some keys, of which `full` need no mask; alone: there are no others."""
        call, scratch = self._call, self._call.scratch
        pairs, rows, columns, head_dim_v = *q.shape[:2], *v.shape[1:]
        product = scratch.take("scores", (pairs, rows, columns), call.dtype)
        products.add(product, q, k, alpha=call.problem.softmax_scale)  # line 8: S = Q Kᵀ
        scores = call.score(product.view(*self._top.shape[:4], columns), self._chunk, self._queries, keys)
        hidden = self._rims.hide_keys(scores, self._queries, keys, full)
        before = self._so_far
        top = torch.amax(scores, -1, keepdim=True, out=self._top) if alone else scores.amax(-1, keepdim=True)
        if before is not None:
            top = torch.maximum(top, before)
        if self._some_row_empty or (hidden and self._chunk.window.left is not None):
            # A row that has met no key yet: exp(-inf - a finite number) is 0, and exp(-inf + inf) were nan.
            top.clamp_(min=torch.finfo(call.dtype).min)
        probs = scores.sub_(top)
        if call.product_dtype == call.dtype:
            probs.exp_()
        else:
            # Rounded to the dtype of the products before they are summed: the sum is that of what multiplies V.
            probs = torch.exp(scores, out=scratch.take("probs", tuple(scores.shape), call.product_dtype))
        name = "sums" if before is None else "more sums"
        sums = scratch.take(name, (pairs, rows, padded(head_dim_v)), call.dtype)[..., : head_dim_v + 1]
        total = self._total if alone else sums[..., head_dim_v].view(*self._top.shape)
        torch.sum(probs, -1, keepdim=True, dtype=call.dtype, out=total)
        # The softmax is normalised over all keys, dropped ones included: drop after the sum.
        if (dropped := call.dropped(self._dropout, self._queries, keys)) is not None:
            probs.masked_fill_(dropped, 0.0)
        products.add(sums[..., :head_dim_v], probs.view(pairs, rows, columns), v)  # line 10: O += P V
        if before is not None and self._sums is not None:
            fade = before.sub_(top).exp_().view(pairs, rows, 1)
            torch.addcmul(sums, self._sums, fade, out=self._sums)
        else:
            self._sums = sums
        self._so_far = top

    def finish(self, out: Tensor) -> None:
        """diag(l)^-1 O (line 12); 0 for rows without a key, whose total is 0."""
        if self._sums is None or self._so_far is None:
            out.zero_()
            self._top.zero_()
            self._total.zero_()
            return
        if self._so_far is not self._top:
            self._top.copy_(self._so_far)
            self._total.copy_(self._sums[..., -1:].view(self._total.shape))
        total = self._total
        if self._call.keep_probability != 1.0:
            total = total * self._call.keep_probability
        if self._some_row_empty:
            total = total.clamp(min=torch.finfo(total.dtype).tiny)
        products.into(out, torch.div, self._sums[..., :-1].view(*total.shape[:4], -1), total)
