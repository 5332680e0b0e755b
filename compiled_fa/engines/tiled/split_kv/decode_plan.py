"""What a decoding call shares with others of its shape: the layers of a model ask for the same once a token.

Made of a hundred operations on small tensors, which take longer than attending to a short cache does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .... import inductor
from ....inductor import Compiled
from ....memory import keep_freed
from ....problem import Problem
from ....scores import Window
from ..features import Features, numbers
from . import step
from .split_table import Rows, SplitPlan, SplitTable, located, sizes, split_plan

SCORES = 4 << 20  # bytes of scores at once; a step's buffers are several times as large, and are kept (memory.py)
PLANS = 64  # kept

_plans: dict[object, DecodePlan] = {}


class DecodePlan(NamedTuple):
    kernel: Compiled
    lengths: Tensor  # keys of every sequence
    numbers: list[Tensor]  # of the score program
    run: int  # keys
    split_plans: list[SplitPlan]  # of sequences that run together
    dense: list[SplitTable]  # the same, where they lie, if keys are dense


def plan(problem: Problem, k: Rows, queries: int, lengths: Sequence[int]) -> DecodePlan | None:
    """For sequences with so many queries, and keys; None: there are no keys, or memory of less than a run, or
    there is no compiler."""
    page_size, max_num_blocks = _pages(problem)
    heads_and_dims = problem.q.shape[-2:], problem.v.shape[-2:]
    program = problem.softmax_scale, problem.softcap, problem.window
    slopes = problem.alibi_slopes is not None
    how = inductor.eager_reason(), slopes, problem.packed is None, page_size, max_num_blocks, k.total, k.per_block
    key = queries, *lengths, *how, *heads_and_dims, problem.q.dtype, *program
    found = _plans.get(key)
    if found is None:
        found = _made(problem, k, queries, lengths)
        if found is not None:
            if len(_plans) >= PLANS:
                _plans.clear()
            _plans[key] = found
    elif slopes:  # everybody has their own
        found = found._replace(numbers=_numbers(problem, queries, found.lengths))
    return found


def _made(problem: Problem, k: Rows, queries: int, lengths: Sequence[int]) -> DecodePlan | None:
    q, packed, (nheads_k, head_dim_v) = problem.q, problem.packed, problem.v.shape[-2:]
    heads_per_key = q.shape[-2] // nheads_k
    rows = queries * heads_per_key
    lengths_k = torch.tensor(lengths, dtype=torch.int32, device=q.device)
    program = problem.program(queries, lengths_k)
    features = Features.of(program, problem.window_in_force != Window(), problem.lse_dtype, q.dtype)
    page_size, max_num_blocks = _pages(problem)
    split, run = sizes(max(lengths), page_size)
    if k.total < run or not any(lengths):
        return None
    kernel = step.decoding(step.Shape(features, queries, heads_per_key, (q.shape[-1], head_dim_v)))
    if kernel is None:
        return None
    keep_freed()
    seen = [problem.window.keys_seen_by_any(length - queries, length - 1, length) for length in lengths]
    spans = tuple((max(0, start // split * split), max(0, stop)) for start, stop in seen)
    groups = _groups(lengths, SCORES // (features.dtype.itemsize * rows * nheads_k))
    split_plans = [
        split_plan(spans[first:stop], first, split, run, page_size, max_num_blocks) for first, stop in groups
    ]
    dense = [located(None, k, run, some) for some in split_plans] if packed is None else []
    return DecodePlan(kernel, lengths_k, _numbers(problem, queries, lengths_k), run, split_plans, dense)


def _numbers(problem: Problem, queries: int, lengths: Tensor) -> list[Tensor]:
    """Of the score program. Query heads are counted as the step counts them: the first of every key head first."""
    program = problem.program(queries, lengths)
    if program.alibi_slopes is not None:
        by_key = program.alibi_slopes.unflatten(1, (problem.k.shape[-2], -1))
        program = replace(program, alibi_slopes=by_key.mT.flatten(1))
    return numbers(program, problem.batch, 1.0, problem.lse_dtype)


def _pages(problem: Problem) -> tuple[int | None, int]:
    """Keys of a page, and how many pages a row of the block table has."""
    table = None if problem.packed is None else problem.packed.block_table
    return (None, 0) if table is None else (problem.k.shape[1], table.shape[1])


def _groups(lengths: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Sequences first to stop of `most` keys in all, or one."""
    first = keys = 0
    for sequence, length in enumerate(lengths):
        if keys and keys + length > most:
            yield first, sequence
            first, keys = sequence, 0
        keys += length
    yield first, len(lengths)
