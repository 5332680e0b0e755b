"""Keys in pages, read where they lie: which calls can be, in which tiles, and the tables that lead there.

A tile of keys lies within a page, or, where each sequence has one page (a cache that is not paged), within that page's
piece of memory. Tables list the tiles that a block of query rows sees, in the order of the keys, which list_order.py
counts along; query heads that share a key head are rows beside each other, so that keys are read once for all of them.
A block is of one sequence, and a batch of its own to the kernel, as are the splits of its list: so many that all of a
GPU's processors have work, from shapes alone, and of about as many tiles each, from the lengths on the device.

    query i, query head h of key head h // g: row i * g + h % g of its sequence, which are cut into blocks
    block n, split s: batch n * splits + s
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...inductor.graphs import is_traced
from ...messages import say_once
from ...problem import Cached, Packed, Problem, once_a_call
from ...scores import Window
from ...scores.arguments import UNBOUNDED
from ...tuning import FlexOptions
from ..nvidia import capability_of, processors
from . import list_order
from .blocks import Sequences, Size, at, bounded, contiguous, query_rows
from .flex import SMALLEST_HEAD_DIM
from .options import options_for_pages

FEWEST_KEYS = 16  # of a tile: tl.dot takes no less
BLOCKS_A_PROCESSOR = 2  # that read at once, so that one of them waits for memory while the other computes
MOST_BATCHES = 65535  # of a launch's grid
FEWEST_TILES = 2  # of a split: each one's result is written, and read to be merged


@dataclass(frozen=True)
class Rows:
    """All pages of k or v as rows of memory. stride, head: of a row and of a head, in elements. step: rows from one
    page's first to the next one's."""

    stride: int
    head: int
    step: int

    @classmethod
    def of(cls, x: Tensor) -> Rows | None:
        """x: (pages, page_size, heads, head_dim); None: they do not lie at even distances."""
        (pages, size, heads, columns), (page, row, head, column) = x.shape, x.stride()
        if columns > 1 and column != 1:
            return None
        # The stride of a dimension of size 1 is nobody's.
        head = head if heads > 1 else columns
        if size == 1:
            row = page if pages > 1 else heads * head
        if pages == 1:
            page = size * row
        return cls(row, head, page // row) if row > 0 and page % row == 0 else None

    def view(self, x: Tensor) -> Tensor:
        """(rows, heads, head_dim), without a copy."""
        rows = (x.shape[0] - 1) * self.step + x.shape[1]
        return x.as_strided((rows, *x.shape[2:]), (self.stride, self.head, 1))


@dataclass(frozen=True)
class Plan:
    """How a call's keys are read. options: of the kernel. blocks, splits, width: of the tables."""

    k: Rows
    v: Rows
    options: FlexOptions
    blocks: int
    splits: int
    width: int

    @property
    def block_rows(self) -> int:
        return dict(self.options)["BLOCK_M"]

    @property
    def keys(self) -> int:
        return dict(self.options)["BLOCK_N"]


@once_a_call
def plan(problem: Problem) -> Plan | None:
    """None: keys are gathered, since they are in pages that no tile fits, or lie in another way; or since a graph
    traces the call, whose sizes may be symbols."""
    packed, k, v = problem.packed, problem.k, problem.v
    if packed is None or packed.block_table is None or is_traced(problem.q):
        return None
    if not (k.numel() and problem.batch and packed.block_table.shape[1]):
        return None
    if problem.dropout_seed is not None or min(problem.q.shape[-1], v.shape[-1]) < SMALLEST_HEAD_DIM:
        return None
    rows_k, rows_v = Rows.of(k), Rows.of(v)
    if rows_k is None or rows_v is None or rows_k.step != rows_v.step:
        return None
    rows = max(1, packed.max_seqlen_q) * problem.heads_per_key
    head_dim, capability = max(problem.q.shape[-1], v.shape[-1]), capability_of(problem.q.device)
    options = options_for_pages(head_dim, problem.q.dtype, rows, problem.softcap > 0.0, capability)
    keys = dict(options)["BLOCK_N"]
    if not packed.one_page_each:
        while keys >= FEWEST_KEYS and (k.shape[1] % keys or (k.shape[0] > 1 and rows_k.step % keys)):
            keys //= 2
        if keys < FEWEST_KEYS:
            return None
    if (reason := list_order.install()) is not None:
        say_once(f"keys in pages are gathered, which is slower: {reason}")
        return None
    options = tuple((name, keys if name == "BLOCK_N" else number) for name, number in options)
    block_rows = dict(options)["BLOCK_M"]
    width = _width(problem, packed, block_rows, keys)
    if alike(packed):
        blocks = problem.batch * -(-rows // block_rows)
    else:
        blocks = problem.q.shape[0] * problem.heads_per_key // block_rows + problem.batch
    wanted = packed.asked_splits or -(-BLOCKS_A_PROCESSOR * processors(problem.q.device) // (blocks * k.shape[2]))
    splits = max(1, min(wanted, width // FEWEST_TILES))
    # The kernel goes no further along a list than memory has tiles: of pages that a sequence has twice, it could.
    in_memory = -(-((k.shape[0] - 1) * rows_k.step + k.shape[1]) // keys)
    splits = max(splits, -(-width // in_memory))
    if blocks * splits > MOST_BATCHES:
        return None
    return Plan(rows_k, rows_v, options, blocks, splits, -(-width // splits))


def _width(problem: Problem, packed: Packed, block_rows: int, keys: int) -> int:
    """The most tiles that a block of query rows can see, from shapes and the window."""
    columns, page_size = _table(packed).shape[1], problem.k.shape[1]
    longest_q, longest_k = max(1, packed.max_seqlen_q), max(1, min(packed.max_seqlen_k, columns * page_size))
    sides: tuple[Any, ...] = bounded(problem.window)
    left, right = sides
    queries = (block_rows + problem.heads_per_key - 2) // problem.heads_per_key + 1
    seen: int = min(longest_k, queries + min(left, longest_k) + min(right, longest_q))
    return (seen + keys - 2) // keys + 1


class Sizes(NamedTuple):
    """What tables are made of besides tensors. rows_q: of the tensor. columns: of the block table. page_size, step:
    rows of a page, and from one to the next. blocks, splits, width: Plan's."""

    rows_q: Size
    columns: Size
    page_size: Size
    step: Size
    blocks: Size
    splits: Size
    width: Size


@dataclass(frozen=True)
class Shape:
    """What is fixed in the code that makes tables. block_rows, keys: of a block of query rows, and of a tile of keys.
    whole: each sequence's keys lie in one piece. leftpad: sequences do not begin with their pages. alike: they have
    one number of queries. positions: are they asked for?"""

    heads_per_key: int
    block_rows: int
    keys: int
    whole: bool
    leftpad: bool
    alike: bool
    positions: bool

    def tables(
        self,
        sizes: Sizes,
        window: Window,
        device: torch.device,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        block_table: Any,
        first_keys: Any = None,
    ) -> dict[str, Tensor]:
        """window: bounded. int32:

        kv_num_blocks, (blocks, splits), kv_indices, (blocks * splits, 1, 1, width): flex_attention's lists.
        start, stop, (blocks * splits, block_rows): what a row of queries sees, in keys as list_order.py counts them.
        source, (blocks,): a block's first row among those of all sequences.
        home, (rows_q, 2): the first batch of a query's sequence, and its first row there.
        Of `positions`, position: where a row stands, and member: which of a key head's query heads it is, both as
        start; owner, (blocks * splits,): the sequence.
        """
        group, block_rows, batch = self.heads_per_key, self.block_rows, block_table.shape[0]
        q, k = Sequences.packed(cu_seqlens_q, sizes.rows_q), self._keys(sizes, cu_seqlens_k, block_table, first_keys)
        block = torch.arange(sizes.blocks, dtype=torch.int32, device=device)
        row_q = torch.arange(sizes.rows_q, dtype=torch.int32, device=device)
        if self.alike:
            each_has, queries = sizes.blocks // batch, sizes.rows_q // batch
            sequence, block_there = block // each_has, block % each_has
            home, number_there = row_q // queries * each_has, row_q % queries
        else:
            # Rows before a sequence's, in blocks rounded down, and one more each: there is room for those rounded up.
            first_block = cu_seqlens_q * group // block_rows
            first_block = first_block + torch.arange(batch + 1, dtype=torch.int32, device=device)
            stops = contiguous(first_block.narrow(0, 1, batch))
            sequence = torch.searchsorted(stops, block, right=True, out_int32=True).clamp(max=batch - 1)
            block_there = block - at(first_block, sequence)
            # Rows behind all sequences are as the last one's last.
            of_row = q.find(row_q)
            number_there = torch.minimum(row_q - q.start_of(of_row), q.length_of(of_row) - 1).clamp(min=0)
            home = at(first_block, of_row)
        row = block_there.unsqueeze(1) * block_rows + torch.arange(block_rows, dtype=torch.int32, device=device)
        seen = query_rows(window, q, k, sequence.unsqueeze(1).expand_as(row), row // group)
        some = seen.start < seen.stop
        first, last = torch.where(some, seen.start, UNBOUNDED).amin(1), torch.where(some, seen.stop, 0).amax(1)
        begin = torch.where(first < last, first // self.keys, 0)
        end = torch.where(first < last, (last + (self.keys - 1)) // self.keys, 0)
        # (blocks, splits): from which tile on, and how many.
        each = ((end - begin + (sizes.splits - 1)) // sizes.splits).unsqueeze(1)
        begin = begin.unsqueeze(1) + torch.arange(sizes.splits, dtype=torch.int32, device=device) * each
        number = torch.minimum(each, end.unsqueeze(1) - begin).clamp(min=0)
        # A longest length that is not true makes results wrong; no kernel shall read beyond the lists for it.
        number = torch.minimum(number, torch.full_like(number, sizes.width)).to(torch.int32)
        column = torch.arange(sizes.width, dtype=torch.int32, device=device)
        tiles = self._place(sizes, begin.unsqueeze(2) + column, sequence, block_table)
        tiles = torch.where(column < number.unsqueeze(2), tiles, 0)
        shift = (self._place(sizes, begin, sequence, block_table) - begin) * self.keys
        shift = torch.where(number > 0, shift, 0).unsqueeze(2)

        def of_splits(x: Tensor) -> Tensor:
            moved: Tensor = (x.unsqueeze(1) + shift).to(torch.int32)
            return moved.flatten(0, 1)

        lists = tiles.to(torch.int32).flatten(0, 1).unsqueeze(1).unsqueeze(1)
        found = {"kv_num_blocks": number, "kv_indices": lists}
        found |= {"start": of_splits(seen.start), "stop": of_splits(seen.stop)}
        found["home"] = torch.stack([home * sizes.splits, number_there * group], 1).to(torch.int32)
        found["source"] = at(cu_seqlens_q, sequence) * group + block_there * block_rows
        if self.positions:
            found["position"] = of_splits(seen.position)
            of_all = sizes.blocks, sizes.splits, block_rows
            found["member"] = contiguous((row % group).unsqueeze(1).expand(of_all)).flatten(0, 1)
            found["owner"] = contiguous(sequence.unsqueeze(1).expand(sizes.blocks, sizes.splits)).view(-1)
        return found

    def _keys(self, sizes: Sizes, cu_seqlens_k: Tensor, block_table: Tensor, first_keys: Tensor | None) -> Sequences:
        """Where keys are in their sequence's pages, or, of those in one piece, in memory."""
        batch = block_table.shape[0]
        first = torch.zeros(batch, dtype=torch.int32, device=block_table.device) if first_keys is None else first_keys
        if self.whole:
            first = first + block_table.select(1, 0) * sizes.step
        return Sequences(first, first + cu_seqlens_k.diff(), sizes.columns * sizes.page_size)

    def _place(self, sizes: Sizes, tile: Tensor, sequence: Tensor, block_table: Tensor) -> Tensor:
        """Tiles of blocks' sequences, by their numbers (blocks, ...) -> their numbers in memory."""
        if self.whole:
            return tile
        per_page = sizes.page_size // self.keys
        column = (tile // per_page).clamp(max=sizes.columns - 1)
        page = at(block_table, sequence.view(-1, *[1] * (tile.dim() - 1)), column)
        place: Tensor = page * (sizes.step // self.keys) + tile % per_page
        return place

    def function(self, *arguments: Any) -> tuple[Tensor, ...]:
        """What is compiled: Sizes, the window's sides and tensors -> tables, in their order."""
        count = len(Sizes._fields)
        left, right, *tensors = arguments[count:]
        window: Any = Window(left, right)
        return tuple(self.tables(Sizes(*arguments[:count]), window, left.device, *tensors).values())

    def example_inputs(self, device: torch.device | str, size: Callable[[str, int], Any]) -> list[Any]:
        """To trace with. size: (name, typical value) -> a size, the same one for the same name."""
        typical = dict(zip(Sizes._fields, (900, 20, 256, 512, 300, 5, 16), strict=True))
        batch = size("batch", 9)
        shapes: list[tuple[Any, ...]] = [(), (), (batch + 1,), (batch + 1,), (batch, size("columns", 20))]
        shapes += [(batch,)] * self.leftpad
        tensors = (torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)
        return [*(size(name, value) for name, value in typical.items()), *tensors]

    @property
    def smallest(self) -> list[Any]:
        """Sizes and tensors without data, of a call with one query."""
        meta = torch.device("meta")
        shapes: list[tuple[int, ...]] = [(2,), (2,), (1, 1), *[(1,)] * self.leftpad]
        return [
            Sizes(1, 1, self.keys, self.keys, 1, 1, 1),
            *(torch.empty(shape, dtype=torch.int32, device=meta) for shape in shapes),
        ]


def shape_of(problem: Problem) -> Shape:
    found, packed = planned(problem), _packed(problem)
    how = packed.one_page_each, packed.first_keys is not None, alike(packed), problem.alibi_slopes is not None
    return Shape(problem.heads_per_key, found.block_rows, found.keys, *how)


def alike(packed: Packed) -> bool:
    """Are sequences known to have one number of queries, without a look at them?"""
    return isinstance(packed, Cached)


def sizes_of(problem: Problem) -> Sizes:
    found, packed = planned(problem), _packed(problem)
    of_pages = _table(packed).shape[1], problem.k.shape[1], found.k.step
    return Sizes(problem.q.shape[0], *of_pages, found.blocks, found.splits, found.width)


def tensors_of(problem: Problem) -> tuple[Tensor, ...]:
    """Those that tables are made of."""
    packed = _packed(problem)
    first_keys = () if packed.first_keys is None else (packed.first_keys,)
    return packed.cu_seqlens_q, packed.cu_seqlens_k, _table(packed), *first_keys


def planned(problem: Problem) -> Plan:
    if (found := plan(problem)) is None:
        raise ValueError("there is no plan for these keys: `plan` tells")
    return found


def _packed(problem: Problem) -> Packed:
    if problem.packed is None:
        raise ValueError("keys in pages are those of packed sequences")
    return problem.packed


def _table(packed: Packed) -> Tensor:
    if packed.block_table is None:
        raise ValueError("keys in pages have a block table")
    return packed.block_table
