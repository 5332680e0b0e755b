"""flash_attn's private forward and backward: results, gradients in place, a merged lse, dropout's state."""

from typing import Any

import pytest
import torch
from support import Case, check_against_float64, cumulative, make, packed, replace

from compiled_fa import flash_attn_func, flash_attn_varlen_func, forward_backward
from compiled_fa.drop_in import extension as flash_attn_gpu
from compiled_fa.testing.naive import naive_attention

private: Any = forward_backward
extension: Any = flash_attn_gpu

DENSE = Case(((9, 14),) * 2, True, heads_per_key=2, causal=True, softcap=3.0, slopes="batch")
PACKED = Case(((5, 9), (0, 3), (4, 0), (1, 7)), heads_per_key=2, head_dim_v=5, window_size=(3, 1), slopes="heads")
CASES = {
    "dense": DENSE,
    "packed": PACKED,
    "dense, fp64": replace(DENSE, dtype=torch.float64),
    "packed, bf16": replace(PACKED, dtype=torch.bfloat16),
}


def nan_like(x):
    """Of other strides than any of x."""
    return torch.full((*x.shape, 2), torch.nan, dtype=x.dtype).mT.contiguous().mT[..., 0]


def scores_of(data):
    case = data.case
    return (case.dropout_p, case.scale, case.causal, *case.window_size, case.softcap, data.alibi_slopes)


def by_function(data):
    q, k, v, dout = (data.laid_out(x) for x in (data.q, data.k, data.v, data.dout))
    packing = data.packing if data.varlen else ()
    name = "varlen_" if data.varlen else ""
    forward = getattr(private, f"_flash_attn_{name}forward")
    backward = getattr(private, f"_flash_attn_{name}backward")
    out, lse, _, rng_state = forward(q, k, v, *packing, *scores_of(data), False)
    gradients = [nan_like(x) for x in (q, k, v)]
    delta = backward(dout, q, k, v, out, lse, *gradients, *packing, *scores_of(data), False, rng_state)
    assert torch.allclose(delta, (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).mT)
    return out, lse, *gradients


def by_extension(data):
    q, k, v, dout = (data.laid_out(x) for x in (data.q, data.k, data.v, data.dout))
    dropout_p, *rest, slopes = scores_of(data)
    out = nan_like(dout)
    gradients = [nan_like(q), None, nan_like(v)]
    if data.varlen:
        sums, longest = data.packing[:2], data.packing[2:]
        found = extension.varlen_fwd(
            q, k, v, out, *sums, None, None, None, slopes, *longest, dropout_p, rest[0], False, *rest[1:], False, None
        )
        lse, rng_state = found[1], found[3]
        scores = (dropout_p, rest[0], False, *rest[1:])
        dq, dk, dv, _ = extension.varlen_bwd(
            dout, q, k, v, out, lse, *gradients, *sums, slopes, *longest, *scores, True, None, rng_state
        )
    else:
        found = extension.fwd(q, k, v, out, slopes, dropout_p, *rest, False, None)
        lse, rng_state = found[1], found[3]
        dq, dk, dv, _ = extension.bwd(
            dout, q, k, v, out, lse, *gradients, slopes, dropout_p, *rest, True, None, rng_state
        )
    assert found[0] is out
    assert dq is gradients[0]
    assert dv is gradients[2]
    return out, lse, dq, dk, dv


@pytest.mark.parametrize("run", [by_function, by_extension])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_are_within_the_budget_and_gradients_are_written_in_place(case, run):
    data = replace(make(case), dlse=None)
    check_against_float64(data, packed(data, run(data)))


@pytest.mark.parametrize("case", [DENSE, PACKED], ids=["dense", "packed"])
def test_backward_drops_what_the_forward_of_its_rng_state_dropped(case):
    """The state of the first forward, after a second one that has drawn another."""
    data = make(replace(case, dropout_p=0.4))
    q, k, v, dout = (data.laid_out(x) for x in (data.q, data.k, data.v, data.dout))
    packing = data.packing if data.varlen else ()
    name = "varlen_" if data.varlen else ""
    forward, backward = (getattr(private, f"_flash_attn_{name}{way}") for way in ("forward", "backward"))
    out, lse, probabilities, rng_state = forward(q, k, v, *packing, *scores_of(data), True)
    other = forward(q, k, v, *packing, *scores_of(data), False)
    assert rng_state.shape == (2,)
    assert not torch.equal(rng_state, other[3])
    assert (probabilities < 0).any()
    assert other[2].numel() == 0
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    backward(dout, q, k, v, out, lse, *gradients, *packing, *scores_of(data), False, rng_state)
    seeded = replace(data, dlse=None, dropout_seed=rng_state[:1])
    check_against_float64(seeded, packed(seeded, (out, lse, *gradients)))


def test_backward_recomputes_probabilities_from_a_merged_lse():
    """As ring attention calls it: keys in two parts, each with the out and lse of the whole."""
    q, dout = torch.randn(2, 2, 6, 4, 8).unbind(0)
    k, v = torch.randn(2, 2, 10, 2, 8).unbind(0)
    options = (0.0, 8**-0.5, False, -1, -1, 0.0, None)
    halves = list(zip(k.split([7, 3], 1), v.split([7, 3], 1), strict=True))
    parts = [private._flash_attn_forward(q, *half, *options, False)[:2] for half in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = torch.stack([part * torch.exp(own - lse).mT[..., None] for part, own in parts]).sum(0)
    dk, dv = (torch.empty_like(x) for x in (k, v))
    dq = torch.zeros_like(q)
    for (key, value), dkey, dvalue in zip(halves, dk.split([7, 3], 1), dv.split([7, 3], 1), strict=True):
        mine = torch.empty_like(q)
        private._flash_attn_backward(dout, q, key, value, out, lse, mine, dkey, dvalue, *options, False)
        dq += mine
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    whole, whole_lse = naive_attention(leaves[0], leaves[1], leaves[2])
    assert torch.allclose(out, whole, atol=1e-6)
    assert torch.allclose(lse, whole_lse, atol=1e-6)
    for found, wanted in zip((dq, dk, dv), torch.autograd.grad(whole, leaves, dout), strict=True):
        assert torch.allclose(found, wanted, atol=1e-5)


def test_a_gradient_that_is_not_wanted_is_none():
    q, k, v = torch.randn(3, 1, 5, 2, 8).unbind(0)
    options = (0.0, None, True, -1, -1, None, None)
    out, lse, _, rng_state = private._flash_attn_forward(q, k, v, *options, True)
    assert rng_state.shape == (2,)
    dv = torch.empty_like(v)
    private._flash_attn_backward(out, q, k, v, out, lse, None, None, dv, *options, False)
    leaf = v.clone().requires_grad_()
    wanted = torch.autograd.grad(flash_attn_func(q, k, leaf, causal=True), leaf, out)[0]
    assert torch.allclose(dv, wanted, atol=1e-6)


@pytest.mark.parametrize("left", [None, [1, 0, 2]], ids=["", "leftpad"])
@pytest.mark.parametrize("used", [None, [4, 0, 5]], ids=["", "seqused"])
@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_do_not_count(left, used, causal):
    lengths_q, lengths_k = [3, 2, 4], [6, 3, 5]
    q, k, v = torch.randn(9, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    start = left or [0, 0, 0]
    stop = used or lengths_k
    sums = [0, 6, 9, 14]
    rows = torch.cat([torch.arange(sums[b] + start[b], max(sums[b] + start[b], sums[b] + stop[b])) for b in range(3)])
    kept = [max(0, stop[b] - start[b]) for b in range(3)]
    wanted = flash_attn_varlen_func(
        q, k[rows], v[rows], cumulative(lengths_q), cumulative(kept), 4, max(kept), causal=causal
    )
    counts = [None if x is None else torch.tensor(x, dtype=torch.int32) for x in (left, used)]
    found = private._flash_attn_varlen_forward(
        q, k, v, cumulative(lengths_q), cumulative(lengths_k), 4, 6, 0.0, None, causal, leftpad_k=counts[0],
        seqused_k=counts[1],
    )[0]  # fmt: skip
    assert torch.equal(found, wanted)


def test_seqused_in_pages():
    q, pages = torch.randn(3, 2, 8), torch.randn(5, 4, 2, 8)
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    sums_q, used = cumulative([1, 2]), torch.tensor([6, 3], dtype=torch.int32)
    arguments = (8**-0.5, True, -1, -1, 0.0, None, False)
    found = private._flash_attn_varlen_forward(
        q, pages, pages, sums_q, cumulative([0, 0]), 2, 8, 0.0, *arguments, table, None, used
    )
    wanted = flash_attn_varlen_func(q, pages, pages, sums_q, cumulative([6, 3]), 2, 8, causal=True, block_table=table)
    assert torch.equal(found[0], wanted)


def backward_with(**changed):
    q = torch.randn(1, 4, 2, 8)
    given: dict[str, Any] = {name: torch.empty_like(q) for name in ("dq", "dk", "dv")}
    given |= dict.fromkeys(("dout", "q", "k", "v", "out"), q)
    given |= {"softmax_lse": torch.randn(1, 2, 4), "dropout_p": 0.0, "softmax_scale": 1.0, "causal": False}
    given |= {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
    given["deterministic"] = False
    return private._flash_attn_backward(**(given | changed))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"dropout_p": 0.5}, ValueError, r"rng_state must be what the forward gave .*got None"),
        ({"dropout_p": 0.5, "rng_state": torch.zeros(2)}, ValueError, r"rng_state must be .*got torch.float32 \(2,\)"),
        (
            {"dropout_p": 0.5, "rng_state": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            r"rng_state must be .*on cpu, .*\(2,\) on meta",
        ),
        ({"dk": torch.empty(1, 4, 2, 9)}, ValueError, r"dk must be of shape \(1, 4, 2, 8\), got \(1, 4, 2, 9\)"),
        ({"dk": torch.empty(1, 4, 2, 8, dtype=torch.int64)}, TypeError, "dk must be of q's dtype, torch.float32, got"),
        ({"dq": torch.empty(1, 4, 2, 8, device="meta")}, ValueError, "dq must be on q's device, cpu, got meta"),
        ({"dq": 3}, TypeError, "dq must be a tensor, got int"),
        ({"out": torch.zeros(1, 4, 2, 8).half()}, TypeError, "out must be of q's dtype"),
    ],
)
def test_a_wrong_argument_is_named_and_nothing_is_written(changed, error, words):
    dv = torch.full((1, 4, 2, 8), 7.0)
    with pytest.raises(error, match=words):
        backward_with(**(changed | {"dv": dv}))
    assert (dv == 7.0).all()


def test_the_extension_takes_no_generator_and_no_out_of_another_kind():
    q = torch.randn(1, 4, 2, 8)
    options = (None, 0.0, 1.0, False, -1, -1, 0.0, False)
    with pytest.raises(ValueError, match="generator must be None"):
        extension.fwd(q, q, q, None, *options, torch.Generator())
    with pytest.raises(ValueError, match=r"out must be of shape \(1, 4, 2, 8\), got \(4, 2, 8\)"):
        extension.fwd(q, q, q, q[0], *options, None)
    with pytest.raises(TypeError, match="out must be of q's dtype"):
        extension.fwd(q, q, q, torch.zeros_like(q, dtype=torch.int32), *options, None)


@pytest.mark.parametrize(("seqused", "words"), [([9, 1], "seqused_k must be from 0 to"), ([1], "of one element a seq")])
def test_more_keys_than_there_are_is_refused(seqused, words):
    q, sums = torch.randn(4, 2, 8), cumulative([2, 2])
    with pytest.raises(ValueError, match=words):
        private._flash_attn_varlen_forward(
            q, q, q, sums, sums, 2, 2, 0.0, None, False, seqused_k=torch.tensor(seqused, dtype=torch.int32)
        )


def test_they_are_traced_whole():
    q, k, v = torch.randn(3, 1, 6, 2, 8).unbind(0)

    def both(q, k, v):
        options = (0.0, 8**-0.5, True, -1, -1, 0.0, None)
        out, lse, _, rng_state = private._flash_attn_forward(q, k, v, *options, False)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        private._flash_attn_backward(out, q, k, v, out, lse, *gradients, *options, False, rng_state)
        return out, lse, *gradients

    traced = torch.compile(both, backend="aot_eager", fullgraph=True)(q, k, v)
    for found, wanted in zip(traced, both(q, k, v), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


def test_blocks_of_what_is_dropped():
    """A caller who takes a row's greatest score, of its blocks, for what its probabilities are divided by."""
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind(0)
    out, lse, found, _ = private._flash_attn_forward(q, k, v, 0.3, None, False, -1, -1, 0.0, None, True)
    (scores,) = torch.einsum("bqhd,bkhd->bhqk", q * 8**-0.5, k).split(
        private._get_block_size_n(q.device, 8, True, False), dim=-1
    )
    probabilities = found.abs() * torch.exp(scores.amax(-1) - lse)[..., None]
    assert torch.allclose(probabilities, torch.softmax(scores, -1), atol=1e-6)
    kept = torch.where(found > 0, probabilities, 0.0) / 0.7
    assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", kept, v), out, atol=1e-5)
