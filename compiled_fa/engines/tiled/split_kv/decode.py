"""Few queries on many keys, forward (Flash-Decoding: Dao, Haziza, Massa and Sizov 2023).

What takes time here is reading the cache. Keys are cut into splits, which may lie anywhere, in pages too; what the
splits of a sequence give is merged by their maxima and sums.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .... import untiled
from ....problem import Problem
from . import step
from .decode_plan import plan
from .split_table import Rows, located

Results = tuple[Tensor, Tensor]


def pays(problem: Problem) -> bool:
    """Is this a call for `forward`, as far as one can tell at a glance?"""
    q, k, packed = problem.q, problem.k, problem.packed
    if q.device.type != "cpu" or problem.dropout_seed is not None or not (q.numel() and problem.v.numel()):
        return False
    seqlen_q, seqlen_k = (q.shape[1], k.shape[1]) if packed is None else (packed.max_seqlen_q, packed.max_seqlen_k)
    few = untiled.rows(problem, max(1, seqlen_q)) <= untiled.ROWS
    return few and seqlen_k >= untiled.DECODING_KEYS and k.numel() >= untiled.DECODING_ELEMENTS


def forward(problem: Problem) -> Results | None:
    """-> out and lse, as the engine's; None: it is for tiles, after all, or there is no compiler."""
    lengths, k, v = _lengths(problem), Rows.of(problem.k), Rows.of(problem.v)
    if lengths is None or k is None or v is None or k.per_block != v.per_block:
        return None
    (queries, lengths_k), q, batch = lengths, problem.q, problem.batch
    planned = plan(problem, k, queries, lengths_k)
    if planned is None:
        return None
    nheads_k, head_dim_v = problem.v.shape[-2:]
    heads_per_key = q.shape[-2] // nheads_k
    rows = queries * heads_per_key
    # Query head h reads key head h // heads_per_key.
    by_key = (q if q.stride(-1) == 1 else q.contiguous()).view(batch, queries, nheads_k, heads_per_key, -1)
    by_key = by_key.to(problem.lse_dtype)
    windows = k.windows(planned.run), v.windows(planned.run, step.slices(head_dim_v, rows, q.dtype))
    everything = planned.dense or [located(problem.packed, k, planned.run, plan) for plan in planned.split_plans]
    found = [planned.kernel([by_key, *windows, *splits, *planned.numbers]) for splits in everything]
    out, lse = found[0] if len(found) == 1 else (torch.cat(x) for x in zip(*found, strict=True))
    if queries > 1:
        out, lse = (x.unflatten(2, (queries, -1)).transpose(1, 2) for x in (out, lse))
    lse = lse.reshape(batch, queries, -1)
    if problem.packed is None:
        return out.reshape(batch, queries, -1, head_dim_v).contiguous(), lse.mT.contiguous()
    return out.reshape(batch * queries, -1, head_dim_v).contiguous(), lse.flatten(0, 1).mT.contiguous()


def _lengths(problem: Problem) -> tuple[int, list[int]] | None:
    """Queries of every sequence, and keys of each; None: sequences differ in their queries."""
    packed = problem.packed
    if packed is None:
        return problem.q.shape[1], [problem.k.shape[1]] * problem.batch
    queries, remainder = divmod(problem.q.shape[0], problem.batch)
    if remainder or packed.sums_q != list(range(0, problem.q.shape[0] + 1, queries)):
        return None
    return queries, [stop - start for start, stop in pairwise(packed.sums_k)]
