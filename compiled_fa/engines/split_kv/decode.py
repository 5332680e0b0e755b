"""Few queries on many keys, forward (Flash-Decoding: Dao, Haziza, Massa and Sizov 2023).

What takes time here is reading the cache. Keys are cut into splits, which may lie anywhere, in pages too; what the
splits of a sequence give is merged by their maxima and sums.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...problem import Problem, once_a_call
from ...scores import Window
from ...tuning import current
from ..engine import Prepared
from .decode_plan import DecodePlan, page_size_of, plan
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


def rule(problem: Problem, instead_of: str) -> str | None:
    """The name of the tuned rule by which it is faster than that engine; None: it is not."""
    if instead_of != "sdpa_cpu":
        return "decode_beside_tiles"
    if problem.k.dtype.itemsize < 4:
        masked = problem.packed is None and problem.window_in_force != Window()
        return "decode_beside_sdpa_16bit_masked" if masked else "decode_beside_sdpa_16bit"
    rows = problem.mean_seqlens[0] * problem.heads_per_key
    many = problem.packed is None and rows > current().split_kv.decode_rows_beside_sdpa
    return None if many else "decode_beside_sdpa"


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out and lse, as the engine's."""
    q, packed, planned = problem.q, problem.packed, plan(problem)
    tables = planned.tables or [located(packed, planned.k, planned.run, some).flatten() for some in planned.split_plans]
    if packed is None:
        return _attend(planned, tables, q, problem.k, problem.v)
    out, lse = _attend(planned, tables, q.unflatten(0, (problem.batch, -1)), problem.k, problem.v)
    return out.flatten(0, 1), lse.transpose(0, 1).flatten(1).contiguous()


def prepared(problem: Problem) -> Prepared | None:
    """As the engine's: of calls that have their keys in the same places."""
    planned = plan(problem)
    if not planned.tables or problem.alibi_slopes is not None:
        return None
    nbytes = sum(tensor.nbytes for table in planned.tables for tensor in table)
    return Prepared(functools.partial(_attend, planned, planned.tables), nbytes)


def _attend(planned: DecodePlan, tables: list[list[Tensor]], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q (B, Sq, H, D) -> out (B, Sq, H, Dv) and lse (B, H, Sq)."""
    if q.dtype != planned.dtype:
        q = q.to(planned.dtype)
    if q.stride(-1) != 1:
        q = q.contiguous()
    of_k, of_v = planned.windows
    tensors = q, k.as_strided(*of_k), v.as_strided(*of_v)
    if len(tables) == 1:
        out, lse = planned.kernel([*tensors, *tables[0], *planned.arguments])
        return out, lse
    found = [planned.kernel([*tensors, *table, *planned.arguments]) for table in tables]
    out, lse = (torch.cat(x) for x in zip(*found, strict=True))
    return out, lse
