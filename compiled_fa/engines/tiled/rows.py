"""Reading and writing rows of dense, packed and paged tensors, some sequences and heads at a time.

`load` fills a contiguous tile (sequences * key heads, rows * heads_per_key, head_dim) with rows start to stop of these
sequences, and `store` is its inverse. Rows past the end of a sequence, which packed and paged sequences of unequal
lengths have, come out 0, and are left out by `store`. `view` is the same rows where they lie, if they lie side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    def numbers(self, sequences: Sequence[int]) -> Tensor: ...

    def view(self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> Tensor | None: ...

    def load(
        self, tile: Tensor, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice
    ) -> None: ...

    def store(
        self, tile: Tensor, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice
    ) -> None: ...


def _by_rows(tile: Tensor, rows: Tensor, pairs_per_sequence: int) -> Tensor:
    """A tile's values in the order of `rows`, (sequences, rows, heads, head_dim)."""
    sequences, count = rows.shape[:2]
    by_pairs = tile.view(sequences, pairs_per_sequence, count, -1, rows.shape[-1])
    return by_pairs.transpose(1, 2)


def _split(rows: Tensor, pairs_per_sequence: int) -> Tensor:
    """(sequences, rows, heads, head_dim) -> (sequences, rows, key heads, heads_per_key, head_dim)."""
    return rows.view(*rows.shape[:2], pairs_per_sequence, -1, rows.shape[-1])


def as_rows(per_row: Tensor) -> Tensor:
    """lse or its gradient, (B, H, Sq) or (H, T), as a tensor of rows like q with one column."""
    return per_row.mT[..., None]


def is_regular(tensor: Tensor) -> bool:
    """Is it made of rows (head_dim) that lie a multiple of head_dim apart, so that `flattened` can take it?"""
    head_dim, strides = tensor.shape[-1], tensor.stride()
    return (strides[-1] == 1 or head_dim == 1) and not any(stride % head_dim for stride in strides[:-1])


def flattened(tensor: Tensor) -> Tensor:
    """Its memory as (., head_dim): row and head of it are at the sum of their numbers times strides / head_dim."""
    head_dim, strides = tensor.shape[-1], tensor.stride()
    count = 1 + sum((size - 1) * stride // head_dim for size, stride in zip(tensor.shape, strides, strict=True))
    return tensor.as_strided((count, head_dim), (head_dim, 1))


class DenseRows:
    """(batch, seqlen, nheads, head_dim); sequences are consecutive, so that the device is sent nothing."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self._numbers = torch.arange(batch, dtype=torch.int32, device=device)

    def numbers(self, sequences: Sequence[int]) -> Tensor:
        """The sequences as int32 (sequences,)."""
        return self._numbers[sequences[0] : sequences[-1] + 1]

    def view(self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> Tensor:
        """(sequences, rows, heads, head_dim)."""
        return tensor[sequences[0] : sequences[-1] + 1, start:stop, heads]

    def load(self, tile: Tensor, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> None:
        rows = self.view(tensor, sequences, start, stop, heads)
        batch_heads = tile.shape[0] // len(sequences)
        _by_rows(tile, rows, batch_heads).copy_(_split(rows, batch_heads))

    def store(
        self, tile: Tensor, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice
    ) -> None:
        rows = self.view(tensor, sequences, start, stop, heads)
        batch_heads = tile.shape[0] // len(sequences)
        _split(rows, batch_heads).copy_(_by_rows(tile, rows, batch_heads))


class PackedRows:
    """(total, nheads, head_dim); sequence s is rows cu_seqlens[s] to cu_seqlens[s + 1]. host_sums: the same numbers.

    A sequence alone is a view. Several are gathered, row by row and head by head, by a table of where they lie.
    """

    def __init__(self, cu_seqlens: Tensor, host_sums: Sequence[int]) -> None:
        self._tables: dict[object, tuple[Tensor, Tensor | None]] = {}
        self._tables_of: object = None
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._first = cu_seqlens[:-1]
        self._lengths = cu_seqlens.diff()
        self._single = [(start, stop - start) for start, stop in pairwise(host_sums)]

    def numbers(self, sequences: Sequence[int]) -> Tensor:
        return torch.tensor(sequences, dtype=torch.int32, device=self._first.device)

    def view(self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> Tensor | None:
        first, length = self._single[sequences[0]]
        if len(sequences) > 1 or stop > length:
            return None
        return tensor[None, first + start : first + stop, heads]

    def load(self, tile: Tensor, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> None:
        rows = self.view(tensor, sequences, start, stop, heads)
        batch_heads = tile.shape[0] // len(sequences)
        if rows is not None:
            _by_rows(tile, rows, batch_heads).copy_(_split(rows, batch_heads))
            return
        flat, places, missing = self._places(tensor, sequences, start, stop, heads, batch_heads)
        into = tile.view(-1, tensor.shape[-1])
        if tile.dtype == tensor.dtype:
            torch.index_select(flat, 0, places, out=into)
        else:
            into.copy_(flat.index_select(0, places))
        if missing is not None:
            into.masked_fill_(missing[:, None], 0)

    def store(
        self, tile: Tensor, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice
    ) -> None:
        rows = self.view(tensor, sequences, start, stop, heads)
        batch_heads = tile.shape[0] // len(sequences)
        if rows is not None:
            _split(rows, batch_heads).copy_(_by_rows(tile, rows, batch_heads))
            return
        flat, places, missing = self._places(tensor, sequences, start, stop, heads, batch_heads)
        values = tile.reshape(-1, tensor.shape[-1]).to(tensor.dtype)
        if missing is None:
            flat.index_copy_(0, places, values)
        else:
            flat.index_copy_(0, places[~missing], values[~missing])

    def _places(
        self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice, batch_heads: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Memory as (., head_dim), which of it every row and head of a tile is, and which of these are missing."""
        tensor = self._regular(tensor)
        head_dim, strides, flat = tensor.shape[-1], tensor.stride(), flattened(tensor)
        if self._tables_of is not sequences:  # tables are for the tensors of one chunk
            self._tables_of = sequences
            self._tables.clear()
        key = (start, stop, heads.start, heads.stop, batch_heads, strides[:-1], head_dim)
        if key not in self._tables:
            row, exists = self._rows(sequences, start, stop, [stride // head_dim for stride in strides[:-2]])
            head = torch.arange(heads.start, heads.stop, device=row.device) * (strides[-2] // head_dim)
            places = row[:, None, :, None] + head.view(batch_heads, 1, -1)
            missing = None if exists is None else ~exists[:, None, :, None].expand(places.shape).flatten()
            self._tables[key] = places.flatten(), missing
        return flat, *self._tables[key]

    def _regular(self, tensor: Tensor) -> Tensor:
        """The tensor, or once a call a copy of it, if it is not made of rows a multiple of head_dim apart."""
        if is_regular(tensor):
            return tensor
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor, tensor.contiguous()  # the tensor too, to keep its id
        return self._copies[id(tensor)][1]

    def _rows(
        self, sequences: Sequence[int], start: int, stop: int, strides: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Where rows start to stop of every sequence begin, (sequences, rows), and which of them exist; None: all."""
        chosen = self.numbers(sequences)
        row = torch.arange(start, stop, device=self._first.device)
        place = self._place(chosen, row, start, stop, strides)
        if stop <= min(self._single[s][1] for s in sequences):
            return place, None
        exists = row < self._lengths[chosen, None]
        return place.where(exists, 0), exists

    def _place(self, chosen: Tensor, row: Tensor, start: int, stop: int, strides: Sequence[int]) -> Tensor:
        """Where rows start to stop, `row`, of sequences begin; past the end of one, anywhere."""
        return (self._first[chosen, None] + row) * strides[0]


class PagedRows(PackedRows):
    """(num_blocks, block_size, nheads, head_dim); row r of sequence s is in block block_table[s, r // block_size].

    first_rows: (batch,), where in its blocks a sequence begins; None: at their beginning. pieces: the block and the
    first row of each sequence, where each lies in one block: alone it is a view.
    """

    def __init__(
        self,
        block_table: Tensor,
        block_size: int,
        cu_seqlens: Tensor,
        host_sums: Sequence[int],
        first_rows: Tensor | None = None,
        pieces: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(cu_seqlens, host_sums)
        self._block_table = block_table
        self._block_size = block_size
        self._first_rows = first_rows
        self._pieces = pieces

    def view(self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> Tensor | None:
        if self._pieces is None or len(sequences) > 1 or stop > self._single[sequences[0]][1]:
            return None
        block, first = self._pieces[sequences[0]]
        return tensor[None, block, first + start : first + stop, heads]

    def load(self, tile: Tensor, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> None:
        # Of rows at odd distances `_regular` would copy all blocks, also those of others.
        if is_regular(tensor) or self.view(tensor, sequences, start, stop, heads) is not None:
            super().load(tile, tensor, sequences, start, stop, heads)
            return
        chosen, row = self.numbers(sequences), torch.arange(start, stop, device=self._first.device)
        exists = (row < self._lengths[chosen, None])[..., None, None]
        place = (place.where(exists[..., 0, 0], 0) for place in self._block_and_row(chosen, row))
        rows = torch.where(exists, tensor[:, :, heads][tuple(place)], 0.0)
        batch_heads = tile.shape[0] // len(sequences)
        _by_rows(tile, rows, batch_heads).copy_(_split(rows, batch_heads))

    def _block_and_row(self, chosen: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Of each sequence and row; past the end of a sequence, any."""
        if self._first_rows is not None:
            row = row + self._first_rows[chosen, None]
        column = (row // self._block_size).clamp(max=self._block_table.shape[1] - 1)
        return self._block_table[chosen[:, None], column].long(), (row % self._block_size).expand(len(chosen), -1)

    def _place(self, chosen: Tensor, row: Tensor, start: int, stop: int, strides: Sequence[int]) -> Tensor:
        block, row = self._block_and_row(chosen, row)
        return block * strides[0] + row * strides[1]
