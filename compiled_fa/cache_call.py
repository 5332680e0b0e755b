"""One call on a KV cache: its tensors, where its rows lie, how they are written, and the problems that engines solve.

A cache is pages, and a row of the batch has some of them, in order: a table (B, pages) says which. A cache that is not
paged is a page a row, as long as the cache, and cache_batch_idx is its table. Keys leftpad to cache_seqlens are those
of a row; new ones are written behind them.

B batch, Sq queries, Sn new keys, S rows of a page, H and Hk query and key heads, D and Dv head_dims of q, k and of v.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .caches import Cache, TensorCache, stream_of
from .problem import Cached, Options, Problem
from .rotation import rotated

PIECES_FROM = 8  # new keys of a row, from which on each piece of a page is copied by itself on a CPU

_of_tensors = TensorCache[Tensor]("of cache lengths", 64, 4 << 20, lambda x: x.nbytes)
_of_numbers: Cache[object, Tensor] = Cache("of cache sizes", entries=64)


def equal_lengths(length: int, batch: int, device: torch.device) -> Tensor:
    """int32 (batch,), for all layers the same tensor where such are kept."""
    make = functools.partial(torch.full, (batch,), length, dtype=torch.int32, device=device)
    if torch.compiler.is_compiling() or not is_kept(device) or (stream := stream_of(device)) is None:
        return make()
    return _of_numbers.get(("length", length, batch, device, stream), make)


def is_kept(device: torch.device) -> bool:
    """On a CPU to make it anew costs as little; and there NumPy may write to a tensor without a word."""
    return device.type != "cpu"


Lengths = tuple[Tensor, Tensor, int, int]  # cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
Piece = tuple[int, slice, int, slice]  # new keys that lie side by side: whose, which, their page, and where in it
Places = list[Piece] | tuple[Tensor, Tensor]  # or page and row of every new key


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the rows of a call lie: the same for calls of the same shapes and lengths, whose signature it is, itself.

    lengths: of rows in pages. dense: of others, which are an ordinary dense problem, the first one's page, and each
    one's first key in its page and number of keys. fixed: the pages are the same, too; then places: of new keys.
    fresh: no other keys than the new ones are seen, which are those of an ordinary dense problem.
    """

    lengths: Lengths | None = None
    dense: tuple[int, int, int] = (0, 0, 0)
    fixed: bool = False
    places: Places | None = None
    fresh: bool = False


class _Arguments(NamedTuple):
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None = None
    v: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    cache_seqlens: Tensor | int | None = None
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None
    shares_tables: bool = False


class CacheCall(_Arguments):
    """Arguments of the op that are tensors, in its order, and whether it shares tables.

    q: (B, Sq, H, D). k_cache: (pages, S, Hk, D). v_cache: (pages, S, Hk, Dv). k: (B, Sn, Hk, D). v: (B, Sn, Hk, Dv).
    rotary_cos, rotary_sin: (positions, rotary_dim / 2). cache_seqlens, cache_batch_idx, cache_leftpad: int32 (B,), or
    cache_seqlens one number for all, of calls that go past the op. block_table: int32 (B, pages of a row).
    shares_tables: cache_ops.py.
    """

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def seqlen_new(self) -> int:
        return 0 if self.k is None else self.k.shape[1]

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[1]

    @property
    def capacity(self) -> int:
        """Keys that a row has room for."""
        return self.page_size * self.columns

    @property
    def columns(self) -> int:
        """Pages of a row, those that it may have."""
        return 1 if self.block_table is None else self.block_table.shape[1]

    @functools.cached_property
    def table(self) -> Tensor:
        """int32 (B, pages of a row)."""
        if self.block_table is not None:
            return self.block_table
        if (rows := self.cache_batch_idx) is not None:
            return self._kept("rows of the cache", (rows,), None, lambda: rows[:, None])
        count, device = self.batch, self.q.device
        return self._kept(
            "rows in order", (), count, lambda: torch.arange(count, dtype=torch.int32, device=device)[:, None]
        )

    @functools.cached_property
    def before(self) -> Tensor:
        """int32 (B,): keys of each row, with what its leftpad leaves out, before new ones."""
        if isinstance(self.cache_seqlens, int):
            return equal_lengths(self.cache_seqlens, self.batch, self.q.device)
        if self.cache_seqlens is not None:
            return self.cache_seqlens
        count, device = self.capacity, self.q.device
        size = (self.batch,)
        return self._kept(
            "capacity", (), (size, count), lambda: torch.full(size, count, dtype=torch.int32, device=device)
        )

    # What the host reads: on a CPU, where it costs nothing; elsewhere it waits for the device.

    @functools.cached_property
    def host_before(self) -> list[int]:
        seqlens = self.capacity if self.cache_seqlens is None else self.cache_seqlens
        return [seqlens] * self.batch if isinstance(seqlens, int) else seqlens.tolist()

    @functools.cached_property
    def host_leftpad(self) -> list[int]:
        return [0] * self.batch if self.cache_leftpad is None else self.cache_leftpad.tolist()

    @functools.cached_property
    def host_first_page(self) -> list[int]:
        """The first page of each row."""
        if self.block_table is None and self.cache_batch_idx is None:
            return list(range(self.batch))
        pages: list[int] = self.table[:, 0].tolist()
        return pages

    # Rotary embedding

    def rotated(self, interleaved: bool, consecutive: bool) -> CacheCall:
        """With q and k rotated. k's positions are those in which it will lie; q's begin there, too, and are consecutive
        or, where every query sees the same keys, one and the same."""
        cos, sin = self.rotary_cos, self.rotary_sin
        if cos is None or sin is None or self.k is None:
            return self
        found = []
        for x, step in ((self.q, int(consecutive)), (self.k, 1)):
            place = self.before[:, None] + step * torch.arange(x.shape[1], device=x.device)
            found.append(rotated(x, cos[place, None], sin[place, None], interleaved))
        return self._replace(q=found[0], k=found[1], rotary_cos=None, rotary_sin=None)

    # Writing

    @functools.cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """Page and row of every new key, int64 (B, Sn)."""

        def make() -> Tensor:
            place = self.before[:, None] + torch.arange(self.seqlen_new, device=self.q.device)
            if self.columns == 1:
                return torch.stack([self.table.long().expand(-1, self.seqlen_new), place])
            return torch.stack([self.table.gather(1, place // self.page_size).long(), place % self.page_size])

        of = self.before, self.table
        with torch.inference_mode(False):  # the next call may want them, out of it
            page, row = self._kept("slots", of, (self.seqlen_new, self.page_size), make).unbind(0)
        return page, row

    def append(self, places: Places | None = None) -> None:
        """Write k and v behind what the cache has. places: `places`, where they are known."""
        if self.k is None or self.v is None or not self.batch * self.seqlen_new:
            return
        pairs = (self.k_cache, self.k), (self.v_cache, self.v)
        found = self.places() if places is None else places
        if isinstance(found, list):
            for row, new, page, at in found:
                for cache, values in pairs:
                    cache[page, at].copy_(values[row, new])
        else:
            for cache, values in pairs:
                cache.index_put_(found, values)

    def places(self) -> Places:
        """Where new keys go."""
        if not self.seqlen_new:
            return []
        by_pieces = self.batch == 1 or self.seqlen_new >= PIECES_FROM
        return list(self._pieces()) if by_pieces and self.q.device.type == "cpu" else self.slots

    def _pieces(self) -> Iterator[Piece]:
        for row, before in enumerate(self.host_before):
            done, place = 0, before
            while done < self.seqlen_new:
                column, first = divmod(place, self.page_size)
                count = min(self.page_size - first, self.seqlen_new - done)
                page = int(self.table[row, column]) if self.columns > 1 else self.host_first_page[row]
                yield row, slice(done, done + count), page, slice(first, first + count)
                done, place = done + count, place + count

    # Problems

    def problem(self, options: Options, num_splits: int = 0, layout: Layout | None = None) -> Problem:
        """Attention of all rows, on the cache as it is after `append`. layout: the call's, where it is known."""
        if self.q.device.type != "cpu":
            return self.unread_problem(options, num_splits)
        found = self.layout() if layout is None else layout
        if found.lengths is not None:
            return self._in_pages(found.lengths, options, num_splits, layout)
        k, v = self.keys_and_values(found)
        return Problem.of(self.q, k, v, None, *options, signature=layout)

    def keys_and_values(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """k and v of the problem: the new ones, the whole cache, or those of a dense one."""
        if layout.fresh and self.k is not None and self.v is not None:
            return self.k, self.v
        if layout.lengths is not None:
            return self.k_cache, self.v_cache
        page, first, length = layout.dense
        k, v = self.k_cache, self.v_cache
        if self.batch != k.shape[0]:
            k, v = (x.narrow(0, page, self.batch) for x in (k, v))
        if length != k.shape[1]:
            k, v = (x.narrow(1, first, length) for x in (k, v))
        return k, v

    def layout(self) -> Layout:
        """The host reads lengths, and pages of rows that have one each."""
        if self._is_fresh:
            fixed = self.columns == 1
            return Layout(fixed=fixed, places=self.places() if fixed else None, fresh=True)
        if (dense := self._as_dense()) is not None:
            return Layout(dense=dense, fixed=True, places=self.places())
        lengths, seqlen_q = self.host_lengths, self.q.shape[1]
        cu_seqlens_q = torch.arange(self.batch + 1, dtype=torch.int32, device="cpu") * seqlen_q
        cu_seqlens_k = torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device="cpu")
        lengths_of_rows = cu_seqlens_q, cu_seqlens_k, seqlen_q, max(lengths, default=0)
        fixed = self.columns == 1
        return Layout(lengths_of_rows, fixed=fixed, places=self.places() if fixed else None)

    def unread_problem(self, options: Options, num_splits: int = 0) -> Problem:
        """The same, of which the host reads nothing."""
        leftpad = () if self.cache_leftpad is None else (self.cache_leftpad,)

        def make() -> Tensor:
            lengths = self.before + self.seqlen_new
            sums = (lengths - leftpad[0] if leftpad else lengths).cumsum(0, dtype=torch.int32)
            return torch.cat([sums.new_zeros(1), sums])

        batch, seqlen_q = self.q.shape[:2]
        cu_seqlens_k = self._kept("sums of lengths", (self.before, *leftpad), self.seqlen_new, make)
        cu_seqlens_q = self._kept(
            "sums of queries",
            (),
            (batch, seqlen_q),
            lambda: torch.arange(batch + 1, dtype=torch.int32, device=self.q.device) * seqlen_q,
        )
        return self._in_pages((cu_seqlens_q, cu_seqlens_k, seqlen_q, self.capacity), options, num_splits)

    def _in_pages(self, lengths: Lengths, options: Options, num_splits: int, layout: Layout | None = None) -> Problem:
        fixed = layout is not None and layout.fixed
        cached = Cached(*lengths, self.table, self.cache_leftpad, num_splits, fixed)
        return Problem.of(self.q.flatten(0, 1), self.k_cache, self.v_cache, cached, *options, signature=layout)

    def _kept(self, what: str, of: tuple[Tensor, ...], key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """A small tensor made `of` others, or of the numbers in the key: off the CPU it is a launch or more, and all
        layers of a model ask for the same."""
        device = self.q.device
        if not is_kept(device) or (of and not self.shares_tables) or (stream := stream_of(device)) is None:
            return make()
        whole = what, key, device, stream
        return _of_tensors.get(of, whole, make) if of else _of_numbers.get(whole, make)

    @functools.cached_property
    def host_lengths(self) -> list[int]:
        new = self.seqlen_new
        return [seqlen + new - pad for seqlen, pad in zip(self.host_before, self.host_leftpad, strict=True)]

    @property
    def host_values(self) -> Hashable:
        """All that the layout depends on, but for shapes and which tensors are given."""
        before, leftpad = (
            tuple(x.tolist()) if isinstance(x, Tensor) else x for x in (self.cache_seqlens, self.cache_leftpad)
        )
        if self.block_table is None:
            pages = () if self.cache_batch_idx is None else tuple(self.cache_batch_idx.tolist())
        else:
            pages = tuple(self.host_first_page) if self.columns == 1 else ()
        return before, leftpad, pages

    @functools.cached_property
    def _is_fresh(self) -> bool:
        """Are new keys all there are? A prompt needs no look at the cache then, wherever its pages lie."""
        return bool(self.batch and self.seqlen_new) and not any(self.host_before)  # nor is any left out then

    def _as_dense(self) -> tuple[int, int, int] | None:
        """As Layout has it, which more engines serve: rows of one length, that lie at even distances."""
        if not self.batch or self.columns != 1:
            return None
        (length, *lengths), (pad, *pads), (page, *pages) = self.host_lengths, self.host_leftpad, self.host_first_page
        if not length:  # its page may be any number
            return None
        consecutive = all(other == page + n for n, other in enumerate(pages, 1))
        if not consecutive or any(other != length for other in lengths) or any(other != pad for other in pads):
            return None
        return page, pad, length

    def row(self, number: int) -> CacheCall:
        """One row of the batch as a call of its own, after `append`, and after `rotated`.

        Its table is as wide as it needs; a batch's is as wide as its longest row needs. Of a row whose keys are all
        new, these are the cache, as they are in a batch of one.
        """
        some = slice(number, number + 1)
        if self.k is not None and self.v is not None and self.seqlen_new and not self.host_before[number]:
            return CacheCall(self.q[some], self.k[some], self.v[some])

        def of(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[some]

        table = self.block_table
        if table is not None:
            pages = -(-(self.host_before[number] + self.seqlen_new) // self.page_size)
            table = table[some, : max(1, pages)]
        index = self.table[some, 0] if table is None else None
        lengths = self.before[some] + self.seqlen_new
        nothing = None, None, None, None
        return CacheCall(
            self.q[some], self.k_cache, self.v_cache, *nothing, lengths, index, of(self.cache_leftpad), table
        )
