"""Backward: probabilities recomputed from lse, one tile of keys after another (FlashAttention-2, Algorithm 2)."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ...problem import Problem
from ...tuning import current, on
from . import large
from .bias import BiasGradient
from .call import Call
from .chunks import Chunk, spans
from .products import Sum
from .rows import as_rows
from .tiles import TileSizes


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

    dlse: gradient of lse, or None where it is not used. tiles: sizes to use in place of those of tiles.py.
    """
    if on(problem.q.device).tiled.memory_parts:
        return large.backward(problem, dout, out, lse, dlse, tiles)
    call = Call(problem, tiles)
    gradients = call.results(problem.q.shape), call.results(problem.k.shape), call.results(problem.v.shape)
    dbias = BiasGradient.of(problem, call.dtype)
    with call:
        for chunk in call.chunks("backward"):
            _backward_chunk(call, chunk, dout, out, lse, dlse, *gradients, dbias)
    return gradients if dbias is None else (*gradients, dbias.finished())


def _backward_chunk(
    call: Call,
    chunk: Chunk,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dbias: BiasGradient | None,
) -> None:
    problem, scratch = call.problem, call.scratch
    batch_heads, heads, dtype = (
        chunk.batch_heads,
        chunk.heads_per_key,
        call.product_dtype(chunk.lengths_q[1], chunk.lengths_k[1]),
    )
    q_total, head_dim = chunk.lengths_q[1], problem.q.shape[-1]
    # The query side of the whole chunk stays at hand, and dQ grows beside it: the outer loop is over keys.
    at = call.indices(chunk)
    queries = call.load_queries("queries", problem.q, chunk, 0, q_total, dtype)
    douts = call.load_queries("dout", dout, chunk, 0, q_total, dtype)
    lses = call.load_queries("lse", as_rows(lse), chunk, 0, q_total).view(batch_heads, q_total, heads)
    lses.masked_fill_(lses == -inf, inf)
    deltas = _deltas(call, chunk, douts, out, dlse).view(batch_heads, q_total, heads)
    tile_dq = scratch.take("dq", (batch_heads, q_total * heads, head_dim), call.dtype).zero_()
    for k_start, k_stop in chunk.key_spans():
        keys = call.load_keys("keys", problem.k, chunk, k_start, k_stop, dtype)
        values = call.load_keys("values", problem.v, chunk, k_start, k_stop, dtype)
        # Transposed, because a short and wide product is faster than a tall and narrow one.
        dk_sum = Sum(scratch.take("dk", (batch_heads, head_dim, k_stop - k_start), call.dtype), scratch)
        dv_sum = Sum(scratch.take("dv", (batch_heads, values.shape[-1], k_stop - k_start), call.dtype), scratch)
        for q_start, q_stop, masked in chunk.query_tiles(k_start, k_stop):
            rows = slice(q_start * heads, q_stop * heads)
            shape = (batch_heads, q_stop - q_start, heads, k_stop - k_start)
            scores, dprobs = scratch.take("scores", shape, dtype), scratch.take("dprobs", shape, dtype)
            flat_scores, flat_dprobs = scores.flatten(1, 2), dprobs.flatten(1, 2)
            torch.bmm(queries[:, rows], keys.mT, out=flat_scores)  # line 10: S = Q Kᵀ
            torch.bmm(douts[:, rows], values.mT, out=flat_dprobs)  # line 13: dP = dO Vᵀ
            indices = at(q_start, q_stop, k_start, k_stop)
            chosen = slice(q_start, q_stop)
            dscores = None if dbias is None else scratch.take("dscores", shape, call.dtype)
            call.kernels.gradient_step(scores, dprobs, lses[:, chosen], deltas[:, chosen], indices, masked, dscores)
            if dbias is not None and dscores is not None:
                by_head = dscores.unflatten(0, (-1, chunk.nheads_k))
                dbias.add(by_head, chunk, (q_start, q_stop), (k_start, k_stop))
            dv_sum.add(douts[:, rows].mT, flat_scores)  # line 12: dVᵀ += dOᵀ P
            dq_product = scratch.take("product", (batch_heads, rows.stop - rows.start, head_dim), dtype)
            tile_dq[:, rows].add_(torch.bmm(flat_dprobs, keys, out=dq_product))  # line 15: dQ += dS K
            dk_sum.add(queries[:, rows].mT, flat_dprobs)  # line 16: dKᵀ += Qᵀ dS
        call.store_keys(dk, chunk, k_start, k_stop, dk_sum.finished().mT)
        call.store_keys(dv, chunk, k_start, k_stop, dv_sum.finished().mT)
    call.store_queries(dq, chunk, 0, q_total, tile_dq)


def _deltas(call: Call, chunk: Chunk, douts: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """D = rowsum(dO * O) (line 4), less the gradient of lse: (batch_heads, rows of the chunk's queries)."""
    deltas = call.scratch.take("delta", tuple(douts.shape[:2]), call.dtype)
    heads = chunk.heads_per_key
    for start, stop in spans(0, chunk.lengths_q[1], current().tiled.tile):
        rows = slice(start * heads, stop * heads)
        tile_out = call.load_queries("out", out, chunk, start, stop)
        torch.sum(tile_out.mul_(douts[:, rows]), -1, out=deltas[:, rows])
        if dlse is not None:
            deltas[:, rows].sub_(call.load_queries("dlse", as_rows(dlse), chunk, start, stop)[..., 0])
    return deltas
