"""Backward: probabilities recomputed from lse, one tile of keys after another (FlashAttention-2, Algorithm 2)."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ...problem import Problem
from .call import Call
from .chunks import Chunk
from .tiles import TileSizes


def backward(
    problem: Problem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None = None,
    tiles: TileSizes | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv. Probabilities come from the lse given, which may be merged over more keys than these.

    dlse: gradient of lse, or None where it is not used. tiles: sizes to use in place of those of tiles.py.
    """
    call = Call(problem, tiles)
    gradients = (
        problem.q.new_zeros(problem.q.shape),
        problem.k.new_zeros(problem.k.shape),
        problem.v.new_zeros(problem.v.shape),
    )
    with call:
        for chunk in call.chunks("backward"):
            _backward_chunk(call, chunk, dout, out, lse, dlse, *gradients)
    return gradients


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
) -> None:
    problem, scratch = call.problem, call.scratch
    pairs, heads = chunk.pairs, chunk.heads_per_key
    # The query side of the whole chunk stays at hand, and dQ grows beside it: the outer loop is over keys.
    at = call.indices(chunk)
    queries, douts, lses, deltas, dqs = [], [], [], [], []
    for start, stop in chunk.query_spans():
        queries.append(call.load_queries("queries", problem.q, chunk, start, stop))
        douts.append(call.load_queries("dout", dout, chunk, start, stop))
        tile_out = call.load_queries("out", out, chunk, start, stop)
        delta = (douts[-1] * tile_out).sum(-1)  # line 4: D = rowsum(dO * O)
        if dlse is not None:
            delta -= call.load_queries("dlse", call.as_rows(dlse), chunk, start, stop)[..., 0]
        tile_lse = call.load_queries("lse", call.as_rows(lse), chunk, start, stop)
        lses.append(tile_lse.masked_fill_(tile_lse == -inf, inf).view(pairs, heads, -1))
        deltas.append(delta.view(pairs, heads, -1))
        dqs.append(call.query_buffer("dq", chunk, start, stop, problem.q.shape[-1]).zero_())
    for k_start, k_stop in chunk.key_spans():
        keys = call.load_keys("keys", problem.k, chunk, k_start, k_stop)
        values = call.load_keys("values", problem.v, chunk, k_start, k_stop)
        tile_dk = scratch.take("dk", keys.shape, call.dtype).zero_()
        tile_dv = scratch.take("dv", values.shape, call.dtype).zero_()
        for number, (q_start, q_stop) in enumerate(chunk.query_spans()):
            tile = chunk.tile_at(q_start, q_stop, k_start, k_stop)
            if tile is None:
                continue
            shape = (pairs, heads, q_stop - q_start, k_stop - k_start)
            scores = scratch.take("scores", shape, call.dtype)
            dprobs = scratch.take("dprobs", shape, call.dtype)
            flat_scores, flat_dprobs = scores.flatten(1, 2), dprobs.flatten(1, 2)
            torch.bmm(queries[number], keys.mT, out=flat_scores)  # line 10: S = Q Kᵀ
            torch.bmm(douts[number], values.mT, out=flat_dprobs)  # line 13: dP = dO Vᵀ
            call.kernels.gradient_step(
                scores, dprobs, lses[number], deltas[number], at(q_start, q_stop, tile), tile.masked
            )
            tile_dv.baddbmm_(flat_scores.mT, douts[number])  # line 12: dV += Pᵀ dO
            dqs[number].baddbmm_(flat_dprobs, keys)  # line 15: dQ += dS K
            tile_dk.baddbmm_(flat_dprobs.mT, queries[number])  # line 16: dK += dSᵀ Q
        call.store_keys(dk, chunk, k_start, k_stop, tile_dk)
        call.store_keys(dv, chunk, k_start, k_stop, tile_dv)
    for number, (start, stop) in enumerate(chunk.query_spans()):
        call.store_queries(dq, chunk, start, stop, dqs[number].view(pairs, heads, stop - start, -1))
