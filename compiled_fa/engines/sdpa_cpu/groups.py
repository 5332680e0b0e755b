"""The calls of the kernel that packed sequences take.

A call takes as long as some products do, whatever it computes. So short sequences share one: those of one length as a
batch, gathered where they do not lie side by side; or, where there are few of each, those that lie side by side as one
sequence, in which a bias hides from each what is not its own. A sequence alone, and those that lie side by side, are a
view.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ...caches import Cache
from ...problem import Packed
from ...scores import Window
from ...scores.masks import query_position
from ...tuning import SdpaCpu, current

Lengths = Sequence[tuple[int, int]]  # of queries and keys


class Group:
    """Sequences of one length in a packed tensor (T, ...), as (sequences, length, ...)."""

    def __init__(self, first: Sequence[int], length: int) -> None:
        self._shape = len(first), length
        self._rows: slice | Tensor = slice(first[0], first[0] + length * len(first))
        if any(start != first[0] + number * length for number, start in enumerate(first)):
            self._rows = (torch.tensor(first)[:, None] + torch.arange(length)).flatten()

    def take(self, packed: Tensor) -> Tensor:
        rows = packed[self._rows] if isinstance(self._rows, slice) else packed.index_select(0, self._rows)
        return rows.view(*self._shape, *packed.shape[1:])

    def put(self, packed: Tensor, batch: Tensor) -> None:
        if isinstance(self._rows, slice):
            packed[self._rows] = batch.flatten(0, 1)
        else:
            packed.index_copy_(0, self._rows, batch.flatten(0, 1))


class Shared(NamedTuple):
    """A call of the kernel. bias: of sequences that run as one, fp32 (1, 1, Sq, Sk), -inf where a key is hidden, which
    says all there is to say of masks; else None."""

    queries: Group
    keys: Group
    bias: Tensor | None = None


def _nbytes(calls: list[Shared]) -> int:
    return sum(call.bias.nbytes for call in calls if call.bias is not None)


_calls: Cache[object, list[Shared]] = Cache("packed groups", 16, 4 << 20, _nbytes)


def calls(packed: Packed, window: Window, width: int, apart: bool = False) -> list[Shared]:
    """Of all sequences of a packed call. width: heads * head_dim of q, the products of a score. apart: none as one with
    others."""
    tuned, sums = current().sdpa_cpu, packed.host_sums
    products = 0 if apart else tuned.call_products
    lengths = list(zip(*packed.host_lengths, strict=True))
    limits = products, tuned.call_tokens, tuned.shared_call_below_tokens, tuned.shared_call_tokens
    key = *map(tuple, sums), window, width, limits
    return _calls.get(key, lambda: _made(sums, lengths, window, width, products, tuned))


def _made(
    first_rows: tuple[Sequence[int], Sequence[int]],
    lengths: Lengths,
    window: Window,
    width: int,
    products: int,
    tuned: SdpaCpu,
) -> list[Shared]:
    """As is cheaper: by their lengths, or one after another.

    products: as many as take as long as a call.
    """
    alike = list(_alike(lengths, tuned))
    neighbours = list(_neighbours(lengths, products // width, tuned.call_tokens))
    hidden = sum(_hidden(lengths, run) for run in neighbours) * width
    if len(neighbours) * products + hidden >= len(alike) * products:
        return [_as_batch(first_rows, lengths, members) for members in alike]
    return [
        _as_one(first_rows, lengths, run, window) if len(run) > 1 else _as_batch(first_rows, lengths, run)
        for run in neighbours
    ]


def _alike(lengths: Lengths, tuned: SdpaCpu) -> Iterator[list[int]]:
    """Sequences: short ones with those of their lengths, others alone."""
    together: dict[object, list[int]] = defaultdict(list)
    for sequence, pair in enumerate(lengths):
        together[pair if max(pair) < tuned.shared_call_below_tokens else sequence].append(sequence)
    for members in together.values():
        at_once = max(1, tuned.shared_call_tokens // max(1, *lengths[members[0]]))
        yield from (members[start : start + at_once] for start in range(0, len(members), at_once))


def _neighbours(lengths: Lengths, scores: int, tokens: int) -> Iterator[range]:
    """Sequences: one after another, as long as one more has fewer scores with the others, which are nobody's, than take
    as long as a call, and all together have no more tokens."""
    first = total_q = total_k = 0
    for sequence, (seqlen_q, seqlen_k) in enumerate(lengths):
        hidden = total_q * seqlen_k + seqlen_q * total_k
        longest = max(total_q + seqlen_q, total_k + seqlen_k)
        if sequence > first and (hidden >= scores or longest > tokens):
            yield range(first, sequence)
            first, total_q, total_k = sequence, 0, 0
        total_q, total_k = total_q + seqlen_q, total_k + seqlen_k
    if first < len(lengths):
        yield range(first, len(lengths))


def _hidden(lengths: Lengths, run: range) -> int:
    """Scores of sequences as one that are nobody's."""
    some = lengths[run.start : run.stop]
    return sum(q for q, _ in some) * sum(k for _, k in some) - sum(q * k for q, k in some)


def _as_batch(first_rows: tuple[Sequence[int], Sequence[int]], lengths: Lengths, members: Sequence[int]) -> Shared:
    (first_q, first_k), (length_q, length_k) = first_rows, lengths[members[0]]
    return Shared(Group([first_q[s] for s in members], length_q), Group([first_k[s] for s in members], length_k))


def _as_one(first_rows: tuple[Sequence[int], Sequence[int]], lengths: Lengths, run: range, window: Window) -> Shared:
    (first_q, first_k), (stop_q, stop_k) = ([sums[at] for sums in first_rows] for at in (run.start, run.stop))
    some = torch.tensor(lengths[run.start : run.stop])
    sequence_q, sequence_k = (torch.repeat_interleave(some[:, side]) for side in (0, 1))
    idx_q, idx_k = (
        torch.cat([torch.arange(stop - start) for start, stop in pairwise(sums[run.start : run.stop + 1])])
        for sums in first_rows
    )
    position = query_position(idx_q, *some[sequence_q].unbind(-1))
    seen = (sequence_q[:, None] == sequence_k) & window.contains(position[:, None], idx_k.expand(len(idx_q), -1))
    bias = torch.zeros(seen.shape).masked_fill_(~seen, -inf)[None, None]
    return Shared(Group([first_q], stop_q - first_q), Group([first_k], stop_k - first_k), bias)
