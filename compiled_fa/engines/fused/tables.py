"""A call's tables and numbers on its device, made once for all calls that share them.

Tables depend on lengths and window alone, so that all layers of a model share them: dense ones by their shapes, packed
ones by the cu_seqlens tensors that they were made of, as long as those live and nobody writes to them. On a GPU they
are one compiled graph of a few kernels.

Each stream keeps its own, and while a CUDA graph is captured, nothing is kept (caches.stream_of).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...caches import Cache, TensorCache, stream_of
from ...inductor import graphs
from ...inductor.graphs import Compiled
from ...problem import Direction, Packed, Problem
from ...scores import Window
from . import pages
from .blocks import (
    BLOCK,
    Sequences,
    Size,
    bounded,
    stored,
    tables_of_rows,
    tables_of_sequences,
    widths,
)
from .kernels import CONFIG
from .mods import Layout

__all__ = ["Shape", "Sizes", "Tables", "layout_of", "number", "stream_of", "tables_of", "traced"]

Tables = Mapping[str, Tensor]  # BlockTables and RowTables by name, and what a layout needs


class Sizes(NamedTuple):
    """What tables are made of besides cu_seqlens. rows_q, rows_k: of the tensors. table: blocks of a block table, and
    block_size: of those; or 0. longest_q: rows of a padded batch. width_kv, width_q: of the lists of blocks."""

    rows_q: Size
    rows_k: Size
    table: Size
    block_size: Size
    longest_q: Size
    width_kv: Size
    width_q: Size


@dataclass(frozen=True)
class Shape:
    """What is fixed in the code that makes tables."""

    layout: Layout
    paged: bool
    leftpad: bool = False

    def tables(
        self,
        sizes: Sizes,
        window: Window,
        device: torch.device,
        cu_seqlens_q: Any = None,
        cu_seqlens_k: Any = None,
        first_keys: Any = None,
    ) -> dict[str, Tensor]:
        """window: bounded. cu_seqlens: of packed sequences. first_keys: as Sequences.spaced has them."""
        if self.layout == "dense":
            q, k = Sequences.single(sizes.rows_q), Sequences.single(sizes.rows_k)
        else:
            q, k = _packed_sides(cu_seqlens_q, cu_seqlens_k, first_keys, sizes, self.paged)
        lists = sizes.width_kv, sizes.width_q
        found: dict[str, Tensor] = {}
        if self.layout != "padded":
            blocks, rows = tables_of_rows(window, q, k, lists, device)
        else:
            blocks, rows = tables_of_sequences(window, q, k, sizes.longest_q, sizes.width_kv, device)
            within = torch.arange(sizes.longest_q, dtype=torch.int32, device=device)
            source = (q.start.unsqueeze(1) + within).clamp(max=sizes.rows_q - 1)
            row = torch.arange(sizes.rows_q, dtype=torch.int32, device=device)
            sequence = q.find(row)
            index = (row - q.start_of(sequence)).clamp(max=sizes.longest_q - 1)
            found = {"source": source, "home": sequence * sizes.longest_q + index}
        if self.paged:
            room = torch.arange(k.start.shape[0], dtype=torch.int32, device=device) * (sizes.table * sizes.block_size)
            found["used"] = k.stop - room
            if self.leftpad:
                found["skipped"] = k.start - room
        return {**blocks._asdict(), **dict(zip(rows.present(), rows.flatten(), strict=True)), **found}

    def function(self, *arguments: Any) -> tuple[Tensor, ...]:
        """What is compiled: Sizes, the window's sides and cu_seqlens -> tables, in their order."""
        left, right, *of_sequences = arguments[len(Sizes._fields) :]
        window: Any = Window(left, right)
        return tuple(self.tables(Sizes(*arguments[: len(Sizes._fields)]), window, left.device, *of_sequences).values())

    def example_inputs(self, device: torch.device | str, size: Callable[[str, int], Any]) -> list[Any]:
        """To trace with. size: (name, typical value) -> a size, the same one for the same name."""
        typical = dict(zip(Sizes._fields, (1000, 1100, 7, 256, 100, 9, 9), strict=True))
        sizes = [size(name, value) for name, value in typical.items()]
        shapes: list[tuple[Any, ...]] = [(), ()]
        shapes += [(size("sums", 9),)] * self.tensors
        return [*sizes, *(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)]

    @property
    def tensors(self) -> int:
        """How many there are of cu_seqlens and first_keys."""
        return 0 if self.layout == "dense" else 3 if self.leftpad else 2

    @property
    def smallest(self) -> list[Any]:
        """Sizes and tensors without data, of a call with one query."""
        sums = torch.empty(2, dtype=torch.int32, device=torch.device("meta"))
        return [Sizes(1, 1, 1, 1, 1, 1, 1), *[sums] * self.tensors]


def _packed_sides(
    cu_q: Tensor, cu_k: Tensor, first_keys: Tensor | None, sizes: Sizes, paged: bool
) -> tuple[Sequences, Sequences]:
    q = Sequences.packed(cu_q, sizes.rows_q)
    if not paged:
        return q, Sequences.packed(cu_k, sizes.rows_k)
    return q, Sequences.spaced(cu_k, sizes.table * sizes.block_size, first_keys)


_dense: Cache[object, Tables] = Cache("dense tables", 256, 64 << 20, lambda tables: _nbytes(tables))
_packed = TensorCache[Tables]("packed tables", 64, 256 << 20, lambda tables: _nbytes(tables))
_numbers: Cache[object, Tensor] = Cache("numbers on devices", entries=256)
_makers: Cache[object, Compiled] = Cache("compiled tables", entries=32)  # by shape and device, as kernels are


def _nbytes(tables: Tables) -> int:
    return sum(x.nbytes for x in tables.values())


def layout_of(problem: Problem, direction: Direction) -> Layout:
    """Of few queries a sequence on keys of their own, a block of packed rows would be of many sequences, on whose keys
    one program would work by itself: such queries are laid out as a batch. Keys lie as they are, but in pages that no
    tile fits (pages.py)."""
    packed = problem.packed
    if packed is None:
        return "dense"
    if direction == "forward" and pages.plan(problem) is not None:
        return "paged"
    few = direction == "forward" and packed.max_seqlen_q <= BLOCK and not lie_alike(packed)
    return "padded" if few else "packed"


def lie_alike(packed: Packed) -> bool:
    """Are queries and keys known to have the same lengths, without a look at them?"""
    return packed.block_table is None and packed.cu_seqlens_q is packed.cu_seqlens_k


def tables_of(problem: Problem, layout: Layout, stream: int | None) -> Tables:
    """On the device of the call. stream: as `stream_of` has it."""
    window, device, of_sequences = bounded(problem.window), problem.q.device, _of_sequences(problem.packed)
    shape: _Shape
    sizes: Sequence[Size]
    if layout == "paged":
        shape, sizes, of_sequences = pages.shape_of(problem), pages.sizes_of(problem), pages.tensors_of(problem)
    else:
        shape, sizes = shape_of(problem, layout), sizes_of(problem, layout)
    key = shape, window, tuple(sizes), device, stream

    def make() -> Tables:
        alike = [x.contiguous() for x in of_sequences] if layout == "paged" else _alike(of_sequences)
        return _made(shape, sizes, window, device, stream, *alike)

    if stream is None:
        return make()
    return _packed.get(of_sequences, key, make) if of_sequences else _dense.get(key, make)


def traced(problem: Problem, layout: Layout) -> Tables:
    """As part of the graph that traces the call."""
    sizes, sums = sizes_of(problem, layout), _alike(_of_sequences(problem.packed))
    found = shape_of(problem, layout).tables(sizes, bounded(problem.window), problem.q.device, *sums)
    return {name: stored(x) for name, x in found.items()}


def _of_sequences(packed: Packed | None) -> tuple[Tensor, ...]:
    """The tensors that tables are made of."""
    if packed is None:
        return ()
    first_keys = () if packed.first_keys is None else (packed.first_keys,)
    return packed.cu_seqlens_q, packed.cu_seqlens_k, *first_keys


def _alike(of_sequences: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """With first_keys as long as cu_seqlens, so that a graph of any batch knows that they are of one."""
    return (*of_sequences[:2], *(torch.nn.functional.pad(x, (0, 1)) for x in of_sequences[2:]))


def shape_of(problem: Problem, layout: Layout) -> Shape:
    packed = problem.packed
    if packed is None:
        return Shape(layout, False)
    return Shape(layout, packed.block_table is not None, packed.first_keys is not None)


def sizes_of(problem: Problem, layout: Layout) -> Sizes:
    packed = problem.packed
    if packed is None:
        seqlen_q, seqlen_k = problem.q.shape[1], problem.k.shape[1]
        q, k = Sequences.single(seqlen_q), Sequences.single(seqlen_k)
        return Sizes(seqlen_q, seqlen_k, 0, 0, 0, *widths(problem.window, True, q, k, seqlen_q, seqlen_k))
    rows_q, rows_k, table, block_size = problem.q.shape[0], problem.k.shape[0], 0, 0
    if packed.block_table is not None:
        table, block_size = packed.block_table.shape[1], problem.k.shape[1]
        rows_k = packed.block_table.shape[0] * table * block_size
    q, k = Sequences(0, 0, rows_q), Sequences(0, 0, rows_k)
    longest_q, longest_k = packed.max_seqlen_q, packed.max_seqlen_k
    if layout == "padded":  # of one sequence's blocks, which begin anywhere
        width = torch.sym_min((longest_k + (BLOCK - 2)) // BLOCK + 1, k.blocks)
        return Sizes(rows_q, rows_k, table, block_size, torch.sym_max(longest_q, 1), torch.sym_max(width, 1), 1)
    return Sizes(
        rows_q, rows_k, table, block_size, 0, *widths(problem.window, lie_alike(packed), q, k, longest_q, longest_k)
    )


def number(value: float, device: torch.device, stream: int | None) -> Tensor:
    """A tensor of no dimension, int32 or fp32, shared by all calls with this number on this stream."""
    dtype = torch.int32 if isinstance(value, int) else torch.float32

    def make() -> Tensor:
        return torch.full((), value, dtype=dtype, device=device)

    return make() if stream is None else _numbers.get((value, dtype, device, stream), make)


class _Shape(Hashable, Protocol):
    """Shape, or that of pages.py."""

    @property
    def smallest(self) -> list[Any]: ...

    def tables(self, sizes: Any, window: Window, device: torch.device, *tensors: Any) -> dict[str, Tensor]: ...

    def function(self, *arguments: Any) -> tuple[Tensor, ...]: ...

    def example_inputs(self, device: torch.device | str, size: Callable[[str, int], Any]) -> list[Any]: ...


def _made(
    shape: _Shape, sizes: Sequence[Size], window: Window, device: torch.device, stream: int | None, *tensors: Tensor
) -> dict[str, Tensor]:
    bounds = [number(side, device, stream) for side in window if isinstance(side, int)]
    arguments = [*sizes, *bounds, *tensors]
    if device.type == "cpu":
        made = shape.function(*arguments)
    else:
        made = _makers.get((shape, device), lambda: _compiled(shape, device))(arguments)
    return dict(zip(_names(shape), made, strict=True))


def _compiled(shape: _Shape, device: torch.device) -> Compiled:
    what = "the tables of a call's rows"
    return graphs.compiled_graph(shape.function, lambda size: shape.example_inputs(device, size), what, **CONFIG)


@functools.cache
def _names(shape: _Shape) -> tuple[str, ...]:
    """Of the tables, in order."""
    sizes, *tensors = shape.smallest
    return tuple(shape.tables(sizes, Window(0, 0), torch.device("meta"), *tensors))
