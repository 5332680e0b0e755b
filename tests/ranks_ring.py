"""What ranks.py has ranks find out about context_parallel: all four together, and two and two. One rank's results."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import check
from ranks_sharding import mesh, results
from support import cumulative
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

from compiled_fa import context_parallel, flash_attn_func, flash_attn_varlen_func
from compiled_fa.testing.budget import budget, error

OPS = torch.ops.compiled_fa
LAYOUTS: list[dict[str, Any]] = [
    {"causal": causal, "balanced": balanced} for causal in (False, True) for balanced in (False, True)
]


@functools.cache
def groups() -> tuple[Any, ...]:
    """All ranks, as a mesh and by default, and two of them, as a mesh and as a group."""
    return init_device_mesh("cpu", (4,)), None, mesh()["tp"], mesh()["dp"].get_group()


def qkv(nheads: int = 4, nheads_k: int = 2, batch: int = 2, length: int = 16) -> list[Tensor]:
    shapes = (batch, length, nheads, 8), (batch, length, nheads_k, 8), (batch, length, nheads_k, 4)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def of_both(out: Tensor, lse: Tensor) -> Tensor:
    """What depends on each, so that gradients go through each."""
    return out * torch.sin(lse).mT[..., None]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, **options: Any) -> Tensor:
    return of_both(*OPS.attention(q, k, v, causal=causal, **options))


def attend_in_parts(group: Any, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return of_both(*context_parallel.attention(q, k, v, group, return_lse=True, **options))


def equal(found: Sequence[Tensor], expected: Sequence[Tensor], **layout: Any) -> None:
    for mine, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, context_parallel.shard(whole, **layout), rtol=1e-11, atol=1e-11)


@check
def a_ring_gives_what_one_rank_gives() -> None:
    inputs = qkv()
    for options in LAYOUTS:
        expected = results(functools.partial(attend, causal=options["causal"]), inputs)
        for group in groups():
            layout = {"group": group, "balanced": options["balanced"]}
            parts = [context_parallel.shard(x, **layout) for x in inputs]
            equal(results(functools.partial(attend_in_parts, group, **options), parts), expected, **layout)


@check
def a_ring_of_one() -> None:
    alone, *_ = dist.new_subgroups(1)
    found = results(functools.partial(attend_in_parts, alone, causal=True), inputs := qkv())
    torch.testing.assert_close(found, results(functools.partial(attend, causal=True), inputs))


@check
def options_views_and_a_gradient_of_out_alone() -> None:
    """Rows of other strides; one key head; softcap; another scale."""
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(4, 1)]
    scores: dict[str, Any] = {"softmax_scale": 0.5, "softcap": 2.0}
    expected = results(lambda q, k, v: flash_attn_func(q, k, v, causal=True, **scores), inputs)
    parts = [context_parallel.shard(x).transpose(0, 1).contiguous().transpose(0, 1) for x in inputs]
    equal(results(lambda q, k, v: context_parallel.attention(q, k, v, causal=True, **scores), parts), expected)
    q, k, v = parts
    with torch.inference_mode():
        out = context_parallel.attention(q, k, v, causal=True, **scores)
    torch.testing.assert_close(out, context_parallel.shard(expected[0].detach()))
    k.requires_grad_()
    lse = context_parallel.attention(q, k, v, return_lse=True)[1]
    assert torch.autograd.grad(lse.sum(), k)[0].shape == k.shape


@check
def queries_of_another_length_than_keys() -> None:
    q, k, v = qkv()[0], *qkv(length=24)[1:]
    expected = results(flash_attn_func, [q, k, v])
    parts = [context_parallel.shard(x) for x in (q, k, v)]
    equal(results(context_parallel.attention, parts), expected)


@check
def precision_is_one_ranks() -> None:
    """In the error budget of one rank's attention: merging is in fp32."""
    exact = qkv(length=32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = [x.to(dtype) for x in exact]
        reference = results(functools.partial(flash_attn_func, causal=True), [x.double() for x in inputs])
        naive = results(naive_causal, inputs, torch.cos(reference[0].detach()).to(dtype))
        dout = context_parallel.shard(torch.cos(reference[0].detach()).to(dtype))
        parts = [context_parallel.shard(x) for x in inputs]
        found = results(functools.partial(context_parallel.attention, causal=True), parts, dout)
        for mine, theirs, right in zip(found, naive, reference, strict=True):
            assert mine.dtype == dtype
            within(context_parallel.unshard(mine), theirs.detach(), right.detach())


def naive_causal(q: Tensor, k: Tensor, v: Tensor) -> Any:
    q, k, v = (x.transpose(1, 2).repeat_interleave(q.shape[2] // x.shape[2], dim=1) for x in (q, k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def within(found: Tensor, naive: Tensor, exact: Tensor) -> None:
    assert error(found, exact) <= budget(naive, exact, magnitude=float(exact.abs().max()))


# What is sent


class Sent:
    """Bytes that this rank sends to others, by collective."""

    def __init__(self) -> None:
        self.bytes = 0
        self.messages, self.gather, self.scatter = (
            dist.batch_isend_irecv,
            dist.all_gather_into_tensor,
            dist.reduce_scatter_tensor,
        )

    def batch_isend_irecv(self, messages: Any) -> Any:
        self.bytes += sum(message.tensor.nbytes for message in messages if message.op is dist.isend)
        return self.messages(messages)

    def all_gather_into_tensor(self, whole: Tensor, own: Tensor, **options: Any) -> Any:
        self.bytes += whole.nbytes - own.nbytes
        return self.gather(whole, own, **options)

    def reduce_scatter_tensor(self, own: Tensor, whole: Tensor, **options: Any) -> Any:
        self.bytes += whole.nbytes - own.nbytes
        return self.scatter(own, whole, **options)


def sent_both_ways(function: Callable[[], Tensor]) -> tuple[int, int]:
    """In forward and in backward."""
    counter = Sent()
    names = "batch_isend_irecv", "all_gather_into_tensor", "reduce_scatter_tensor"
    with mock.patch.multiple(dist, **{name: getattr(counter, name) for name in names}):
        out = function()
        forward = counter.bytes
        out.sum().backward()
    return forward, counter.bytes - forward


@check
def volume_is_as_stated() -> None:
    for group in groups():
        for dtype, bytes_of_sums in ((torch.float64, 8), (torch.bfloat16, 4)):
            q, k, v = (context_parallel.shard(x.to(dtype), group).requires_grad_() for x in qkv())
            n = 16 // q.shape[1]  # ranks of the group
            ring = functools.partial(context_parallel.attention, q, k, v, group, causal=True)
            forward, backward = sent_both_ways(ring)
            assert forward == (n - 1) * (k.nbytes + v.nbytes)
            assert backward == forward + n * (k.numel() + v.numel()) * bytes_of_sums

            packing = context_parallel.pack(cumulative([9, 23]), group, causal=True)
            q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v))
            gathered, scattered = sent_both_ways(functools.partial(context_parallel.varlen_attention, q, k, v, packing))
            assert gathered == forward
            assert scattered == gathered + (n - 1) * (k.numel() + v.numel()) * bytes_of_sums


@check
def balanced_ranks_have_as_much_to_do() -> None:
    for balanced in (True, False):
        q, k, v = (context_parallel.shard(x, balanced=balanced) for x in qkv())
        with FlopCounterMode(display=False) as counter:
            context_parallel.attention(q, k, v, causal=True, balanced=balanced)
        work = torch.tensor([counter.get_total_flops()])
        all_work = context_parallel.unshard(work, dim=0, balanced=False).tolist()
        assert (len(set(all_work)) == 1) == balanced


# Packed sequences


def attend_packed(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], causal: bool) -> Any:
    sums, longest = cumulative(lengths), max(lengths)
    out, lse = OPS.varlen_attention(q, k, v, sums, sums, longest, longest, causal=causal)
    return out * torch.sin(lse).mT[..., None]


def attend_packed_in_parts(q: Tensor, k: Tensor, v: Tensor, packing: Any, heads_at_once: int) -> Any:
    out, lse = context_parallel.varlen_attention(q, k, v, packing, heads_at_once=heads_at_once, return_lse=True)
    return out * torch.sin(lse).mT[..., None]


def packings() -> Iterator[tuple[list[int], Any, dict[str, Any], int]]:
    for group in groups()[:3:2]:
        for number, lengths in enumerate(([32], [0, 5, 0, 9, 2, 15, 1, 0], [3, 29])):
            for options in LAYOUTS:
                yield lengths, group, options, 1 + number % 2


@check
def packed_sequences_over_the_ranks_give_what_one_rank_gives() -> None:
    inputs = [x.flatten(0, 1) for x in qkv()]
    for lengths, group, options, heads_at_once in packings():
        expected = results(functools.partial(attend_packed, lengths=lengths, causal=options["causal"]), inputs)
        packing = context_parallel.pack(cumulative(lengths), group, **options)
        layout = {"group": group, "dim": 0, "balanced": options["balanced"]}
        parts = [context_parallel.shard(x, **layout) for x in inputs]
        ours = functools.partial(attend_packed_in_parts, packing=packing, heads_at_once=heads_at_once)
        equal(results(ours, parts), expected, **layout)


@check
def packed_sequences_without_lse_in_half_precision() -> None:
    lengths = [5, 27]
    q, k, v = (x.flatten(0, 1).bfloat16() for x in qkv())
    sums = cumulative(lengths)
    exact = flash_attn_varlen_func(q.double(), k.double(), v.double(), sums, sums, 27, 27, softcap=1.5)
    packing = context_parallel.pack(sums)
    naive = flash_attn_varlen_func(q, k, v, sums, sums, 27, 27, softcap=1.5)
    q, k, v = (context_parallel.shard(x, dim=0) for x in (q, k, v))
    out = context_parallel.varlen_attention(q, k, v, packing, softcap=1.5)
    within(context_parallel.unshard(out, dim=0), naive, exact)


# Layout


@check
def rows_are_cut_and_put_together() -> None:
    x = torch.randn(3, 16, 2)
    for group in groups():
        for balanced in (True, False):
            layout = {"group": group, "balanced": balanced}
            part = context_parallel.shard(x, **layout)
            assert torch.equal(context_parallel.unshard(part, **layout), x)
            assert torch.equal(x[:, context_parallel.positions(16, **layout)], part)
    x.requires_grad_()
    context_parallel.shard(x).sum().backward()
    assert x.grad is not None
    assert x.grad.sum() == x.numel() / 4


@check
def in_code_that_is_compiled() -> None:
    """Communication stays outside of the graph."""
    inputs = [context_parallel.shard(x) for x in qkv()]

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = context_parallel.attention(q.sin(), k, v, causal=True)
        return out.cos()

    torch.testing.assert_close(results(torch.compile(layer, backend="eager"), inputs), results(layer, inputs))


def refused(q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is said, and the call that it is said to."""
    rows = "must be of a number of rows that is a multiple of"
    yield f"x {rows} 2 · 4", lambda: context_parallel.shard(q[:, :12])
    yield rf"x {rows} 4 \(ranks\)", lambda: context_parallel.shard(q[:, :15], balanced=False)
    yield f"x {rows} 2 · 1", lambda: context_parallel.unshard(q[:, :3])
    yield f"seqlen {rows} 2 · 4", lambda: context_parallel.positions(12)

    attend: Any = context_parallel.attention
    yield "q must be of an even length", lambda: attend(q[:, :3], k[:, :3], v[:, :3], causal=True)
    yield "k must be of q's length with causal", lambda: attend(q[:, :4], k, v, causal=True)
    yield "k must be of a number of heads", lambda: attend(q[:, :, :3], k, v)
    yield "group must be a process group or a mesh of one dimension", lambda: attend(q, k, v, mesh())
    yield "group must be a process group, a DeviceMesh or None", lambda: attend(q, k, v, "tp")

    yield f"cu_seqlens {rows} 2 · 4", lambda: context_parallel.pack(cumulative([3, 9]))
    yield "cu_seqlens must be running sums", lambda: context_parallel.pack(cumulative([3, 13])[1:])
    yield "cu_seqlens must be of dtype", lambda: context_parallel.pack(cumulative([16]).long())

    packed: Any = context_parallel.varlen_attention
    whole, other = (context_parallel.pack(cumulative([rows])) for rows in (64, 32))
    q, k, v = q[0], k[0], v[0]
    yield "q must be of packing's rows, 8", lambda: packed(q, k, v, other)
    yield "heads_at_once must be a divisor", lambda: packed(q, k, v, whole, heads_at_once=3)
    yield "packing must be what context_parallel.pack gives", lambda: packed(q, k, v, cumulative([64]))


@check
def what_does_not_fit_is_refused_by_name() -> None:
    for message, call in refused(*qkv()):
        with pytest.raises((ValueError, TypeError), match=f"^{message}"):
            call()
