"""Tile sizes from bytes: what a tile takes for every score, row and pair of heads, and how many of them fit.

What is counted here is what forward.py and backward.py allocate: change them together. tests/test_large_tiles.py holds
the sum against an allocator's record.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....problem import Direction, Problem
from ....scores import Window
from ....tuning import Tiled
from ..tiles import TileSizes, even
from . import products

LEAST_KEYS = 128  # of a tile that passes over the keys
HASH = 13  # bytes of an element while dropout decides: three int32, and the decision
PAD = 4  # elements; a row of sums is as wide as head_dim and one more, rounded up to so many


@dataclass(frozen=True)
class Bytes:
    """a_score: of a tile. a_row: of a tile's queries, for each head. a_pair: of a pair (sequence, key head) as a whole;
    alone: where its sequence runs by itself, and lies as products take it. a_key: of a tile's keys.
    """

    a_score: int
    a_row: int
    a_key: int
    a_pair: int
    alone: int

    @classmethod
    def of(
        cls,
        direction: Direction,
        problem: Problem,
        seqlen_q: int,
        seqlen_k: int,
        operand: int,
        lies: tuple[bool, bool, bool],
    ) -> Bytes:
        """operand: bytes of an element of a product's operand. lies: do q (and dout), k and v, of one sequence by
        itself, lie as products take them?
        """
        wide, size, g = problem.lse_dtype.itemsize, problem.q.dtype.itemsize, problem.heads_per_key
        head_dim, head_dim_v, packed = problem.q.shape[-1], problem.v.shape[-1], problem.packed is not None
        narrow = operand if operand != wide else 0  # a copy of probabilities for the product
        capped, biased, dropping = problem.softcap > 0.0, problem.alibi_slopes is not None, problem.dropout_p > 0.0
        featured = wide * (capped or biased)  # the score beside the product
        scoring = 2 * wide * (capped or biased) + wide * (capped and biased)
        masked = 3 if packed and problem.window_in_force != Window() else 0  # offsets differ: a mask for each sequence
        product = wide * (problem.q.device.type not in products.IN_PLACE)
        rows = seqlen_q * g
        queries, keys, values, outs = rows * head_dim, seqlen_k * head_dim, seqlen_k * head_dim_v, rows * head_dim_v
        # Gathered, and then converted; places, int64, and an int32 on the way, and where to put results.
        copied, moved = operand + size * (operand != size), size * packed
        held = (32 * rows + 20 * seqlen_k) * packed + 40 * rows * dropping
        copies = (queries, keys, values)
        apart = sum(elements for elements, lying in zip(copies, lies, strict=True) if not lying)
        if direction == "forward":
            a_score = wide + masked + max(product, scoring, featured + narrow + HASH * dropping)
            held += outs * moved + (3 if packed else 2) * wide * rows
            a_row = (2 * padded(head_dim_v) + 8) * wide + (head_dim_v * wide if product else 0)
            return cls(a_score, a_row, 0, held + copied * sum(copies), held + copied * apart)
        probabilities = narrow or wide * dropping
        gradient = 4 * wide * capped
        a_score = 2 * wide + masked
        a_score += max(product, scoring, featured + probabilities + narrow + max(HASH * dropping, gradient + dropping))
        # delta's terms and out, then dq: never at once. Results on their way back.
        held += (
            max(wide * queries * (2 if product else 1), (wide + moved) * outs)
            + 8 * wide * rows
            + moved * (queries + keys + values)
        )
        together, alone = copied * (sum(copies) + outs), copied * (apart + outs * (not lies[0]))
        return cls(a_score, 0, (head_dim + head_dim_v) * wide * (2 if product else 1), held + together, held + alone)


def padded(head_dim_v: int) -> int:
    """Columns of a row of sums: of P·V, and of P."""
    return -(-(head_dim_v + 1) // PAD) * PAD


def choose(
    direction: Direction,
    seqlen_q: int,
    seqlen_k: int,
    sequences: int,
    nheads_k: int,
    heads_per_key: int,
    window: Window,
    nbytes: int,
    costs: Bytes,
    tuned: Tiled,
) -> TileSizes:
    """All that fits side by side; the scores of all keys of so many queries, or (backward) of all queries, as far as
    that leaves rows worth a product. window: in force. nbytes: what all of it may take.
    """
    banded = window != Window()
    # Which of a tile's sides is cut first, and what the other sees of it under a window.
    length, other = (seqlen_q, seqlen_k) if direction == "forward" else (seqlen_k, seqlen_q)
    g = heads_per_key
    longest = min(length, tuned.banded_tile if banded else length)
    seen = other
    if window.left is not None and window.right is not None:
        seen = min(other, int(window.left) + int(window.right) + longest)
    of_length, of_other = (g * costs.a_row, 0) if direction == "forward" else (costs.a_key, g * costs.a_row)
    a_score = g * costs.a_score
    wanted = min(longest, -(-tuned.whole_rows // g) if direction == "forward" else tuned.whole_rows)

    def room(pairs: int) -> int:
        """Bytes for a pair's tile."""
        return nbytes // pairs - (costs.alone if pairs <= nheads_k else costs.a_pair)

    def whole(pairs: int) -> int:
        """Of the side that is cut: how many of them fit with all that they see."""
        return (room(pairs) - of_other * seen) // (of_length + a_score * seen)

    pairs = sequences * nheads_k
    while pairs > 1 and whole(pairs) < wanted:
        pairs = _fewer(pairs, nheads_k)
    if whole(pairs) >= wanted:
        cut = even(length, min(longest, whole(pairs)))
        return TileSizes(cut, other, pairs) if direction == "forward" else TileSizes(other, cut, pairs)
    # Not even a pair's fit: tiles in both directions.
    pairs, cut = sequences * nheads_k, min(longest, max(1, tuned.tile // g) if direction == "forward" else tuned.tile)

    def across() -> int:
        return (room(pairs) - of_length * cut) // (of_other + a_score * cut)

    enough = min(other, LEAST_KEYS)
    while pairs > 1 and across() < enough:
        pairs = _fewer(pairs, nheads_k)
    while cut > wanted and across() < enough:
        cut = max(wanted, cut // 2)
    over = even(other, max(across(), enough))
    return TileSizes(cut, over, pairs) if direction == "forward" else TileSizes(over, cut, pairs)


def _fewer(pairs: int, nheads_k: int) -> int:
    """Half as many sequences, and then heads of one."""
    if pairs > nheads_k:
        return -(-pairs // nheads_k // 2) * nheads_k
    return -(-pairs // 2)
