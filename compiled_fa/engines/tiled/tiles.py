"""Tile sizes, all of them.

A tile is `pairs` (sequence, key head) pairs side by side, `queries` queries of every query head that reads that key
head, and `keys` keys. Its fp32 scores should stay in the cores' L2 caches between the product that writes them, the
step that exponentiates them and the product that reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...problem import Direction

LARGEST = 512  # queries or keys of a tile
LARGEST_BANDED = 256  # the same under a window or causal, whose rims cost half a tile each
SCORES = 512 * 512  # scores of a tile, for each core
CHUNK_BYTES = 64 << 20  # copies of k and v (forward), or of the query side (backward), that a chunk may hold


@dataclass(frozen=True)
class TileSizes:
    queries: int
    keys: int
    pairs: int


def _even(length: int, largest: int) -> int:
    """Tile size at most `largest` that cuts a length into equal parts, so that no tile is nearly empty."""
    parts = -(-length // largest)
    return -(-length // max(parts, 1))


def choose(
    direction: Direction,
    seqlen_q: int,
    seqlen_k: int,
    heads_per_key: int,
    bytes_per_row: int,
    banded: bool,
) -> TileSizes:
    """Tile sizes for sequences of (at most) these lengths.

    heads_per_key: query heads per key head. bytes_per_row: of one row of k and of v together. banded: a window hides
    some keys. Forward cuts its key tiles where the window ends, so only backward wants them smaller for it.
    """
    forward = direction == "forward"
    queries = _even(seqlen_q, max(1, (LARGEST_BANDED if banded else LARGEST) // heads_per_key))
    keys = _even(seqlen_k, LARGEST_BANDED if banded and not forward else LARGEST)
    scores = max(1, heads_per_key * queries * keys)
    copied = seqlen_k if forward else 2 * heads_per_key * seqlen_q  # rows a pair: k and v; or q, dout, dq
    pairs = min(SCORES * torch.get_num_threads() // scores, CHUNK_BYTES // max(1, copied * bytes_per_row))
    return TileSizes(queries, keys, max(1, pairs))
