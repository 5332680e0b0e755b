"""The ops as PyTorch sees them: opcheck, gradcheck, autocast, checkpointing, vmap, export, double backward."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from support import cumulative
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from compiled_fa import flash_attn_func, flash_attn_varlen_func, validation

DENSE, VARLEN = torch.ops.compiled_fa.attention, torch.ops.compiled_fa.varlen_attention


def rows(*shape, grad=False, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


OPTIONS = {
    "plain": {},
    "causal window": {"causal": True, "window_left": 5},
    "softcap and slopes": {"softcap": 3.0, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
    "dropout": {"dropout_p": 0.3, "dropout_seed": torch.tensor([7])},
    "numbers": {"softcap": 1.0, "numbers": torch.tensor([0.3, 3.0, 0.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("nheads_k", [4, 2], ids=["MHA", "GQA"])
def test_opcheck_dense(options, nheads_k, grad):
    q, k, v = rows(2, 9, 4, 8, grad=grad), rows(2, 11, nheads_k, 8, grad=grad), rows(2, 11, nheads_k, 6, grad=grad)
    opcheck(DENSE, (q, k, v), options)
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = DENSE(q, k, v, **options)
    opcheck(torch.ops.compiled_fa.attention_backward, (out, torch.ones_like(lse), out, lse, q, k, v), options)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_opcheck_varlen(options, grad):
    q, k, v = rows(9, 4, 8, grad=grad), rows(11, 2, 8, grad=grad), rows(11, 2, 6, grad=grad)
    packing = cumulative([4, 0, 5]), cumulative([3, 7, 1]), 5, 7
    opcheck(VARLEN, (q, k, v, *packing), options)
    q, k, v = q.detach(), k.detach(), v.detach()
    out, lse = VARLEN(q, k, v, *packing, **options)
    opcheck(torch.ops.compiled_fa.varlen_attention_backward, (out, None, out, lse, q, k, v, *packing), options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    """Also through lse."""
    double = {"grad": True, "dtype": torch.float64}
    q, k, v = rows(2, 5, 4, 3, **double), rows(2, 6, 2, 3, **double), rows(2, 6, 2, 2, **double)
    torch.autograd.gradcheck(lambda *x: DENSE(*x, **options), (q, k, v))
    q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in (q, k, v))
    packing = cumulative([3, 2, 5]), cumulative([4, 2, 6]), 5, 6  # no empty rows: their lse is -inf
    torch.autograd.gradcheck(lambda *x: VARLEN(*x, *packing, **options), (q, k, v))


def test_numbers_of_a_tensor_are_those_of_the_arguments():
    q, k, v = rows(2, 9, 4, 8), rows(2, 11, 4, 8), rows(2, 11, 4, 8)
    numbers = torch.tensor([0.3, 3.0, 0.2], dtype=torch.float64)
    seed = {"dropout_seed": torch.tensor([7])}
    found = DENSE(q, k, v, 1.0, softcap=1.0, dropout_p=0.5, numbers=numbers, **seed)
    expected = DENSE(q, k, v, 0.3, softcap=3.0, dropout_p=0.2, **seed)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for wrong in (numbers[:2], numbers.float()):
        with pytest.raises(ValueError, match="numbers must be"):
            DENSE(q, k, v, 1.0, softcap=1.0, numbers=wrong)
    with pytest.raises(ValueError, match="softmax_scale must be finite"):
        DENSE(q, k, v, numbers=numbers * torch.inf)


def test_gradient_of_lse_alone():
    q, k, v = (rows(1, 4, 2, 3, grad=True, dtype=torch.float64) for _ in range(3))
    DENSE(q, k, v)[1].sum().backward()
    found = q.grad.clone()
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 3**-0.5
    (expected,) = torch.autograd.grad(scores.logsumexp(-1).sum(), q)
    assert torch.allclose(found, expected)
    assert v.grad is None or (v.grad == 0).all()


def test_double_backward_is_refused_clearly():
    q = rows(1, 4, 1, 4, grad=True)
    (dq,) = torch.autograd.grad(flash_attn_func(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        dq.sum().backward()


@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_casts_like_sdpa(mixed):
    q, k, v = rows(1, 6, 2, 8, grad=True), rows(1, 6, 2, 8), rows(1, 6, 2, 8)
    if mixed:
        k = k.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flash_attn_func(q, k, v, causal=True)
        varlen = flash_attn_varlen_func(q[0], k[0], v[0], cumulative([6]), cumulative([6]), 6, 6, causal=True)
    assert out.dtype == varlen.dtype == torch.bfloat16
    expected = flash_attn_func(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_replays_dropout(use_reentrant):
    q, k, v = (rows(2, 12, 2, 4, grad=True) for _ in range(3))

    def out_and_gradients(function):
        for x in (q, k, v):
            x.grad = None
        torch.manual_seed(3)
        out = function(q, k, v)
        out.square().sum().backward()
        return [out.detach(), *(x.grad for x in (q, k, v))]

    def attend(q, k, v):
        return flash_attn_func(q, k, v, dropout_p=0.5)

    expected = out_and_gradients(attend)
    found = out_and_gradients(lambda *x: checkpoint(attend, *x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_packed_calls_alike_are_checked_for_what_changes(monkeypatch):
    """Lengths and blocks, which NumPy changes without a word; in inference mode and with gradients."""
    sums, table = np.array([0, 5, 12], dtype=np.int32), np.array([[0, 1], [2, 3]], dtype=np.int32)
    cu_seqlens, block_table = torch.from_numpy(sums), torch.from_numpy(table)
    q, blocks = torch.randn(12, 2, 8, requires_grad=True), torch.randn(4, 6, 2, 8)

    def call(k, *paged):
        return VARLEN(q, k, k, cu_seqlens, cu_seqlens, 12, 12, *paged)[0]

    def sequences(x):
        return [x[start:stop][None] for start, stop in pairwise(sums.tolist())]

    def keys(b, length):
        return blocks[table[b].tolist()].flatten(0, 1)[None, :length]

    def check():
        out = torch.cat([flash_attn_func(x, x, x)[0] for x in sequences(q)])
        found = call(q)
        assert torch.allclose(found, out, atol=1e-6)
        if found.requires_grad:
            gradient, expected = (torch.autograd.grad(x.square().sum(), q)[0] for x in (found, out))
            assert torch.allclose(gradient, expected, atol=1e-5)
        pages = [keys(b, x.shape[1]) for b, x in enumerate(sequences(q))]
        out = torch.cat([flash_attn_func(x, k, k)[0] for x, k in zip(sequences(q.detach()), pages, strict=True)])
        with torch.no_grad():
            assert torch.allclose(call(blocks, block_table), out, atol=1e-6)

    for middle in (5, 5, 7, 0, 12):
        sums[1] = middle
        for mode in (torch.inference_mode(), torch.enable_grad()):
            with mode:
                check()
        table[:] = table[::-1].copy()
    with monkeypatch.context() as patch:  # and are not, where nothing has
        patch.setattr(validation, "packed_lengths", None)
        check()
    sums[1] = 13
    with pytest.raises(ValueError, match="cu_seqlens_q must be not decreasing, got 13 before 12 at 1"):
        call(q)
    sums[1] = 5
    table[1, 0] = 4
    with pytest.raises(ValueError, match="block_table must be block numbers from 0 to 3, got 1 to 4"):
        call(blocks, block_table)


def test_vmap_folds_into_the_batch():
    q, k, v = rows(3, 2, 7, 4, 8), rows(2, 9, 3, 2, 8), rows(2, 9, 2, 8)
    slopes = torch.rand(2, 4)

    def attend(q, k, v):
        return flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes)

    found = torch.func.vmap(attend, in_dims=(0, 2, None))(q, k, v)
    expected = torch.stack([attend(q[n], k[:, :, n], v) for n in range(3)])
    assert torch.allclose(found, expected, atol=1e-6)


def test_vmap_of_varlen_is_refused_clearly():
    q, cu_seqlens = rows(3, 8, 2, 4), cumulative([8])
    with pytest.raises(NotImplementedError, match="varlen attention has no batching rule"):
        torch.func.vmap(lambda q: flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 8, 8))(q)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).unbind(-3)
        return flash_attn_func(q, k, v, causal=True).flatten(-2)


def test_export():
    block, x = Block().eval(), rows(2, 10, 16)
    dynamic = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen")}}
    exported = torch.export.export(block, (x,), dynamic_shapes=dynamic)
    assert "compiled_fa.attention" in str(exported.graph)
    for shape in ((2, 10, 16), (3, 21, 16)):
        y = rows(*shape)
        assert torch.allclose(exported.module()(y), block(y), atol=1e-6)


def test_meta_tensors_give_shapes():
    q = torch.empty(2, 5, 4, 8, device="meta", dtype=torch.float16)
    out, lse = DENSE(q, q[:, :, :2], torch.empty(2, 5, 2, 12, device="meta", dtype=torch.float16))
    assert (out.shape, lse.shape, lse.dtype) == ((2, 5, 4, 12), (2, 4, 5), torch.float32)
