"""Keys in parts, and where in memory they lie.

A part is some pieces, each of rows that lie side by side: one piece, or the pages of a cache whose pages are small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....problem import Packed

PART, LONG_PART = 64, 256  # keys: enough parts for all threads, or few to be merged
LONG = 4096  # keys from which there are parts enough

Spans = tuple[tuple[int, int], ...]  # keys start to stop of every sequence; starts are multiples of a part


class Parts(NamedTuple):
    """All but the last part of every sequence, which are whole (x,), and the last ones, which need not be (b,). int64.

    A window is the rows of the last part and some before or after it, if it is not whole.
    """

    row: Tensor  # (x, pieces): where pieces begin
    owner: Tensor  # whose they are
    key: Tensor  # the number in the sequence of a part's first key
    first: Tensor  # (b,): the first part of a sequence, and how many it has
    parts: Tensor
    steps: Tensor  # 0 to the most of them
    last_row: Tensor  # (b, pieces), of the window
    last_owner: Tensor
    last_key: Tensor  # of the window
    last_start: Tensor  # rows of the window that the last part is
    last_stop: Tensor


class Rows(NamedTuple):
    """k or v as rows of memory that are `stride` apart."""

    tensor: Tensor
    total: int
    stride: int
    per_block: int  # rows from one sequence, or one page, to the next

    @classmethod
    def of(cls, x: Tensor) -> Rows | None:
        """None: it is not made of such rows."""
        x = x if x.dim() == 4 else x[None]
        blocks, rows, _, head_dim = x.shape
        outer, stride, _, inner = x.stride()
        if (inner != 1 and head_dim != 1) or stride <= 0 or (blocks > 1 and (outer <= 0 or outer % stride)):
            return None
        per_block = outer // stride if blocks > 1 else rows
        return cls(x, (blocks - 1) * per_block + rows, stride, per_block)

    def windows(self, piece: int, slices: int = 0) -> Tensor:
        """Row n and those after it, for every n: (rows, piece, heads, head_dim), overlapping; or head_dim in slices."""
        heads, head_dim = self.tensor.shape[2:]
        shape, strides = (self.total - piece + 1, piece, heads), (self.stride, self.stride, self.tensor.stride(2))
        if not slices:
            return self.tensor.as_strided((*shape, head_dim), (*strides, 1))
        width = head_dim // slices
        return self.tensor.as_strided((*shape, slices, width), (*strides, width, 1))


class Cut(NamedTuple):
    """Spans in parts, wherever those lie: whole ones, then last ones, (x + b, pieces)."""

    place: Tensor  # of a piece's first key: its page, counted in all of the block table; without pages, its sequence
    offset: Tensor  # of that key in there
    owner: Tensor  # (x,), and as in Parts
    key: Tensor
    first: Tensor
    parts: Tensor
    steps: Tensor
    last_owner: Tensor  # (b,)
    last_key: Tensor  # of the last part
    last_start: Tensor  # 0
    last_length: Tensor
    exists: Tensor | None  # (x + b, 1): that part has keys; None: all have


def sizes(longest: int, page: int | None) -> tuple[int, int]:
    """Keys of a part, and of a piece. longest: keys of a sequence. page: rows of it, where keys lie in pages."""
    part = LONG_PART if longest >= LONG else PART
    if page is None:
        return part, part
    piece = max(n for n in range(1, min(page, part) + 1) if page % n == 0)
    return part // piece * piece, piece


def cut(spans: Spans, first: int, part: int, piece: int, page: int | None, pages: int) -> Cut:
    """first: the number of the first of these sequences. pages: in a row of the block table."""
    start, stop = torch.tensor(spans, device="cpu").T
    parts = ((stop - start + part - 1) // part - 1).clamp(min=0)
    before = parts.cumsum(0) - parts
    everyone = torch.arange(len(spans), device="cpu")
    some_whole = bool((parts > 0).any())
    # There is always a part, though no sequence may have it, so that no table is empty.
    owner = everyone.repeat_interleave(parts) if some_whole else everyone[:1]
    key = start[owner] + (torch.arange(len(owner), device="cpu") - before[owner]) * part
    last = start + parts * part
    length = (stop - last).clamp(min=0)
    pieces = torch.arange(0, part, piece, device="cpu")
    # Beyond the last key, the last piece that has one, once more.
    last_pieces = torch.minimum(pieces, (length - 1).clamp(min=0)[:, None] // piece * piece)
    whole_pieces = pieces if some_whole else torch.zeros_like(pieces)
    number = torch.cat([key[:, None] + whole_pieces, last[:, None] + last_pieces])
    place = (first + torch.cat([owner, everyone])[:, None]).expand(number.shape)
    exists = torch.cat([torch.full_like(owner, some_whole, dtype=torch.bool), length > 0])
    return Cut(
        place * pages + number // page if page else place.contiguous(),
        number % page if page else number,
        first + owner,
        key,
        before,
        parts,
        torch.arange(max(1, int(parts.max())), device="cpu"),
        first + everyone,
        last,
        torch.zeros_like(last),
        length,
        None if bool(exists.all()) else exists[:, None],
    )


def located(packed: Packed | None, k: Rows, piece: int, cut: Cut) -> Parts:
    """Where parts of dense (None), packed or paged keys lie."""
    if packed is None:
        return _placed(cut, cut.place * k.per_block + cut.offset, k.total - piece)
    if packed.block_table is None:
        return _placed(cut, packed.cu_seqlens_k.take(cut.place) + cut.offset, k.total - piece)
    return _placed(cut, torch.add(cut.offset, packed.block_table.take(cut.place), alpha=k.per_block))


def _placed(cut: Cut, row: Tensor, last_window: int | None = None) -> Parts:
    """row: where pieces begin that have keys. last_window: of memory, where pieces are not parts of its blocks."""
    if cut.exists is not None:
        row = row.where(cut.exists, 0)
    row, last_row = row.split([len(cut.key), len(cut.last_key)])
    last_key, start, stop = cut.last_key, cut.last_start, cut.last_length
    if last_window is not None:
        window = last_row.clamp(max=last_window)
        start = (last_row - window)[:, 0]
        last_row, last_key, stop = window, last_key - start, stop + start
    counted = cut.first, cut.parts, cut.steps
    return Parts(row, cut.owner, cut.key, *counted, last_row, cut.last_owner, last_key, start, stop)
