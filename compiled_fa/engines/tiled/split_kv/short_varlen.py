"""Many short packed sequences, forward: a few of a sequence's queries on all of its keys, many sequences at a time.

Their products are small: thousands of matrix products are mostly calls (bench/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .... import inductor, untiled
from ....inductor import Compiled
from ....memory import keep_freed, new_empty
from ....problem import Packed, Problem
from ....scores import Window
from ..features import Features, numbers
from . import step
from .decode_plan import SCORES
from .split_table import Rows

ROWS = 4  # queries times heads_per_key that share a key, if heads_per_key allows
MULTIPLE = 16  # keys: blocks run together that see as many, rounded up; finer, a sequence would be read more often
PLANS = 4  # kept

_plans: dict[object, ShortVarlenPlan] = {}

Results = tuple[Tensor, Tensor]


class Group(NamedTuple):
    """Blocks of queries that run together: tables of `step.alone`, (blocks,), and where its results belong."""

    run: int  # keys
    tables: list[Tensor]
    numbers: list[Tensor]
    rows: Tensor  # (blocks * queries,), of out; the one after its last for those of nobody


class ShortVarlenPlan(NamedTuple):
    """What calls with these lengths share."""

    kernel: Compiled
    queries: int
    groups: list[Group]


def pays(problem: Problem) -> bool:
    """Is this a call for `forward`, as far as one can tell at a glance?"""
    q, packed = problem.q, problem.packed
    if q.device.type != "cpu" or packed is None or packed.block_table is not None:
        return False
    if problem.dropout_seed is not None or problem.alibi_slopes is not None or not problem.v.numel():
        return False
    if q.numel() < untiled.SHORT_ELEMENTS or packed.max_seqlen_k > untiled.SHORT_KEYS:
        return False
    return untiled.rows(problem, 1) <= untiled.ROWS


def forward(problem: Problem) -> Results | None:
    """-> out and lse, as the engine's; None: it is for tiles, after all, or there is no compiler."""
    q, packed = problem.q, problem.packed
    q_rows, k, v = Rows.of(q), Rows.of(problem.k), Rows.of(problem.v)
    if packed is None or q_rows is None or k is None or v is None:
        return None
    plan = _plan(problem, packed)
    if plan is None:
        return None
    (total, nheads, _), (nheads_k, head_dim_v) = q.shape, problem.v.shape[-2:]
    heads_per_key = nheads // nheads_k
    queries = q_rows.windows(plan.queries).unflatten(2, (nheads_k, heads_per_key))
    slices = step.slices(head_dim_v, plan.queries * heads_per_key, q.dtype)
    out = new_empty(q, (total + 1, nheads, head_dim_v))
    lse = q.new_empty(total + 1, nheads, dtype=problem.lse_dtype)
    for group in plan.groups:
        windows = k.windows(group.run), v.windows(group.run, slices)
        some_out, some_lse = plan.kernel([queries, *windows, *group.tables, *group.numbers])
        out.index_copy_(0, group.rows, some_out.view(-1, nheads, head_dim_v))
        lse.index_copy_(0, group.rows, some_lse.view(-1, nheads))
    return out[:total], lse[:total].mT.contiguous()


def _plan(problem: Problem, packed: Packed) -> ShortVarlenPlan | None:
    """None: there is no compiler, or memory holds less than a window."""
    q, k = problem.q, problem.k
    sums = tuple(packed.sums_q), tuple(packed.sums_k)
    program = problem.softmax_scale, problem.softcap, problem.window
    key = inductor.eager_reason(), *sums, q.shape[1:], problem.v.shape[1:], q.dtype, *program
    found = _plans.get(key)
    if found is not None:
        return found
    heads_per_key = q.shape[-2] // k.shape[-2]
    queries = max(1, ROWS // heads_per_key)
    longest = max(stop - start for start, stop in pairwise(sums[1]))
    if q.shape[0] < queries or k.shape[0] < max(MULTIPLE, -(-longest // MULTIPLE) * MULTIPLE):
        return None
    masked = problem.window.in_force(packed.max_seqlen_q, longest) != Window()
    features = Features.of(problem.program(0, 0), masked, problem.lse_dtype, q.dtype)
    kernel = step.alone(step.Shape(features, queries, heads_per_key, (q.shape[-1], problem.v.shape[-1])))
    if kernel is None:
        return None
    keep_freed()
    if len(_plans) >= PLANS:
        _plans.clear()
    plan = _plans[key] = ShortVarlenPlan(kernel, queries, list(_groups(problem, packed, queries, features)))
    return plan


def _groups(problem: Problem, packed: Packed, queries: int, features: Features) -> Iterator[Group]:
    total_q, nheads, _ = problem.q.shape
    first_q, first_k = packed.cu_seqlens_q[:-1].long(), packed.cu_seqlens_k[:-1].long()
    lengths_q, lengths_k = packed.cu_seqlens_q.diff().long(), packed.cu_seqlens_k.diff().long()
    blocks = -(-lengths_q // queries)
    batch_idx = torch.arange(len(blocks), device=blocks.device).repeat_interleave(blocks)
    q_start = (torch.arange(len(batch_idx), device=batch_idx.device) - (blocks.cumsum(0) - blocks)[batch_idx]) * queries
    position = q_start + (lengths_k - lengths_q)[batch_idx]
    _, seen = problem.window.keys_seen_by_any(position, position + queries - 1, lengths_k[batch_idx])
    seen = seen.clamp(min=0)  # keys of a block's sequence, up to the last that it sees
    runs = seen.clamp(min=1).add(MULTIPLE - 1) // MULTIPLE * MULTIPLE
    for run in runs.unique().tolist():
        members = (runs == run).nonzero()[:, 0]
        at_once = max(1, SCORES // (features.dtype.itemsize * run * queries * nheads))
        for some in members.split(at_once):
            of = batch_idx[some]
            # Windows lie within memory, and begin earlier where that ends.
            first = first_q[of] + q_start[some]
            query = first.clamp(max=total_q - queries)
            row = first_k[of].clamp(max=problem.k.shape[0] - run)
            start = first_k[of] - row
            in_window, end = query[:, None] + torch.arange(queries, device=query.device), (first_q + lengths_q)[of]
            mine = (in_window >= first[:, None]) & (in_window < end[:, None])
            # The program counts queries from the window's first: so many are left, which lines up the last ones.
            program = problem.program((end - query).int(), lengths_k[of].int())
            rows = in_window.where(mine, total_q).flatten()
            yield Group(run, [query, row, start, start + seen[some]], numbers(program, 0, 1.0, features.dtype), rows)
