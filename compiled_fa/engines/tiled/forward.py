"""Forward: for every tile of queries, one pass over the keys they see (FlashAttention-2, Algorithm 1)."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ...problem import Problem
from .call import Call
from .chunks import Chunk
from .steps import softmax_finish
from .tiles import TileSizes


def forward(problem: Problem, tiles: TileSizes | None = None) -> tuple[Tensor, Tensor]:
    """-> out, shaped as q with v's head_dim, and lse, (B, H, Sq) or, packed, (H, T).

    tiles: sizes to use in place of those of tiles.py.
    """
    call = Call(problem, tiles)
    q, v = problem.q, problem.v
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    rows = q.shape[:-1]
    lse = torch.full((*rows[:-2], rows[-1], rows[-2]), -inf, dtype=call.dtype, device=q.device)
    with call:
        for chunk in call.chunks("forward"):
            _forward_chunk(call, chunk, out, lse)
    return out, lse


def _forward_chunk(call: Call, chunk: Chunk, out: Tensor, lse: Tensor) -> None:
    k, v = call.problem.k, call.problem.v
    once = len(chunk.query_spans()) == 1
    keys = call.load_keys("keys", k, chunk, 0, chunk.lengths_k[1], used_once=once)
    values = call.load_keys("values", v, chunk, 0, chunk.lengths_k[1], used_once=once)
    at = call.indices(chunk)
    for q_start, q_stop in chunk.query_spans():
        queries = call.load_queries("queries", call.problem.q, chunk, q_start, q_stop)
        shape = (chunk.pairs, chunk.heads_per_key, q_stop - q_start)
        row_max = call.scratch.take("row_max", shape, call.dtype).fill_(-inf)
        row_sum = call.scratch.take("row_sum", shape, call.dtype).zero_()
        accumulator = call.scratch.take("accumulator", (*shape, v.shape[-1]), call.dtype).zero_()
        for tile in chunk.key_tiles(q_start, q_stop):
            scores = call.scratch.take("scores", (*shape, tile.stop - tile.start), call.dtype)
            torch.bmm(queries, keys[:, tile.start : tile.stop].mT, out=scores.flatten(1, 2))  # line 8: Q Kᵀ
            call.kernels.softmax_step(scores, row_max, row_sum, accumulator, at(q_start, q_stop, tile), tile.masked)
            accumulator.flatten(1, 2).baddbmm_(scores.flatten(1, 2), values[:, tile.start : tile.stop])  # line 10
        tile_out, tile_lse = softmax_finish(accumulator, row_max, row_sum, call.keep_probability)
        call.store_queries(out, chunk, q_start, q_stop, tile_out)
        call.store_queries(call.as_rows(lse), chunk, q_start, q_stop, tile_lse[..., None])
