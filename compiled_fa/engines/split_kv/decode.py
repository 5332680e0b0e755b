"""Few queries on many keys, forward (Flash-Decoding: Dao, Haziza, Massa and Sizov 2023).

What takes time here is reading the cache. Keys are cut into splits, which may lie anywhere, in pages too; what the
splits of a sequence give is merged by their maxima and sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...problem import Problem, once_a_call
from ...tuning import current
from .decode_plan import page_size_of, plan
from .split_table import Rows, located, sizes


@once_a_call
def unsupported_reason(problem: Problem) -> str | None:
    """Why `forward` cannot serve a call on a CPU, with queries and keys and without dropout; None: it can."""
    most_rows = current().split_kv.most_rows
    queries, longest = problem.mean_seqlens[0], 0
    if (rows := max(1, queries) * problem.heads_per_key) > most_rows:
        return f"it decodes for up to {most_rows} query rows a key head, and these are {rows}"
    k, v = _rows(problem)
    if k is None or v is None or k.per_block != v.per_block:
        return "it decodes where keys and values are rows at even distances in memory"
    if problem.packed is None:
        longest = problem.k.shape[1]
    else:
        if problem.packed.first_keys is not None and page_size_of(problem) is not None:
            return "it decodes where a sequence in pages begins with its first page"
        lengths_q, lengths_k = problem.packed.host_lengths
        if min(lengths_q) != max(lengths_q):
            return "it decodes where sequences have one number of queries"
        longest = max(lengths_k)
    if not longest or k.total < sizes(longest, page_size_of(problem))[1]:
        return "it decodes where there are keys for a split"
    return None


@once_a_call
def _rows(problem: Problem) -> tuple[Rows | None, Rows | None]:
    """Keys and values as rows of memory."""
    return Rows.of(problem.k), Rows.of(problem.v)


def is_worth_code(problem: Problem) -> bool:
    """Are there so many keys that code of its own is worth its while?"""
    tuned = current().split_kv
    if max(1, problem.mean_seqlens[0]) * problem.heads_per_key > tuned.most_rows:
        return False
    nheads_k, head_dim = problem.k.shape[-2:]
    elements = problem.total_k * nheads_k * head_dim  # not those of a pool
    return problem.mean_seqlens[1] >= tuned.decode_from_keys and elements >= tuned.decode_from_elements


def rule(problem: Problem, instead_of: str) -> str:
    """The name of the tuned rule by which it is faster than that engine."""
    if instead_of != "sdpa_cpu":
        return "decode_beside_tiles"
    return "decode_beside_sdpa_16bit" if problem.k.dtype.itemsize < 4 else "decode_beside_sdpa"


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out and lse, as the engine's."""
    q, batch, queries, packed = problem.q, problem.batch, problem.mean_seqlens[0], problem.packed
    planned = plan(problem)
    nheads_k, heads_per_key, head_dim_v = problem.k.shape[-2], problem.heads_per_key, problem.v.shape[-1]
    # Query head h reads key head h // heads_per_key.
    by_key = (q if q.stride(-1) == 1 else q.contiguous()).view(batch, queries, nheads_k, heads_per_key, -1)
    of_k, of_v = planned.windows
    tensors = by_key.to(problem.lse_dtype), problem.k.as_strided(*of_k), problem.v.as_strided(*of_v)
    tables = planned.tables or [located(packed, planned.k, planned.run, some).flatten() for some in planned.split_plans]
    found = [planned.kernel([*tensors, *table, *planned.arguments]) for table in tables]
    out, lse = found[0] if len(found) == 1 else (torch.cat(x) for x in zip(*found, strict=True))
    if queries > 1:
        out, lse = (x.unflatten(2, (queries, -1)).transpose(1, 2) for x in (out, lse))
    lse = lse.reshape(batch, queries, -1)
    if packed is None:
        return out.reshape(batch, queries, -1, head_dim_v).contiguous(), lse.mT.contiguous()
    return out.reshape(batch * queries, -1, head_dim_v).contiguous(), lse.flatten(0, 1).mT.contiguous()
