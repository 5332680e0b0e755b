"""Forward-mode AD: tangents agree with naive attention's in float64, and where there are none, nothing is dropped."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Case, cases, cumulative, make, packed
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from compiled_fa import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    tangent,
)
from compiled_fa.problem import Problem
from compiled_fa.testing.budget import budget, error
from compiled_fa.testing.naive import keep_decisions, naive_attention

OPS = torch.ops.compiled_fa


def jvp(function, at, along):
    """Results and their tangents: torch.func.jvp, which is annotated as if there could be a third."""
    return torch.func.jvp(function, at, along)


def tangents_of(data):
    generator = torch.Generator().manual_seed(data.case.seed + 1)
    return tuple(torch.randn(x.shape, generator=generator).to(x.dtype) for x in (data.q, data.k, data.v))


def by_the_op(data, along):
    """Tangents of out and lse, packed."""
    case = data.case
    longest = [max((pair[side] for pair in case.lengths), default=0) for side in (0, 1)]

    def attend(q, k, v):
        if case.dense:
            return OPS.attention(*(data.batched(x) for x in (q, k, v)), *data.options)
        return OPS.varlen_attention(q, k, v, *data.cu_seqlens, *longest, None, *data.options)

    _, found = jvp(attend, (data.q, data.k, data.v), along)
    if not case.dense:
        return dict(zip(("out", "lse"), found, strict=True))
    named = packed(data, (*found, data.batched(data.q), data.batched(data.k), data.batched(data.v)))
    return {name: named[name] for name in ("out", "lse")}


def by_naive_attention(data, along, dtype):
    """The same, sequence by sequence; lse's of rows without keys, which is nan there, 0."""
    case, outs, lses = data.case, [], []
    cu_q, cu_k = (c.tolist() for c in data.cu_seqlens)
    for b, (seqlen_q, seqlen_k) in enumerate(case.lengths):
        keep, slopes = None, data.alibi_slopes
        if data.dropout_seed is not None:
            sizes = len(case.lengths), case.nheads, seqlen_q, seqlen_k
            keep = keep_decisions(data.dropout_seed, case.dropout_p, *sizes)[b : b + 1]
        options = {
            "softmax_scale": case.softmax_scale,
            "causal": case.causal,
            "window_size": case.window_size,
            "softcap": case.softcap,
            "alibi_slopes": slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes,
            "dropout_p": case.dropout_p,
            "keep": keep,
        }
        rows = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1]), slice(cu_k[b], cu_k[b + 1])
        inputs, directions = (
            tuple(x[None, at].to(dtype) for x, at in zip(xs, rows, strict=True))
            for xs in ((data.q, data.k, data.v), along)
        )
        attend = lambda q, k, v, options=options: naive_attention(q, k, v, **options)  # noqa: E731
        (_, lse), (out_tangent, lse_tangent) = jvp(attend, inputs, directions)
        outs.append(out_tangent[0])
        lses.append(torch.where(lse[0].isinf(), 0.0, lse_tangent[0]))
    if not outs:
        return {"out": data.dout.to(dtype), "lse": data.dlse.to(dtype)}
    return {"out": torch.cat(outs), "lse": torch.cat(lses, 1)}


def magnitudes(data, along):
    """Of the terms whose sum a tangent is (testing/budget.py)."""

    def longest(x):
        return float(x.double().norm(dim=-1).max()) if x.numel() else 0.0

    case = data.case
    scale = abs(case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale)
    (q, k, v), (q_tangent, k_tangent, v_tangent) = map(longest, (data.q, data.k, data.v)), map(longest, along)
    probability, score_tangent = 1.0 + scale * q * k, scale * (q_tangent * k + q * k_tangent)
    out = (v_tangent + 2.0 * score_tangent * v) * probability / (1.0 - case.dropout_p)
    return {"out": out, "lse": score_tangent * probability}


def check(case):
    data = make(case)
    along = tangents_of(data)
    found, sizes = by_the_op(data, along), magnitudes(data, along)
    exact, naive = (by_naive_attention(data, along, dtype) for dtype in (torch.float64, case.dtype))
    for name, result in found.items():
        allowed = budget(naive[name], exact[name], sizes[name])
        assert result.shape == exact[name].shape, name
        assert error(result, exact[name]) <= allowed, f"{name}: {error(result, exact[name]):.3e}, allowed {allowed:.3e}"


TILES = st.sampled_from([(128, 512, 1 << 21), (16, 23, 1), (33, 17, 2000)])


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
def test_agrees_with_float64(dense):
    @settings(max_examples=max(1, settings().max_examples // 3))
    @given(cases(dense=dense), TILES)
    def run(case, tiles):
        with pytest.MonkeyPatch.context() as patch:
            for name, size in zip(("QUERIES", "KEYS", "SCORES"), tiles, strict=True):
                patch.setattr(tangent, name, size)
            check(case)

    run()


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
def test_in_tiles_of_their_own_size(dense):
    lengths = ((140, 530),) * 2 if dense else ((140, 530), (0, 5), (4, 0), (129, 513))
    options: dict[str, Any] = {
        "heads_per_key": 2,
        "head_dim_v": 12,
        "softcap": 3.0,
        "slopes": "batch",
        "dropout_p": 0.2,
    }
    check(Case(lengths, dense, nheads_k=1, window_size=(400, 5), **options))


@pytest.mark.parametrize("among", range(3), ids=["q", "k", "v"])
def test_one_tangent_alone(among):
    inputs = [torch.randn(1, 3, 2, 4, dtype=torch.float64) for _ in range(3)]
    direction = torch.randn_like(inputs[among])

    def along(function):
        with forward_ad.dual_level():
            duals = list(inputs)
            duals[among] = forward_ad.make_dual(duals[among], direction)
            return forward_ad.unpack_dual(function(*duals)).tangent

    expected = along(lambda q, k, v: naive_attention(q, k, v, causal=True)[0])
    assert expected.abs().max() > 0.01
    assert torch.allclose(
        along(lambda q, k, v: flash_attn_func(q, k, v, causal=True)), expected, rtol=1e-12, atol=1e-14
    )


def doubles(*shape, count=1):
    return torch.randn(count, *shape, dtype=torch.float64).unbind()


def naive(q, k, v):
    return naive_attention(q, k, v, causal=True)[0]


def ours(q, k, v):
    return flash_attn_func(q, k, v, causal=True)


def ours_packed(q, k, v):
    total = q.shape[0]
    lengths = cumulative([total])
    return flash_attn_varlen_func(q, k, v, lengths, lengths, total, total, causal=True)


def naive_packed(q, k, v):
    return naive(q[None], k[None], v[None])[0]


def checkpointing_keeps_tangents():
    """As of torch 2.12 or 2.13: before, what it saves its inputs with has no rule for them."""
    with forward_ad.dual_level():
        try:
            checkpoint(torch.sin, forward_ad.make_dual(*doubles(2, count=2)), use_reentrant=False)
        except NotImplementedError:
            return False
    return True


@pytest.mark.parametrize(
    ("function", "reference", "shape"),
    [(ours, naive, (2, 3, 2, 4)), (ours_packed, naive_packed, (5, 2, 4))],
    ids=["dense", "varlen"],
)
def test_every_way_to_ask_for_it(function, reference, shape):
    q, k, v, *along = doubles(*shape, count=6)
    _, expected = jvp(reference, (q, k, v), tuple(along))
    assert torch.allclose(jvp(function, (q, k, v), tuple(along))[1], expected)
    assert torch.allclose(torch.func.linearize(function, q, k, v)[1](*along), expected)

    def both(inputs, along):
        return jvp(function, inputs, along)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled((q, k, v), tuple(along))[1], expected)

    def checkpointed(q, k, v):
        return checkpoint(function, q, k, v, use_reentrant=False)

    if checkpointing_keeps_tangents():
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(x, direction) for x, direction in zip((q, k, v), along, strict=True))
            assert torch.allclose(forward_ad.unpack_dual(checkpointed(*duals)).tangent, expected)
    for argnums in range(3):
        expected = torch.func.jacfwd(reference, argnums)(q, k, v)
        assert torch.allclose(torch.func.jacfwd(function, argnums)(q, k, v), expected)


def test_packed_functions():
    qkv, direction = doubles(2, 5, 3, 2, 4, count=2)
    kvs = qkv[:, :, 1:], direction[:, :, 1:]
    _, expected = jvp(lambda x: naive(*x.unbind(2)), (qkv,), (direction,))
    _, found = jvp(lambda x: flash_attn_qkvpacked_func(x, causal=True), (qkv,), (direction,))
    assert torch.allclose(found, expected)
    queries = qkv[:, :, 0], direction[:, :, 0]
    pairs = zip(queries, kvs, strict=True)
    _, found = jvp(lambda q, kv: flash_attn_kvpacked_func(q, kv, causal=True), *pairs)
    assert torch.allclose(found, expected)
    lengths = cumulative([5, 5])
    flat = qkv.flatten(0, 1), direction.flatten(0, 1)

    def qkvpacked(x):
        return flash_attn_varlen_qkvpacked_func(x, lengths, 5, causal=True)

    def kvpacked(q, kv):
        return flash_attn_varlen_kvpacked_func(q, kv, lengths, lengths, 5, 5, causal=True)

    assert torch.allclose(jvp(qkvpacked, *((x,) for x in flat))[1], expected.flatten(0, 1))
    assert torch.allclose(jvp(kvpacked, *((x[:, 0], x[:, 1:]) for x in flat))[1], expected.flatten(0, 1))


def test_through_vmap():
    q, k, v, *along = doubles(3, 2, 3, 2, 4, count=6)
    expected = torch.func.vmap(lambda *x: jvp(naive, x[:3], x[3:])[1])(q, k, v, *along)
    assert torch.allclose(torch.func.vmap(lambda *x: jvp(ours, x[:3], x[3:])[1])(q, k, v, *along), expected)
    _, found = jvp(torch.func.vmap(ours), (q, k, v), tuple(along))
    assert torch.allclose(found, expected)


def test_tangents_of_packed_sequences_through_vmap():
    q, k, v = doubles(5, 2, 4, count=3)
    along = doubles(5, 3, 2, 4, count=3)
    lengths = cumulative([5])
    call = lengths, lengths, 5, 5, None, None, True
    results = OPS.varlen_attention(q, k, v, *call)
    by_jvp = torch.func.vmap(lambda *x: torch.func.jvp(ours_packed, (q, k, v), x)[1], in_dims=1)(*along)
    by_op = torch.func.vmap(lambda *x: OPS.varlen_attention_jvp(q, k, v, *x, *results, *call)[0], in_dims=1)(*along)
    for at in range(3):
        expected = torch.func.jvp(naive_packed, (q, k, v), tuple(x[:, at] for x in along))[1]
        assert torch.allclose(by_jvp[at], expected)
        assert torch.allclose(by_op[at], expected)


def test_autocast_casts_tangents_too():
    q, k, v, *along = torch.randn(6, 1, 5, 2, 8).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, found = jvp(ours, (q, k, v), tuple(along))
    low = [tuple(x.bfloat16() for x in xs) for xs in ((q, k, v), along)]
    assert found.dtype == out.dtype == torch.bfloat16
    assert torch.equal(found, jvp(ours, *low)[1])


@pytest.mark.parametrize("transform", [True, False], ids=["jvp", "dual_level"])
def test_results_keep_their_gradients(transform):
    """A loss of out and of a constant made from its tangent, as consistency models have; parameters want gradients."""
    x, direction, weight = doubles(1, 4, 2, 6, count=3)
    weight = weight[0, 0].requires_grad_()

    def gradient(attend):
        def model(x):
            q, k, v = (x * weight).split(2, -1)
            return attend(q, k, v)

        if transform:
            out, along = jvp(model, (x,), (direction,))
        else:
            with forward_ad.dual_level():
                out, along = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)))
        return torch.autograd.grad((out - along.detach()).square().sum(), weight, retain_graph=True)[0], along

    (found, along), (expected, _) = gradient(ours), gradient(naive)
    assert torch.allclose(found, expected)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        along.sum().backward()


def test_gradients_have_no_tangents():
    """Forward over reverse is refused, and works again outside of the level."""
    q, k, v, direction = doubles(1, 4, 2, 6, count=4)
    q = q.clone().requires_grad_()
    with forward_ad.dual_level():
        out = ours(forward_ad.make_dual(q, direction), k, v)
        with pytest.raises(NotImplementedError, match="attention_backward does not support forward-mode AD in q"):
            torch.autograd.grad(out.sum(), q, retain_graph=True)
    (found,) = torch.autograd.grad(out.sum(), q)
    assert torch.allclose(found, torch.autograd.grad(naive(q, k, v).sum(), q)[0])


def calls():
    """The ops that have no forward rule: tensors by name, and other arguments."""
    q, k, v = (torch.randn(1, 3, 2, 4) for _ in range(3))
    slopes, seed = torch.rand(2), torch.tensor([1])
    options = (None, False, -1, -1, 0.0, slopes, 0.5, seed)
    out, lse = OPS.attention(q, k, v, *options)
    dense = {"q": q, "k": k, "v": v}
    backward = {"dout": torch.ones_like(out), "dlse": torch.ones_like(lse), "out": out, "lse": lse}
    jvp = {**dense, "q_tangent": q, "k_tangent": k, "v_tangent": v, "out": out, "lse": lse}
    packing = (cumulative([3]), cumulative([3]), 3, 3, None)
    kinds = {"attention": dense, "attention_backward": {**backward, **dense}, "attention_jvp": jvp}
    flat = {f"varlen_{op}": {name: x[0] for name, x in tensors.items()} for op, tensors in kinds.items()}
    return {op: (tensors, (), options) for op, tensors in kinds.items()} | {
        op: (tensors, packing, options) for op, tensors in flat.items()
    }


REFUSED = [
    (op, name)
    for op, (tensors, _, _) in calls().items()
    for name in ["alibi_slopes", *(() if op in ("attention", "varlen_attention") else tensors)]
]


@pytest.mark.parametrize(("op", "name"), REFUSED)
def test_what_has_no_rule_refuses_tangents(op, name):
    tensors, packing, options = calls()[op]
    options = list(options)
    with forward_ad.dual_level():
        getattr(OPS, op)(*tensors.values(), *packing, *options)  # none has a tangent
        if name == "alibi_slopes":
            options[5] = forward_ad.make_dual(options[5], torch.ones_like(options[5]))
        else:
            tensors[name] = forward_ad.make_dual(tensors[name], torch.ones_like(tensors[name]))
        with pytest.raises(NotImplementedError, match=f"{op} does not support forward-mode AD in {name}, which has"):
            getattr(OPS, op)(*tensors.values(), *packing, *options)


def test_pages_have_no_tangents():
    q, pages = torch.randn(3, 2, 4), torch.randn(1, 3, 2, 4)
    lengths, table = cumulative([3]), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="with a block_table does not support forward-mode AD"):
        jvp(lambda q: flash_attn_varlen_func(q, pages, pages, lengths, lengths, 3, 3, block_table=table), (q,), (q,))


def test_a_dual_level_inside_compiled_code_is_refused():
    def attend(q, direction):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(ours(forward_ad.make_dual(q, direction), q, q)).tangent

    q, direction = doubles(1, 3, 2, 4, count=2)
    with pytest.raises(Exception, match="in compiled code, and no dual_level"):
        torch.compile(attend, fullgraph=True, backend="eager")(q, direction)
    found = torch.compile(attend, backend="eager")(q, direction)  # a graph break
    assert torch.equal(found, attend(q, direction))


@pytest.mark.parametrize("op", ["attention_jvp", "varlen_attention_jvp"])
def test_opcheck(op):
    tensors, packing, options = calls()[op]
    opcheck(getattr(OPS, op), (*tensors.values(), *packing, *options))
    tensors["q"] = tensors["q"].requires_grad_()
    opcheck(getattr(OPS, op), (*tensors.values(), *packing, *options), test_utils="test_faketensor")


@pytest.mark.parametrize("dim", ["batch", "seqlen"])
def test_memory_is_linear(monkeypatch, dim):
    """At 4 times the length no tensor grows by more than that, and at 4 times the batch no tile does."""

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = result if isinstance(result, (tuple, list)) else [result]
            self.most = max(self.most, *(x.numel() for x in tensors if isinstance(x, torch.Tensor)))
            return result

    def largest(batch, seqlen):
        q = torch.zeros(batch, seqlen, 1, 4)
        with Largest() as mode:
            tangent.tangents(Problem.of(q, q, q, None), q, q, q, q, q.new_zeros(batch, 1, seqlen))
        return mode.most

    for name, size in {"QUERIES": 64, "KEYS": 64, "SCORES": 1 << 13}.items():
        monkeypatch.setattr(tangent, name, size)
    if dim == "seqlen":
        assert largest(1, 1024) <= 4 * largest(1, 256)
    else:
        assert largest(8, 64) == largest(2, 64) == 1 << 13


@pytest.mark.parametrize("among", ["q_tangent", "k_tangent", "v_tangent", "out", "lse"])
def test_the_jvp_op_refuses_wrong_tensors(among):
    tensors, _, options = calls()["attention_jvp"]
    for bad, error_type, message in (
        (tensors[among][:, :1], ValueError, f"{among} must be of shape"),
        (tensors[among].half(), TypeError, f"{among} must be of .*float32, got torch.float16"),
        (tensors[among].to("meta"), ValueError, f"{among} must be on q's device, cpu, got meta"),
    ):
        with pytest.raises(error_type, match=message):
            OPS.attention_jvp(*{**tensors, among: bad}.values(), *options)
