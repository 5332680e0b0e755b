"""One call of the tiled engine: how its tensors are cut into tiles, and its steps, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...problem import Direction, Problem
from ...scores import Window
from . import chunks as chunking
from .chunks import Chunk, Tile
from .kernels import Kernels
from .rows import DenseRows, PackedRows, PagedRows, Rows
from .scratch import Scratch
from .steps import Indices
from .tiles import TileSizes, choose


class Call:
    """Loads and stores tiles in the dtype of the arithmetic (fp32, fp64 for fp64), with pairs before rows.

    A tile of queries is (pairs, heads_per_key * queries, head_dim): the query heads that read one key head lie one
    after another, so that GQA is a taller product and never a copy of k or v.
    """

    def __init__(self, problem: Problem, tiles: TileSizes | None) -> None:
        self.problem = problem
        self.dtype = torch.float64 if problem.q.dtype == torch.float64 else torch.float32
        self.keep_probability = 1.0 - problem.dropout_p
        self.scratch = Scratch(problem.q.device)
        self.heads_per_key = problem.q.shape[-2] // max(1, problem.k.shape[-2])
        self._tiles = tiles
        self._lay_out()
        self.kernels = Kernels(self.program, problem.batch, self.keep_probability, self.dtype, problem.q.device)

    def _lay_out(self) -> None:
        """Where the sequences lie. Packed lengths are read on the host: it decides which tiles run."""
        problem, packed = self.problem, self.problem.packed
        self._query_rows: Rows = DenseRows(problem.batch, problem.q.device)
        self._key_rows: Rows = self._query_rows
        if packed is None:
            lengths = problem.q.shape[1], problem.k.shape[1]
            self._lengths = [lengths] * problem.batch
            self.program = problem.program(*lengths)
            longest = max(lengths)
        else:
            lengths_q, lengths_k = packed.cu_seqlens_q.diff(), packed.cu_seqlens_k.diff()
            self._lengths = list(zip(lengths_q.tolist(), lengths_k.tolist(), strict=True))
            self.program = problem.program(lengths_q, lengths_k)
            longest = max((max(pair) for pair in self._lengths), default=0)
            self._query_rows = PackedRows(packed.cu_seqlens_q[:-1], lengths_q)
            if packed.block_table is None:
                self._key_rows = PackedRows(packed.cu_seqlens_k[:-1], lengths_k)
            else:
                self._key_rows = PagedRows(packed.block_table, problem.k.shape[1], lengths_k)
        device = problem.q.device
        self._positions = torch.arange(longest, dtype=torch.int32, device=device)
        self._heads = torch.arange(problem.q.shape[-2], dtype=torch.int32, device=device)

    def __enter__(self) -> Call:
        self.scratch.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.scratch.__exit__(*exception)

    def chunks(self, direction: Direction) -> Iterator[Chunk]:
        problem = self.problem
        head_dims = problem.q.shape[-1] + problem.v.shape[-1]

        def sizes(seqlen_q: int, seqlen_k: int) -> TileSizes:
            if self._tiles is not None:
                return self._tiles
            bytes_per_row = head_dims * self.dtype.itemsize
            banded = self.program.window != Window()
            return choose(direction, seqlen_q, seqlen_k, self.heads_per_key, bytes_per_row, banded)

        return chunking.chunks(
            self._lengths,
            problem.k.shape[-2],
            self.heads_per_key,
            problem.window,
            sizes,
        )

    def as_rows(self, per_row: Tensor) -> Tensor:
        """lse or its gradient, (B, H, Sq) or (H, T), as a tensor of rows like q with one column."""
        return per_row.mT[..., None]

    def query_buffer(self, name: str, chunk: Chunk, start: int, stop: int, columns: int) -> Tensor:
        """Scratch (pairs, heads_per_key * rows, columns) for rows start to stop; those of a chunk find room."""
        rows = chunk.pairs * chunk.heads_per_key
        buffer = self.scratch.take(name, (rows * chunk.lengths_q[1] * columns,), self.dtype)
        return buffer[rows * start * columns : rows * stop * columns].view(chunk.pairs, -1, columns)

    def load_queries(self, name: str, tensor: Tensor, chunk: Chunk, start: int, stop: int) -> Tensor:
        """Rows of q, dout, ... -> (pairs, heads_per_key * rows, columns) in scratch `name`."""
        rows = self._query_rows.load(tensor, chunk.sequences, start, stop, chunk.query_heads).transpose(1, 2)
        buffer = self.query_buffer(name, chunk, start, stop, tensor.shape[-1])
        buffer.view(rows.shape).copy_(rows)
        return buffer

    def store_queries(self, tensor: Tensor, chunk: Chunk, start: int, stop: int, tile: Tensor) -> None:
        """(pairs, heads_per_key, rows, columns) -> rows of dq, out, ..."""
        rows = tile.reshape(len(chunk.sequences), -1, *tile.shape[2:]).transpose(1, 2)
        self._query_rows.store(tensor, chunk.sequences, start, stop, chunk.query_heads, rows)

    def load_keys(
        self, name: str, tensor: Tensor, chunk: Chunk, start: int, stop: int, used_once: bool = False
    ) -> Tensor:
        """Rows of k or v -> (pairs, rows, head_dim): in scratch `name`, or a view where a copy would not pay."""
        rows = self._key_rows.load(tensor, chunk.sequences, start, stop, chunk.key_heads).transpose(1, 2)
        if used_once and rows.dtype == self.dtype and rows.shape[0] == 1:
            return rows[0]
        buffer = self.scratch.take(name, (chunk.pairs, stop - start, tensor.shape[-1]), self.dtype)
        buffer.view(rows.shape).copy_(rows)
        return buffer

    def store_keys(self, tensor: Tensor, chunk: Chunk, start: int, stop: int, tile: Tensor) -> None:
        """(pairs, rows, head_dim) -> rows of dk or dv."""
        rows = tile.view(len(chunk.sequences), -1, *tile.shape[1:]).transpose(1, 2)
        self._key_rows.store(tensor, chunk.sequences, start, stop, chunk.key_heads, rows)

    def indices(self, chunk: Chunk) -> Callable[[int, int, Tile], Indices]:
        """-> (q_start, q_stop, tile) -> where that tile of the chunk lies."""
        keys = chunk.key_heads.stop - chunk.key_heads.start
        sequences = self._query_rows.numbers(chunk.sequences)
        batch = sequences.repeat_interleave(keys)[:, None, None, None]
        head = self._heads[chunk.query_heads].view(keys, -1).repeat(len(sequences), 1)[:, :, None, None]

        queries = self._positions[: chunk.lengths_q[1], None]
        dropout = self.program.dropout
        rows = dropout.row(batch, head, queries) if dropout is not None else None

        def at(q_start: int, q_stop: int, tile: Tile) -> Indices:
            keys = self._positions[tile.start : tile.stop]
            if rows is None:
                return Indices(batch, head, queries[q_start:q_stop], keys)
            low, high = (half[:, :, q_start:q_stop].contiguous() for half in rows)
            return Indices(batch, head, queries[q_start:q_stop], keys, (low, high))

        return at
