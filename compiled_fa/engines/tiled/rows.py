"""Reading and writing rows of dense, packed and paged tensors, some sequences and heads at a time.

Each class answers `load(tensor, sequences, start, stop, heads)` with rows start to stop of these sequences, as
(sequences, stop - start, heads, head_dim): a view where the layout allows one. Rows past the end of a sequence, which
packed and paged sequences of unequal lengths have, come out 0, and `store` leaves them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    def numbers(self, sequences: Sequence[int]) -> Tensor: ...

    def load(self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> Tensor: ...

    def store(
        self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice, values: Tensor
    ) -> None: ...


class DenseRows:
    """(batch, seqlen, nheads, head_dim); sequences are consecutive, so that the device is sent nothing."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self._numbers = torch.arange(batch, dtype=torch.int32, device=device)

    def numbers(self, sequences: Sequence[int]) -> Tensor:
        """The sequences as int32 (sequences,)."""
        return self._numbers[sequences[0] : sequences[-1] + 1]

    def load(self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> Tensor:
        return tensor[sequences[0] : sequences[-1] + 1, start:stop, heads]

    def store(
        self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice, values: Tensor
    ) -> None:
        tensor[sequences[0] : sequences[-1] + 1, start:stop, heads].copy_(values)


class PackedRows:
    """(total, nheads, head_dim); sequence s is rows first[s] to first[s] + lengths[s]."""

    def __init__(self, first: Tensor, lengths: Tensor) -> None:
        self._first = first
        self._lengths = lengths
        self._single = list(zip(first.tolist(), lengths.tolist(), strict=True))

    def numbers(self, sequences: Sequence[int]) -> Tensor:
        return torch.tensor(sequences, dtype=torch.int32, device=self._first.device)

    def _places(self, sequences: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Row numbers (sequences, stop - start) in the tensor, and which of them exist."""
        chosen = self.numbers(sequences)
        row = torch.arange(start, stop, device=self._first.device)
        exists = row < self._lengths[chosen, None]
        return (self._first[chosen, None] + row).where(exists, 0), exists

    def load(self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> Tensor:
        if len(sequences) == 1:
            first, length = self._single[sequences[0]]
            if stop <= length:
                return tensor[None, first + start : first + stop, heads]
        places, exists = self._places(sequences, start, stop)
        return tensor[:, heads][places].masked_fill_(~exists[..., None, None], 0)

    def store(
        self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice, values: Tensor
    ) -> None:
        if len(sequences) == 1:
            first, length = self._single[sequences[0]]
            count = min(stop, length) - start
            tensor[first + start : first + start + count, heads].copy_(values[0, :count])
            return
        places, exists = self._places(sequences, start, stop)
        tensor[:, heads][places[exists]] = values[exists].to(tensor.dtype)


class PagedRows:
    """(num_blocks, block_size, nheads, head_dim); row r of sequence s is in block block_table[s, r // block_size]."""

    def __init__(self, block_table: Tensor, block_size: int, lengths: Tensor) -> None:
        self._block_table = block_table
        self._block_size = block_size
        self._lengths = lengths

    def numbers(self, sequences: Sequence[int]) -> Tensor:
        return torch.tensor(sequences, dtype=torch.int32, device=self._lengths.device)

    def load(self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice) -> Tensor:
        chosen = self.numbers(sequences)
        row = torch.arange(start, stop, device=self._lengths.device)
        exists = row < self._lengths[chosen, None]
        row = row.expand_as(exists).where(exists, 0)
        block = self._block_table[chosen[:, None], row // self._block_size].where(exists, 0)
        return tensor[:, :, heads][block, row % self._block_size].masked_fill_(~exists[..., None, None], 0)

    def store(
        self, tensor: Tensor, sequences: Sequence[int], start: int, stop: int, heads: slice, values: Tensor
    ) -> None:
        raise NotImplementedError  # validation has refused the backward of paged keys
