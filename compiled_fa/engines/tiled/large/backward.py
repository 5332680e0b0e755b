"""Backward: probabilities recomputed from lse, one tile of keys after another (FlashAttention-2, Algorithm 2)."""

from __future__ import annotations

from math import inf, nan

import torch
from torch import Tensor

from ....problem import Problem
from ..bias import BiasGradient
from ..chunks import Chunk, Span, spans
from ..rows import as_rows
from ..tiles import TileSizes
from . import operands, products
from .budget import within
from .call import Call
from .operands import Side
from .rims import Rims


def backward(
    problem: Problem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    tiles: TileSizes | None = None,
) -> tuple[Tensor, ...]:
    """-> dq, dk, dv, and dbias where it is wanted. Probabilities come from the lse given, which may be merged over more
    keys than these.

    dlse: gradient of lse, or None where it is not used. tiles: sizes to use in place of those that fit the budget.
    """
    return within(problem.q.device, lambda nbytes: _backward(problem, dout, out, lse, dlse, nbytes, tiles))


def _backward(
    problem: Problem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    nbytes: int,
    tiles: TileSizes | None,
) -> tuple[Tensor, ...]:
    call = Call(problem, "backward", nbytes, tiles)
    dq, dk, dv = (call.results(x, x.shape) for x in (problem.q, problem.k, problem.v))
    dbias = BiasGradient.of(problem, call.dtype)
    with call.scratch:
        for chunk in call.chunks:
            _Chunk(call, chunk, dout, out, lse, dlse, dbias).run(dq, dk, dv)
    gradients = call.finished(dq), call.finished(dk), call.finished(dv)
    return gradients if dbias is None else (*gradients, dbias.finished())


class _Chunk:
    """A chunk's query side stays at hand, and dQ grows beside it: the outer loop is over keys."""

    def __init__(
        self,
        call: Call,
        chunk: Chunk,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        dlse: Tensor | None,
        dbias: BiasGradient | None,
    ) -> None:
        problem, dtype = call.problem, call.product_dtype
        self._call, self._chunk, self._dbias = call, chunk, dbias
        self._rows, self._columns = operands.sides(call, chunk)
        self._q, self._dout = self._rows.operand(problem.q, dtype), self._rows.operand(dout, dtype)
        self._k, self._v = self._columns.operand(problem.k, dtype), self._columns.operand(problem.v, dtype)
        # Rows without a key have probabilities 0, and those past a sequence's end.
        self._lse = torch.nan_to_num(self._rows.split(as_rows(lse)), nan=nan, posinf=inf, neginf=inf)
        if (missing := self._rows.missing()) is not None:
            self._lse.masked_fill_(missing, inf)
        self._delta = _deltas(call, self._rows, self._dout, out, dlse)
        self._rims, self._dropout = Rims(call, chunk, self._columns), call.dropout_rows(chunk)

    def run(self, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        call, chunk, scratch = self._call, self._chunk, self._call.scratch
        pairs, rows, head_dim = self._q.shape
        heads, scale = chunk.heads_per_key, call.problem.softmax_scale
        dq_sum = scratch.take("dq", (pairs, rows, head_dim), call.dtype)
        of_dk, of_dv, of_dq = self._columns.room(dk), self._columns.room(dv), self._rows.room(dq)
        begun = False
        for k_start, k_stop in chunk.key_spans():
            needed, full = chunk.queries_that_see(k_start, k_stop)
            if not begun and needed != (0, chunk.lengths_q[1]):
                dq_sum.zero_()
                begun = True
            keys = slice(k_start, k_stop)
            dk_sum = scratch.take("dk", (pairs, k_stop - k_start, head_dim), call.dtype)
            dv_sum = scratch.take("dv", (pairs, k_stop - k_start, self._v.shape[-1]), call.dtype)
            parts = spans(*needed, chunk.tiles.queries)
            for queries in parts:
                these = slice(queries[0] * heads, queries[1] * heads)
                probs, dscores = self._tile(queries, (k_start, k_stop), full, these)
                more = queries is not parts[0]
                products.add(dv_sum, probs.mT, self._dout[:, these], more)  # line 12: dV += Pᵀ dO
                products.add(dk_sum, dscores.mT, self._q[:, these], more)  # line 16: dK += dSᵀ Q
                products.add(dq_sum[:, these], dscores, self._k[:, keys], begun)  # line 15: dQ += dS K
                del probs, dscores  # the next tile's are as large
            begun = True
            if not parts:
                dk_sum.zero_()
                dv_sum.zero_()
            _scaled(dk_sum, scale, of_dk[:, :, keys])
            _scaled(dv_sum, 1.0 / call.keep_probability, of_dv[:, :, keys])
        self._columns.put(of_dk, dk)
        self._columns.put(of_dv, dv)
        _scaled(dq_sum, scale, of_dq)
        self._rows.put(of_dq, dq)

    def _tile(self, queries: Span, keys: Span, full: Span, rows: slice) -> tuple[Tensor, Tensor]:
        """P, with dropout but for its factor, and dS, without the scale; (pairs, rows, keys) in the products' dtype."""
        call, chunk, scratch = self._call, self._chunk, self._call.scratch
        q, dout = self._q[:, rows], self._dout[:, rows]
        shape = *q.shape[:2], keys[1] - keys[0]
        of_tile = len(chunk.sequences), chunk.nheads_k, queries[1] - queries[0], chunk.heads_per_key, shape[-1]
        product, dprobs = (scratch.take(name, shape, call.dtype) for name in ("scores", "dprobs"))
        products.add(product, q, self._k[:, slice(*keys)].mT, alpha=call.problem.softmax_scale)  # line 10: S = Q Kᵀ
        # line 13: dP = dO Vᵀ
        products.add(dprobs, dout, self._v[:, slice(*keys)].mT, alpha=1.0 / call.keep_probability)
        product, dprobs = product.view(of_tile), dprobs.view(of_tile)
        scores = call.score(product, chunk, queries, keys)
        self._rims.hide_queries(scores, queries, keys, full)
        of_rows = slice(*queries)
        probs = scores.sub_(self._lse[:, :, of_rows]).exp_()  # line 11
        dropped = call.dropped(self._dropout, queries, keys)
        if dropped is not None:
            dprobs.masked_fill_(dropped, 0.0)
        dprobs.sub_(self._delta[:, :, of_rows])
        narrow, kept, dscores = call.product_dtype != call.dtype, probs, dprobs
        if narrow or dropped is not None:
            kept = scratch.take("probs", tuple(probs.shape), call.product_dtype).copy_(probs)
        if dropped is not None:
            kept.masked_fill_(dropped, 0.0)
        if narrow:
            dscores = scratch.take("dscores", tuple(probs.shape), call.product_dtype)
        if call.problem.softcap > 0.0 or self._dbias is not None:
            gradient = dprobs.mul_(probs)  # line 14: dS = P * (dP - D)
            if self._dbias is not None:
                self._dbias.add(gradient, chunk, queries, keys)
            gradient = call.program.product_gradient(gradient, product)
            if gradient is not dscores:
                dscores.copy_(gradient)
        else:
            torch.mul(dprobs, probs, out=dscores)  # line 14
        return kept.view(shape), dscores.view(shape)


def _scaled(total: Tensor, factor: float, found: Tensor) -> None:
    """found = factor * total, in found's shape and dtype."""
    products.into(found, torch.mul, total.view(found.shape), factor)


def _deltas(call: Call, rows: Side, dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """D = rowsum(dO * O) (line 4), less the gradient of lse."""
    outs = rows.split(out)
    douts = dout.view(outs.shape)
    if call.dtype != outs.dtype or call.dtype != douts.dtype:
        terms = torch.addcmul(call.zero, douts, outs)  # in the larger dtype, in one launch
    else:
        terms = douts * outs
    deltas = terms.sum(-1, keepdim=True)
    return deltas if dlse is None else deltas.sub_(rows.split(as_rows(dlse)))
