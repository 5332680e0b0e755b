"""Where sequences lie in rows that are packed into one: behind one another, in slots of one size, or with gaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .. import validation


@dataclass(frozen=True)
class SeqLenInfo:
    """seqstart_py: where each sequence begins, and where the last one's place ends; seqlen_py: their lengths.

    seqstart is seqstart_py as int32, max_seqlen and min_seqlen the longest and the shortest length: what code reads
    off xformers' masks.
    """

    seqstart_py: list[int]
    seqlen_py: list[int]
    seqstart: Tensor

    @property
    def max_seqlen(self) -> int:
        return max(self.seqlen_py)

    @property
    def min_seqlen(self) -> int:
        return min(self.seqlen_py)

    @property
    def total(self) -> int:
        """Rows, those between the sequences included."""
        return self.seqstart_py[-1]

    def intervals(self) -> list[tuple[int, int]]:
        """(start, end) of each sequence."""
        return [(start, start + length) for start, length in zip(self.seqstart_py, self.seqlen_py, strict=False)]

    def to(self, device: torch.device) -> SeqLenInfo:
        return SeqLenInfo(self.seqstart_py, self.seqlen_py, self.seqstart.to(device))

    def split(self, argument: str, x: Tensor, batch_sizes: Sequence[int] | None) -> list[Tensor]:
        """x (1, total, ...) -> a view of each sequence, (1, length, ...); with batch_sizes of so many sequences of one
        length together, (batch_size, length, ...)."""
        if x.shape[:2] != (1, self.total):
            validation.refuse(argument, f"of shape (1, {self.total}, ...)", tuple(x.shape))
        batches = [1] * len(self.seqlen_py) if batch_sizes is None else list(batch_sizes)
        if sum(batches) != len(self.seqlen_py):
            validation.refuse("_batch_sizes", f"numbers whose sum is {len(self.seqlen_py)} sequences", batches)
        found, at = [], 0
        for batch in batches:
            lengths = self.seqlen_py[at : at + batch]
            if len(set(lengths)) > 1:
                validation.refuse("_batch_sizes", "of sequences of one length each", f"{batch} of lengths {lengths}")
            start = self.seqstart_py[at]
            rows = x[0, start : start + sum(lengths)]
            found.append(rows.unflatten(0, (batch, lengths[0])) if batch else rows[None, :0])
            at += batch
        return found


def _lengths(argument: str, seqlens: Sequence[int]) -> list[int]:
    found = [int(validation.length(f"{argument}[{at}]", seqlen)) for at, seqlen in enumerate(seqlens)]
    if not found or min(found) < 0:
        validation.refuse(argument, "lengths of one sequence or more, 0 at least", found)
    return found


def _info(starts: list[int], lengths: list[int], device: torch.device | str | None) -> SeqLenInfo:
    return SeqLenInfo(starts, lengths, torch.tensor(starts, dtype=torch.int32, device=device))


def packed(argument: str, seqlens: Sequence[int], device: torch.device | str | None) -> SeqLenInfo:
    """Sequences that lie behind one another."""
    lengths = _lengths(argument, seqlens)
    return _info([0, *accumulate(lengths)], lengths, device)


def padded(argument: str, seqlens: Sequence[int], padding: int, device: torch.device | str | None) -> SeqLenInfo:
    """Sequences at the beginning of slots of `padding` rows each."""
    lengths = _lengths(argument, seqlens)
    if max(lengths) > padding:
        validation.refuse(argument, f"of at most kv_padding, {padding}", max(lengths))
    return _info([padding * at for at in range(len(lengths) + 1)], lengths, device)


def gappy(
    argument: str, starts: Sequence[int], seqlens: Sequence[int], device: torch.device | str | None
) -> SeqLenInfo:
    """Sequences that begin at starts; the last of starts is where the rows end."""
    lengths, starts = _lengths(argument, seqlens), [int(start) for start in starts]
    if len(starts) != len(lengths) + 1:
        validation.refuse("kv_seqstarts", f"{len(lengths) + 1} numbers, one more than {argument}", len(starts))
    ends = [start + length for start, length in zip(starts, lengths, strict=False)]
    if starts[0] < 0 or any(end > start for end, start in zip(ends, starts[1:], strict=True)):
        validation.refuse("kv_seqstarts", f"ascending, with room for lengths {lengths}", starts)
    return _info(starts, lengths, device)
