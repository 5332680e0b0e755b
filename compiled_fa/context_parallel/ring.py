"""Ring attention: keys and values go from rank to rank while each computes with those it has.

Forward merges out and lse over the ranks' keys. Backward sends k and v around once more; dk and dv travel with them, a
step behind, in the dtype of lse, and arrive at their owner. Each recomputes probabilities from the merged lse, in our
public backward op. A rank's step on the keys it has runs beside the transfer of the next.

What a rank sends, of n, in elements of its own k and v: (n - 1) (k + v) forward, and in backward as much again and
n (dk + dv), which are fp32 (fp64 for fp64).

Source: Ring Attention (arXiv 2310.01889), FlashAttention-2 (arXiv 2307.08691).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import arguments, engines, ops, validation
from ..problem import Options, lse_dtype
from ..registration import not_traced
from .layout import Block, Group, blocks, process_group
from .merging import merge


@not_traced
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Group = None,
    *,
    causal: bool = False,
    balanced: bool = True,
    softmax_scale: float | None = None,
    softcap: float | None = 0.0,
    return_lse: bool = False,
) -> Any:
    """flash_attn_func on a sequence that lies on several ranks. Differentiable, through lse too.

    Args:
        q: (B, Sq, H, D), the rows of this rank, as `shard` gives them.
        k, v: (B, Sk, Hk, D) and (B, Sk, Hk, Dv), likewise; with causal, as many rows as q. All ranks have as many.
        group: the ranks that share the sequence: a process group, a DeviceMesh of one dimension, None: all.
        causal: a query sees no key after it in the whole sequence.
        balanced: rows lie as `shard` gives them with the same argument. Without causal it does not matter.
        softmax_scale, softcap: as in flash_attn_func.
        return_lse: return (out, softmax_lse), softmax_lse (B, H, Sq) over the keys of all ranks.

    Returns: out (B, Sq, H, Dv), this rank's rows.

    Raises: as flash_attn_func; ValueError, if causal and q and k have different lengths, or balanced and an odd one.
    """
    arguments.check_tensors(q=q, k=k, v=v)
    q, k, v = arguments.autocast(q, k, v)
    options = arguments.options(0.0, softmax_scale, causal, (-1, -1), softcap, None)
    ops.check_dense(q, k, v, *options)
    if options.causal and k.shape[1] != q.shape[1]:
        validation.refuse("k", f"of q's length with causal, {q.shape[1]}", k.shape[1])
    if options.causal and balanced and q.shape[1] % 2:
        validation.refuse("q", "of an even length, two chunks, with causal and balanced", q.shape[1])
    ring = _Ring(process_group(group), options, balanced, engines.requested())
    out, lse = _Attention.apply(q, k, v, ring)  # type: ignore[no-untyped-call]
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _Ring:
    """The ranks, and what all of them compute."""

    group: dist.ProcessGroup
    options: Options
    balanced: bool
    engine: str

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def blocks(self, source: int, length: int) -> list[Block]:
        return blocks(self.rank, source, length, self.options.causal, self.balanced)

    def options_of(self, block: Block) -> tuple[Any, ...]:
        return (*self.options.changed(causal=block.causal), self.engine)

    def sent(self, packed: Tensor) -> _Transfer:
        """Send to the next rank, and receive as much from the one before: begun, not done."""
        received = torch.empty_like(packed)
        after, before = ((self.rank + step) % self.size for step in (1, -1))
        peers = [dist.get_global_rank(self.group, peer) for peer in (after, before)]
        messages = [
            dist.P2POp(dist.isend, packed, peers[0], self.group),
            dist.P2POp(dist.irecv, received, peers[1], self.group),
        ]
        return _Transfer(packed, received, dist.batch_isend_irecv(messages))

    def around(self, k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Each rank's number, k and v, beginning with this one's; the next are on their way meanwhile."""
        packed = _packed(k, v)
        for step in range(self.size):
            transfer = self.sent(packed) if step + 1 < self.size else None
            yield ((self.rank - step) % self.size, *_unpacked(packed, k, v))
            if transfer is not None:
                packed = transfer.received_whole()


@dataclass(frozen=True)
class _Transfer:
    """sent: kept until it has left."""

    sent: Tensor
    received: Tensor
    works: Sequence[Any]

    def received_whole(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received


def _packed(*tensors: Tensor) -> Tensor:
    """In one message."""
    return torch.cat([x.flatten() for x in tensors])


def _unpacked(packed: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of the shapes of k and v."""
    first, second = packed.split([k.numel(), v.numel()])
    return first.view(k.shape), second.view(v.shape)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, ring)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring = ring
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None, None
        dout = torch.zeros_like(out) if dout is None else dout
        return (*_backward(dout, dlse, out, lse, q, k, v, ctx.ring), None)


def _forward(q: Tensor, k: Tensor, v: Tensor, ring: _Ring) -> tuple[Tensor, Tensor]:
    keys = ring.around(k, v)
    own, *of_own = next(keys)
    (block,) = ring.blocks(own, q.shape[1])  # with all of its queries
    out, lse = ops.attention(q, *of_own, *ring.options_of(block))
    out = out.to(lse_dtype(q.dtype))
    for source, k_block, v_block in keys:
        for block in ring.blocks(source, q.shape[1]):
            of_keys = k_block[:, block.keys], v_block[:, block.keys]
            part, part_lse = ops.attention(q[:, block.queries], *of_keys, *ring.options_of(block))
            merge(out[:, block.queries], lse[:, :, block.queries], part, part_lse)
    return out.to(q.dtype), lse


def _backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, ring: _Ring
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = lse_dtype(q.dtype)
    dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
    sums = torch.zeros(k.numel() + v.numel(), dtype=dtype, device=k.device)  # dk and dv of the keys that are here
    on_its_way: _Transfer | None = None
    for source, k_block, v_block in ring.around(k, v):
        found = []
        for block in ring.blocks(source, q.shape[1]):
            rows, keys = block.queries, block.keys
            of_rows = dout[:, rows], None if dlse is None else dlse[:, :, rows], out[:, rows], lse[:, :, rows]
            tensors = q[:, rows], k_block[:, keys], v_block[:, keys]
            dq_part, *of_keys = ops.attention_backward(*of_rows, *tensors, *ring.options_of(block))
            dq[:, rows] += dq_part
            found.append((keys, of_keys))
        if on_its_way is not None:
            sums = on_its_way.received_whole()
        for keys, of_keys in found:
            for total, gradient in zip(_unpacked(sums, k, v), of_keys, strict=True):
                total[:, keys] += gradient
        if ring.size > 1:
            on_its_way = ring.sent(sums)
    if on_its_way is not None:
        sums = on_its_way.received_whole()
    dk, dv = _unpacked(sums, k, v)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
