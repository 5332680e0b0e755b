"""The steps: scores, softmax and weighted values of splits of the keys, and of a sequence's splits together.

    b sequences   x splits   n keys of a split, in runs   m queries   h key heads   g query heads for each   r = (m, g)

Inductor makes loops of them that read k and v about as fast as memory gives them (bench/NOTES.md), because

- sums of their own, for each row r and for each slice of v's head_dim, become one loop, which loads a key or a value
  once for all of them, and all of a head's values together;
- shapes that decide how a loop looks are fixed: rows, head_dims. Others are symbolic;
- queries and splits are found by an index on windows of memory, which overlap, so that rows within a split are plain
  strides.

What lies where a split has no key is never multiplied: it may be anything, NaN too.

Private API: Inductor's config in CONFIG and aten::_unsafe_index, tried with torch 2.11.0, 2.13.0 and 2.15.0. Without
the operator other engines serve; without the config the compilation fails, a warning says so once, and steps run
eagerly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...inductor import steps
from ...inductor.graphs import Compiled, Size
from ...inductor.steps import example
from ...scores import ScoreProgram
from ...scores.arguments import Features, ScoreArguments
from ...tuning import current
from .split_table import SplitTable

CONFIG: dict[str, Any] = {
    # Nothing is kept that a loop can make again: it would be a copy of the cache.
    "realize_opcount_threshold": 1000,
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "realize_acc_reads_size_threshold": None,
    "assert_indirect_indexing": False,  # indices are our own
    "size_asserts": False,  # and so are views: 13 questions a call less
    "cpp.enable_floating_point_contract_flag": "fast",
    "cpp_wrapper": True,  # what is around the loops, 30 tensors and views, takes as long in Python as a short cache
}


def missing() -> str | None:
    """Why there are no steps; None: there are."""
    if hasattr(torch.ops.aten, "_unsafe_index"):
        return None
    return f"torch {torch.__version__} does not have aten::_unsafe_index"


def _rows_of(x: Tensor, indices: list[Tensor]) -> Tensor:
    rows: Tensor = torch.ops.aten._unsafe_index.Tensor(x, indices)
    return rows


def slices(head_dim: int, rows: int, dtype: torch.dtype) -> int:
    """Of v's head_dim: of whole vectors each, and as many as have their sums in registers."""
    tuned = current().split_kv
    vector = tuned.register_bytes // dtype.itemsize
    counts = range(1, min(head_dim // vector, tuned.accumulators // rows) + 1)
    return max((count for count in counts if head_dim % (count * vector) == 0), default=1)


class Shape(NamedTuple):
    """What is fixed in the code of a step. head_dims: q's and v's."""

    features: Features
    queries: int
    heads_per_key: int
    head_dims: tuple[int, int]

    @property
    def rows(self) -> int:
        return self.queries * self.heads_per_key


Attended = tuple[Tensor, Tensor, Tensor]


def decoding(shape: Shape) -> Compiled:
    """q (batch, m, h * g, head_dim) in the arithmetic's dtype, windows of k (., run, h, head_dim) and v
    (., run, h, slices, .), SplitTable and ScoreArguments, slopes as (b, g * h) -> out (b, m, h * g, head_dim of v) and
    lse (b, h * g, m)."""
    x = ("x",)
    tables = (*x, "runs"), x, x, x, x, ("b", "s"), ("b",)
    return _compiled(decode, shape, shape.features.dtype, tables, "decoding")


def alone(shape: Shape) -> Compiled:
    """For sequences of one split each. Windows of queries (., m, h * g, head_dim), k and v, tables (batch,) of windows
    of queries, of windows of keys, and of the rows of these that are keys, start and stop, and ScoreArguments
    -> out (batch, m, h, g, slices, .) and lse (batch, m, h, g)."""
    return _compiled(attend_alone, shape, shape.features.product_dtype, (("batch",),) * 4, "short sequences")


def _compiled(
    step: Callable[..., tuple[Tensor, ...]],
    shape: Shape,
    query_dtype: torch.dtype,
    tables: tuple[tuple[str, ...], ...],
    what: str,
) -> Compiled:
    """Machine code; without a compiler the step itself, which is slow."""
    features, head_dims = shape.features, shape.head_dims
    dtype, count = features.product_dtype, slices(head_dims[1], shape.rows, features.product_dtype)

    def examples(size: Size) -> list[Tensor]:
        run, h = size("run", 64), size("h", 5)

        def windows(name: str, *inner: int) -> Tensor:
            strides = [size(f"{name} {n}", typical) for n, typical in enumerate((1 << 10, 1 << 10, 1 << 7))]
            last = torch.empty(inner, dtype=dtype).stride()
            return torch.empty_strided((size(f"{name} rows", 9973), run, h, *inner), (*strides, *last), dtype=dtype)

        strides = [size(f"q {n}", typical) for n, typical in enumerate((1 << 11, 1 << 11, 1 << 7))]
        sizes = size("q rows", 9941), shape.queries, h * shape.heads_per_key, head_dims[0]
        queries = torch.empty_strided(sizes, (*strides, 1), dtype=query_dtype)
        k, v = windows("k", head_dims[0]), windows("v", count, head_dims[1] // count)
        indices = [example(size, *table, dtype=torch.int64) for table in tables]
        arguments = ScoreArguments.examples(features, functools.partial(example, size))
        return [queries, k, v, *indices, *arguments.flatten()]

    function = functools.partial(step, shape)
    key = what, shape, count
    compiled = steps.compiled(key, function, examples, f"{what} ({features.words})", **CONFIG)
    return compiled if compiled is not None else lambda tensors: function(*tensors)


def attend_alone(shape: Shape, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """What `alone` compiles."""
    q, k, v, query, row, start, stop, *rest = tensors
    program = ScoreArguments.unflatten(ScoreArguments.names(shape.features), iter(rest)).program()
    batch_idx = torch.arange(query.shape[0])
    queries = _by_key_head(shape, q, k)
    out, total, top = _attended(shape, program, queries, k, v, query, row[:, None], batch_idx, -start, start, stop)
    lse = (top + total.log()).unflatten(1, (shape.queries, -1)).transpose(-1, -2).contiguous()
    divisor = torch.where(total == 0.0, 1.0, total).transpose(-1, -2)[..., None, None]
    out = (out / divisor).to(shape.features.product_dtype).unflatten(2, (shape.queries, -1))
    return out.transpose(1, 2).contiguous(), lse


def decode(shape: Shape, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """What `decoding` compiles."""
    features = shape.features
    q, k, v, *rest = tensors
    following = iter(rest)
    table = SplitTable.unflatten(tuple(SplitTable.__dataclass_fields__), following)
    program = ScoreArguments.unflatten(ScoreArguments.names(features), following).program()

    inputs, batch_idx = (shape, program, _by_key_head(shape, q, k), k, v), table.batch_idx
    out, total, top = _attended(*inputs, batch_idx, table.first_row, batch_idx, table.kv_start, table.start, table.stop)
    # Each sequence's splits, side by side: b s ...
    exists = (torch.arange(table.splits.shape[1]) < table.num_splits[:, None])[..., None, None]
    tops = torch.where(exists, _rows_of(top, [table.splits]), -inf)
    greatest = tops.amax(1)
    weight = torch.exp(tops - torch.where(greatest == -inf, 0.0, greatest)[:, None])
    total = (torch.where(exists, _rows_of(total, [table.splits]), 0.0) * weight).sum(1)
    lse = (greatest + total.log()).unflatten(1, (shape.queries, -1)).permute(0, 3, 2, 1)  # b h g m
    weight, divisor = (x.transpose(-1, -2)[..., None, None] for x in (weight, torch.where(total == 0.0, 1.0, total)))
    out = (torch.where(exists[..., None, None], _rows_of(out, [table.splits]), 0.0) * weight).sum(1)
    out = (out / divisor).to(features.product_dtype).unflatten(2, (shape.queries, -1)).transpose(1, 2)  # b m h g ...
    return out.flatten(4).flatten(2, 3).contiguous(), lse.flatten(1, 2).contiguous()


def _by_key_head(shape: Shape, q: Tensor, k: Tensor) -> Tensor:
    """(., m, h * g, head_dim) -> (., m, h, g, head_dim): query head n reads key head n // g."""
    batch, queries, _, head_dim = q.shape
    return q.view(batch, queries, k.shape[2], shape.heads_per_key, head_dim)


def _attended(
    shape: Shape,
    program: ScoreProgram,
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    first_row: Tensor,
    batch_idx: Tensor,
    kv_start: Tensor,
    start: Tensor,
    stop: Tensor,
) -> Attended:
    """-> of every split: values weighted by exp(score - maximum) (x, h, r, slices, .), the sum of these weights, and
    the maximum (x, r, h). query, first_row: windows of queries, and of keys, (x, runs). batch_idx, kv_start: the
    program's batch index, and the index of the window's first row. start, stop: the rows of it that are keys."""
    features, rows, heads_per_key = shape.features, shape.rows, shape.heads_per_key
    dtype = features.dtype
    keys = _rows_of(k, [first_row]).to(dtype)  # x runs run h head_dim

    def product(r: int) -> Tensor:
        m, g = divmod(r, heads_per_key)
        return (_rows_of(queries[:, m, :, g], [query]).to(dtype)[:, None, None] * keys).sum(-1)

    _, runs, run, h, _ = keys.shape
    offset = torch.arange(runs * run, dtype=torch.int32).view(runs, run, 1, 1)
    batch_idx, kv_start = (x[:, None, None, None, None] for x in (batch_idx, kv_start.int()))
    start, stop = (x.int()[:, None, None, None, None] for x in (start, stop))
    inside = (offset >= start) & (offset < stop)

    def scores(some: range) -> Tensor:
        """Of these rows: x runs run r h."""
        row_number = torch.arange(some.start, some.stop, dtype=torch.int32)[:, None]
        head = row_number % heads_per_key * h + torch.arange(h, dtype=torch.int32)  # slopes lie as scores do
        indices = batch_idx, head, row_number // heads_per_key, kv_start + offset
        score = program.score(torch.stack([product(r) for r in some], 3), *indices)
        if features.masked:
            score = torch.where(program.mask(*indices), score, -inf)
        return torch.where(inside, score, -inf)

    if features.masked and shape.queries > 1:
        # A mask of its own for each row: cheaper made once than for the maximum and again for the exponentials.
        score = torch.cat([scores(range(row, row + 1)) for row in range(rows)], 3)
    else:
        score = scores(range(rows))
    top = score.amax((1, 2))
    probs = torch.exp(score - torch.where(top == -inf, 0.0, top)[:, None, None])
    outs = []
    for r in range(rows):
        for j in range(v.shape[3]):
            values = torch.where(inside, _rows_of(v[:, :, :, j], [first_row]).to(dtype), 0.0)
            outs.append((probs[:, :, :, r, :, None] * values).sum((1, 2)))
    return torch.stack(outs, 2).unflatten(2, (rows, -1)), probs.sum((1, 2)), top
