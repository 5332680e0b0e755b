"""Which sequences and heads run together, and which of their tiles exist.

A chunk is some sequences times some key heads whose tiles have one shape, so that a tile of all of them is one batched
product. Dense sequences are alike. Packed ones are grouped by length: by the very length where there are many of each,
so that nothing is padded; else by lengths rounded up by at most a quarter, so that thousands of short sequences make a
handful of chunks. A long sequence makes its own, and is never padded to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ...scores import Window
from ...tuning import current
from .tiles import TileSizes, rounded_up

Span = tuple[int, int]  # start and stop (exclusive); empty where start >= stop
Lengths = Sequence[tuple[int, int]]  # (seqlen_q, seqlen_k) of every sequence
Groups = dict[tuple[int, int], list[int]]  # sequences that run together, by a length that holds them all


class Tile(NamedTuple):
    """Keys start to stop (exclusive) against some queries, or queries against some keys.

    masked: the score program's mask has something to hide there.
    """

    start: int
    stop: int
    masked: bool


def spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """start..stop cut into intervals of at most `size`."""
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


@dataclass(frozen=True)
class Chunk:
    sequences: Sequence[int]
    key_heads: slice
    heads_per_key: int
    lengths_q: tuple[int, int]  # of the shortest and the longest sequence, that one rounded up to tiles.multiple
    lengths_k: tuple[int, int]
    offsets: tuple[int, int]  # least and greatest seqlen_k - seqlen_q
    window: Window
    tiles: TileSizes

    @property
    def nheads_k(self) -> int:
        return int(self.key_heads.stop - self.key_heads.start)

    @property
    def batch_heads(self) -> int:
        return len(self.sequences) * self.nheads_k

    @property
    def query_heads(self) -> slice:
        """Query head h reads key head h // heads_per_key."""
        return slice(self.key_heads.start * self.heads_per_key, self.key_heads.stop * self.heads_per_key)

    def query_spans(self) -> list[tuple[int, int]]:
        return spans(0, self.lengths_q[1], self.tiles.queries)

    def key_spans(self) -> list[tuple[int, int]]:
        return spans(0, self.lengths_k[1], self.tiles.keys)

    def keys_seen(self, q_start: int, q_stop: int) -> tuple[Span, Span]:
        """The keys that some of queries q_start..q_stop see, and those that, lengths aside, all of them see."""
        first, last = q_start + self.offsets[0], q_stop - 1 + self.offsets[1]
        needed = self.window.keys_seen_by_any(first, last, self.lengths_k[1])
        return needed, self.window.keys_seen_by_all(first, last, self.lengths_k[1])

    def queries_that_see(self, k_start: int, k_stop: int) -> tuple[Span, Span]:
        """The queries that see some of keys k_start..k_stop, and those that, lengths aside, see all of them."""
        least, greatest = self.offsets  # of a query's position from its number
        limits = least, self.lengths_q[1] + greatest
        start, stop = self.window.positions_that_see_any(k_start, k_stop - 1, *limits)
        needed = max(start - greatest, 0), min(stop - least, self.lengths_q[1])
        start, stop = self.window.positions_that_see_all(k_start, k_stop - 1, *limits)
        return needed, (max(start - least, 0), min(stop - greatest, self.lengths_q[1]))

    def key_tiles(self, q_start: int, q_stop: int) -> list[Tile]:
        """The keys that queries q_start..q_stop need, in tiles."""
        needed, full = self.keys_seen(q_start, q_stop)
        ragged = q_stop > self.lengths_q[0]
        tiles = _tiles(needed, full, self.tiles.keys)
        return [tile._replace(masked=tile.masked or ragged or tile.stop > self.lengths_k[0]) for tile in tiles]

    def query_tiles(self, k_start: int, k_stop: int) -> list[Tile]:
        """The queries that need keys k_start..k_stop, in tiles."""
        needed, full = self.queries_that_see(k_start, k_stop)
        ragged = k_stop > self.lengths_k[0]
        tiles = _tiles(needed, full, self.tiles.queries)
        return [tile._replace(masked=tile.masked or ragged or tile.stop > self.lengths_q[0]) for tile in tiles]


def _tiles(needed: tuple[int, int], full: tuple[int, int], size: int) -> list[Tile]:
    """The needed interval in tiles, cut where the mask begins and ends: only its rims pay for it."""
    start, stop = needed
    full_start, full_stop = max(start, full[0]), min(stop, full[1])
    if full_start >= full_stop or stop - start <= min(size, current().tiled.uncut):
        return [Tile(*span, (full_start, full_stop) != needed) for span in spans(start, stop, size)]
    parts = ((start, full_start, True), (full_start, full_stop, False), (full_stop, stop, True))
    return [Tile(*span, masked) for first, last, masked in parts for span in spans(first, last, size)]


def _rounded(length: int) -> int:
    """Lengths that share a group: up to a quarter longer than the shortest; long ones only with their like."""
    if length <= 8 or length > current().tiled.grouped_tokens:
        return length
    return rounded_up(length, max(2, 1 << (length.bit_length() - 3)))


def groups(lengths: Lengths) -> Groups:
    """Sequences that run together: those of one length where there are many of each, for then nothing is padded, and
    nothing hidden.
    """
    exact: dict[tuple[int, int], list[int]] = defaultdict(list)
    for sequence, (seqlen_q, seqlen_k) in enumerate(lengths):
        if seqlen_q and seqlen_k:
            exact[seqlen_q, seqlen_k].append(sequence)
    if sum(map(len, exact.values())) >= current().tiled.exact_group_sequences * len(exact):
        return exact
    rounded: dict[tuple[int, int], list[int]] = defaultdict(list)
    for (seqlen_q, seqlen_k), sequences in exact.items():
        rounded[_rounded(seqlen_q), _rounded(seqlen_k)] += sequences
    return rounded


def chunks(
    lengths: Lengths,
    nheads_k: int,
    heads_per_key: int,
    window: Callable[[Sequence[int], slice], Window],
    sizes: Callable[[int, int, int], TileSizes],
    groups: Callable[[Lengths], Groups] = groups,
) -> Iterator[Chunk]:
    """Chunks that cover every sequence with queries and keys.

    window: of some sequences and query heads, outside of which nothing need be computed. sizes: tile sizes for so many
    queries and keys, and sequences in their group.
    """
    for (seqlen_q, seqlen_k), members in groups(lengths).items():
        tiles = sizes(seqlen_q, seqlen_k, len(members))
        at_once = max(1, tiles.batch_heads // nheads_k)
        heads_at_once = min(nheads_k, tiles.batch_heads)
        for first in range(0, len(members), at_once):
            sequences = members[first : first + at_once]
            q = [lengths[s][0] for s in sequences]
            k = [lengths[s][1] for s in sequences]
            offsets = [long - short for short, long in zip(q, k, strict=True)]
            for head, stop in spans(0, nheads_k, heads_at_once):
                heads = slice(head * heads_per_key, stop * heads_per_key)
                yield Chunk(
                    sequences,
                    slice(head, stop),
                    heads_per_key,
                    (min(q), rounded_up(max(q), tiles.multiple)),
                    (min(k), rounded_up(max(k), tiles.multiple)),
                    (min(offsets), max(offsets)),
                    window(sequences, heads),
                    tiles,
                )
