"""Attention of packed sequences that lie on several ranks: keys of a few heads at a time are gathered on all of them.

A rank has rows of the packed tensors (layout.py), which begin and end somewhere in a sequence, and reads the keys of
those sequences. The next heads are gathered beside the arithmetic on these, and gradients of the last are summed beside
it.

What a rank receives, of n, in elements of its own k and v: (n - 1) (k + v) forward, and in backward as much again and
(n - 1) (dk + dv), which are fp32 (fp64 for fp64). Memory: heads_at_once heads of k and v of all ranks, those that are
used and the next ones, and in backward their gradients, likewise.

Source: Llama 3 (arXiv 2407.21783, 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import arguments, engines, ops, validation
from ..problem import Options, lse_dtype
from ..registration import not_traced
from .layout import Group, by_rank, chunk_size, chunks_of, in_order, process_group


@dataclass(frozen=True)
class _Chunk:
    """Rows of this rank that follow one another, and the keys of their sequences, of all ranks' in order."""

    rows: slice
    keys: slice
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(frozen=True)
class Packing:
    """Where sequences lie on the ranks of a group: what `pack` finds, once a batch, for all layers."""

    group: dist.ProcessGroup
    causal: bool
    balanced: bool
    rows: int  # of a rank
    chunks: tuple[_Chunk, ...]

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)


def pack(
    cu_seqlens: Tensor,
    group: Group = None,
    *,
    causal: bool = False,
    balanced: bool = True,
    device: torch.device | str | None = None,
) -> Packing:
    """What `varlen_attention` needs to know of packed sequences.

    Args:
        cu_seqlens: int32 (batch + 1,), running sums of the lengths of the whole sequences, from 0 to the rows of all
            ranks. Read by the host.
        group: the ranks that share the rows: a process group, a DeviceMesh of one dimension, None: all.
        causal: a query sees no key after it.
        balanced: rows lie as `shard(..., dim=0)` gives them with the same argument.
        device: of q, k and v; None: cu_seqlens'.

    Raises: ValueError, if cu_seqlens are no running sums, or their last does not divide among the ranks, or among twice
    as many where balanced: pad, as a sequence of its own.
    """
    validation.tensor("cu_seqlens", cu_seqlens, "batch + 1")
    if cu_seqlens.dtype != torch.int32:
        validation.refuse("cu_seqlens", "of dtype int32", cu_seqlens.dtype, TypeError)
    sums: list[int] = cu_seqlens.tolist()
    if len(sums) < 2 or sums[0] != 0 or any(stop < start for start, stop in pairwise(sums)):
        validation.refuse("cu_seqlens", "running sums that begin with 0", sums)
    ours = process_group(group)
    ranks = dist.get_world_size(ours)
    size = chunk_size("cu_seqlens", sums[-1], ranks, balanced)
    numbers = chunks_of(dist.get_rank(ours), ranks, balanced)
    where = cu_seqlens.device if device is None else torch.device(device)
    chunks = tuple(_chunk(at * size, number * size, size, sums, causal, where) for at, number in enumerate(numbers))
    return Packing(ours, causal, balanced, size * len(numbers), chunks)


def _chunk(row: int, first: int, size: int, sums: list[int], causal: bool, device: torch.device) -> _Chunk:
    """row: its first among the rank's; first: among all."""
    stop = first + size
    inside = [(start, end) for start, end in pairwise(sums) if start < min(end, stop) and end > first]
    lengths_q = [min(end, stop) - max(start, first) for start, end in inside]
    ends = [min(end, stop) if causal else end for _, end in inside]  # the last query stands at the last key
    lengths_k = [end - start for (start, _), end in zip(inside, ends, strict=True)]
    keys = slice(inside[0][0], ends[-1]) if inside else slice(0, 0)
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32, device=device)
        for lengths in (lengths_q, lengths_k)
    )
    longest = max(lengths_q, default=0), max(lengths_k, default=0)
    return _Chunk(slice(row, row + size), keys, cu_seqlens_q, cu_seqlens_k, *longest)


@not_traced
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = 0.0,
    heads_at_once: int = 1,
    return_lse: bool = False,
) -> Any:
    """flash_attn_varlen_func on packed sequences that lie on several ranks. Differentiable, through lse too.

    Args:
        q: (T, H, D), the rows of this rank, as `shard(..., dim=0)` gives them.
        k, v: (T, Hk, D) and (T, Hk, Dv), likewise.
        packing: of `pack`.
        softmax_scale, softcap: as in flash_attn_varlen_func.
        heads_at_once: key heads that are gathered at a time, a divisor of Hk: more are fewer messages and more memory.
        return_lse: return (out, softmax_lse), softmax_lse (H, T) over the keys of all ranks.

    Returns: out (T, H, Dv), this rank's rows.

    Raises: as flash_attn_varlen_func; ValueError, if rows are not those of packing.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    if not isinstance(packing, Packing):
        validation.refuse("packing", "what context_parallel.pack gives", type(packing).__name__, TypeError)
    q, k, v = arguments.autocast(q, k, v)
    options = arguments.options(0.0, softmax_scale, packing.causal, (-1, -1), softcap, None)
    validation.qkv(q, k, v, ops.PACKED)
    for argument, x in (("q", q), ("k", k)):
        if x.shape[0] != packing.rows:
            validation.refuse(argument, f"of packing's rows, {packing.rows}", x.shape[0])
    if heads_at_once < 1 or k.shape[1] % heads_at_once:
        validation.refuse("heads_at_once", f"a divisor of the key heads, {k.shape[1]}", heads_at_once)
    for chunk in packing.chunks:
        ops.check_packed(q[chunk.rows], k, v, *_packing_of(chunk), *options)
    call = _Call(packing, options, engines.requested(), heads_at_once)
    out, lse = _VarlenAttention.apply(q, k, v, call)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


def _packing_of(chunk: _Chunk) -> tuple[Any, ...]:
    """The op's arguments about where sequences lie."""
    return chunk.cu_seqlens_q, chunk.cu_seqlens_k, chunk.max_seqlen_q, chunk.max_seqlen_k, None


@dataclass(frozen=True)
class _Call:
    packing: Packing
    options: Options
    engine: str
    heads_at_once: int

    def arguments(self, chunk: _Chunk) -> tuple[Any, ...]:
        return (*_packing_of(chunk), *self.options, self.engine)

    def groups_of_heads(self, q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
        """Key heads that are gathered at a time, and the query heads that read them."""
        count, each = self.heads_at_once, q.shape[1] // k.shape[1]
        return [(slice(n, n + count), slice(n * each, (n + count) * each)) for n in range(0, k.shape[1], count)]

    def gathered(self, k: Tensor, v: Tensor, groups: list[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """k and v of all ranks, in order, of one group of heads after another; the next are on their way meanwhile."""
        pending = self._gather(k, v, groups[0])
        for n in range(len(groups)):
            packed, work = pending
            if n + 1 < len(groups):
                pending = self._gather(k, v, groups[n + 1])
            work.wait()
            whole = in_order(list(packed.chunk(self.packing.ranks)), 0, self.packing.balanced)
            yield whole[..., : k.shape[-1]], whole[..., k.shape[-1] :]

    def _gather(self, k: Tensor, v: Tensor, heads: slice) -> tuple[Tensor, Any]:
        own = torch.cat([k[:, heads], v[:, heads]], dim=-1)  # (T, heads, D + Dv)
        packed = own.new_empty((self.packing.ranks * own.shape[0], *own.shape[1:]))
        return packed, dist.all_gather_into_tensor(packed, own, group=self.packing.group, async_op=True)

    def summed(self, gradients: Tensor) -> tuple[Tensor, Any]:
        """This rank's rows of the sum over all ranks of gradients of all rows, in order: begun, not done."""
        packed = by_rank(gradients, self.packing.ranks, 0, self.packing.balanced)
        own = packed.new_empty((self.packing.rows, *packed.shape[1:]))
        return own, dist.reduce_scatter_tensor(own, packed, group=self.packing.group, async_op=True)


class _VarlenAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call = call
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None
        dout = torch.zeros_like(out) if dout is None else dout
        return (*_backward(dout, dlse, out, lse, q, k, v, ctx.call), None)


def _forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype(q.dtype))
    groups = call.groups_of_heads(q, k)
    all_keys = call.gathered(k, v, [heads for heads, _ in groups])
    for (_, heads_q), (k_all, v_all) in zip(groups, all_keys, strict=True):
        for chunk in call.packing.chunks:
            tensors = q[chunk.rows, heads_q], k_all[chunk.keys], v_all[chunk.keys]
            found = ops.varlen_attention(*tensors, *call.arguments(chunk))
            out[chunk.rows, heads_q], lse[heads_q, chunk.rows] = found
    return out, lse


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, call: _Call
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    groups = call.groups_of_heads(q, k)
    all_keys = call.gathered(k, v, [heads for heads, _ in groups])
    pending: tuple[slice, Tensor, Any] | None = None
    for (heads, heads_q), (k_all, v_all) in zip(groups, all_keys, strict=True):
        dk_all, dv_all = (torch.zeros_like(x, dtype=lse.dtype) for x in (k_all, v_all))
        for chunk in call.packing.chunks:
            rows, keys = chunk.rows, chunk.keys
            of_lse = None if dlse is None else dlse[heads_q, rows], out[rows, heads_q], lse[heads_q, rows]
            tensors = q[rows, heads_q], k_all[keys], v_all[keys]
            found = ops.varlen_attention_backward(dout[rows, heads_q], *of_lse, *tensors, *call.arguments(chunk))
            dq[rows, heads_q] = found[0]
            dk_all[keys] += found[1]
            dv_all[keys] += found[2]
        _write(pending, dk, dv)
        pending = (heads, *call.summed(torch.cat([dk_all, dv_all], dim=-1)))
    _write(pending, dk, dv)
    return dq, dk, dv


def _write(summed: tuple[slice, Tensor, Any] | None, dk: Tensor, dv: Tensor) -> None:
    """A group of heads, its gradients side by side, and what is to be waited for."""
    if summed is not None:
        heads, own, work = summed
        work.wait()
        dk[:, heads], dv[:, heads] = own.split([dk.shape[-1], dv.shape[-1]], dim=-1)
