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
from ...tuning import current


@dataclass(frozen=True)
class TileSizes:
    """multiple: packed sequences run as if their lengths were rounded up to it."""

    queries: int
    keys: int
    batch_heads: int
    multiple: int = 1


def even(length: int, largest: int) -> int:
    """Tile size at most `largest` that cuts a length into equal parts, so that no tile is nearly empty."""
    parts = -(-length // largest)
    return -(-length // max(parts, 1))


def rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def thin(seqlen_q: int, seqlen_k: int, heads_per_key: int) -> bool:
    """Are these a few queries on many keys, whose reading is all that takes time?"""
    tuned = current().tiled
    return seqlen_q * heads_per_key <= tuned.thin_rows and seqlen_k > tuned.tile


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
    tuned = current().tiled
    if direction == "forward" and thin(seqlen_q, seqlen_k, heads_per_key):
        keys = even(seqlen_k, tuned.thin_tile_keys)
        return TileSizes(seqlen_q, keys, nheads_k * max(1, tuned.thin_tile_keys // seqlen_k))
    half, banded = itemsize < 4, window != Window()
    multiple = 1
    if half and lengths > (tuned.bf16_lengths_banded if banded else tuned.bf16_lengths):
        multiple = tuned.bf16_length_multiple
        seqlen_q, seqlen_k = rounded_up(seqlen_q, multiple), rounded_up(seqlen_k, multiple)
    rows, keys = tuned.bf16_tile_queries if half else tuned.tile, tuned.tile
    if banded and direction == "forward":
        rows = tuned.banded_tile // (1 if half or None in window else 2)
    elif banded:
        keys = tuned.banded_tile
    queries, keys = even(seqlen_q, max(1, rows // heads_per_key)), even(seqlen_k, keys)
    # Copies that a pair holds, in rows: k and v; or q and dout, and dq.
    copied = seqlen_k if direction == "forward" else 2 * heads_per_key * seqlen_q
    scores = max(1, heads_per_key * queries * keys * itemsize)
    batch_heads = min(
        tuned.score_bytes_a_core * torch.get_num_threads() // scores,
        tuned.chunk_bytes // max(1, copied * head_dims * itemsize),
    )
    return TileSizes(queries, keys, max(1, batch_heads), multiple)
