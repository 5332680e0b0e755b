"""What ranks.py has four ranks find out about DTensors, on a mesh of 2 × 2, dp and tp: one rank's out and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ranks import check
from support import cumulative
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from compiled_fa import attention, flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func

OPS = torch.ops.compiled_fa
Placements = Sequence[Placement]
WHOLE = (Replicate(), Replicate())


@functools.cache
def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def qkv(nheads: int = 4, nheads_k: int = 2, batch: int = 2, length: int = 6, length_k: int = 9) -> list[Tensor]:
    shapes = (batch, length, nheads, 8), (batch, length_k, nheads_k, 8), (batch, length_k, nheads_k, 4)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def results(function: Callable[..., Any], inputs: Sequence[Tensor], dout: Tensor | None = None) -> list[Any]:
    """Its first result, and the gradients of inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, Tensor) else out[0]
    return [out, *torch.autograd.grad(out, leaves, torch.cos(out.detach()) if dout is None else dout)]


def same(found: Any, expected: Any, placements: Placements | None = None) -> None:
    assert isinstance(found, DTensor)
    if placements is not None:
        assert found.placements == tuple(placements)
    torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-11, atol=1e-11)


def agree(
    function: Callable[..., Any], inputs: Sequence[Tensor], placements: Sequence[Placements], moves: bool = False
) -> list[Any]:
    """On one rank and on the mesh; moves: is there anything to communicate? Returns what the mesh gives."""
    expected = results(function, inputs)
    sharded = [distribute_tensor(x, mesh(), where) for x, where in zip(inputs, placements, strict=True)]
    with CommDebugMode() as communication:
        found = results(function, sharded)
    assert bool(communication.get_total_counts()) == moves
    for mine, whole in zip(found, expected, strict=True):
        same(mine, whole)
    return found


@check
def batch_and_heads_are_sharded_without_a_word() -> None:
    where = Shard(0), Shard(2)
    for options in ({}, {"causal": True}, {"window_size": (2, 1), "softcap": 3.0}):
        for result in agree(functools.partial(flash_attn_func, **options), qkv(), [where] * 3):
            assert result.placements == where
    for result in agree(flash_attn_func, qkv(), [(Shard(2), Replicate())] * 3):
        assert result.placements == (Shard(2), Replicate())


@check
def one_tensor_for_q_k_and_v() -> None:
    qkv_packed = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64)
    agree(functools.partial(flash_attn_qkvpacked_func, causal=True), [qkv_packed], [(Shard(0), Shard(3))])


@check
def slopes_are_sharded_as_their_heads_and_batch() -> None:
    inputs = qkv()
    sharded = [distribute_tensor(x, mesh(), (Shard(0), Shard(2))) for x in inputs]
    for slopes in (torch.rand(4), torch.rand(2, 4)):
        expected = results(functools.partial(flash_attn_func, causal=True, alibi_slopes=slopes), inputs)
        spread = distribute_tensor(slopes, mesh(), WHOLE)
        found = results(functools.partial(flash_attn_func, causal=True, alibi_slopes=spread), sharded)
        for mine, whole in zip(found, expected, strict=True):
            same(mine, whole, (Shard(0), Shard(2)))


@check
def heads_that_do_not_divide() -> None:
    """As many key heads as query heads are cut alike; groups of heads would not be, and are gathered."""
    for heads, moves in (((3, 3), False), ((6, 3), True)):
        agree(flash_attn_func, qkv(*heads), [(Replicate(), Shard(2))] * 3, moves)
    agree(flash_attn_func, qkv(12, 6), [(Shard(2), Shard(2))] * 3, moves=True)


@check
def one_key_head_is_whole_everywhere() -> None:
    heads, whole = (Shard(0), Shard(2)), (Shard(0), Replicate())
    _, dq, dk, dv = agree(functools.partial(flash_attn_func, causal=True), qkv(4, 1), [heads, whole, whole])
    assert dq.placements == heads
    assert dk.placements == dv.placements == (Shard(0), Partial())


@check
def queries_are_sharded_where_positions_do_not_count() -> None:
    rows, whole = (Replicate(), Shard(1)), WHOLE
    out, dq, dk, _ = agree(flash_attn_func, qkv(), [rows, whole, whole])
    assert out.placements == dq.placements == rows
    assert dk.placements == (Replicate(), Partial())
    for options in ({"causal": True}, {"window_size": (3, -1)}):
        agree(functools.partial(flash_attn_func, **options), qkv(), [rows, whole, whole], moves=True)


@check
def keys_sharded_by_length_are_gathered() -> None:
    rows = Replicate(), Shard(1)
    agree(functools.partial(flash_attn_func, causal=True), qkv(), [rows] * 3, moves=True)


@check
def both_gradients_through_the_op() -> None:
    def out_and_lse(q: Any, k: Any, v: Any) -> Any:
        out, lse = OPS.attention(q, k, v, causal=True)
        return out * lse.transpose(1, 2)[..., None]

    agree(out_and_lse, qkv(length=9), [(Shard(0), Shard(2))] * 3)


@check
def a_bias_is_sharded_by_what_it_has() -> None:
    """Of every kind of shape; its gradient is a sum over what it does not have."""
    where, whole = (Shard(0), Shard(2)), (Shard(0), Replicate())
    inputs = qkv()
    for shape, how, of_gradient in (
        ((2, 4, 6, 9), (Shard(0), Shard(1)), (Shard(0), Shard(1))),
        ((4, 1, 9), (Replicate(), Shard(0)), (Partial(), Shard(0))),
        ((2, 1, 6, 1), whole, (Shard(0), Partial())),
        ((9,), WHOLE, (Partial(), Partial())),
        ((), WHOLE, (Partial(), Partial())),
    ):
        bias = torch.randn(shape, dtype=torch.float64)
        *_, dbias = agree(attention, [*inputs, bias], [where, where, where, how])
        assert dbias.placements == of_gradient
    seen = torch.rand(2, 1, 6, 9) < 0.7
    expected = results(functools.partial(attention, bias=seen), inputs)
    sharded = [distribute_tensor(x, mesh(), where) for x in inputs]
    spread = distribute_tensor(seen, mesh(), whole)
    for mine, theirs in zip(results(functools.partial(attention, bias=spread), sharded), expected, strict=True):
        same(mine, theirs, where)
    rows = Replicate(), Shard(1)
    bias = torch.randn(4, 6, 9, dtype=torch.float64)
    found = agree(attention, [*inputs, bias], [rows, WHOLE, WHOLE, rows])
    assert found[0].placements == found[-1].placements == rows


@check
def packed_sequences_are_sharded_by_heads() -> None:
    lengths = cumulative([3, 0, 5])
    inputs = [torch.randn(8, nheads, 8, dtype=torch.float64) for nheads in (4, 2, 2)]
    heads = Replicate(), Shard(1)

    spread = distribute_tensor(lengths, mesh(), WHOLE)

    def attend(q: Any, k: Any, v: Any) -> Any:
        sums = spread if isinstance(q, DTensor) else lengths
        return flash_attn_varlen_func(q, k, v, sums, sums, 5, 5, causal=True)

    for result in agree(attend, inputs, [heads] * 3):
        assert result.placements == heads


@check
def pages_are_sharded_by_heads() -> None:
    lengths_q, lengths_k = cumulative([1, 2]), cumulative([4, 7])
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in ((3, 4, 8), (4, 4, 2, 8), (4, 4, 2, 8)))
    tensors = q, k, v, lengths_q, lengths_k
    expected = flash_attn_varlen_func(*tensors, 2, 7, block_table=table)
    heads: list[Placements] = [(Replicate(), Shard(1)), *[(Replicate(), Shard(2))] * 2, WHOLE, WHOLE]
    q, k, v, lengths_q, lengths_k = (
        distribute_tensor(x, mesh(), where) for x, where in zip(tensors, heads, strict=True)
    )
    with torch.inference_mode():
        found = flash_attn_varlen_func(
            q, k, v, lengths_q, lengths_k, 2, 7, block_table=distribute_tensor(table, mesh(), WHOLE)
        )
    same(found, expected, heads[0])


@check
def dropout_drops_what_one_rank_drops_and_is_refused_where_a_seed_would_be_drawn() -> None:
    seed = torch.tensor([7])

    def attend(q: Any, k: Any, v: Any) -> Any:
        spread = distribute_tensor(seed, mesh(), WHOLE) if isinstance(q, DTensor) else seed
        return OPS.attention(q, k, v, dropout_p=0.5, dropout_seed=spread)

    agree(attend, qkv(), [(Shard(0), Shard(2))] * 3, moves=True)
    q, k, v = (distribute_tensor(x, mesh(), (Shard(0), Shard(2))) for x in qkv())
    with pytest.raises(ValueError, match="dropout_p must be 0 with DTensors"):
        flash_attn_func(q, k, v, dropout_p=0.5)


@check
def forward_mode_by_its_op() -> None:
    inputs, along = qkv(4, 1), qkv(4, 1)
    results = OPS.attention(*inputs, causal=True)
    expected = OPS.attention_jvp(*inputs, *along, *results, causal=True)
    where = [(Shard(0), Shard(2)), *[(Shard(0), Replicate())] * 2] * 2 + [(Shard(0), Shard(2)), (Shard(0), Shard(1))]
    pairs = zip([*inputs, *along, *results], where, strict=True)
    found = OPS.attention_jvp(*(distribute_tensor(x, mesh(), how) for x, how in pairs), causal=True)
    for mine, whole, how in zip(found, expected, where[-2:], strict=True):
        same(mine, whole, how)


@check
def one_graph_of_dtensors() -> None:
    compiled = torch.compile(functools.partial(flash_attn_func, causal=True), backend="aot_eager", fullgraph=True)
    inputs = qkv()
    expected = results(functools.partial(flash_attn_func, causal=True), inputs)
    sharded = [distribute_tensor(x, mesh(), (Shard(0), Shard(2))) for x in inputs]
    for mine, whole in zip(results(compiled, sharded), expected, strict=True):
        same(mine, whole, (Shard(0), Shard(2)))
