"""memory_efficient_attention and its masks: attention under masks that are written out here, and xformers' helpers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import compiled_fa.xformers_api as xf
from compiled_fa.testing.budget import budget, error

memory_efficient_attention: Any = xf.memory_efficient_attention  # called with lists of arguments
DTYPES = [torch.float32, torch.bfloat16]
Seen = Callable[[int, int, int, int], bool]  # query, key, seqlen_q, seqlen_k


def written_out(seqlen_q: int, seqlen_k: int, seen: Seen) -> Tensor:
    rows = [[seen(i, j, seqlen_q, seqlen_k) for j in range(seqlen_k)] for i in range(seqlen_q)]
    return torch.tensor(rows, dtype=torch.bool).reshape(seqlen_q, seqlen_k)


def everything(i, j, m, n):
    return True


def causal_top_left(i, j, m, n):
    return j <= i


def causal_bottom_right(i, j, m, n):
    return m - 1 - i <= n - 1 - j


def local_top_left(i, j, m, n):
    return i - 3 < j <= i


def local_bottom_right(i, j, m, n):
    return 0 <= (n - 1 - j) - (m - 1 - i) < 3


def window(i, j, m, n):
    return -1 <= (n - 1 - j) - (m - 1 - i) <= 2


def in_blocks(queries: Sequence[int], starts: Sequence[int], keys: Sequence[int], total_k: int, seen: Seen) -> Tensor:
    """Sequence i of the queries lies behind the one before; that of the keys begins at starts[i]."""
    found, at = torch.zeros(sum(queries), total_k, dtype=torch.bool), 0
    for m, start, n in zip(queries, starts, keys, strict=True):
        found[at : at + m, start : start + n] = written_out(m, n, seen)
        at += m
    return found


def under(seen: Tensor, scale: float | None = None) -> Callable[..., Any]:
    """Attention on (B, M, ..., K), (B, N, ..., K), (B, N, ..., Kv) in their dtype, every score written down."""

    def naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.movedim(1, -2) for x in (query, key, value))
        scores = (q * (query.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
        probs = scores.masked_fill(~seen, -math.inf).softmax(-1).masked_fill(~seen, 0.0)
        return (probs @ v).movedim(-2, 1)

    return naive


def results(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, towards)]


def check(attend: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    found, rough = results(attend, inputs), results(reference, inputs)
    exact = results(reference, [x.double() for x in inputs])
    for result, as_naive, as_exact in zip(found, rough, exact, strict=True):
        assert result.shape == as_exact.shape
        assert error(result, as_exact) <= budget(as_naive, as_exact, 8.0)


DENSE: dict[str, tuple[Any, Seen]] = {
    "none": (None, everything),
    "LowerTriangularMask": (xf.LowerTriangularMask(), causal_top_left),
    "LowerTriangularFromBottomRightMask": (xf.LowerTriangularFromBottomRightMask(), causal_bottom_right),
    "its local kind": (xf.LowerTriangularFromBottomRightMask().make_local_attention(3), local_bottom_right),
    "LocalAttentionFromBottomRightMask": (xf.LocalAttentionFromBottomRightMask(2, 1), window),
}


@pytest.mark.parametrize("heads", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_a_tensor_of_biases(heads, shared):
    """In as many dimensions as q; its gradient is summed where it broadcasts."""

    def naive(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (x.movedim(1, -2) for x in (query, key, value))
        probs = (q @ k.mT * query.shape[-1] ** -0.5 + bias).softmax(-1)
        out: Tensor = (probs @ v).movedim(-2, 1)
        return out

    bias = torch.randn(1 if shared else 2, *heads, 5, 7)
    inputs = torch.randn(2, 5, *heads, 8), torch.randn(2, 7, *heads, 8), torch.randn(2, 7, *heads, 6), bias
    check(memory_efficient_attention, naive, inputs)
    with pytest.raises(ValueError, match=r"^attn_bias must be \(batch, .*seqlen_q, seqlen_k\), got shape"):
        memory_efficient_attention(*inputs[:3], bias[0])


@pytest.mark.parametrize(("m", "n"), [(7, 7), (4, 9), (9, 4)])
@pytest.mark.parametrize("name", DENSE)
def test_dense_masks(name, m, n):
    mask, seen = DENSE[name]
    inputs = torch.randn(2, m, 2, 8), torch.randn(2, n, 2, 8), torch.randn(2, n, 2, 6)
    visible = written_out(m, n, seen)
    check(
        lambda *x: memory_efficient_attention(*x, attn_bias=mask, scale=0.4),
        under(visible, 0.4),
        inputs,
    )
    if mask is not None:
        bias = mask.materialize((2, 2, m, n))
        assert bias.shape == (2, 2, m, n)
        assert torch.equal(bias[1, 1], torch.zeros(m, n).masked_fill(~visible, -math.inf))


@pytest.mark.parametrize(("m", "n"), [(7, 7), (4, 9), (9, 4)])
@pytest.mark.parametrize("shared", [False, True])
def test_a_triangle_with_a_tensor_of_biases(shared, m, n):
    """Also of keys that no query sees, whose bias has a gradient of 0."""
    visible = written_out(m, n, causal_top_left)

    def biased(query, key, value, bias):
        return memory_efficient_attention(query, key, value, xf.LowerTriangularMask().add_bias(bias))

    def naive(query, key, value, bias):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        scores = q @ k.mT * query.shape[-1] ** -0.5 + bias
        return (scores.masked_fill(~visible, -math.inf).softmax(-1) @ v).transpose(1, 2)

    inputs = torch.randn(2, m, 2, 8), torch.randn(2, n, 2, 8), torch.randn(2, n, 2, 6)
    bias = torch.randn(1 if shared else 2, 2, m, 1 if shared else n)
    check(biased, naive, [*inputs, bias])
    mask = xf.LowerTriangularMaskWithTensorBias(bias).to("cpu")
    written = torch.zeros(m, n).masked_fill(~visible, -math.inf) + bias[0, 1]
    assert torch.equal(mask.materialize((2, 2, m, n))[0, 1], written)
    wrong: Any = [0.0]
    with pytest.raises(TypeError, match=r"^bias must be a tensor, got list"):
        xf.LowerTriangularMask().add_bias(wrong)


Q, K = [3, 5, 0, 4, 6, 1], [3, 2, 4, 9, 1, 0]  # alike, fewer keys by 3, 5 and 1, more keys, no queries, no keys
PADDING = 11
STARTS = [2, 5, 8, 12, 23, 24, 30]
BLOCKS: dict[str, tuple[Any, Seen]] = {
    "BlockDiagonalMask": (lambda mask: mask, everything),
    "BlockDiagonalCausalMask": (lambda mask: mask.make_causal(), causal_top_left),
    "BlockDiagonalCausalFromBottomRightMask": (
        lambda mask: mask.make_causal_from_bottomright(),
        causal_bottom_right,
    ),
    "BlockDiagonalCausalLocalAttentionMask": (lambda mask: mask.make_local_attention(3), local_top_left),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (
        lambda mask: mask.make_local_attention_from_bottomright(3),
        local_bottom_right,
    ),
}
WITH_GAPS: dict[str, tuple[Any, Seen]] = {
    "BlockDiagonalPaddedKeysMask": (lambda mask: mask, everything),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (
        lambda mask: xf.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(Q, PADDING, K),
        causal_bottom_right,
    ),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (lambda mask: mask.make_local_attention(2, 1), window),
    "the same by from_seqlens_local": (
        lambda mask: xf.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(Q, PADDING, K, 2, 1),
        window,
    ),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (
        lambda mask: xf.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(Q, PADDING, K, 3),
        local_bottom_right,
    ),
}


def check_blocks(mask: Any, visible: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """With a value wider than its key, which is a view; a mask's device is where it is used."""
    total_q, total_k = visible.shape
    key_and_value = torch.randn(1, total_k, 2, 2, 8, dtype=dtype)
    inputs = torch.randn(1, total_q, 4, 8, dtype=dtype), *key_and_value.unbind(2)

    def reference(q, k, v):
        return under(visible)(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))

    check(lambda *x: memory_efficient_attention(*x, attn_bias=mask), reference, inputs)
    bias = mask.materialize((1, 4, total_q, total_k), torch.float64)
    assert torch.equal(bias[0, 3], torch.zeros(total_q, total_k).double().masked_fill(~visible, -math.inf))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype):
    make, seen = BLOCKS[name]
    mask = make(xf.BlockDiagonalMask.from_seqlens(Q, K))
    assert type(mask) is getattr(xf, name)
    starts = [sum(K[:at]) for at in range(len(K))]
    check_blocks(mask, in_blocks(Q, starts, K, sum(K), seen), dtype)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_one_set_of_lengths(name):
    make, seen = BLOCKS[name]
    starts = [sum(Q[:at]) for at in range(len(Q))]
    check_blocks(make(xf.BlockDiagonalMask.from_seqlens(Q)), in_blocks(Q, starts, Q, sum(Q), seen))


@pytest.mark.parametrize("name", WITH_GAPS)
def test_keys_in_slots(name):
    make, seen = WITH_GAPS[name]
    mask = make(xf.BlockDiagonalPaddedKeysMask.from_seqlens(Q, PADDING, K))
    starts = [PADDING * at for at in range(len(K))]
    check_blocks(mask, in_blocks(Q, starts, K, PADDING * len(K), seen))


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (xf.BlockDiagonalGappyKeysMask, everything),
        (xf.BlockDiagonalCausalWithOffsetGappyKeysMask, causal_bottom_right),
    ],
)
def test_keys_with_gaps(kind, seen):
    check_blocks(kind.from_seqlens(Q, STARTS, K), in_blocks(Q, STARTS[:-1], K, STARTS[-1], seen))


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (xf.PagedBlockDiagonalPaddedKeysMask, everything),
        (xf.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask, causal_bottom_right),
    ],
)
def test_keys_in_pages(kind, seen):
    queries, keys, table = [2, 1, 3], [5, 8, 3], torch.tensor([[4, 1], [0, 3], [2, 0]], dtype=torch.int32)
    q, k, v = torch.randn(1, 6, 4, 8), torch.randn(1, 20, 2, 8), torch.randn(1, 20, 2, 8)
    mask = kind.from_seqlens(queries, keys, table, 4)
    found = memory_efficient_attention(q, k, v, mask)
    assert torch.equal(found, memory_efficient_attention(q, k, v, mask.to("cpu")))
    padded = xf.BlockDiagonalPaddedKeysMask.from_seqlens(queries, 8, keys)
    assert torch.equal(found, memory_efficient_attention(q, k, v, padded.make_paged(table, 4, kind)))
    visible = torch.zeros(6, 20, dtype=torch.bool)
    rows = [16, 17, 18, 19, 4], [0, 1, 2, 3, 12, 13, 14, 15], [8, 9, 10]
    for at, (first, end) in enumerate([(0, 2), (2, 3), (3, 6)]):
        visible[first:end, rows[at]] = written_out(end - first, keys[at], seen)
    torch.testing.assert_close(found, under(visible)(q, *(x.repeat_interleave(2, 2) for x in (k, v))))
    assert torch.equal(mask.materialize((6, 20)) == 0, visible)


def test_one_head_of_three_dimensions():
    inputs = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 6)
    visible = written_out(5, 7, causal_bottom_right)
    mask = xf.LowerTriangularFromBottomRightMask()
    check(lambda *x: memory_efficient_attention(*x, mask), under(visible), inputs)


@pytest.mark.parametrize("expanded", ["heads", "groups and heads", "nothing"])
def test_groups_of_five_dimensions(expanded):
    """Expanded heads are read where they are; without an expansion each group and head has its own keys."""
    groups, heads = {"heads": (2, 1), "groups and heads": (1, 1), "nothing": (2, 3)}[expanded]
    visible = written_out(5, 5, causal_top_left)

    def broadcast(attend):
        return lambda q, k, v: attend(q, k.expand(-1, -1, 2, 3, -1), v.expand(-1, -1, 2, 3, -1))

    inputs = torch.randn(2, 5, 2, 3, 8), *torch.randn(2, 2, 5, groups, heads, 8).unbind(0)
    mask = xf.LowerTriangularMask()
    check(
        broadcast(lambda *x: memory_efficient_attention(*x, mask)),
        broadcast(under(visible)),
        inputs,
    )


def test_expanded_heads_are_not_copied(monkeypatch):
    seen: list[Tensor] = []

    def attend(q, k, v, *arguments, **options):
        seen.extend([q, k, v])
        return q

    monkeypatch.setattr(xf.attention, "flash_attn_func", attend)
    q, k, v = torch.randn(1, 5, 2, 3, 8), *torch.randn(2, 1, 5, 2, 1, 8).expand(-1, -1, -1, -1, 3, -1).unbind(0)
    memory_efficient_attention(q, k, v)
    assert [x.shape for x in seen] == [(1, 5, 6, 8), (1, 5, 2, 8), (1, 5, 2, 8)]
    assert [x.data_ptr() for x in seen] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]


def test_lists_of_tensors_and_back():
    """Batches of images of two sizes, as vision transformers pack them."""
    images = [torch.randn(2, 3, 2, 8), torch.randn(1, 5, 2, 8)]
    mask, row = xf.BlockDiagonalMask.from_tensor_list(images)
    assert row.shape == (1, 11, 2, 8)
    outs = mask.split(memory_efficient_attention(row, row, row, mask))
    for out, image in zip(outs, images, strict=True):
        torch.testing.assert_close(out, memory_efficient_attention(image, image, image))
    assert [x.shape for x in mask.make_causal().split(row)] == [x.shape for x in images]
    plain = xf.BlockDiagonalMask.from_seqlens([3, 3, 5])
    assert [x.shape[:2] for x in plain.split(row)] == [(1, 3), (1, 3), (1, 5)]
    plain._batch_sizes = [2, 0, 1]  # which some set by hand
    assert [x.shape[:2] for x in plain.split(row)] == [(2, 3), (1, 0), (1, 5)]


def test_lists_of_queries_keys_and_values():
    queries, keys = (
        [torch.randn(2, 3, 2, 8), torch.randn(1, 4, 2, 8)],
        [torch.randn(2, 5, 2, 8), torch.randn(1, 1, 2, 8)],
    )
    values = [torch.randn(2, 5, 2, 6), torch.randn(1, 1, 2, 6)]
    mask, q, k, v = xf.BlockDiagonalMask.from_tensor_lists_qkv(queries, keys, values)
    outs = mask.split_queries(memory_efficient_attention(q, k, v, mask))
    for out, *each in zip(outs, queries, keys, values, strict=True):
        torch.testing.assert_close(out, memory_efficient_attention(*each))
    assert v is not None
    assert [torch.equal(*pair) for pair in zip(mask.split_kv(v), values, strict=True)] == [True, True]
    assert xf.BlockDiagonalMask.from_tensor_lists_qkv(queries, keys)[3] is None
    with pytest.raises(ValueError, match="tensor must be split by split_queries or split_kv"):
        mask.split(q)


def test_where_sequences_lie_can_be_read():
    mask = xf.BlockDiagonalMask.from_seqlens([3, 5], [4, 2])
    assert mask.q_seqinfo.seqstart_py == [0, 3, 8]
    assert mask.q_seqinfo.seqstart.dtype == torch.int32
    assert mask.k_seqinfo.seqstart.tolist() == [0, 4, 6]
    assert (mask.k_seqinfo.max_seqlen, mask.k_seqinfo.min_seqlen) == (4, 2)
    assert mask.k_seqinfo.intervals() == [(0, 4), (4, 6)]
    padded = xf.BlockDiagonalPaddedKeysMask.from_seqlens([1, 1], 6, [4, 2])
    assert padded.k_seqinfo.intervals() == [(0, 4), (6, 8)]
    assert padded.k_seqinfo.seqstart_py == [0, 6, 12]


def test_a_mask_goes_where_it_is_used():
    q = torch.randn(1, 8, 2, 8, device="meta")
    there = xf.BlockDiagonalMask.from_seqlens([3, 5], device="meta").make_causal()
    moved = xf.BlockDiagonalMask.from_seqlens([3, 5]).to("meta")
    here = xf.BlockDiagonalMask.from_seqlens([3, 5])
    for mask in (there, moved, here):
        assert memory_efficient_attention(q, q, q, mask).device.type == "meta"
        assert mask._calls[0].cu_seqlens_q.device.type == "meta"
    assert moved.q_seqinfo.seqstart.device.type == "meta"
    assert xf.LowerTriangularMask(device="meta").to("cpu").band == xf.LowerTriangularMask().band


def test_dropout_is_applied_and_seeded():
    q = torch.randn(1, 40, 2, 8)
    mask = xf.BlockDiagonalMask.from_seqlens([30, 10])
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(memory_efficient_attention(q, q, q, mask, 0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])
    assert not torch.allclose(outs[0], memory_efficient_attention(q, q, q, mask))


def test_half_precision_under_inference_mode_and_autocast():
    q = torch.randn(1, 8, 2, 8)
    mask = xf.BlockDiagonalMask.from_seqlens([3, 5])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert memory_efficient_attention(q, q, q, mask).dtype == torch.bfloat16


def test_compiled_code_has_one_graph():
    """For a mask and its tensors; another mask of other lengths may be another graph, and is no break in one."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def attend(q, mask):
        return memory_efficient_attention(q, q, q, mask) + memory_efficient_attention(q, q, q, xf.LowerTriangularMask())

    frames = []
    for seqlens in ([3, 5], [4, 7], [9, 2], [6, 7]):
        mask = xf.BlockDiagonalMask.from_seqlens(seqlens).make_causal()
        q = torch.randn(1, sum(seqlens), 2, 8)
        wanted = under(in_blocks(seqlens, [0, seqlens[0]], seqlens, sum(seqlens), causal_top_left))(q, q, q)
        wanted = wanted + under(written_out(sum(seqlens), sum(seqlens), causal_top_left))(q, q, q)
        torch.testing.assert_close(attend(q, mask), wanted)
        frames.append(counter.frame_count)
    assert frames[-1] == frames[1]


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dimensions": ({"query": torch.ones(3, 4)}, ValueError, r"query must be \(batch, seqlen, head_dim\) or "),
    "others": ({"key": torch.ones(1, 8, 8)}, ValueError, r"key must be \(batch, seqlen, nheads, head_dim\)"),
    "no tensor": ({"value": None}, TypeError, "value must be a tensor"),
    "a bias": ({"attn_bias": [0.0]}, TypeError, "attn_bias must be None, a tensor or a mask of compiled_fa"),
    "op": ({"op": "cutlass"}, ValueError, "op must be None"),
    "dtype": ({"output_dtype": torch.float64}, ValueError, r"output_dtype must be query's, torch.float32, or None"),
    "a batch": (
        {"query": torch.ones(2, 8, 2, 8), "attn_bias": xf.BlockDiagonalMask.from_seqlens([8])},
        ValueError,
        "query must be of one row, batch size 1, with BlockDiagonalMask",
    ),
    "rows": ({"attn_bias": xf.BlockDiagonalMask.from_seqlens([7])}, ValueError, "query must be of 7 rows"),
    "keys": ({"attn_bias": xf.BlockDiagonalMask.from_seqlens([8], [7])}, ValueError, "key must be of 7 rows"),
    "pages": (
        {"attn_bias": xf.PagedBlockDiagonalPaddedKeysMask.from_seqlens([8], [3], torch.zeros(1, 1).int(), 5)},
        ValueError,
        "key must be of pages of 5 rows, got 8",
    ),
    "groups": (
        {"query": torch.ones(1, 8, 2, 2, 8), "key": torch.ones(1, 8, 2, 1, 8), "value": torch.ones(1, 8, 2, 1, 8)},
        ValueError,
        r"key must be expanded to query's groups and heads, \(2, 2\)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_calls_that_are_refused(what):
    options, kind, message = REFUSED[what]
    arguments = {"query": torch.ones(1, 8, 2, 8), "key": torch.ones(1, 8, 2, 8), "value": torch.ones(1, 8, 2, 8)}
    with pytest.raises(kind, match=f"^{message}"):
        memory_efficient_attention(**{**arguments, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: xf.BlockDiagonalMask.from_seqlens([]), "q_seqlen must be lengths of one sequence or more"),
        (lambda: xf.BlockDiagonalMask.from_seqlens([3, -1]), "q_seqlen must be lengths of one sequence or more"),
        (lambda: xf.BlockDiagonalMask.from_seqlens([3], [3, 4]), "kv_seqlen must be as many lengths as q_seqlen, 1"),
        (lambda: xf.BlockDiagonalMask.from_seqlens([3]).make_local_attention(0), "_window_size must be at least 1"),
        (lambda: xf.LocalAttentionFromBottomRightMask(-1, 0), "window_left must be at least 0"),
        (lambda: xf.LocalAttentionFromBottomRightMask(0, -1), "window_right must be at least 0"),
        (lambda: xf.BlockDiagonalPaddedKeysMask.from_seqlens([1], 3, [4]), "kv_seqlen must be of at most kv_padding"),
        (lambda: xf.BlockDiagonalGappyKeysMask.from_seqlens([1, 1], [0, 2], [2, 2]), "kv_seqstarts must be 3 numbers"),
        (
            lambda: xf.BlockDiagonalGappyKeysMask.from_seqlens([1, 1], [0, 1, 4], [2, 2]),
            "kv_seqstarts must be ascending",
        ),
        (lambda: xf.BlockDiagonalMask.from_seqlens([3]).split(torch.ones(3, 2)), r"tensor must be of shape \(1, 3"),
        (lambda: xf.BlockDiagonalMask.from_seqlens([3]).materialize((3, 4)), r"shape must be \(..., 3, 3\)"),
        (
            lambda: xf.BlockDiagonalMask.from_tensor_lists_qkv([torch.ones(2, 3, 1)], [torch.ones(1, 3, 1)]),
            "tensors_k must be of tensors_q's batch sizes",
        ),
        (
            lambda: xf.BlockDiagonalMask.from_tensor_lists_qkv(*([torch.ones(2, length, 1)] for length in (3, 4, 5))),
            "tensors_v must be of tensors_k's lengths",
        ),
    ],
)
def test_masks_that_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_batches_that_do_not_fit_are_refused():
    mask = xf.BlockDiagonalMask.from_seqlens([3, 4])
    mask._batch_sizes = [2]
    with pytest.raises(ValueError, match="_batch_sizes must be of sequences of one length each"):
        mask.split(torch.ones(1, 7))
    mask._batch_sizes = [1]
    with pytest.raises(ValueError, match="_batch_sizes must be numbers whose sum is 2"):
        mask.split(torch.ones(1, 7))
