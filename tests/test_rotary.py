"""compiled_fa.rotary, against rotation as multiplication of complex numbers in float64."""

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cumulative
from torch._subclasses.fake_tensor import FakeTensorMode

from compiled_fa.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def table(rows, pairs, dtype=torch.float64):
    angles = torch.rand(rows, pairs, dtype=torch.float64) * 2 * math.pi
    return angles.cos().to(dtype), angles.sin().to(dtype)


def exact(x, cos, sin, positions, interleaved):
    """x (tokens, H, D), its tokens at these positions; in float64."""
    pairs, head_dim = cos.shape[1], x.shape[-1]
    even = torch.arange(pairs) * 2 if interleaved else torch.arange(pairs)
    odd = even + 1 if interleaved else even + pairs
    turn = torch.complex(cos.double(), sin.double())[positions, None]
    product = torch.complex(x.double()[..., even], x.double()[..., odd]) * turn
    found = x.double().clone()
    found[..., even], found[..., odd] = product.real, product.imag
    assert found.shape[-1] == head_dim
    return found


def close(found, expected, like):
    """One rounding of the result, and a few of fp32's arithmetic on terms that may cancel."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    largest = like.double().abs().amax() if like.numel() else 0.0
    allowed = torch.finfo(like.dtype).eps * expected.abs() + 8 * torch.finfo(wide).eps * largest
    return bool(((found.double() - expected).abs() <= allowed).all())


@st.composite
def calls(draw):
    return {
        "lengths": draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)),
        "packed": draw(st.booleans()),
        "heads": draw(st.integers(1, 3)),
        "pairs": draw(st.integers(0, 5)),
        "rest": draw(st.sampled_from([0, 0, 1, 6])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "interleaved": draw(st.booleans()),
        "inplace": draw(st.booleans()),
        "offsets": draw(st.sampled_from(["none", "int", "int32", "int64"])),
        "transposed": draw(st.booleans()),
    }


@given(call=calls())
def test_agrees_with_complex_numbers(call):
    lengths = call["lengths"] if call["packed"] else [call["lengths"][0]] * len(call["lengths"])
    head_dim, dtype, interleaved = max(1, 2 * call["pairs"] + call["rest"]), call["dtype"], call["interleaved"]
    cos, sin = table(20, call["pairs"], dtype)
    tokens = torch.randn(call["heads"], sum(lengths), head_dim).to(dtype).transpose(0, 1)
    if not call["transposed"]:
        tokens = tokens.contiguous()
    offsets: Any = {"none": 0, "int": 4}.get(call["offsets"])
    each = [offsets] * len(lengths)
    if offsets is None:
        each = torch.randint(0, 13, (len(lengths),)).tolist()
        offsets = torch.tensor(each, dtype=getattr(torch, call["offsets"]))
    positions = torch.cat([torch.arange(n) + at for n, at in zip(lengths, each, strict=True)])
    expected = exact(tokens, cos, sin, positions, interleaved)
    x = tokens if call["packed"] else tokens.unflatten(0, (len(lengths), lengths[0]))
    before, packing = x.clone(), cumulative(lengths) if call["packed"] else None
    found = apply_rotary_emb(x, cos, sin, interleaved, call["inplace"], offsets, packing)
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert (found is x) == call["inplace"]
    if not call["inplace"]:
        assert torch.equal(x, before)
    assert close(found.reshape(expected.shape), expected, before)
    assert torch.equal(found[..., 2 * call["pairs"] :], before[..., 2 * call["pairs"] :])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offsets", [3, torch.tensor([0, 4])], ids=["int", "tensor"])
def test_gradients(interleaved, offsets):
    """By finite differences, and in place: the gradient is rotated back. cos and sin are constants."""
    cos, sin = table(9, 2)
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)

    def out_of_place(x):
        return apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets)

    torch.autograd.gradcheck(out_of_place, x, check_forward_ad=True)
    dout = torch.randn_like(x)
    (expected,) = torch.autograd.grad(out_of_place(x), x, dout)
    cos.requires_grad_()
    leaf = x.clone()  # not a leaf, which nobody may write into
    found = apply_rotary_emb(leaf, cos, sin, interleaved, inplace=True, seqlen_offsets=offsets)
    assert torch.allclose(torch.autograd.grad(found, x, dout)[0], expected)
    back = apply_rotary_emb(expected, cos, sin, interleaved, seqlen_offsets=offsets)
    assert torch.allclose(back, dout)


def in_place():
    """Name -> a call in place, and the shape of what it writes to."""
    cos, sin = table(9, 2, torch.float32)
    offsets = torch.tensor([0, 4])
    return {
        "x": (lambda x: apply_rotary_emb(x, cos, sin, inplace=True, seqlen_offsets=offsets), (2, 3, 2, 6)),
        "part": (lambda x: apply_rotary_emb(x[..., 1:, 1:], cos, sin, True, inplace=True), (2, 3, 3, 6)),
        "qkv": (lambda x: apply_rotary_emb_qkv_(x, cos, sin, seqlen_offsets=offsets), (2, 3, 3, 2, 6)),
        "heads": (lambda x: apply_rotary_emb_qkv_(x, cos, sin, num_heads_q=4), (2, 3, 8, 6)),
        "kv": (lambda x: apply_rotary_emb_kv_(x, cos, sin, True, 3), (2, 3, 2, 2, 6)),
    }


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("name", in_place())
def test_in_place_on_leaves(name, backend):
    """They are written outside of autograd, and the gradient goes through what is returned."""
    torch.compiler.reset()
    call, shape = in_place()[name]
    compiled = call if backend is None else torch.compile(call, backend=backend, fullgraph=True)
    leaf, other = torch.randn(shape, requires_grad=True), torch.empty(shape, requires_grad=True)
    other.data.copy_(leaf.data)
    ordinary = other * 1.0  # no leaf: what is done to it in place is an operation as any other
    expected, found = call(ordinary), compiled(leaf)
    assert leaf.is_leaf
    assert torch.allclose(leaf, ordinary, atol=1e-6)
    assert torch.allclose(found, expected, atol=1e-6)
    dout = torch.randn_like(found)
    one, another = torch.autograd.grad(found, leaf, dout), torch.autograd.grad(expected, other, dout)
    assert torch.allclose(one[0], another[0], atol=1e-6)


def test_in_place_on_a_part_of_a_leaf_taken_apart():
    """Autograd has an error of its own for these views."""
    cos, sin = table(3, 2, torch.float32)
    leaf = torch.randn(2, 3, 3, 2, 6, requires_grad=True)
    _, k, _ = leaf.unbind(2)
    expected = apply_rotary_emb(leaf.detach()[:, :, 1], cos, sin)
    found = apply_rotary_emb(k, cos, sin, inplace=True)
    assert torch.equal(found, expected)
    assert torch.equal(leaf.detach()[:, :, 1], expected)
    (dleaf,) = torch.autograd.grad(found.square().sum() / 2, leaf)
    back = apply_rotary_emb(expected, cos, -sin)
    assert torch.allclose(dleaf[:, :, 1], back, atol=1e-6)
    assert not dleaf[:, :, ::2].any()


@pytest.mark.parametrize("num_heads_q", [None, 4])
@pytest.mark.parametrize("own_table", [False, True])
def test_qkv_in_place(num_heads_q, own_table):
    """Also with gradients through a part of a larger tensor, v's part untouched."""
    cos, sin = table(8, 2)
    cos_k, sin_k = table(8, 2) if own_table else (cos, sin)
    shape = (2, 3, 3, 2, 6) if num_heads_q is None else (2, 3, num_heads_q + 2 * 2, 6)
    leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    q, k, v = leaf.unbind(2) if num_heads_q is None else leaf.split([4, 2, 2], 2)
    offsets = torch.tensor([5, 0])
    q, k = (apply_rotary_emb(x, *t, True, seqlen_offsets=offsets) for x, t in ((q, (cos, sin)), (k, (cos_k, sin_k))))
    expected = torch.stack([q, k, v], 2) if num_heads_q is None else torch.cat([q, k, v], 2)
    qkv = leaf.clone()
    own = (cos_k, sin_k) if own_table else (None, None)
    found = apply_rotary_emb_qkv_(qkv, cos, sin, own[0], own[1], True, offsets, num_heads_q)
    assert found is qkv
    assert torch.allclose(found, expected)
    dout = torch.randn_like(found)
    one, other = (torch.autograd.grad(out, leaf, dout)[0] for out in (found, expected))
    assert torch.allclose(one, other)


def test_kv_in_place():
    cos, sin = table(8, 3)
    kv = torch.randn(2, 5, 2, 3, 6, dtype=torch.float64)
    expected = kv.clone()
    expected[:, :, 0] = apply_rotary_emb_func(kv[:, :, 0], cos, sin, seqlen_offsets=2)
    assert apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=2) is kv
    assert torch.allclose(kv, expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_module(interleaved, dtype):
    """Angles are position * base ** (-2 j / dim): the paper's."""
    rotary = RotaryEmbedding(8, base=100.0, interleaved=interleaved)
    angles = torch.arange(9)[:, None].double() * 100.0 ** -(torch.arange(0, 8, 2).double() / 8)
    q, kv = torch.randn(1, 7, 4, 10, dtype=dtype), torch.randn(1, 7, 2, 2, 10, dtype=dtype)
    before = q.clone(), kv.clone()
    for returned, argument in zip(rotary(q, kv, seqlen_offset=2), (q, kv), strict=True):
        assert returned is argument
    for x, old in ((q, before[0]), (kv[:, :, 0], before[1][:, :, 0])):
        expected = exact(old[0], angles.cos(), angles.sin(), torch.arange(7) + 2, interleaved)
        assert torch.allclose(x[0].double(), expected, atol=1e-12 if dtype == torch.float64 else 3e-6)
    assert torch.equal(kv[:, :, 1], before[1][:, :, 1])
    packed = torch.stack([before[0], before[0], before[0]], 2)
    assert torch.allclose(rotary(packed, seqlen_offset=2)[:, :, 1], q)


def test_module_keeps_its_tables():
    rotary: Any = RotaryEmbedding(4).eval()
    with pytest.raises(ValueError, match="max_seqlen must be given once"):
        rotary(torch.randn(1, 2, 3, 1, 4), seqlen_offset=torch.tensor([0]))
    with torch.inference_mode():
        rotary(torch.randn(1, 2, 3, 1, 4), seqlen_offset=torch.tensor([1]), max_seqlen=16)
    kept = rotary._cos_cached
    assert kept.shape == (16, 2)
    rotary(torch.randn(1, 9, 3, 1, 4), seqlen_offset=7)
    assert rotary._cos_cached is kept
    rotary.train()  # an inference tensor cannot be saved for backward
    qkv = torch.randn(1, 2, 3, 1, 4, requires_grad=True)
    rotary(qkv.clone()).sum().backward()
    assert not rotary._cos_cached.is_inference()
    rotary.half()  # rounds inv_freq, and no table
    rotary(torch.randn(1, 400, 3, 1, 4))
    expected = torch.outer(torch.arange(400.0), RotaryEmbedding(4).inv_freq).cos()
    assert torch.equal(rotary._cos_cached, expected)


def test_xpos_products_depend_on_the_distance_alone():
    """arXiv 2212.10554: q's factor times k's is scale ** (distance / scale_base)."""
    rotary = RotaryEmbedding(6, scale_base=4.0)
    tokens, query, key = 12, torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    q, kv = query.expand(1, tokens, 1, 6).clone(), key.expand(1, tokens, 2, 1, 6).clone()
    rotary(q, kv)
    found = q[0, :, 0] @ kv[0, :, 0, 0].T
    scale = (torch.arange(0, 6, 2) + 0.4 * 6) / (1.4 * 6)
    for i in range(tokens):
        for j in range(tokens):
            angle = (i - j) * 10000.0 ** -(torch.arange(0, 6, 2).double() / 6)
            turned = exact(query[None, None], angle.cos()[None], angle.sin()[None], torch.zeros(1).long(), False)
            factors = (scale.double() ** ((i - j) / 4.0)).repeat(2)
            assert torch.allclose(found[i, j], (turned[0, 0] * factors) @ key, rtol=1e-5)


def test_compiled_whole_without_a_graph_a_position():
    cos, sin = table(64, 4, torch.float32)
    count = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=count, fullgraph=True)
    def rotate(x, at):
        return apply_rotary_emb(x, cos, sin, inplace=True, seqlen_offsets=at).sin()

    for at in range(5):
        x = torch.randn(1, 3, 2, 8)
        expected = apply_rotary_emb(x, cos, sin, seqlen_offsets=at).sin()
        assert torch.allclose(rotate(x.clone(), torch.tensor([at])), expected)
    assert count.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_gradients(backend):
    """The module and the in-place form, in a part of what a projection gives."""
    torch.compiler.reset()
    rotary, projection = RotaryEmbedding(4, scale_base=8.0), torch.nn.Linear(6, 3 * 2 * 6)
    x = torch.randn(2, 5, 6)

    def loss(x):
        return rotary(projection(x).unflatten(-1, (3, 2, 6)))[:, :, :2].sin().sum()

    def gradients(function):
        projection.zero_grad()
        function(x).backward()
        return [p.grad.clone() for p in projection.parameters() if p.grad is not None]

    expected = gradients(loss)
    found = gradients(torch.compile(loss, backend=backend, fullgraph=True))
    assert len(found) == len(expected) == 2
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_fake_tensors():
    with FakeTensorMode():
        x, offsets = torch.empty(2, 3, 2, 8), torch.empty(2, dtype=torch.int32)
        found = apply_rotary_emb(x, torch.empty(9, 2), torch.empty(9, 2), seqlen_offsets=offsets)
    assert found.shape == x.shape


X, COS = torch.zeros(2, 3, 2, 8), torch.zeros(9, 2)
PACKED = X.flatten(0, 1)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (X[0], {}, ValueError, "x must be (batch, seqlen, nheads, head_dim), got shape (3, 2, 8)"),
        (X.long(), {}, TypeError, "x must be float16, bfloat16, float32 or float64, got torch.int64"),
        (X, {"cos": COS[0]}, ValueError, "cos must be (positions, rotary_dim / 2), got shape (2,)"),
        (X, {"cos": None}, TypeError, "cos must be a tensor (positions, rotary_dim / 2), got NoneType"),
        (X, {"sin": COS.int()}, TypeError, "sin must be of a floating point dtype, got torch.int32"),
        (X, {"sin": COS[:8]}, ValueError, "sin must be of cos's shape, (9, 2), got (8, 2)"),
        (X[..., :3], {}, ValueError, "cos must be of at most head_dim / 2 = 1.5 columns, got 2"),
        (X, {"cos": COS.to("meta")}, ValueError, "cos must be on the device of what it rotates, cpu, got meta"),
        (X, {"seqlen_offsets": 7}, ValueError, "cos must be of a row for each of 10 positions, got 9 rows"),
        (X, {"seqlen_offsets": -1}, ValueError, "seqlen_offsets must be at least 0, got -1"),
        (X, {"seqlen_offsets": 1.0}, TypeError, "seqlen_offsets must be an int or a tensor of one element, got 1.0"),
        (
            X,
            {"seqlen_offsets": torch.tensor([0, 7])},
            ValueError,
            "cos must be of a row for each of 10 positions, got 9 rows",
        ),
        (X, {"seqlen_offsets": torch.tensor([0, -2])}, ValueError, "seqlen_offsets must be at least 0, got -2"),
        (
            X,
            {"seqlen_offsets": torch.tensor([0])},
            ValueError,
            "seqlen_offsets must be an int or of one element a sequence, 2, got 1",
        ),
        (
            X,
            {"seqlen_offsets": torch.tensor([0.0, 1.0])},
            TypeError,
            "seqlen_offsets must be of dtype int32 or int64, got torch.float32",
        ),
        (
            PACKED,
            {"cu_seqlens": cumulative([3, 2])},
            ValueError,
            "cu_seqlens must be running sums of lengths, from 0 to x's total, 6, got [0, 3, 5]",
        ),
        (
            PACKED,
            {"cu_seqlens": cumulative([6]), "seqlen_offsets": 4},
            ValueError,
            "cos must be of a row for each of 10 positions, got 9 rows",
        ),
        (
            PACKED,
            {"cu_seqlens": cumulative([6]), "max_seqlen": 10},
            ValueError,
            "cos must be of a row for each of 10 positions, got 9 rows",
        ),
        (
            PACKED,
            {"cu_seqlens": cumulative([2, 4]), "max_seqlen": 3},
            ValueError,
            "max_seqlen must be at least the longest length in cu_seqlens, 4, got 3",
        ),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_written(x, options, error, message):
    arguments = {"cos": COS, "sin": COS, **options}
    before = x.clone()
    with pytest.raises(error) as raised:
        apply_rotary_emb(x, inplace=True, **arguments)
    assert str(raised.value) == message
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: apply_rotary_emb_qkv_(torch.zeros(1, 2, 2, 1, 4), COS, COS), "qkv must be (batch, seqlen, 3,"),
        (lambda: apply_rotary_emb_qkv_(torch.zeros(1, 2, 3, 4), COS, COS), "num_heads_q must be given where qkv has 4"),
        (
            lambda: apply_rotary_emb_qkv_(torch.zeros(1, 2, 4, 4), COS, COS, num_heads_q=1),
            "num_heads_q must be the heads of q among qkv's 4",
        ),
        (
            lambda: apply_rotary_emb_qkv_(torch.zeros(1, 2, 3, 1, 4), COS, COS, COS),
            "sin_k must be given where the other is, got None",
        ),
        (
            lambda: apply_rotary_emb_qkv_(torch.zeros(1, 2, 3, 1, 4), COS, COS, COS[:1], COS[:1]),
            "cos_k must be of a row for each of 2 positions, got 1 rows",
        ),
        (
            lambda: apply_rotary_emb_qkv_(torch.zeros(1, 2, 3, 1, 4), COS, COS, COS, COS[:, :1]),
            "sin_k must be of cos_k's shape, (9, 2), got (9, 1)",
        ),
        (lambda: apply_rotary_emb_kv_(torch.zeros(1, 2, 3, 1, 4), COS, COS), "kv must be (batch, seqlen, 2, nheads"),
        (lambda: RotaryEmbedding(5), "dim must be an even number of elements, got 5"),
    ],
)
def test_other_wrong_arguments(call, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        call()
    assert str(raised.value).startswith(message)


def test_num_heads_q_is_a_number():
    with pytest.raises(TypeError, match="num_heads_q must be an int"):
        apply_rotary_emb_qkv_(torch.zeros(1, 2, 4, 4), COS, COS, num_heads_q="2")  # type: ignore[arg-type]


@settings(max_examples=20)
@given(shift=st.integers(0, 30), apart=st.integers(0, 30), interleaved=st.booleans())
def test_products_depend_on_the_distance_alone(shift, apart, interleaved):
    rotary: Any = RotaryEmbedding(8, base=50.0, interleaved=interleaved)
    rotary._update_cos_sin_cache(64, device=torch.device("cpu"), dtype=torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def product(at):
        one, other = (
            apply_rotary_emb(x, rotary._cos_cached, rotary._sin_cached, interleaved, seqlen_offsets=n)
            for x, n in ((q, at), (k, at + apart))
        )
        return (one * other).sum()

    assert torch.allclose(product(shift), product(0))
