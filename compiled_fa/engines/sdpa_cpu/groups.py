"""Packed sequences of one length as a batch.

Short ones are gathered, so that the kernel is called once for all of a length. A sequence alone, and those that lie
side by side, are a view.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...caches import Cache
from ...problem import Packed
from ...tuning import SdpaCpu, current


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


_groups: Cache[object, list[tuple[Group, Group]]] = Cache("packed groups", entries=16)


def groups(packed: Packed) -> list[tuple[Group, Group]]:
    """Queries and keys of all sequences: short ones with those of their lengths, others alone."""
    tuned, sums = current().sdpa_cpu, packed.host_sums
    lengths = list(zip(*packed.host_lengths, strict=True))
    return _groups.get((*map(tuple, sums), tuned), lambda: list(_made(sums, lengths, tuned)))


def _made(
    first_rows: tuple[Sequence[int], Sequence[int]], lengths: Sequence[tuple[int, int]], tuned: SdpaCpu
) -> Iterator[tuple[Group, Group]]:
    first_q, first_k = first_rows
    together: dict[object, list[int]] = defaultdict(list)
    for sequence, pair in enumerate(lengths):
        together[pair if max(pair) < tuned.shared_call_below_tokens else sequence].append(sequence)
    for members in together.values():
        length_q, length_k = lengths[members[0]]
        at_once = max(1, tuned.shared_call_tokens // max(1, length_q, length_k))
        for start in range(0, len(members), at_once):
            some = members[start : start + at_once]
            yield Group([first_q[s] for s in some], length_q), Group([first_k[s] for s in some], length_k)
