"""One call of large tiles: its chunks, its score program, its results and buffers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from ....memory import new_empty
from ....problem import Direction, Problem
from ....scores import ScoreProgram
from ....scores.dropout import Row
from ....scores.terms import add_bias
from ....tuning import on
from .. import bias as biases
from .. import chunks as chunking
from ..chunks import Chunk, Lengths, Span
from ..rows import as_rows
from ..scratch import Scratch
from ..tiles import TileSizes
from . import products
from .groups import groups
from .sizes import Bytes, choose


class Call:
    """A tile's scores are (sequences, key heads, queries, query heads of a key head, keys), or (pairs of sequence and
    key head, rows, keys): the query heads that read one key head lie side by side: GQA is a taller product.

    nbytes: what the call may take. tiles: sizes to use in place of those of sizes.py.
    """

    def __init__(self, problem: Problem, direction: Direction, nbytes: int, tiles: TileSizes | None) -> None:
        self.problem = problem
        self.device = problem.q.device
        self.dtype = problem.lse_dtype  # of the arithmetic: fp32, fp64 for fp64
        self.product_dtype = products.dtype(problem.q, self.dtype)
        self.keep_probability = 1.0 - problem.dropout_p
        self.tuned = on(self.device).tiled
        self.window = problem.window_in_force
        self.scratch = Scratch(self.device)
        self.masks: dict[tuple[int, int, int], Tensor] = {}  # of rims.py
        packed = problem.packed
        self.lengths: Lengths = (
            [(problem.q.shape[1], problem.k.shape[1])] * problem.batch
            if packed is None
            else list(zip(*packed.host_lengths, strict=True))
        )
        self._direction, self._nbytes, self._tiles = direction, nbytes, tiles
        self.chunks = list(
            chunking.chunks(
                self.lengths,
                problem.k.shape[-2],
                problem.heads_per_key,
                lambda sequences, heads: self.window,
                self._sizes,
                lambda lengths: groups(lengths, problem.q.shape[-2], self.tuned.group_scores),
            )
        )

    def _sizes(self, seqlen_q: int, seqlen_k: int, sequences: int) -> TileSizes:
        if self._tiles is not None:
            return self._tiles
        problem = self.problem
        paged = problem.packed is not None and problem.packed.block_table is not None
        lies = (
            problem.heads_per_key == 1 and self.lies(problem.q),
            not paged and self.lies(problem.k),
            not paged and self.lies(problem.v),
        )
        lengths = seqlen_q, seqlen_k
        costs = Bytes.of(self._direction, problem, *lengths, self.product_dtype.itemsize, lies)
        heads = problem.k.shape[-2], problem.heads_per_key
        return choose(self._direction, *lengths, sequences, *heads, self.window, self._nbytes, costs, self.tuned)

    def lies(self, tensor: Tensor) -> bool:
        """Are a head's rows of it, of one sequence, an operand of a product where they lie?"""
        dtype_fits = tensor.dtype == self.product_dtype
        return dtype_fits and tensor.stride(-1) == 1 and tensor.stride(-3) >= tensor.shape[-1]

    # ------------------------------------------------------------------------------------------------ the score program

    @functools.cached_property
    def positions(self) -> Tensor:
        """int32, from 0 to the longest length."""
        longest = max((max(pair) for pair in self.lengths), default=0)
        return torch.arange(longest, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def heads(self) -> Tensor:
        """int64 (nheads,): a number of a place comes of it."""
        return torch.arange(self.problem.q.shape[-2], device=self.device)

    @functools.cached_property
    def numbers(self) -> Tensor:
        """int32 (5, sequences in the order of the chunks): number, first row and last position of q, and of k."""
        problem, packed = self.problem, self.problem.packed
        order = list(self._order)
        sums = ([0], [0]) if packed is None else packed.host_sums
        firsts = ([sums[side][s] if packed is not None else 0 for s in order] for side in (0, 1))
        lasts = ([self.lengths[s][side] - 1 for s in order] for side in (0, 1))
        first_q, first_k = firsts
        last_q, last_k = lasts
        rows = [order, first_q, last_q, first_k, last_k]
        return torch.tensor(rows, dtype=torch.int32, device=problem.q.device)

    @functools.cached_property
    def _order(self) -> dict[int, int]:
        """Where a sequence is among the numbers."""
        order: dict[int, int] = {}
        for chunk in self.chunks:
            for sequence in chunk.sequences:
                order.setdefault(sequence, len(order))
        return order

    def numbers_of(self, chunk: Chunk) -> Tensor:
        """(5, sequences, 1, 1, 1, 1)."""
        first = self._order[chunk.sequences[0]]
        return self.numbers[:, first : first + len(chunk.sequences), None, None, None, None]

    @functools.cached_property
    def program(self) -> ScoreProgram:
        """Of products that have the scale in them."""
        problem, packed = self.problem, self.problem.packed
        if packed is None:
            program = problem.program(problem.q.shape[1], problem.k.shape[1])
        else:
            program = problem.program(packed.cu_seqlens_q.diff(), packed.cu_seqlens_k.diff())
        return replace(program, softmax_scale=1.0)

    @functools.cached_property
    def _batch(self) -> Tensor:
        return torch.arange(self.problem.batch, dtype=torch.int32, device=self.device)

    def _indices(self, chunk: Chunk, queries: Span) -> tuple[Tensor, Tensor, Tensor]:
        """batch, head and q_idx of the score program, (n, 1, 1, 1, 1), (Hk, 1, g, 1) and (m, 1, 1)."""
        sequences = chunk.sequences
        if self.problem.packed is None:
            batch = self._batch[sequences[0] : sequences[-1] + 1, None, None, None, None]
        else:
            batch = self.numbers_of(chunk)[0]
        head = self.heads[chunk.query_heads].view(-1, 1, chunk.heads_per_key, 1)
        return batch, head, self.positions[slice(*queries), None, None]

    def score(self, product: Tensor, chunk: Chunk, queries: Span, keys: Span) -> Tensor:
        """Scores of a tile, the mask aside: the product itself where nothing but the scale and a bias comes to it."""
        scores = product
        if self.problem.softcap > 0.0 or self.problem.alibi_slopes is not None:
            scores = self.program.score(product, *self._indices(chunk, queries), self.positions[slice(*keys)])
        if self.problem.bias is not None:
            add_bias(scores, biases.tile(self.problem.bias, chunk, queries, keys))
        return scores

    def dropout_rows(self, chunk: Chunk) -> Row | None:
        """What dropout's decisions in a row have in common, of a chunk's queries; None: nothing is dropped."""
        if self.problem.dropout_seed is None or self.program.dropout is None:
            return None
        return self.program.dropout.row(*self._indices(chunk, (0, chunk.lengths_q[1])))

    def dropped(self, rows: Row | None, queries: Span, keys: Span) -> Tensor | None:
        """bool, like a tile: which probabilities are not kept."""
        if rows is None or self.program.dropout is None:
            return None
        low, high = (half[:, :, slice(*queries)] for half in rows)
        return self.program.dropout.keep_in_row((low, high), self.positions[slice(*keys)]).logical_not_()

    # --------------------------------------------------------------------------------------------------------- results

    def results(
        self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, empty: float = 0.0
    ) -> Tensor:
        """A result to be written into, packed ones with a row too many, where rows that are none may go; `empty` where
        a sequence without queries or keys leaves rows alone.
        """
        shape = shape if self.problem.packed is None else (shape[0] + 1, *shape[1:])
        found = new_empty(like, shape, dtype)
        return found.fill_(empty) if any(0 in pair for pair in self.lengths) else found

    def finished(self, result: Tensor) -> Tensor:
        return result if self.problem.packed is None else result[:-1]

    def lse(self) -> Tensor:
        """lse to be written into, as rows of one column."""
        q = self.problem.q
        if self.problem.packed is None:
            batch, seqlen, nheads = q.shape[:-1]
            return as_rows(self.results(q, (batch, nheads, seqlen), self.dtype, -inf))
        return self.results(q, (*q.shape[:-1], 1), self.dtype, -inf)

    def finished_lse(self, rows: Tensor) -> Tensor:
        """-> (B, H, Sq) or (H, T)."""
        return self.finished(rows)[..., 0].mT.contiguous()

    @functools.cached_property
    def zero(self) -> Tensor:
        """(1,) in the dtype of the arithmetic, which what is added to it is computed in."""
        return torch.zeros(1, dtype=self.dtype, device=self.device)
