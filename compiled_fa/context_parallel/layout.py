"""Which rows of a sequence each rank has, and which of them see which.

With n ranks, contiguous: rank r has the r-th of n chunks. Balanced: chunks r and 2 n - 1 - r of 2 n, one behind the
other, so that under causal, where late rows see more keys than early ones, all ranks have as much to do. For 4 ranks:

    rank         0    1    2    3
    contiguous   0    1    2    3    of 4
    balanced     0 7  1 6  2 5  3 4  of 8
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import validation

Group = dist.ProcessGroup | DeviceMesh | None


class Block(NamedTuple):
    """Rows of this rank's queries and of a rank's keys; causal: the last of these queries stands at the last key."""

    queries: slice
    keys: slice
    causal: bool


ALL = slice(None)


def process_group(group: Any) -> dist.ProcessGroup:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            validation.refuse("group", "a process group or a mesh of one dimension", f"a mesh of shape {group.shape}")
        return group.get_group()
    group = dist.group.WORLD if group is None else group
    if group is None:
        validation.refuse("group", "given, or torch.distributed initialised", None)
    if not isinstance(group, dist.ProcessGroup):
        validation.refuse("group", "a process group, a DeviceMesh or None", type(group).__name__, TypeError)
    return group


def chunks_of(rank: int, ranks: int, balanced: bool) -> tuple[int, ...]:
    """The numbers of a rank's chunks, in the order in which it has them."""
    return (rank, 2 * ranks - 1 - rank) if balanced else (rank,)


def blocks(rank: int, source: int, length: int, causal: bool, balanced: bool) -> list[Block]:
    """Of a rank's queries on the keys of rank `source`: those in which a query sees a key. length: rows of a rank."""
    if not causal:
        return [Block(ALL, ALL, False)]
    if source == rank:  # chunks lie in order, whichever they are
        return [Block(ALL, ALL, True)]
    if not balanced:
        return [Block(ALL, ALL, False)] if source < rank else []
    # Of an earlier rank the early chunk is before, and the late one behind, all of ours; of a later rank both are
    # between our two.
    half = length // 2
    return [Block(ALL, slice(half), False)] if source < rank else [Block(slice(half, None), ALL, False)]


def positions(seqlen: int, group: Group = None, *, balanced: bool = True) -> Tensor:
    """Where this rank's rows stand in a sequence of seqlen rows: int64 (seqlen / ranks,) on the CPU, for rotary.

    Raises: ValueError, if seqlen is not a multiple of the ranks, or of twice as many where balanced.
    """
    ours = process_group(group)
    ranks = dist.get_world_size(ours)
    size = chunk_size("seqlen", seqlen, ranks, balanced)
    numbers = chunks_of(dist.get_rank(ours), ranks, balanced)
    return torch.cat([torch.arange(number * size, (number + 1) * size) for number in numbers])


def chunk_size(argument: str, seqlen: int, ranks: int, balanced: bool) -> int:
    chunks = ranks * (2 if balanced else 1)
    if seqlen % chunks:
        what = f"2 · {ranks} (ranks; two chunks each)" if balanced else f"{ranks} (ranks)"
        validation.refuse(argument, f"of a number of rows that is a multiple of {what}", seqlen)
    return seqlen // chunks


def shard(x: Tensor, group: Group = None, *, dim: int = 1, balanced: bool = True) -> Tensor:
    """This rank's rows of x, which every rank has whole; differentiable, each rank's gradient being its rows' alone.

    Args:
        x: any tensor, like tokens (B, S) or activations (B, S, ...); dim: its sequence. With dim=0 packed rows.
        group: the ranks that share the sequence.
        balanced: two chunks a rank. All calls on what is sharded say the same.

    Raises: ValueError, if the rows do not divide: pad them, behind the last.
    """
    validation.tensor_given("x", x)
    ours = process_group(group)
    ranks = dist.get_world_size(ours)
    size = chunk_size("x", x.shape[dim], ranks, balanced)
    return torch.cat([x.narrow(dim, n * size, size) for n in chunks_of(dist.get_rank(ours), ranks, balanced)], dim)


@torch.no_grad()
def unshard(x: Tensor, group: Group = None, *, dim: int = 1, balanced: bool = True) -> Tensor:
    """The whole tensor of which each rank has the rows x, on every rank, in order. Not differentiable.

    Raises: ValueError, if balanced and this rank's rows are not two chunks.
    """
    validation.tensor_given("x", x)
    ours = process_group(group)
    if balanced:
        chunk_size("x", x.shape[dim], 1, balanced)
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(ours))]
    dist.all_gather(found, x.contiguous(), group=ours)
    return in_order(found, dim, balanced)


def in_order(of_ranks: list[Tensor], dim: int, balanced: bool) -> Tensor:
    """The rows of all ranks, as they follow one another in the sequence."""
    if not balanced:
        return torch.cat(of_ranks, dim)
    halves = [x.chunk(2, dim) for x in of_ranks]
    return torch.cat([early for early, _ in halves] + [late for _, late in reversed(halves)], dim)


def by_rank(x: Tensor, ranks: int, dim: int, balanced: bool) -> Tensor:
    """The inverse of in_order: the rows of all ranks, one rank behind the other."""
    if not balanced:
        return x
    chunks = x.chunk(2 * ranks, dim)
    return torch.cat([chunks[n] for rank in range(ranks) for n in chunks_of(rank, ranks, balanced)], dim)
