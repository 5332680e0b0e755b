"""One call of the tiled engine: how its tensors are cut into tiles, and its steps, compiled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...memory import new_empty
from ...problem import Direction, Problem
from ...scores import Window
from ...tuning import current
from . import bias as biases
from . import chunks as chunking
from . import products
from .chunks import Chunk, Span
from .kernels import Kernels
from .rows import DenseRows, PackedRows, PagedRows, Rows
from .scratch import Scratch
from .steps import Indices
from .tiles import TileSizes, choose


class Call:
    """Loads and stores tiles, with pairs of (sequence, key head) before rows.

    A tile of queries is (batch_heads, queries * heads_per_key, head_dim): the query heads that read one key head lie
    side by side, so that GQA is a taller product and never a copy of k or v, and queries start to stop are consecutive
    rows.
    """

    def __init__(self, problem: Problem, tiles: TileSizes | None) -> None:
        self.problem = problem
        self.dtype = problem.lse_dtype  # of the arithmetic: fp32, fp64 for fp64
        self.keep_probability = 1.0 - problem.dropout_p
        self.scratch = Scratch(problem.q.device)
        self.heads_per_key = problem.heads_per_key
        self._tiles = tiles
        self._lay_out()
        of_bias = None if problem.bias is None else problem.bias.dtype, problem.bias_gradient
        of_call = self.program, problem.batch, self.keep_probability, self.dtype, problem.q.device
        self.kernels = Kernels(*of_call, self._some_masked, *of_bias)

    def _lay_out(self) -> None:
        """Where the sequences lie. Packed lengths are read on the host: it decides which tiles run."""
        problem, packed = self.problem, self.problem.packed
        self._query_rows: Rows = DenseRows(problem.batch, problem.q.device)
        self._key_rows: Rows = self._query_rows
        self._window = problem.window_in_force
        self._some_masked = packed is not None or self._window != Window()
        if packed is None:
            lengths = problem.q.shape[1], problem.k.shape[1]
            self._lengths = [lengths] * problem.batch
            self.program = problem.program(*lengths)
            longest = max(lengths)
        else:
            self._lengths = list(zip(*packed.host_lengths, strict=True))
            self.program = problem.program(packed.cu_seqlens_q.diff(), packed.cu_seqlens_k.diff())
            longest = max((max(pair) for pair in self._lengths), default=0)
            self._query_rows = PackedRows(packed.cu_seqlens_q, packed.host_sums[0])
            if packed.cu_seqlens_k is packed.cu_seqlens_q and packed.block_table is None:
                self._key_rows = self._query_rows
            elif packed.block_table is None:
                self._key_rows = PackedRows(packed.cu_seqlens_k, packed.host_sums[1])
            else:
                sums = packed.cu_seqlens_k, packed.host_sums[1]
                where = packed.first_keys, packed.host_pieces
                self._key_rows = PagedRows(packed.block_table, problem.k.shape[1], *sums, *where)
        device = problem.q.device
        self._positions = torch.arange(longest + current().tiled.bf16_length_multiple, dtype=torch.int32, device=device)
        self._heads = torch.arange(problem.q.shape[-2], dtype=torch.int32, device=device)

    def __enter__(self) -> Call:
        self.scratch.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.scratch.__exit__(*exception)

    def chunks(self, direction: Direction) -> Iterator[Chunk]:
        problem = self.problem
        head_dims = problem.q.shape[-1] + problem.v.shape[-1]

        packed = problem.packed is not None and problem.packed.block_table is None  # beyond a table there are no pages
        lengths = len(set(self._lengths)) if packed else 1

        def sizes(seqlen_q: int, seqlen_k: int, sequences: int) -> TileSizes:
            if self._tiles is not None:
                return self._tiles
            itemsize, heads = self.product_dtype(seqlen_q, seqlen_k).itemsize, self.heads_per_key
            shapes = seqlen_q, seqlen_k, problem.k.shape[-2], heads, head_dims, itemsize
            return choose(direction, *shapes, self._window, lengths)

        return chunking.chunks(self._lengths, problem.k.shape[-2], self.heads_per_key, self._narrowed_window(), sizes)

    def _narrowed_window(self) -> Callable[[Sequence[int], slice], Window]:
        """The window, as narrow as ALiBi makes it: tiles that weigh nothing are left out.

        It takes a look at all of q and k, and lets their size have a say in how tiles are cut: for long sequences only,
        and not in pages, of which most may be of others.
        """
        slopes, q, k, packed = self.program.alibi_slopes, self.problem.q, self.problem.k, self.problem.packed
        if self.problem.bias is not None:  # it may give weight to any key
            return lambda sequences, heads: self._window
        longest = max((seqlen_k for _, seqlen_k in self._lengths), default=0)
        paged = packed is not None and packed.block_table is not None
        if slopes is None or paged or q.device.type != "cpu" or not q.numel() or longest <= 2 * current().tiled.tile:
            return lambda sequences, heads: self._window
        largest_q, largest_k = (float(torch.linalg.vector_norm(x, dim=-1, dtype=self.dtype).max()) for x in (q, k))

        def narrowed(sequences: Sequence[int], heads: slice) -> Window:
            if any(seqlen_q > seqlen_k for seqlen_q, seqlen_k in (self._lengths[s] for s in sequences)):
                return self._window  # some queries have no key at their own position
            slope = float(slopes[list(sequences), heads].min())
            return self._window.narrowed(self.program.reach(largest_q * largest_k, slope, self.dtype))

        return narrowed

    def product_dtype(self, seqlen_q: int, seqlen_k: int) -> torch.dtype:
        """Of the matrix products' operands, for sequences of at most these lengths."""
        return products.dtype(self.problem.q, self.dtype, (seqlen_q * self.heads_per_key, seqlen_k))

    def results(self, shape: Sequence[int]) -> Tensor:
        """out or a gradient, to be stored into: zeros where a sequence without queries or keys leaves rows alone."""
        found = new_empty(self.problem.q, shape)
        return found.zero_() if any(0 in pair for pair in self._lengths) else found

    def load_queries(
        self, name: str, tensor: Tensor, chunk: Chunk, start: int, stop: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Rows of q, dout, ... -> (batch_heads, rows * heads_per_key, columns) in scratch `name`."""
        shape = (chunk.batch_heads, (stop - start) * chunk.heads_per_key, tensor.shape[-1])
        tile = self.scratch.take(name, shape, dtype or self.dtype)
        self._query_rows.load(tile, tensor, chunk.sequences, start, stop, chunk.query_heads)
        return tile

    def store_queries(self, tensor: Tensor, chunk: Chunk, start: int, stop: int, tile: Tensor) -> None:
        """(batch_heads, rows * heads_per_key, columns) -> rows of dq, out, ..."""
        self._query_rows.store(tile, tensor, chunk.sequences, start, stop, chunk.query_heads)

    def load_keys(
        self,
        name: str,
        tensor: Tensor,
        chunk: Chunk,
        start: int,
        stop: int,
        dtype: torch.dtype | None = None,
        used_once: bool = False,
    ) -> Tensor:
        """Rows of k or v -> (batch_heads, rows, head_dim): in scratch `name`, or a view where a copy would not pay."""
        dtype = dtype or self.dtype
        if used_once and tensor.dtype == dtype and len(chunk.sequences) == 1:
            rows = self._key_rows.view(tensor, chunk.sequences, start, stop, chunk.key_heads)
            if rows is not None:
                return rows[0].transpose(0, 1)
        tile = self.scratch.take(name, (chunk.batch_heads, stop - start, tensor.shape[-1]), dtype)
        self._key_rows.load(tile, tensor, chunk.sequences, start, stop, chunk.key_heads)
        return tile

    def store_keys(self, tensor: Tensor, chunk: Chunk, start: int, stop: int, tile: Tensor) -> None:
        """(batch_heads, rows, head_dim) -> rows of dk or dv."""
        self._key_rows.store(tile, tensor, chunk.sequences, start, stop, chunk.key_heads)

    def indices(self, chunk: Chunk) -> Callable[[int, int, int, int], Indices]:
        """-> (q_start, q_stop, k_start, k_stop) -> where that tile of the chunk lies."""
        keys = chunk.key_heads.stop - chunk.key_heads.start
        sequences = self._query_rows.numbers(chunk.sequences)
        batch = sequences.repeat_interleave(keys)[:, None, None, None]
        head = self._heads[chunk.query_heads].view(keys, -1).repeat(len(sequences), 1)[:, None, :, None]
        queries = self._positions[: chunk.lengths_q[1], None, None]
        dropout = self.program.dropout
        rows = dropout.row(batch, head, queries) if dropout is not None else None

        def at(q_start: int, q_stop: int, k_start: int, k_stop: int) -> Indices:
            places = batch, head, queries[q_start:q_stop], self._positions[k_start:k_stop]
            bias = self._bias(chunk, (q_start, q_stop), (k_start, k_stop))
            if rows is None:
                return Indices(*places, bias=bias)
            return Indices(*places, rows[0][:, q_start:q_stop], rows[1][:, q_start:q_stop], bias)

        return at

    def _bias(self, chunk: Chunk, queries: Span, keys: Span) -> Tensor | None:
        """As Indices has it: where it lies, or, if a tile's does not lie so, in scratch."""
        if self.problem.bias is None:
            return None
        tile = biases.tile(self.problem.bias, chunk, queries, keys)
        sizes = queries[1] - queries[0], chunk.heads_per_key, keys[1] - keys[0]
        tile = tile.expand(len(chunk.sequences), chunk.nheads_k, *sizes)
        of_sequence, of_head = tile.stride()[:2]
        together = len(chunk.sequences) == 1 or chunk.nheads_k == 1 or of_sequence == chunk.nheads_k * of_head
        if not together or tile.stride(-1) != 1:
            tile = self.scratch.take("bias", tuple(tile.shape), tile.dtype).copy_(tile)
        return tile.flatten(0, 1)
