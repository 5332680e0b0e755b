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

Spans = tuple[tuple[int, int], ...]  # keys start to stop of every sequence; starts are multiples of a split


@dataclass(frozen=True)
class SplitTable(Flattened):
    """All but the last split of every sequence, which are whole (x,), and the last ones, which need not be (b,). int64.

    A window is the rows of the last split and some before or after it, if it is not whole.
    """

    first_row: Tensor  # (x, runs): where runs begin
    batch_idx: Tensor  # whose they are
    kv_start: Tensor  # the index in its sequence of a split's first key
    first_split: Tensor  # (b,): the first split of a sequence, and how many it has
    num_splits: Tensor
    split_idx: Tensor  # 0 to the most of them
    last_first_row: Tensor  # (b, runs), of the window
    last_batch_idx: Tensor
    last_kv_start: Tensor  # of the window
    last_start: Tensor  # rows of the window that the last split is
    last_stop: Tensor


class Rows(NamedTuple):
    """k or v as rows of memory that are `stride` apart."""

    tensor: Tensor
    total: int
    stride: int
    per_block: int  # rows from one sequence, or one page, to the next

    @classmethod
    def of(cls, x: Tensor) -> Rows | None:
        """None: it is not made of such rows."""
        x = x if x.dim() == 4 else x[None]
        blocks, rows, _, head_dim = x.shape
        outer, stride, _, inner = x.stride()
        if (inner != 1 and head_dim != 1) or stride <= 0 or (blocks > 1 and (outer <= 0 or outer % stride)):
            return None
        per_block = outer // stride if blocks > 1 else rows
        return cls(x, (blocks - 1) * per_block + rows, stride, per_block)

    def windows(self, run: int, slices: int = 0) -> Tensor:
        """Row n and those after it, for every n: (rows, run, heads, head_dim), overlapping; or head_dim in slices."""
        heads, head_dim = self.tensor.shape[2:]
        shape, strides = (self.total - run + 1, run, heads), (self.stride, self.stride, self.tensor.stride(2))
        if not slices:
            return self.tensor.as_strided((*shape, head_dim), (*strides, 1))
        width = head_dim // slices
        return self.tensor.as_strided((*shape, slices, width), (*strides, width, 1))


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
    """Spans in splits, wherever those lie: whole ones, then last ones, (x + b, runs)."""

    place: Tensor  # of a run's first key: its page, counted in all of the block table; without pages, its sequence
    offset: Tensor  # of that key in there
    batch_idx: Tensor  # (x,), and as in SplitTable
    kv_start: Tensor
    first_split: Tensor
    num_splits: Tensor
    split_idx: Tensor
    last_batch_idx: Tensor  # (b,)
    last_kv_start: Tensor  # of the last split
    last_start: Tensor  # 0
    last_length: Tensor
    exists: Tensor | None  # (x + b, 1): that split has keys; None: all have


def sizes(longest: int, page_size: int | None) -> tuple[int, int]:
    """Keys of a split, and of a run. longest: keys of a sequence. page_size: of a page, where keys lie in pages."""
    tuned = current().split_kv
    split = tuned.long_split_keys if longest >= tuned.long_split_from_keys else tuned.split_keys
    if page_size is None:
        return split, split
    run = max(n for n in range(1, min(page_size, split) + 1) if page_size % n == 0)
    return split // run * run, run


class WholeSplits(NamedTuple):
    """What splits of some sequences have that does not change while only their last ones grow."""

    place: Tensor  # of whole splits, (x, runs), and as in SplitPlan
    offset: Tensor
    batch_idx: Tensor
    kv_start: Tensor
    first_split: Tensor
    num_splits: Tensor
    split_idx: Tensor
    last_batch_idx: Tensor
    last_kv_start: Tensor
    last_start: Tensor
    runs: Tensor  # of a split, where each begins
    exist: bool  # whole splits; else there is one of nobody, so that no table is empty


def divided(span: tuple[int, int], split: int) -> tuple[int, int]:
    """A span's whole splits before its last one, and the keys of that one."""
    keys = max(0, span[1] - span[0])
    whole = max(0, -(-keys // split) - 1)
    return whole, keys - whole * split


def whole_splits(
    starts: Sequence[int], counts: Sequence[int], first: int, split: int, run: int, pages: Pages
) -> WholeSplits:
    """starts: where each sequence's splits begin. counts: its whole ones. first: the first of these sequences."""
    start, splits = torch.tensor([starts, counts], device="cpu")
    before = splits.cumsum(0) - splits
    everyone = torch.arange(len(starts), device="cpu")
    exist = any(counts)
    batch_idx = everyone.repeat_interleave(splits) if exist else everyone[:1]
    kv_start = start[batch_idx] + (torch.arange(len(batch_idx), device="cpu") - before[batch_idx]) * split
    runs = torch.arange(0, split, run, device="cpu")
    kv_idx = kv_start[:, None] + (runs if exist else torch.zeros_like(runs))
    last = start + splits * split
    return WholeSplits(
        *pages.located((first + batch_idx)[:, None], kv_idx),
        first + batch_idx,
        kv_start,
        before,
        splits,
        torch.arange(max(1, int(splits.max())), device="cpu"),
        first + everyone,
        last,
        torch.zeros_like(last),
        runs,
        exist,
    )


def split_plan(whole: WholeSplits, last_lengths: Sequence[int], run: int, pages: Pages) -> SplitPlan:
    """With so many keys in the last split of every sequence."""
    length = torch.tensor(last_lengths, device="cpu")
    # Beyond the last key, the last run that has one, once more.
    runs = torch.minimum(whole.runs, (length - 1).clamp(min=0)[:, None] // run * run)
    place, offset = pages.located(whole.last_batch_idx[:, None], whole.last_kv_start[:, None] + runs)
    exists = None
    if not (whole.exist and all(last_lengths)):
        exists = torch.cat([torch.full_like(whole.batch_idx, whole.exist, dtype=torch.bool), length > 0])[:, None]
    return SplitPlan(torch.cat([whole.place, place]), torch.cat([whole.offset, offset]), *whole[2:-2], length, exists)


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
    row, last_row = row.split([len(plan.kv_start), len(plan.last_kv_start)])
    last_kv_start, start, stop = plan.last_kv_start, plan.last_start, plan.last_length
    if last_window is not None:
        window = last_row.clamp(max=last_window)
        start = (last_row - window)[:, 0]
        last_row, last_kv_start, stop = window, last_kv_start - start, stop + start
    counted = plan.first_split, plan.num_splits, plan.split_idx
    return SplitTable(
        row, plan.batch_idx, plan.kv_start, *counted, last_row, plan.last_batch_idx, last_kv_start, start, stop
    )
