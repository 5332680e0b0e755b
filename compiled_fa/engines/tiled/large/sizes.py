"""Tile sizes from bytes: what a tile takes for every score, row and pair of heads, and how many of them fit.

What is counted here is what forward.py and backward.py allocate: change them together. tests/test_large_tiles.py holds
the sum against an allocator's record.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....problem import Direction, Problem
from ....scores import Window
from ....tuning import Tiled
from ..tiles import TileSizes, even
from . import products

LEAST_KEYS = 128  # of a tile that passes over the keys
MOST_PAIRS = 65535  # of a batched product: matrices that CUDA's grids can count
HASH = 13  # bytes of an element while dropout decides: three int32, and the decision
PAD = 4  # elements; a row of sums is as wide as head_dim and one more, rounded up to so many


@dataclass(frozen=True)
class Bytes:
    """What a call takes: for a score of a tile, for a row of it forward (each head's of a query), for a key of it
    backward, and for a pair (sequence, key head) as a whole; alone: for one whose sequence runs by itself, and may lie
    as products take it.
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
        """operand: bytes of an element of a product's operand. lies: do q, k and v, of one sequence by itself, lie as
        products take them?
        """
        wide, size = problem.lse_dtype.itemsize, problem.q.dtype.itemsize
        head_dim, head_dim_v = problem.q.shape[-1], problem.v.shape[-1]
        rows, packed, dropping = seqlen_q * problem.heads_per_key, problem.packed is not None, problem.dropout_p > 0.0
        queries, keys, values, outs = rows * head_dim, seqlen_k * head_dim, seqlen_k * head_dim_v, rows * head_dim_v
        copies = (queries, keys, values)
        apart = sum(elements for elements, lying in zip(copies, lies, strict=True) if not lying)
        copied = operand + size * (operand != size)  # gathered, and then converted
        moved = size * packed  # a result on its way back
        made = wide * (problem.q.device.type not in products.IN_PLACE)  # a product, or a result, before it is copied
        # Places, int64, an int32 on their way, and where to put results; hashes of rows.
        held = (32 * rows + 20 * seqlen_k) * packed + 40 * rows * dropping
        a_score = _a_score(direction, problem, wide, operand, made)
        if direction == "forward":
            held += outs * moved + (2 + packed) * wide * rows
            a_row = (2 * padded(head_dim_v) + 8) * wide + head_dim_v * made
            return cls(a_score, a_row, 0, held + copied * sum(copies), held + copied * apart)
        # dq stays in scratch while the next chunk's delta is made, of terms and out.
        held += wide * queries + max(made * queries, (wide + moved) * outs)
        held += 8 * wide * rows + moved * sum(copies)
        together, alone = copied * (sum(copies) + outs), copied * (apart + outs)  # dout lies as a caller has it
        return cls(a_score, 0, (head_dim + head_dim_v) * (wide + made), held + together, held + alone)


def _a_score(direction: Direction, problem: Problem, wide: int, operand: int, made: int) -> int:
    """Bytes of the tensors like a tile that are alive at once, for each of its scores."""
    capped, biased, dropping = problem.softcap > 0.0, problem.alibi_slopes is not None, problem.dropout_p > 0.0
    narrow = operand if operand != wide else 0  # probabilities, or their gradient, as operands
    score = wide * (capped or biased)  # beside the product
    making_it = 2 * score + wide * (capped and biased)
    if biased and problem.packed is not None:
        making_it += 4  # distances, int32, which are each sequence's own
    hash_and_mask = HASH * dropping
    masks = bias = 0
    if problem.bias is not None:
        masks = problem.bias.dtype == torch.bool  # its opposite
        bias = wide * problem.bias_gradient  # summed over what was broadcast
    # Packed sequences whose offsets differ have a mask each.
    masks += 3 if problem.packed is not None and problem.window_in_force != Window() else 0
    if direction == "forward":
        return wide + masks + max(made, making_it, score + narrow + hash_and_mask)
    probabilities = narrow or wide * dropping
    of_softcap = 4 * wide * capped + dropping
    return (
        2 * wide + masks + max(made, making_it, score + probabilities + narrow + max(hash_and_mask, of_softcap, bias))
    )


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
    # Which of a tile's sides is cut first, and how much of the other sees it under a window, where offsets are alike.
    length, other = (seqlen_q, seqlen_k) if direction == "forward" else (seqlen_k, seqlen_q)
    g = heads_per_key
    longest = min(length, tuned.banded_tile if banded else length)
    seen = other
    if window.left is not None and window.right is not None:
        seen = min(other, int(window.left) + int(window.right) + longest)
    of_length = g * costs.a_row if direction == "forward" else costs.a_key
    a_score = g * costs.a_score
    wanted = min(longest, -(-tuned.whole_rows // g) if direction == "forward" else tuned.whole_rows)

    def room(pairs: int) -> int:
        """Bytes for a pair's tile."""
        return nbytes // pairs - (costs.alone if pairs <= nheads_k else costs.a_pair)

    def whole(pairs: int) -> int:
        """Of the side that is cut: how many of them fit with all that they see."""
        return room(pairs) // (of_length + a_score * seen)

    most = sequences * nheads_k
    while most > MOST_PAIRS:
        most = _fewer(most, nheads_k)
    thin = direction == "forward" and seqlen_q * g <= tuned.thin_rows
    if thin and nheads_k * (costs.a_pair - costs.alone) > tuned.chunk_bytes:
        # To read the keys is what takes time: a copy, which sequences side by side need, would take it three times.
        most = min(most, nheads_k)
    pairs = most
    while pairs > 1 and whole(pairs) < wanted:
        pairs = _fewer(pairs, nheads_k)
    if whole(pairs) >= wanted:
        cut = even(length, min(longest, whole(pairs)))
        return TileSizes(cut, seen, pairs) if direction == "forward" else TileSizes(seen, cut, pairs)
    # Not even a pair's fit: tiles in both directions.
    pairs, cut = most, min(longest, max(1, tuned.tile // g) if direction == "forward" else tuned.tile)

    def across() -> int:
        return (room(pairs) - of_length * cut) // (a_score * cut)

    enough = min(seen, LEAST_KEYS)
    while pairs > 1 and across() < enough:
        pairs = _fewer(pairs, nheads_k)
    while cut > wanted and across() < enough:
        cut = max(wanted, cut // 2)
    over = even(seen, max(across(), enough))
    return TileSizes(cut, over, pairs) if direction == "forward" else TileSizes(over, cut, pairs)


def _fewer(pairs: int, nheads_k: int) -> int:
    """Half as many sequences, and then heads of one."""
    if pairs > nheads_k:
        return -(-pairs // nheads_k // 2) * nheads_k
    return -(-pairs // 2)
