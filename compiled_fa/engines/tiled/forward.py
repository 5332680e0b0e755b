"""Forward: for every tile of queries, one pass over the keys they see (FlashAttention-2, Algorithm 1)."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ...problem import Problem
from ...tuning import on
from . import large
from .call import Call
from .chunks import Chunk
from .keys import Keys
from .products import Sum
from .rows import as_rows
from .steps import softmax_finish
from .tiles import TileSizes


def forward(problem: Problem, tiles: TileSizes | None = None) -> tuple[Tensor, Tensor]:
    """-> out, shaped as q with v's head_dim, and lse, (B, H, Sq) or, packed, (H, T).

    tiles: sizes to use in place of those of tiles.py.
    """
    if on(problem.q.device).tiled.memory_parts:
        return large.forward(problem, tiles)
    call = Call(problem, tiles)
    q, v = problem.q, problem.v
    out = call.results((*q.shape[:-1], v.shape[-1]))
    rows = q.shape[:-1]
    lse = torch.full((*rows[:-2], rows[-1], rows[-2]), -inf, dtype=call.dtype, device=q.device)
    with call:
        for chunk in call.chunks("forward"):
            _forward_chunk(call, chunk, out, lse)
    return out, lse


def _forward_chunk(call: Call, chunk: Chunk, out: Tensor, lse: Tensor) -> None:
    head_dim_v, scratch = call.problem.v.shape[-1], call.scratch
    dtype = call.product_dtype(chunk.lengths_q[1], chunk.lengths_k[1])
    keys_and_values, at = Keys(call, chunk, dtype), call.indices(chunk)
    for q_start, q_stop in chunk.query_spans():
        queries = call.load_queries("queries", call.problem.q, chunk, q_start, q_stop, dtype)
        shape = (chunk.batch_heads, q_stop - q_start, chunk.heads_per_key)
        row_max = scratch.take("row_max", shape, call.dtype).fill_(-inf)
        row_sum = scratch.take("row_sum", shape, call.dtype).zero_()
        accumulator = scratch.take("accumulator", (*shape, head_dim_v), call.dtype)
        weighted = Sum(accumulator.flatten(1, 2), scratch)
        to_rescale = accumulator[..., :0]  # nothing, before the first tile
        for start, stop, masked in chunk.key_tiles(q_start, q_stop):
            scores = scratch.take("scores", (*shape, stop - start), dtype)
            keys, values = keys_and_values.tile(start, stop)
            torch.bmm(queries, keys.mT, out=scores.flatten(1, 2))  # line 8: S = Q Kᵀ
            call.kernels.softmax_step(scores, row_max, row_sum, to_rescale, at(q_start, q_stop, start, stop), masked)
            weighted.add(scores.flatten(1, 2), values)  # line 10: O += P V
            to_rescale = accumulator
        weighted.finished()
        tile_out, tile_lse = softmax_finish(accumulator, row_max, row_sum, call.keep_probability)
        call.store_queries(out, chunk, q_start, q_stop, tile_out)
        call.store_queries(as_rows(lse), chunk, q_start, q_stop, tile_lse[..., None])
