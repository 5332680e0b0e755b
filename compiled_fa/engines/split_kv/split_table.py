"""Keys in splits, and where in memory they lie.

A split is some runs, each of rows that lie side by side: one run, or the pages of a cache whose pages are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...flattening import Flattened
from ...problem import Packed
from ...tuning import current

Spans = Sequence[tuple[int, int]]  # keys start to stop of every sequence; starts are multiples of a split


@dataclass(frozen=True)
class SplitTable(Flattened):
    """Splits (x,) of all sequences, one after the other. int64.

    A window is as many rows of memory as a split has keys, those of the split among them.
    """

    first_row: Tensor  # (x, runs): where runs of the window begin
    batch_idx: Tensor  # whose they are
    kv_start: Tensor  # the index in its sequence of the window's first row
    start: Tensor  # the rows of the window that are keys of the split
    stop: Tensor
    splits: Tensor  # (b, s): a sequence's splits; beyond their number, any
    num_splits: Tensor  # (b,)


Strides = tuple[tuple[int, ...], tuple[int, ...]]  # sizes and strides, for Tensor.as_strided


class Rows(NamedTuple):
    """k or v as rows of memory, at even distances."""

    heads: int
    head_dim: int
    strides: tuple[int, int]  # from one row to the next, and from one head
    total: int
    per_block: int  # rows from one sequence, or one page, to the next

    @classmethod
    def of(cls, x: Tensor) -> Rows | None:
        """None: it is not made of such rows."""
        shape, strides = x.shape, x.stride()
        (blocks, rows, heads, head_dim), (outer, stride, of_head, inner) = (1, *shape)[-4:], (0, *strides)[-4:]
        if (inner != 1 and head_dim != 1) or stride <= 0 or (blocks > 1 and (outer <= 0 or outer % stride)):
            return None
        per_block = outer // stride if blocks > 1 else rows
        return cls(heads, head_dim, (stride, of_head), (blocks - 1) * per_block + rows, per_block)

    def windows(self, run: int, slices: int = 0) -> Strides:
        """Row n and those after it, for every n: (rows, run, heads, head_dim), overlapping; or head_dim in slices."""
        row, head = self.strides
        shape, strides = (self.total - run + 1, run, self.heads), (row, row, head)
        if not slices:
            return (*shape, self.head_dim), (*strides, 1)
        width = self.head_dim // slices
        return (*shape, slices, width), (*strides, width, 1)


class Pages(NamedTuple):
    """size: keys of a page; None: each sequence's keys lie in one piece. table_width: pages in a row of the table."""

    size: int | None
    table_width: int

    def located(self, sequence: Tensor, kv_idx: Tensor) -> tuple[Tensor, Tensor]:
        """SplitPlan's place and offset of keys of sequences."""
        if self.size is None:
            return sequence.expand(kv_idx.shape), kv_idx
        return sequence * self.table_width + kv_idx // self.size, kv_idx % self.size


class SplitPlan(NamedTuple):
    """Spans in splits (x,), wherever those lie."""

    place: Tensor  # (x, runs), of a run's first key: its page, counted in all of the block table; else its sequence
    offset: Tensor  # of that key in there
    batch_idx: Tensor  # as in SplitTable
    kv_start: Tensor  # of the split
    start: Tensor  # 0
    length: Tensor
    splits: Tensor
    num_splits: Tensor
    exists: Tensor | None  # (x, 1): that a split has keys; None: all have


def sizes(longest: int, page_size: int | None) -> tuple[int, int]:
    """Keys of a split, and of a run. longest: keys of a sequence. page_size: of a page, where keys lie in pages."""
    tuned = current().split_kv
    split = tuned.long_split_keys if longest >= tuned.long_split_from_keys else tuned.split_keys
    if page_size is None:
        return split, split
    run = max(n for n in range(1, min(page_size, split) + 1) if page_size % n == 0)
    return split // run * run, run


def split_plan(spans: Spans, first: int, split: int, run: int, pages: Pages) -> SplitPlan:
    """first: the first of these sequences. One without keys has a split without."""
    span_start, span_stop = torch.tensor(spans, device="cpu").unbind(1)
    keys = (span_stop - span_start).clamp(min=0)
    num_splits = ((keys + (split - 1)) // split).clamp(min=1)
    before = num_splits.cumsum(0) - num_splits
    sequence = torch.arange(len(spans), device="cpu").repeat_interleave(num_splits)
    done = (torch.arange(len(sequence), device="cpu") - before[sequence]) * split
    length = (keys[sequence] - done).clamp(max=split)
    kv_start = span_start[sequence] + done
    # Beyond the last key, the last run that has one, once more.
    runs = torch.minimum(torch.arange(0, split, run, device="cpu"), (length - 1).clamp(min=0)[:, None] // run * run)
    place, offset = pages.located((first + sequence)[:, None], kv_start[:, None] + runs)
    split_idx = torch.arange(int(num_splits.max()), device="cpu")
    splits = before[:, None] + torch.minimum(split_idx, num_splits[:, None] - 1)
    exists = None if min(stop - start for start, stop in spans) > 0 else (length > 0)[:, None]
    return SplitPlan(
        place, offset, first + sequence, kv_start, torch.zeros_like(length), length, splits, num_splits, exists
    )


def located(packed: Packed | None, k: Rows, run: int, plan: SplitPlan) -> SplitTable:
    """Where splits of dense (None), packed or paged keys lie."""
    if packed is None:
        return _placed(plan, plan.place * k.per_block + plan.offset, k.total - run)
    if packed.block_table is None:
        return _placed(plan, packed.cu_seqlens_k.take(plan.place) + plan.offset, k.total - run)
    if packed.one_page_each:
        row = packed.block_table.take(plan.place).long() * k.per_block + plan.offset
        first = packed.first_keys
        return _placed(plan, row if first is None else row + first.take(plan.place), k.total - run)
    return _placed(plan, torch.add(plan.offset, packed.block_table.take(plan.place), alpha=k.per_block))


def _placed(plan: SplitPlan, row: Tensor, last_window: int | None = None) -> SplitTable:
    """row: where runs begin that have keys. last_window: of memory, where runs are not splits of its blocks."""
    if plan.exists is not None:
        row = row.where(plan.exists, 0)
    kv_start, start, stop = plan.kv_start, plan.start, plan.length
    if last_window is not None:
        window = row.clamp(max=last_window)
        start = (row - window)[:, 0]
        row, kv_start, stop = window, kv_start - start, stop + start
    return SplitTable(row, plan.batch_idx, kv_start, start, stop, plan.splits, plan.num_splits)
