"""Keys in splits, and where in memory they lie.

A split is some runs, each of rows that lie side by side: one run, or the pages of a cache whose pages are small.
"""

from __future__ import annotations

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


def split_plan(spans: Spans, first: int, split: int, run: int, page_size: int | None, max_num_blocks: int) -> SplitPlan:
    """first: which is the first of these sequences. max_num_blocks: in a row of the block table."""
    start, stop = torch.tensor(spans, device="cpu").T
    splits = ((stop - start + split - 1) // split - 1).clamp(min=0)
    before = splits.cumsum(0) - splits
    everyone = torch.arange(len(spans), device="cpu")
    any_whole = bool((splits > 0).any())
    # There is always a split, though no sequence may have it, so that no table is empty.
    batch_idx = everyone.repeat_interleave(splits) if any_whole else everyone[:1]
    kv_start = start[batch_idx] + (torch.arange(len(batch_idx), device="cpu") - before[batch_idx]) * split
    last = start + splits * split
    length = (stop - last).clamp(min=0)
    runs = torch.arange(0, split, run, device="cpu")
    # Beyond the last key, the last run that has one, once more.
    last_runs = torch.minimum(runs, (length - 1).clamp(min=0)[:, None] // run * run)
    whole_runs = runs if any_whole else torch.zeros_like(runs)
    kv_idx = torch.cat([kv_start[:, None] + whole_runs, last[:, None] + last_runs])
    place = (first + torch.cat([batch_idx, everyone])[:, None]).expand(kv_idx.shape)
    exists = torch.cat([torch.full_like(batch_idx, any_whole, dtype=torch.bool), length > 0])
    return SplitPlan(
        place * max_num_blocks + kv_idx // page_size if page_size else place.contiguous(),
        kv_idx % page_size if page_size else kv_idx,
        first + batch_idx,
        kv_start,
        before,
        splits,
        torch.arange(max(1, int(splits.max())), device="cpu"),
        first + everyone,
        last,
        torch.zeros_like(last),
        length,
        None if bool(exists.all()) else exists[:, None],
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
