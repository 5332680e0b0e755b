"""What a decoding call shares with others of its shape: the layers of a model ask for the same once a token.

Made of a hundred operations on small tensors, which take longer than attending to a short cache does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...caches import Cache
from ...inductor.graphs import Compiled
from ...inductor.steps import eager_reason
from ...memory import keep_freed
from ...problem import Problem
from ...scores import Window
from ...scores.arguments import Features, ScoreArguments
from ...tuning import Tuning, current
from . import step
from .split_table import Pages, Rows, SplitPlan, Strides, located, sizes, split_plan


class DecodePlan(NamedTuple):
    kernel: Compiled
    dtype: torch.dtype  # of the arithmetic
    lengths: Tensor  # keys of every sequence
    arguments: list[Tensor]  # of the score program
    k: Rows
    windows: tuple[Strides, Strides]  # of k and v
    run: int  # keys
    split_plans: list[SplitPlan]  # of sequences that run together
    tables: list[list[Tensor]]  # of these, if all calls have their keys in the same places
    tuned: Tuning  # held, so that no other has its id


_plans: Cache[object, DecodePlan] = Cache("decode plans", entries=64)


def plan(problem: Problem) -> DecodePlan:
    found = _plans.get(_key(problem), lambda: _made(problem))
    if problem.alibi_slopes is not None:  # everybody has their own
        found = found._replace(arguments=_arguments(problem, found.lengths))
    return found


def _key(problem: Problem) -> object:
    tuned = current()
    if problem.signature is not None:
        return problem.signature, id(tuned), eager_reason()
    q, k, v, packed = problem.q, problem.k, problem.v, problem.packed
    lengths = () if packed is None else tuple(packed.host_lengths[1])
    tensors = (q.shape, q.dtype), (k.shape, k.stride()), (v.shape, v.stride())
    program = problem.softmax_scale, problem.softcap, problem.window, problem.alibi_slopes is not None
    return (
        lengths,
        *tensors,
        *program,
        page_size_of(problem),
        _max_num_blocks(problem),
        id(tuned),
        eager_reason(),
    )


def _made(problem: Problem) -> DecodePlan:
    q, packed, head_dim_v = problem.q, problem.packed, problem.v.shape[-1]
    k, v = Rows.of(problem.k), Rows.of(problem.v)
    if k is None or v is None:
        raise ValueError("k and v must be rows of memory: decode.unsupported_reason tells")
    lengths = [problem.k.shape[1]] * problem.batch if packed is None else packed.host_lengths[1]
    queries, rows = problem.mean_seqlens[0], problem.mean_seqlens[0] * problem.heads_per_key
    lengths_k = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    program = problem.program(queries, lengths_k)
    features = Features.of(program, problem.window_in_force != Window(), problem.lse_dtype, q.dtype)
    pages = Pages(page_size_of(problem), _max_num_blocks(problem))
    split, run = sizes(max(lengths), pages.size)
    kernel = step.decoding(step.Shape(features, queries, problem.heads_per_key, (q.shape[-1], head_dim_v)))
    keep_freed()
    seen = [problem.window.keys_seen_by_any(length - queries, length - 1, length) for length in lengths]
    spans = [(max(0, start // split * split), max(0, stop)) for start, stop in seen]
    score_bytes_a_key = features.dtype.itemsize * queries * q.shape[-2]
    groups = _groups(lengths, current().split_kv.score_bytes // score_bytes_a_key)
    split_plans = [split_plan(spans[first:stop], first, split, run, pages) for first, stop in groups]
    fixed = packed is None or packed.is_fixed
    tables = [located(packed, k, run, some).flatten() for some in split_plans] if fixed else []
    windows = k.windows(run), v.windows(run, step.slices(head_dim_v, rows, q.dtype))
    arguments = _arguments(problem, lengths_k)
    return DecodePlan(kernel, problem.lse_dtype, lengths_k, arguments, k, windows, run, split_plans, tables, current())


def _arguments(problem: Problem, lengths: Tensor) -> list[Tensor]:
    """Of the score program. Query heads are counted as the step counts them: the first of every key head first."""
    program = problem.program(problem.mean_seqlens[0], lengths)
    if program.alibi_slopes is not None:
        by_key = program.alibi_slopes.unflatten(1, (problem.k.shape[-2], -1))
        program = replace(program, alibi_slopes=by_key.mT.flatten(1))
    return ScoreArguments.of(program, problem.batch, 1.0, problem.lse_dtype).flatten()


def page_size_of(problem: Problem) -> int | None:
    """Keys of a page; None: each sequence's keys lie in one piece."""
    packed = problem.packed
    paged = packed is not None and packed.block_table is not None and not packed.one_page_each
    return problem.k.shape[1] if paged else None


def _max_num_blocks(problem: Problem) -> int:
    """How many pages a row of the block table has; 0: each sequence's keys lie in one piece."""
    table = None if problem.packed is None else problem.packed.block_table
    return 0 if table is None or page_size_of(problem) is None else table.shape[1]


def _groups(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Sequences first to stop of `most` keys in all, or one."""
    first = keys = 0
    for sequence, length in enumerate(lengths):
        if keys and keys + length > most:
            yield first, sequence
            first, keys = sequence, 0
        keys += length
    yield first, len(lengths)
