"""Which keys a row sees, and which tiles of the score matrix exist and which are full: from lengths alone.

Rows lie as they are given: packed sequences are one long row. What a query sees is an interval of it (scores/masks.py
within its sequence, moved to where that begins), and the mask of every call is `start <= key < stop`. A block is BLOCK
rows, wherever sequences begin: its tiles are the run of blocks that the intervals of its rows reach, and those in the
middle that all of its rows see whole are full.

    keys ->   0   1   2   3   4   5          . not kept
    block r   .   p   f   f   p   .          partial: 1, 4     full: 2, 3

All of it is arithmetic on integers, on the device, which Inductor makes a few kernels of: no mask is evaluated, and
the host waits for nothing. The run of a block of several sequences has those between its first and its last, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...flattening import Flattened
from ...scores import Window
from ...scores.arguments import UNBOUNDED

BLOCK = 128  # a multiple of every tile size of the kernels

Size = Any  # int, or a symbol of one
Number = Any  # int, or a tensor of one or of many


class BlockTables(NamedTuple):
    """flex_attention's BlockMask, by its names and in its order: the key blocks of each query block (kv), then the
    query blocks of each key block (q); of both the partial ones, then the full ones. int32: counts (batch, 1, blocks),
    indices (batch, 1, blocks, width), where one batch may serve all."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


@dataclass(frozen=True)
class RowTables(Flattened):
    """Of each query row, int32 (rows,) or (batch, rows), of whole blocks of rows.

    start, stop: the key rows that it sees. position: the key row at which it stands. sequence: its sequence; index: its
    number there; key_start: that sequence's first key row; None where there is one sequence.
    """

    start: Tensor
    stop: Tensor
    position: Tensor
    sequence: Tensor | None = None
    index: Tensor | None = None
    key_start: Tensor | None = None


@dataclass(frozen=True)
class Sequences:
    """Where one side's sequences lie among its rows.

    start, stop: int32 (batch,), of each sequence; or ints, of the only one. rows: how many there are in all. spacing:
    rows from one sequence's first to the next one's, where those are the same for all.
    """

    start: Number
    stop: Number
    rows: Size
    spacing: Size | None = None

    @classmethod
    def packed(cls, cu_seqlens: Tensor, rows: Size) -> Sequences:
        batch = cu_seqlens.shape[0] - 1
        return cls(cu_seqlens.narrow(0, 0, batch), cu_seqlens.narrow(0, 1, batch), rows)

    @classmethod
    def spaced(cls, cu_seqlens: Tensor, spacing: Size, first: Tensor | None = None) -> Sequences:
        """Each has the same room, as in pages that were gathered: cu_seqlens says how much of it is in use, and first,
        int32 of cu_seqlens' length, from where on; None: from its beginning."""
        batch = cu_seqlens.shape[0] - 1
        start = torch.arange(batch, dtype=torch.int32, device=cu_seqlens.device) * spacing
        if first is not None:
            start = start + first.narrow(0, 0, batch)
        return cls(start, start + cu_seqlens.diff(), batch * spacing, spacing)

    @classmethod
    def single(cls, length: Size) -> Sequences:
        return cls(0, length, length)

    @property
    def blocks(self) -> Size:
        return (self.rows + (BLOCK - 1)) // BLOCK

    def find(self, row: Tensor) -> Tensor:
        """The sequence of each row; of rows behind all sequences, the last."""
        if not isinstance(self.start, Tensor):
            return torch.zeros_like(row)
        last = self.start.shape[0] - 1
        if self.spacing is not None:
            sequence: Tensor = row // self.spacing
            return sequence.clamp(max=last)
        return torch.searchsorted(self.stop, row, right=True, out_int32=True).clamp(max=last)

    def start_of(self, sequence: Tensor) -> Number:
        return at(self.start, sequence) if isinstance(self.start, Tensor) else self.start

    def length_of(self, sequence: Tensor) -> Number:
        if not isinstance(self.start, Tensor):
            return self.stop
        return at(self.stop, sequence) - at(self.start, sequence)


def at(x: Tensor, *indices: Tensor) -> Tensor:
    """x[indices], as an operator: brackets would want the device itself, where a graph is traced for one that is
    elsewhere."""
    found: Tensor = torch.ops.aten.index.Tensor(x, indices)
    return found


def contiguous(x: Tensor) -> Tensor:
    """As an operator; see `at`."""
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def stored(x: Tensor) -> Tensor:
    """Computed once, into memory, for functions that the template inlines: Inductor would inline it, too."""
    strides: list[Size] = []
    stride: Size = 1
    for size in reversed(x.shape):
        strides.append(stride)
        stride = stride * size
    return contiguous(x).as_strided(x.shape, strides[::-1])


def bounded(window: Window) -> Window:
    """With a number on both sides."""
    sides: tuple[Any, ...] = window
    left, right = (UNBOUNDED if side is None else min(side, UNBOUNDED) for side in sides)
    return Window(left, right)


def widths(
    window: Window, same: bool, q: Sequences, k: Sequences, longest_q: Size, longest_k: Size
) -> tuple[Size, Size]:
    """Most key blocks that a block of queries can reach, and most query blocks that a block of keys can.

    window: with ints. same: do queries and keys lie alike, or in one sequence? Then BLOCK rows reach so far beyond
    themselves as a window does, or a sequence. Otherwise they may be of BLOCK sequences that lie anywhere.
    longest_q, longest_k: upper bounds of the lengths.
    """
    if not same:
        return k.blocks, q.blocks
    left, right = bounded(window)
    least: Any = torch.sym_min  # of symbols, which min would compare, and make it a graph for such sizes
    reach = least(left, longest_k - 1) + least(right, longest_q - 1)
    width = (BLOCK + reach) // BLOCK + 2
    return least(width, k.blocks), least(width, q.blocks)


def query_rows(window: Window, q: Sequences, k: Sequences, sequence: Tensor, index: Tensor) -> RowTables:
    """Of queries by their sequences and their numbers there. window: bounded; ints, or tensors of no dimension."""
    key_start, seqlen_q, seqlen_k = k.start_of(sequence), q.length_of(sequence), k.length_of(sequence)
    position = index + (seqlen_k - seqlen_q)
    start, stop = window.keys_seen_by_any(position, position, seqlen_k)
    some = (index < seqlen_q) & (start < stop)
    start, stop = (torch.where(some, key_start + end, 0) for end in (start, stop))
    if not isinstance(key_start, Tensor):
        return RowTables(start, stop, position)
    return RowTables(start, stop, key_start + position, sequence, index, key_start)


def _key_rows(window: Window, q: Sequences, k: Sequences, row: Tensor) -> tuple[Tensor, Tensor]:
    """The query rows that see each key row: starts and stops."""
    sequence = k.find(row)
    index = row - k.start_of(sequence)
    query_start, seqlen_q, seqlen_k = q.start_of(sequence), q.length_of(sequence), k.length_of(sequence)
    shift = seqlen_k - seqlen_q
    start, stop = window.positions_that_see_any(index, index, shift, seqlen_k)
    some = (index < seqlen_k) & (start < stop)
    return torch.where(some, query_start + (start - shift), 0), torch.where(some, query_start + (stop - shift), 0)


def tables_of_rows(
    window: Window, q: Sequences, k: Sequences, widths: tuple[Size, Size], device: torch.device
) -> tuple[BlockTables, RowTables]:
    """Of rows as they lie, one batch that serves all. window: bounded."""
    row, column = (torch.arange(side.blocks * BLOCK, dtype=torch.int32, device=device) for side in (q, k))
    sequence = q.find(row)
    rows = query_rows(window, q, k, sequence, row - q.start_of(sequence))
    # Queries past the end want nothing, and nothing of them is kept. Keys past the end have to be masked.
    kv = _lists(rows.start, rows.stop, row < q.rows, k.rows, False, widths[0])
    q_of_k = _lists(*_key_rows(window, q, k, column), None, q.rows, True, widths[1])
    return BlockTables(*(x.unsqueeze(0).unsqueeze(0) for x in (*kv, *q_of_k))), rows


def tables_of_sequences(
    window: Window, q: Sequences, k: Sequences, longest_q: Size, width: Size, device: torch.device
) -> tuple[BlockTables, RowTables]:
    """Of few queries a sequence, laid out as a batch of `longest_q` rows. RowTables are (batch, rows). There are no
    lists of query blocks: for forward only. width: of the lists of a sequence's key blocks."""
    batch = q.start.shape[0]
    padded = (longest_q + (BLOCK - 1)) // BLOCK * BLOCK
    index = torch.arange(padded, dtype=torch.int32, device=device).expand(batch, padded)
    sequence = torch.arange(batch, dtype=torch.int32, device=device).unsqueeze(1).expand(batch, padded)
    rows = query_rows(window, q, k, sequence, index)
    exists = (index < q.length_of(sequence)).view(-1)
    found = _lists(rows.start.view(-1), rows.stop.view(-1), exists, k.rows, False, width)
    kv = (x.unflatten(0, (batch, padded // BLOCK)).unsqueeze(1) for x in found)
    nothing = torch.zeros(1, 1, 1, dtype=torch.int32, device=device)
    none = nothing, nothing.unsqueeze(3), nothing, nothing.unsqueeze(3)
    return BlockTables._make((*kv, *none)), rows


def _lists(
    start: Tensor, stop: Tensor, exists: Tensor | None, rows: Size, last_may_be_short: bool, width: Size
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Intervals of the other side's rows -> numbers and indices of its partial blocks, and of its full ones.

    exists: rows that have a say in whether a tile is full; None: all. rows: of the other side. last_may_be_short: may
    its last block be full where it is not whole?
    """

    def blockwise(x: Tensor) -> Tensor:
        return x.view(-1, BLOCK)

    def up(x: Number) -> Number:
        return (x + (BLOCK - 1)) // BLOCK

    some = start < stop
    first = blockwise(torch.where(some, start, UNBOUNDED)).amin(1)
    last = blockwise(torch.where(some, stop, 0)).amax(1)
    common_first, common_last = torch.where(some, start, UNBOUNDED), torch.where(some, stop, 0)
    if exists is not None:
        common_first = torch.where(exists, common_first, 0)
        common_last = torch.where(exists, common_last, UNBOUNDED)
    common_first, common_last = blockwise(common_first).amax(1), blockwise(common_last).amin(1)
    begin = torch.where(first < last, first // BLOCK, 0)
    # A longest length that is not true makes results wrong; no kernel shall read beyond the lists for it.
    end = torch.minimum(torch.where(first < last, up(last), 0), begin + width)
    full_begin, full_end = up(common_first), common_last // BLOCK
    if last_may_be_short:
        full_end = torch.where(common_last >= rows, up(rows), full_end)
    full_end = torch.minimum(full_end, end)
    none = full_begin >= full_end
    full_begin, full_end = torch.where(none, end, full_begin), torch.where(none, end, full_end)
    column = torch.arange(width, dtype=torch.int32, device=start.device)
    before, full = full_begin - begin, full_end - full_begin
    partial = before + (end - full_end)
    # 0 beyond the count, where the kernel looks but does not go.
    behind = full_end - before
    of_block = [x.unsqueeze(1) for x in (before, begin, behind, partial, full, full_begin)]
    indices = torch.where(column < of_block[0], of_block[1] + column, of_block[2] + column)
    indices = torch.where(column < of_block[3], indices, 0)
    full_indices = torch.where(column < of_block[4], of_block[5] + column, 0)
    return tuple(x.to(torch.int32) for x in (partial, indices, full, full_indices))  # type: ignore[return-value]
