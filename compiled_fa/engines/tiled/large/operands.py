"""Rows of a chunk as operands of products, and results back in their places.

A chunk's rows of q, k, ... are a view (sequences, key heads, rows, heads_per_key, columns) where they lie, or, of
several packed sequences or pages, a copy gathered by a table of places. Rows past the end of a shorter sequence repeat
its last one: finite if that is, and of no other sequence. Nothing comes of them: as keys they are hidden, as queries
they are written to a row that is thrown away, and have no probabilities backward.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..chunks import Chunk
from ..rows import flattened, is_regular
from .call import Call


class Side(Protocol):
    """A chunk's queries or keys."""

    def operand(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """All rows, (pairs, rows * heads_per_key, columns): a view, or one copy."""

    def split(self, tensor: Tensor) -> Tensor:
        """All rows, (sequences, key heads, rows, heads_per_key, columns), in the tensor's dtype."""

    def room(self, result: Tensor) -> Tensor:
        """A tensor for all rows of a result, shaped as `split` gives them: where they lie, or to be put there."""

    def put(self, found: Tensor, result: Tensor) -> None:
        """What `room` gave, now full, into the result."""

    def missing(self) -> Tensor | None:
        """Which rows are past their sequence's end, bool (sequences, 1, rows, 1, 1); None: none is."""


def sides(call: Call, chunk: Chunk) -> tuple[Side, Side]:
    """The chunk's queries, and its keys."""
    packed = call.problem.packed
    gathered = packed is not None and len(chunk.sequences) > 1
    if packed is not None and packed.block_table is not None:
        queries = _Gathered(call, chunk, 0) if gathered else _InPlace(call, chunk, 0)
        return queries, _InPages(call, chunk, 1)
    if packed is None or not gathered:
        return _InPlace(call, chunk, 0), _InPlace(call, chunk, 1)
    rows = _Gathered(call, chunk, 0)
    alike = packed.host_sums[0] == packed.host_sums[1]
    return rows, _Gathered(call, chunk, 1, rows if alike else None)


class _Base:
    def __init__(self, call: Call, chunk: Chunk, side: int) -> None:
        self._call, self._chunk, self._side = call, chunk, side
        self._heads = chunk.query_heads if side == 0 else chunk.key_heads
        self._length = (chunk.lengths_q, chunk.lengths_k)[side][1]
        self._key_heads = chunk.nheads_k


class _InPlace(_Base):
    """Dense sequences, or a packed one by itself."""

    def split(self, tensor: Tensor) -> Tensor:
        packed, sequences = self._call.problem.packed, self._chunk.sequences
        if packed is None:
            rows = tensor[sequences[0] : sequences[-1] + 1, :, self._heads]
        else:
            first = packed.host_sums[self._side][sequences[0]]
            rows = tensor[None, first : first + self._length, self._heads]
        split: Tensor = rows.unflatten(2, (self._key_heads, -1))
        return split.transpose(1, 2)

    def operand(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.split(tensor)
        shape = rows.shape[0] * rows.shape[1], rows.shape[2] * rows.shape[3], rows.shape[4]
        return rows.view(shape) if _mergeable(rows, dtype) else _copy(rows, dtype).view(shape)

    def room(self, result: Tensor) -> Tensor:
        return self.split(result)

    def put(self, found: Tensor, result: Tensor) -> None:
        pass  # it lies there

    def missing(self) -> None:
        return None


def _mergeable(rows: Tensor, dtype: torch.dtype) -> bool:
    """Is (n, Hk, m, g, D) a batch of matrices (n * Hk, m * g, D) that a product takes?"""
    n, heads, m, g, columns = rows.shape
    of_n, of_head, of_row, of_g, of_column = rows.stride()
    batch = n == 1 or heads == 1 or of_n == heads * of_head
    together = g == 1 or m == 1 or of_row == g * of_g
    step = of_g if m == 1 else of_row // g
    lies = (of_column == 1 or columns == 1) and (m * g == 1 or step >= columns)
    return rows.dtype == dtype and batch and together and lies


def _copy(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows.shape, dtype=dtype, device=rows.device).copy_(rows)


class _Gathered(_Base):
    """Several packed sequences. like: the other side, where its rows are the same."""

    def __init__(self, call: Call, chunk: Chunk, side: int, like: _Gathered | None = None) -> None:
        super().__init__(call, chunk, side)
        self._tables: dict[tuple[int, ...], Tensor] = {}
        self._into: Tensor | None = None  # places in a result, which has no gaps; missing rows go to its last row
        self._row: Tensor  # of a row in its sequence: its position, and past the end the last one's
        self._missing: Tensor | None
        self._numbers = call.numbers_of(chunk)[..., 0]  # (., sequences, 1, 1, 1)
        if like is not None:
            self._row, self._missing = like._row, like._missing
            if chunk.heads_per_key == 1:
                self._tables = like._tables
            return
        position, last = call.positions[: self._length, None], self._numbers[2 + 2 * side]
        shortest = (chunk.lengths_q, chunk.lengths_k)[side][0]
        self._missing = position > last if shortest < self._length else None
        self._row = position if self._missing is None else torch.minimum(position, last)

    def missing(self) -> Tensor | None:
        return None if self._missing is None else self._missing[..., None]

    def _places(self, strides: tuple[int, ...]) -> Tensor:
        """int64 (sequences, key heads, rows, heads_per_key): of rows and heads, where they are so far apart."""
        if strides not in self._tables:
            *of_row, of_head = strides
            heads = self._call.heads[self._heads].view(self._key_heads, 1, -1)
            heads = heads if of_head == 1 else heads * of_head
            rows, step = self._rows_at(of_row)
            self._tables[strides] = torch.add(heads, rows, alpha=step)
        return self._tables[strides]

    def _rows_at(self, strides: list[int]) -> tuple[Tensor, int]:
        """(sequences, 1, rows, 1), and the factor that makes places of them."""
        return self._row + self._numbers[1 + 2 * self._side], strides[0]

    def split(self, tensor: Tensor) -> Tensor:
        tensor = tensor if is_regular(tensor) else tensor.contiguous()
        columns = tensor.shape[-1]
        places = self._places(tuple(stride // columns for stride in tensor.stride()[:-1]))
        gathered: Tensor = flattened(tensor).index_select(0, places.flatten())
        return gathered.view(*places.shape, columns)

    def operand(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.split(tensor)
        return rows.to(dtype).view(rows.shape[0] * rows.shape[1], -1, rows.shape[-1])

    def room(self, result: Tensor) -> Tensor:
        heads_per_key = (self._heads.stop - self._heads.start) // self._key_heads
        return result.new_empty(
            (len(self._chunk.sequences), self._key_heads, self._length, heads_per_key, result.shape[-1])
        )

    def put(self, found: Tensor, result: Tensor) -> None:
        columns, nheads = result.shape[-1], result.shape[-2]
        if self._into is None:
            places = self._places((nheads, 1))
            nowhere = (result.shape[0] - 1) * nheads
            self._into = (places if self._missing is None else places.masked_fill(self._missing, nowhere)).flatten()
        result.view(-1, columns).index_copy_(0, self._into, found.view(-1, columns))


class _InPages(_Gathered):
    """(num_blocks, block_size, nheads_k, head_dim); row r of sequence s is in block block_table[s, r // block_size]."""

    def _rows_at(self, strides: list[int]) -> tuple[Tensor, int]:
        packed = self._call.problem.packed
        if packed is None or packed.block_table is None:
            raise ValueError("this call has no block_table")
        size = self._call.problem.k.shape[1]
        sequence = self._numbers[0].view(-1, 1).long()
        row = self._row.expand(len(self._chunk.sequences), 1, self._length, 1)[:, 0, :, 0]
        if packed.first_keys is not None:
            row = row + packed.first_keys[sequence]
        block = packed.block_table[sequence, (row // size).long()].long()
        return (block * strides[0] + (row % size) * strides[1])[:, None, :, None], 1
