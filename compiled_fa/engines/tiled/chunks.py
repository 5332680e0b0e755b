"""Which sequences and heads run together, and which of their tiles exist.

A chunk is some sequences times some key heads whose tiles have one shape, so that a tile of all of them is one batched
product. Dense sequences are alike. Packed ones are grouped by length, rounded up by at most a quarter, so that
thousands of short sequences make a handful of chunks; a long sequence makes its own, and is never padded to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...scores import Window
from .tiles import LARGEST, TileSizes


@dataclass(frozen=True)
class Tile:
    """Keys start to stop (exclusive) against some queries; masked: the score program's mask has something to hide."""

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
    lengths_q: tuple[int, int]  # of the shortest and the longest sequence
    lengths_k: tuple[int, int]
    offsets: tuple[int, int]  # least and greatest seqlen_k - seqlen_q
    window: Window
    tiles: TileSizes

    @property
    def pairs(self) -> int:
        return len(self.sequences) * int(self.key_heads.stop - self.key_heads.start)

    @property
    def query_heads(self) -> slice:
        """Query head h reads key head h // heads_per_key."""
        return slice(self.key_heads.start * self.heads_per_key, self.key_heads.stop * self.heads_per_key)

    def query_spans(self) -> list[tuple[int, int]]:
        return spans(0, self.lengths_q[1], self.tiles.queries)

    def key_spans(self) -> list[tuple[int, int]]:
        return spans(0, self.lengths_k[1], self.tiles.keys)

    def _needed_and_full(self, q_start: int, q_stop: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Keys that any, and keys that every query q_start..q_stop of every sequence sees."""
        first, last = q_start + self.offsets[0], q_stop - 1 + self.offsets[1]
        needed = self.window.keys_seen_by_any(first, last, self.lengths_k[1])
        full = self.window.keys_seen_by_all(first, last, self.lengths_k[0])
        return needed, full if q_stop <= self.lengths_q[0] else (0, 0)

    def key_tiles(self, q_start: int, q_stop: int) -> list[Tile]:
        """The tiles that queries q_start..q_stop need, cut where the mask begins: only its rims pay for it."""
        (start, stop), (full_start, full_stop) = self._needed_and_full(q_start, q_stop)
        size = self.tiles.keys
        if stop - start <= size:
            return [Tile(start, stop, not full_start <= start <= stop <= full_stop)] if start < stop else []
        full_start, full_stop = max(start, full_start), min(stop, full_stop)
        if full_start >= full_stop:
            return [Tile(*span, True) for span in spans(start, stop, size)]
        parts = ((start, full_start, True), (full_start, full_stop, False), (full_stop, stop, True))
        return [Tile(*span, masked) for first, last, masked in parts for span in spans(first, last, size)]

    def tile_at(self, q_start: int, q_stop: int, k_start: int, k_stop: int) -> Tile | None:
        """The tile of these queries and keys, if any of them meet."""
        (start, stop), (full_start, full_stop) = self._needed_and_full(q_start, q_stop)
        if k_start >= stop or k_stop <= start:
            return None
        return Tile(k_start, k_stop, not full_start <= k_start <= k_stop <= full_stop)


def _rounded(length: int) -> int:
    """Lengths that share a group: up to a quarter longer than the shortest; long ones only with their like."""
    if length <= 8 or length > LARGEST:
        return length
    step = max(2, 1 << (length.bit_length() - 3))
    return -(-length // step) * step


def chunks(
    lengths: Sequence[tuple[int, int]],
    nheads_k: int,
    heads_per_key: int,
    window: Window,
    sizes: Callable[[int, int], TileSizes],
) -> Iterator[Chunk]:
    """Chunks that cover every sequence with queries and keys.

    lengths: (seqlen_q, seqlen_k) of every sequence. sizes: tile sizes for given lengths.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for sequence, (seqlen_q, seqlen_k) in enumerate(lengths):
        if seqlen_q and seqlen_k:
            groups[_rounded(seqlen_q), _rounded(seqlen_k)].append(sequence)
    for (seqlen_q, seqlen_k), members in groups.items():
        tiles = sizes(seqlen_q, seqlen_k)
        at_once = max(1, tiles.pairs // nheads_k)
        heads_at_once = min(nheads_k, tiles.pairs)
        for first in range(0, len(members), at_once):
            sequences = members[first : first + at_once]
            q = [lengths[s][0] for s in sequences]
            k = [lengths[s][1] for s in sequences]
            offsets = [long - short for short, long in zip(q, k, strict=True)]
            for head, stop in spans(0, nheads_k, heads_at_once):
                yield Chunk(
                    sequences,
                    slice(head, stop),
                    heads_per_key,
                    (min(q), max(q)),
                    (min(k), max(k)),
                    (min(offsets), max(offsets)),
                    window,
                    tiles,
                )
