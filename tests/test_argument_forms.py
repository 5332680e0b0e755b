"""Arguments in every form that people have them in: NumPy's numbers, tensors, None; eager and compiled."""

import numpy as np
import pytest
import torch
import torch._inductor.config as inductor_config
from support import cumulative

from compiled_fa import flash_attn_func, flash_attn_varlen_func, ops

Q = torch.randn(1, 5, 2, 4, generator=torch.Generator().manual_seed(0))
LENGTHS = cumulative([3, 2])


def dense(q=Q, **options):
    return flash_attn_func(q, q, q, **options)


def packed(longest, q=Q):
    return flash_attn_varlen_func(q[0], q[0], q[0], LENGTHS, LENGTHS, longest, longest)


INTEGERS = {
    "int32": np.int32,
    "int64": np.int64,
    "uint8": np.uint8,
    "array of no dimension": np.array,
    "tensor": torch.tensor,
    "tensor of one element": lambda x: torch.tensor([x], dtype=torch.int32),
}


@pytest.mark.parametrize("form", INTEGERS.values(), ids=INTEGERS)
def test_max_seqlen(form):
    assert torch.equal(packed(form(3)), packed(3))
    compiled = torch.compile(lambda longest, q: packed(longest, q), fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()
    assert torch.equal(compiled(form(3), Q), packed(3))
    with pytest.raises(ValueError, match=r"max_seqlen_q must be at least the longest length in cu_seqlens_q, 3, got 2"):
        packed(form(2))


@pytest.mark.parametrize("form", INTEGERS.values(), ids=INTEGERS)
def test_max_seqlen_made_in_compiled_code(form):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: packed(form(3), q), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(Q), packed(3))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_max_seqlen_read_off_a_tensor_in_compiled_code(backend):
    """A number of which tracing knows no value."""

    def attend(q, lengths):
        longest = lengths.diff().max().item()
        return flash_attn_varlen_func(q, q, q, lengths, lengths, longest, longest, causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for lengths in ([3, 2], [1, 4]):
        inputs = [Q[0].clone().requires_grad_() for _ in range(2)]
        found, expected = (f(q, cumulative(lengths)) for f, q in zip((compiled, attend), inputs, strict=True))
        for out in (found, expected):
            out.square().sum().backward()
        assert torch.allclose(found, expected, atol=1e-6)
        one, other = (x.grad for x in inputs)
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-6)


WINDOWS = {
    "NumPy's integers": lambda left, right: (np.int32(left), np.int64(right)),
    "array": lambda left, right: np.array([left, right]),
    "arrays": lambda left, right: (np.array(left), np.array(right)),
    "list": lambda left, right: [left, right],
    "tensor": lambda left, right: torch.tensor([left, right]),
    "tensors": lambda left, right: (torch.tensor(left), torch.tensor([right])),
}


@pytest.mark.parametrize("form", WINDOWS.values(), ids=WINDOWS)
def test_window_size(form):
    expected = dense(window_size=(2, 0))
    assert not torch.allclose(expected, dense())
    assert torch.equal(dense(window_size=form(2, 0)), expected)
    assert torch.equal(dense(window_size=form(-1, -1)), dense())
    with pytest.raises(ValueError, match=r"window_size\[0\] must be -1 \(unbounded\) or at least 0, got -2"):
        dense(window_size=form(-2, 0))


@pytest.mark.parametrize("made_inside", [True, False], ids=["made inside", "given"])
@pytest.mark.parametrize(("form", "backend"), [*((form, "aot_eager") for form in WINDOWS), ("tensor", "inductor")])
def test_window_size_in_compiled_code(form, made_inside, backend):
    """One graph serves every value of a tensor; it is checked when it runs."""

    form = WINDOWS[form]

    def attend(q, window):
        return dense(q, window_size=form(2, 0) if made_inside else window)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for window in ((2, 0), (1, 1), (-1, -1)):
        q, reference = Q.clone().requires_grad_(), Q.clone().requires_grad_()
        found = compiled(q, form(*window))
        expected = dense(reference, window_size=(2, 0) if made_inside else window)
        assert torch.allclose(found, expected, atol=1e-6)
        for out in (found, expected):
            out.square().sum().backward()
        assert q.grad is not None
        assert reference.grad is not None
        assert torch.allclose(q.grad, reference.grad, atol=1e-6)


def test_what_is_not_known_is_not_inlined():
    """Inductor has the kernel itself in place of a plain or causal call: this is one, or none, when it runs."""

    def attend(q, k, right):
        return flash_attn_func(q, k, k, window_size=(-1, right))

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True)
    k = torch.randn(1, 5, 2, 4)
    with inductor_config.patch(force_disable_caches=True):  # PyTorch's know nothing of what we inline
        for right in (0, 1, -1):
            q, reference = Q.clone().requires_grad_(), Q.clone().requires_grad_()
            found, expected = compiled(q, k, torch.tensor(right)), attend(reference, k, right)
            assert torch.allclose(found, expected, atol=1e-6)
            for out in (found, expected):
                out.square().sum().backward()
            assert q.grad is not None
            assert reference.grad is not None
            assert torch.allclose(q.grad, reference.grad, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_wrong_window_in_compiled_code_is_refused_when_it_runs(backend):
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, window: dense(q, window_size=window), fullgraph=True, backend=backend)
    compiled(Q, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match=r"window_size\[0\] must be -1 \(unbounded\) or at least 0, got -2"):
        compiled(Q, torch.tensor([-2, 1]))


NUMBERS = {
    "float32": np.float32,
    "float64": np.float64,
    "array of no dimension": np.array,
    "array of one element": lambda x: np.array([x]),
    "tensor": torch.tensor,
    "tensor of one element": lambda x: torch.tensor([x]),
}


@pytest.mark.parametrize("form", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("argument", ["softmax_scale", "softcap", "dropout_p"])
def test_numbers(argument, form):
    torch.manual_seed(0)
    expected = dense(**{argument: 0.25})
    torch.manual_seed(0)
    assert torch.equal(dense(**{argument: form(0.25)}), expected)

    def attend(q, x):
        return dense(q, **{argument: x})

    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"{argument} must be a number known when it is compiled, got a tensor or an a"):
        torch.compile(attend, fullgraph=True, backend="aot_eager")(Q, form(0.25))
    torch.manual_seed(0)
    assert torch.equal(torch.compile(attend, backend="eager")(Q, form(0.25)), expected)  # not a part of the graph


@pytest.mark.parametrize("argument", ["softmax_scale", "softcap", "dropout_p"])
def test_none_and_integers(argument):
    expected = dense()
    assert torch.equal(dense(**{argument: None}), expected)
    if argument != "softmax_scale":
        assert torch.equal(dense(**{argument: 0}), expected)
        assert torch.equal(dense(**{argument: np.int64(0)}), expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: dense(q, **{argument: None}), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(Q), expected)


FLAGS = {"bool_": np.bool_, "array": np.array, "tensor": torch.tensor, "int": int, "NumPy's integer": np.int64}


@pytest.mark.parametrize("form", FLAGS.values(), ids=FLAGS)
def test_causal(form):
    for causal in (False, True):
        assert torch.equal(dense(causal=form(causal)), dense(causal=causal))
        assert isinstance(dense(return_attn_probs=form(causal)), tuple) is causal
    if form is not int:
        torch._dynamo.reset()
        with pytest.raises(
            Exception, match="causal must be a bool known when it is compiled, got a tensor or an array"
        ):
            torch.compile(lambda q, x: dense(q, causal=x), fullgraph=True, backend="aot_eager")(Q, form(True))


def test_strides_of_cu_seqlens_do_not_matter():
    apart = torch.tensor([0, 9, 3, 9, 5, 9], dtype=torch.int32)[::2]
    assert torch.equal(flash_attn_varlen_func(Q[0], Q[0], Q[0], apart, apart, 3, 3), packed(3))
    pages, table = torch.randn(4, 3, 2, 4), torch.tensor([[2, 9], [1, 9]], dtype=torch.int32)
    found, expected = (
        flash_attn_varlen_func(Q[0], pages, pages, *lengths, 3, 3, block_table=blocks)
        for lengths, blocks in (((apart, apart), table[:, ::2]), ((LENGTHS, LENGTHS), table[:, ::2].contiguous()))
    )
    assert torch.equal(found, expected)


WINDOW = "window_size must be two integers, (left, right)"
LENGTH = "max_seqlen_q must be an int or a tensor of one"
LIKE_A_NUMBER = torch.tensor([0.5, 0.5])

REFUSED = [
    ({"dropout_p": "a"}, TypeError, "dropout_p must be a number, got 'a'"),
    ({"dropout_p": LIKE_A_NUMBER}, TypeError, "dropout_p must be a number, got tensor"),
    ({"dropout_p": 1j}, TypeError, "dropout_p must be a number, got 1j"),
    ({"softmax_scale": [0.5]}, TypeError, "softmax_scale must be a number, got [0.5]"),
    ({"softmax_scale": LIKE_A_NUMBER}, TypeError, "softmax_scale must be a number, got tensor"),
    ({"softmax_scale": torch.tensor(0.5, device="meta")}, TypeError, "softmax_scale must be a number, got tensor"),
    ({"softmax_scale": torch.tensor(0.5, requires_grad=True)}, ValueError,
     "softmax_scale must be a number that nothing differentiates, got a tensor that requires gradients"),
    ({"softcap": np.array([1.0, 2.0])}, TypeError, "softcap must be a number, got array"),
    ({"causal": "yes"}, TypeError, "causal must be a bool, got 'yes'"),
    ({"causal": torch.tensor([True, False])}, TypeError, "causal must be a bool, got tensor"),
    ({"return_attn_probs": "no"}, TypeError, "return_attn_probs must be a bool, got 'no'"),
    ({"window_size": np.array([1.0, 2.0])}, TypeError, f"{WINDOW}, got [1. 2.]"),
    ({"window_size": torch.tensor([1.0, 2.0])}, TypeError, f"{WINDOW}, got tensor"),
    ({"window_size": (np.float32(1.0), 2)}, TypeError, f"{WINDOW}, got ("),
    ({"window_size": torch.tensor([[1, 2]])}, ValueError, f"{WINDOW}, got tensor"),
    ({"window_size": torch.tensor([1, 2], device="meta")}, ValueError, f"{WINDOW}, got a meta tensor, which has no"),
    ({"window_size": None}, TypeError, f"{WINDOW}, got None"),
    ({"alibi_slopes": np.zeros(2, np.float32)}, TypeError, "alibi_slopes must be a tensor, got ndarray"),
    ({"alibi_slopes": torch.zeros(2, dtype=torch.float64)}, TypeError,
     "alibi_slopes must be of dtype float32, got torch.float64"),
]  # fmt: skip

REFUSED_PACKED = [
    ({"max_seqlen_q": 3.0}, TypeError, f"{LENGTH} element, got 3.0"),
    ({"max_seqlen_q": np.float32(3)}, TypeError, f"{LENGTH} element, got"),
    ({"max_seqlen_q": np.bool_(True)}, TypeError, f"{LENGTH} element, got"),
    ({"max_seqlen_q": np.array([3, 3])}, TypeError, f"{LENGTH} element, got array"),
    ({"max_seqlen_q": None}, TypeError, f"{LENGTH} element, got None"),
    ({"max_seqlen_q": torch.tensor(3.0)}, TypeError, f"{LENGTH} integer, got torch.float32"),
    ({"max_seqlen_q": torch.tensor(True)}, TypeError, f"{LENGTH} integer, got torch.bool"),
    ({"max_seqlen_k": np.int64(-1)}, ValueError, "max_seqlen_k must be at least 0, got -1"),
    ({"max_seqlen_k": torch.tensor(-1)}, ValueError, "max_seqlen_k must be at least 0, got -1"),
    ({"cu_seqlens_q": LENGTHS.numpy()}, TypeError, "cu_seqlens_q must be a tensor, got ndarray"),
    ({"block_table": np.zeros((2, 1), np.int32)}, TypeError, "block_table must be a tensor, got ndarray"),
    ({"block_table": torch.zeros(2, 1, dtype=torch.int32), "return_attn_probs": True, "dropout_p": 0.5}, ValueError,
     "return_attn_probs must be False with block_table and dropout_p > 0, got True"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_refused(arguments, error, message):
    before = torch.random.get_rng_state()
    with pytest.raises(error) as refusal:
        dense(**arguments)
    assert message in str(refusal.value)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED_PACKED)
def test_refused_where_packed(arguments, error, message):
    good = {"cu_seqlens_q": LENGTHS, "cu_seqlens_k": LENGTHS, "max_seqlen_q": 3, "max_seqlen_k": 3}
    before = torch.random.get_rng_state()
    with pytest.raises(error) as refusal:
        flash_attn_varlen_func(Q[0], Q[0], Q[0], **{**good, **arguments})
    assert message in str(refusal.value)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_number_with_a_tangent_is_refused():
    with pytest.raises(ValueError, match=r"softmax_scale must be a number that nothing .* a tangent"):
        torch.func.jvp(lambda x: dense(softmax_scale=x), (torch.tensor(0.5),), (torch.tensor(1.0),))
    with torch.no_grad():
        assert torch.equal(dense(softmax_scale=torch.tensor(0.5, requires_grad=True)), dense(softmax_scale=0.5))


WRONG = {
    "float16": (torch.Tensor.half, TypeError, r"of .*float32, got torch.float16"),
    "float64": (torch.Tensor.double, TypeError, r"of .*float32, got torch.float64"),
    "integers": (torch.Tensor.long, TypeError, r"of .*float32, got torch.int64"),
    "another device": (lambda x: x.to("meta"), ValueError, r"on q's device, cpu, got meta"),
    "another shape": (lambda x: x[..., :1], ValueError, r"of shape \(.*\), got"),
    "none": (lambda x: None, TypeError, r"a tensor, got NoneType"),
}


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize(("wrong", "error", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("argument", ["dout", "dlse", "out", "lse"])
def test_what_the_backward_ops_are_given(argument, wrong, error, message, varlen):
    q, packing = (Q[0], (LENGTHS, LENGTHS, 3, 3, None)) if varlen else (Q, ())
    forward, backward = (
        (ops.varlen_attention, ops.varlen_attention_backward) if varlen else (ops.attention, ops.attention_backward)
    )
    out, lse = forward(q, q, q, *packing)
    given = {"dout": out, "dlse": lse, "out": out, "lse": lse}
    backward(*given.values(), q, q, q, *packing)
    given[argument] = wrong(given[argument])
    if argument == "dlse" and given[argument] is None:
        backward(*given.values(), q, q, q, *packing)
        return
    # The engine is looked for after the check, and before anything is computed.
    with pytest.raises(error, match=f"{argument} must be {message}"):
        backward(*given.values(), q, q, q, *packing, engine="none of them")


def test_float64_has_a_float64_lse():
    q = Q.double()
    out, lse = ops.attention(q, q, q)
    with pytest.raises(TypeError, match=r"lse must be of q's dtype, torch.float64, got torch.float32"):
        ops.attention_backward(out, None, out, lse.float(), q, q, q)
    q = Q.bfloat16()
    out, lse = ops.attention(q, q, q)
    with pytest.raises(TypeError, match=r"lse must be of dtype torch.float32, got torch.bfloat16"):
        ops.attention_backward(out, None, out, lse.bfloat16(), q, q, q)


def test_a_seed_is_checked_without_dropout_too():
    with pytest.raises(TypeError, match=r"dropout_seed must be of dtype int64, got torch.float32"):
        ops.attention(Q, Q, Q, dropout_seed=torch.tensor([1.0]))
