"""Tile sizes, all of them.

A tile is `batch_heads` pairs of (sequence, key head) side by side, `queries` queries of every query head that reads
that key head, and `keys` keys. Its fp32 scores should stay in the cores' L2 caches between the product that writes
them, the step that exponentiates them and the product that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...problem import Direction
from ...scores import Window

LARGEST = 512  # queries or keys of a tile
BANDED = 256  # queries (forward) or keys (backward) under a window or causal, whose rims cost half a tile each
THIN = 16  # rows up to which reading the keys is what takes time, as in decoding
THIN_KEYS = 4096  # keys of a tile, of all its sequences, then
# A product in bf16 is machine code of its own for every shape, and oneDNN keeps no more than 1024 of them. Sequences of
# so many lengths that they would need more run rounded up.
HALF_MULTIPLE = 64
HALF_LENGTHS, HALF_LENGTHS_BANDED = 84, 42  # lengths up to which they need not; banded as above
SCORES = 1 << 20  # bytes of scores of a tile, for each core
CHUNK_BYTES = 64 << 20  # copies of k and v (forward), or of the query side (backward), that a chunk may hold


@dataclass(frozen=True)
class TileSizes:
    """multiple: packed sequences run as if their lengths were rounded up to it."""

    queries: int
    keys: int
    batch_heads: int
    multiple: int = 1


def _even(length: int, largest: int) -> int:
    """Tile size at most `largest` that cuts a length into equal parts, so that no tile is nearly empty."""
    parts = -(-length // largest)
    return -(-length // max(parts, 1))


def rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def thin(seqlen_q: int, seqlen_k: int, heads_per_key: int) -> bool:
    """Are these a few queries on many keys, whose reading is all that takes time?"""
    return seqlen_q * heads_per_key <= THIN and seqlen_k > LARGEST


def choose(
    direction: Direction,
    seqlen_q: int,
    seqlen_k: int,
    nheads_k: int,
    heads_per_key: int,
    head_dims: int,
    itemsize: int,
    window: Window,
    lengths: int = 1,
) -> TileSizes:
    """Tile sizes for sequences of (at most) these lengths.

    nheads_k, heads_per_key: key heads, and query heads for each. head_dims: q's and v's together. itemsize: bytes of a
    product's operand.
    window: keys that queries see. Tiles are cut where it ends in the direction of the inner loop; only in the other one
    do they want to be smaller for it.
    lengths: pairs of lengths that differ among the call's packed sequences.
    """
    if direction == "forward" and thin(seqlen_q, seqlen_k, heads_per_key):
        return TileSizes(seqlen_q, _even(seqlen_k, THIN_KEYS), nheads_k * max(1, THIN_KEYS // seqlen_k))
    half = itemsize < 4
    multiple = 1
    if half and lengths > (HALF_LENGTHS if window == Window() else HALF_LENGTHS_BANDED):
        multiple = HALF_MULTIPLE
        seqlen_q, seqlen_k = rounded_up(seqlen_q, multiple), rounded_up(seqlen_k, multiple)
    rows, keys = LARGEST * (2 if half else 1), LARGEST
    if window != Window() and direction == "forward":
        rows = BANDED // (1 if half or None in window else 2)
    elif window != Window():
        keys = BANDED
    queries, keys = _even(seqlen_q, max(1, rows // heads_per_key)), _even(seqlen_k, keys)
    # Copies that a pair holds, in rows: k and v; or q and dout, and dq.
    copied = seqlen_k if direction == "forward" else 2 * heads_per_key * seqlen_q
    scores = max(1, heads_per_key * queries * keys * itemsize)
    batch_heads = min(SCORES * torch.get_num_threads() // scores, CHUNK_BYTES // max(1, copied * head_dims * itemsize))
    return TileSizes(queries, keys, max(1, batch_heads), multiple)
