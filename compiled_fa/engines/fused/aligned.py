"""Packed sequences laid out anew, each beginning with a new block.

Then a tile belongs to one sequence, its runs are those of blocks.py, and unaligned starts cost nothing in the kernel.
The price is one copy of the rows in and one out, and up to BLOCK - 1 rows of padding a sequence; the buffer's size
follows from shapes alone, so the host never reads a length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import BLOCK, Blocks, blocks_of, first_block


class Aligned:
    """One side, queries or keys, of a packed call.

    cu_seqlens: int32 (batch + 1,). total: rows of the packed tensor. pages: (block_table, block_size, first row of each
    sequence in its pages or None) where those are paged.
    """

    def __init__(self, cu_seqlens: Tensor, total: int, pages: tuple[Tensor, int, Tensor | None] | None = None) -> None:
        self.lengths = cu_seqlens.diff()
        batch = self.lengths.shape[0]
        self.blocks: Blocks = blocks_of(self.lengths, (total + batch * (BLOCK - 1)) // BLOCK)
        within = torch.arange(BLOCK, dtype=torch.int32, device=cu_seqlens.device)
        self.batch = self.blocks.batch.repeat_interleave(BLOCK)  # of each row
        self.index = (self.blocks.first[:, None] + within).flatten()  # of each row within its sequence
        self.exists = (within < self.blocks.length[:, None]).flatten()
        if pages is None:
            source = cu_seqlens[self.batch] + self.index
        else:
            block_table, block_size, first = pages
            index = self.index if first is None else self.index + first[self.batch]
            page = (index // block_size).clamp(0, block_table.shape[1] - 1)
            source = block_table[self.batch, page] * block_size + index % block_size
        self._source = torch.where(self.exists, source, 0)
        # Back again: packed row t of sequence b lies where b's first block begins, and as far into it.
        row = torch.arange(total, dtype=torch.int32, device=cu_seqlens.device)
        owner = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True, out_int32=True).clamp(max=batch - 1)
        self._home = first_block(self.lengths)[owner] * BLOCK + (row - cu_seqlens[owner])

    def load(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """(total, heads, ...) -> (1, heads, rows, ...); rows that do not exist hold `fill`."""
        rows = packed[self._source]
        missing = ~self.exists.view(-1, *[1] * (rows.dim() - 1))
        return rows.masked_fill(missing, fill).transpose(0, 1)[None]

    def store(self, aligned: Tensor) -> Tensor:
        """(1, heads, rows, ...) -> (total, heads, ...)."""
        return aligned[0].transpose(0, 1)[self._home]
