"""A call's tensors as the template takes them: (batch, heads, rows, head_dim), with block tables and buffers."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ...caches import Cache
from ...problem import Problem
from ...scores import Window
from .aligned import Aligned
from .blocks import BLOCK, BlockTables, Lengths, block_tables, blocks_of
from .mods import Buffers, Features

_tables: Cache[object, BlockTables] = Cache(
    "dense block tables", entries=256, nbytes=64 << 20, size_of=lambda tables: sum(x.nbytes for x in tables)
)

SMALLEST_HEAD_DIM = 16  # tl.dot takes no less: smaller ones are padded with zeros


class Layout(Protocol):
    """`load` and `store` bring rows of q, k, v, ... into this layout and back; tables and buffers go with it."""

    features: Features
    block_tables: BlockTables
    buffers: Buffers
    divisible: bool

    def load_queries(self, rows: Tensor, fill: float = 0.0) -> Tensor: ...

    def load_keys(self, rows: Tensor) -> Tensor: ...

    def store_queries(self, x: Tensor) -> Tensor: ...

    def store_keys(self, x: Tensor) -> Tensor: ...


def layout_of(problem: Problem) -> Layout:
    return DenseLayout(problem) if problem.packed is None else AlignedLayout(problem)


def _features(problem: Problem, packed: bool, square: bool, batch: Tensor, q_idx: Tensor) -> tuple[Features, Buffers]:
    """What is fixed in the kernel, and the buffers that come with it.

    batch, q_idx: the score program's indices of the layout's rows, broadcastable to (batch, heads, rows).
    """
    program = problem.program(0, 0)
    slopes = None if program.alibi_slopes is None else program.alibi_slopes.contiguous()
    threshold = None
    row: tuple[Tensor | None, Tensor | None] = None, None
    if program.dropout is not None:
        head = torch.arange(problem.q.shape[-2], dtype=torch.int32, device=problem.q.device)[:, None]
        row = program.dropout.row(batch, head, q_idx)
        threshold = int(program.dropout.threshold)
    softcap = None if program.softcap is None else float(program.softcap)
    fixed = problem.softmax_scale, softcap, slopes is not None, program.window, threshold, packed, square
    return Features(*fixed), Buffers(slopes, *row)


class DenseLayout:
    """Views: (B, S, H, D) with heads and rows swapped. The block tables are those of one sequence, for all of them."""

    def __init__(self, problem: Problem) -> None:
        seqlen_q, seqlen_k = problem.q.shape[1], problem.k.shape[1]
        square = seqlen_q == seqlen_k
        batch = torch.arange(problem.batch, dtype=torch.int32, device=problem.q.device)[:, None, None]
        q_idx = torch.arange(seqlen_q, dtype=torch.int32, device=problem.q.device)
        self.features, self.buffers = _features(problem, False, square, batch, q_idx)
        shape = problem.window, seqlen_q, seqlen_k, problem.q.device
        if _on_default_stream(problem.q.device):
            self.block_tables = _tables.get(shape, lambda: _dense_block_tables(*shape))
        else:
            self.block_tables = _dense_block_tables(*shape)
        self.divisible = seqlen_q % BLOCK == 0 and seqlen_k % BLOCK == 0
        if not square:
            shift = torch.full((), seqlen_k - seqlen_q, dtype=torch.int32, device=problem.q.device)
            self.buffers = replace(self.buffers, shift=shift)

    def load_queries(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        return rows.transpose(1, 2)

    def load_keys(self, rows: Tensor) -> Tensor:
        return rows.transpose(1, 2)

    def store_queries(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()

    def store_keys(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()


def _on_default_stream(device: torch.device) -> bool:
    """Only there tables are cached: another stream would not wait for them, and a CUDA graph owns what it makes."""
    return device.type != "cuda" or torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


def _dense_block_tables(window: Window, seqlen_q: int, seqlen_k: int, device: torch.device) -> BlockTables:
    lengths_q, lengths_k = (torch.full((1,), n, dtype=torch.int32, device=device) for n in (seqlen_q, seqlen_k))
    lengths = Lengths(lengths_q, lengths_k, seqlen_q, seqlen_k)
    blocks = [blocks_of(x, -(-n // BLOCK)) for x, n in ((lengths_q, seqlen_q), (lengths_k, seqlen_k))]
    return block_tables(window, blocks[0], blocks[1], lengths)


class AlignedLayout:
    """Copies: packed sequences, each beginning with a new block, as one long sequence; see aligned.py."""

    divisible = True

    def __init__(self, problem: Problem) -> None:
        packed = problem.packed
        assert packed is not None
        total_k, pages = problem.k.shape[0], None
        if packed.block_table is not None:
            pages = packed.block_table, problem.k.shape[1]
            # Lengths are on the device; as many blocks as the table has room for hold them all.
            total_k = packed.block_table.numel() * problem.k.shape[1]
        self._q = Aligned(packed.cu_seqlens_q, problem.q.shape[0])
        self._k = Aligned(packed.cu_seqlens_k, total_k, pages)
        lengths = Lengths(self._q.lengths, self._k.lengths, packed.max_seqlen_q, packed.max_seqlen_k)
        self.block_tables = block_tables(problem.window, self._q.blocks, self._k.blocks, lengths)
        self.features, buffers = _features(problem, True, False, self._q.batch[None, None], self._q.index)
        self.buffers = replace(
            buffers,
            seqlens_q=self._q.lengths,
            seqlens_k=self._k.lengths,
            q_batch=self._q.batch,
            q_index=self._q.index,
            k_batch=self._k.batch,
            k_index=self._k.index,
        )

    def load_queries(self, rows: Tensor, fill: float = 0.0) -> Tensor:
        return self._q.load(rows, fill)

    def load_keys(self, rows: Tensor) -> Tensor:
        return self._k.load(rows if rows.dim() == 3 else rows.flatten(0, 1))

    def store_queries(self, x: Tensor) -> Tensor:
        return self._q.store(x)

    def store_keys(self, x: Tensor) -> Tensor:
        return self._k.store(x)


def padded(x: Tensor) -> Tensor:
    """At least SMALLEST_HEAD_DIM columns, zeros behind: they change no product."""
    missing = SMALLEST_HEAD_DIM - x.shape[-1]
    return F.pad(x, (0, missing)) if missing > 0 else x


def canonical(x: Tensor) -> Tensor:
    """(B, H, S, D) as views of dense and qkv-packed tensors are: heads within a row, and S rows a batch; others are
    copied.

    That a kernel is compiled for, with the strides of rows and heads fixed in it: lengths are no part of them. The
    stride of a dimension of size 1 is nobody's: any number may stand there.
    """
    batch, heads, rows, columns = x.shape
    head = x.stride(1) if heads > 1 else columns
    row = x.stride(2) if rows > 1 else x.stride(0) if batch > 1 else heads * head
    if x.stride(3) == 1 and head >= columns and row >= heads * head and (batch == 1 or x.stride(0) == rows * row):
        return x.as_strided((batch, heads, rows, columns), (rows * row, head, row, 1))
    return x.transpose(1, 2).contiguous().transpose(1, 2)


__all__ = ["Layout", "canonical", "layout_of", "padded"]
