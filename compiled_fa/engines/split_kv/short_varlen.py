"""Many short packed sequences, forward: a few of a sequence's queries on all of its keys, many sequences at a time.

Their products are small: thousands of matrix products are mostly calls (bench/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...caches import Cache
from ...inductor.graphs import Compiled
from ...inductor.steps import eager_reason
from ...memory import keep_freed, new_empty
from ...problem import Packed, Problem, once_a_call
from ...scores import Window
from ...scores.arguments import Features, ScoreArguments
from ...tuning import current
from . import step
from .split_table import Rows


class Group(NamedTuple):
    """Blocks of queries that run together: tables of `step.alone`, (blocks,), and where its results belong."""

    run: int  # keys
    tables: list[Tensor]
    arguments: list[Tensor]
    rows: Tensor  # (blocks * queries,), of out; the one after its last for those of nobody


class ShortVarlenPlan(NamedTuple):
    """What calls with these lengths share."""

    kernel: Compiled
    queries: int
    groups: list[Group]


_plans: Cache[object, ShortVarlenPlan] = Cache("short varlen plans", entries=4)


@once_a_call
def unsupported_reason(problem: Problem) -> str | None:
    """Why `forward` cannot serve a call on a CPU, with queries and keys and without dropout; None: it can."""
    q, k, packed, most_rows = problem.q, problem.k, problem.packed, current().split_kv.most_rows
    if packed is None or packed.block_table is not None:
        return "short sequences must be packed, not in pages"
    if problem.alibi_slopes is not None:
        return "it has no ALiBi for short sequences"
    if problem.heads_per_key > most_rows:
        return f"it serves up to {most_rows} query heads a key head, and these are {problem.heads_per_key}"
    if any(Rows.of(x) is None for x in (q, k, problem.v)):
        return "short sequences must be rows at even distances in memory"
    if q.shape[0] < _block_queries(problem) or k.shape[0] < _multiple_of_keys(max(1, *packed.host_lengths[1])):
        return "there are fewer rows than it reads at once"
    return None


def is_worth_code(problem: Problem) -> bool:
    """Are the sequences so short, and so many, that code of its own is worth its while?"""
    tuned, packed = current().split_kv, problem.packed
    return (
        packed is not None
        and packed.max_seqlen_k <= tuned.short_keys
        and problem.q.numel() >= tuned.short_from_elements
    )


def rule(problem: Problem, instead_of: str) -> str:
    """The name of the tuned rule by which it is faster than that engine."""
    return "short_beside_sdpa" if instead_of == "sdpa_cpu" else "short_beside_tiles"


def _block_queries(problem: Problem) -> int:
    return max(1, current().split_kv.short_block_rows // problem.heads_per_key)


def _multiple_of_keys(keys: int) -> int:
    multiple = current().split_kv.short_key_multiple
    return -(-keys // multiple) * multiple


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out and lse, as the engine's."""
    q, packed = problem.q, problem.packed
    q_rows, k, v = Rows.of(q), Rows.of(problem.k), Rows.of(problem.v)
    if packed is None or q_rows is None or k is None or v is None:
        raise ValueError("q, k and v must be packed rows of memory: unsupported_reason tells")
    plan = _plan(problem, packed)
    (total, nheads, _), head_dim_v = q.shape, problem.v.shape[-1]
    queries = q.as_strided(*q_rows.windows(plan.queries))
    slices = step.slices(head_dim_v, plan.queries * problem.heads_per_key, q.dtype)
    out = new_empty(q, (total + 1, nheads, head_dim_v))
    lse = q.new_empty(total + 1, nheads, dtype=problem.lse_dtype)
    for group in plan.groups:
        keys = problem.k.as_strided(*k.windows(group.run))
        values = problem.v.as_strided(*v.windows(group.run, slices))
        some_out, some_lse = plan.kernel([queries, keys, values, *group.tables, *group.arguments])
        out.index_copy_(0, group.rows, some_out.view(-1, nheads, head_dim_v))
        lse.index_copy_(0, group.rows, some_lse.view(-1, nheads))
    return out[:total], lse[:total].mT.contiguous()


def _plan(problem: Problem, packed: Packed) -> ShortVarlenPlan:
    q, tuned = problem.q, current().split_kv
    sums = tuple(map(tuple, packed.host_sums))
    program = problem.softmax_scale, problem.softcap, problem.window
    key = eager_reason(), *sums, q.shape[1:], problem.v.shape[1:], q.dtype, *program, tuned
    return _plans.get(key, lambda: _made(problem, packed))


def _made(problem: Problem, packed: Packed) -> ShortVarlenPlan:
    masked = problem.window.in_force(packed.max_seqlen_q, max(packed.host_lengths[1])) != Window()
    features = Features.of(problem.program(0, 0), masked, problem.lse_dtype, problem.q.dtype)
    head_dims, queries = (problem.q.shape[-1], problem.v.shape[-1]), _block_queries(problem)
    kernel = step.alone(step.Shape(features, queries, problem.heads_per_key, head_dims))
    keep_freed()
    return ShortVarlenPlan(kernel, queries, list(_groups(problem, packed, queries, features)))


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
    multiple = current().split_kv.short_key_multiple
    runs = seen.clamp(min=1).add(multiple - 1) // multiple * multiple
    for run in runs.unique().tolist():
        members = (runs == run).nonzero()[:, 0]
        at_once = max(1, current().split_kv.score_bytes // (features.dtype.itemsize * run * queries * nheads))
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
            arguments = ScoreArguments.of(program, 0, 1.0, features.dtype).flatten()
            yield Group(run, [query, row, start, start + seen[some]], arguments, rows)
