"""The six functions: flash_attn's signatures, and every argument at work."""

import inspect
from functools import partial

import pytest
import torch
from support import Case, cumulative, make, run_naive

import compiled_fa
from compiled_fa import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

TAIL = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"


@pytest.mark.parametrize(
    ("name", "signature"),
    [
        ("flash_attn_func", f"q, k, v, {TAIL}"),
        ("flash_attn_kvpacked_func", f"q, kv, {TAIL}"),
        ("flash_attn_qkvpacked_func", f"qkv, {TAIL}"),
        ("flash_attn_varlen_func", f"q, k, v, {LENGTHS}, {TAIL}, block_table=None"),
        ("flash_attn_varlen_kvpacked_func", f"q, kv, {LENGTHS}, {TAIL}"),
        ("flash_attn_varlen_qkvpacked_func", f"qkv, cu_seqlens, max_seqlen, {TAIL}"),
    ],
)
def test_signatures_are_flash_attns(name, signature):
    function = getattr(compiled_fa, name)
    assert inspect.isfunction(function)
    specification = inspect.getfullargspec(function)
    given = specification.defaults or ()
    defaults = [""] * (len(specification.args) - len(given)) + [f"={d}" for d in given]
    assert ", ".join(a + d for a, d in zip(specification.args, defaults, strict=True)) == signature
    assert specification.varargs is specification.varkw is None
    assert not specification.kwonlyargs


def dense(seqlen=20, nheads=4, nheads_k=2, batch=2):
    return [torch.randn(batch, seqlen, h, 8) for h in (nheads, nheads_k, nheads_k)]


def test_packed_functions_are_the_plain_one():
    q, k, v = dense(nheads_k=4)
    expected = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True), expected)
    assert torch.equal(flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), causal=True), expected)
    cu_seqlens = cumulative([20, 20])
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    varlen = flash_attn_varlen_func(rows[0], rows[1], rows[2], cu_seqlens, cu_seqlens, 20, 20, causal=True)
    assert torch.allclose(varlen.view_as(expected), expected, atol=1e-6)
    kv, qkv = torch.stack(rows[1:], 1), torch.stack(rows, 1)
    kvpacked = flash_attn_varlen_kvpacked_func(rows[0], kv, cu_seqlens, cu_seqlens, 20, 20, causal=True)
    assert torch.equal(kvpacked, varlen)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 20, causal=True), varlen)


def test_gradients_reach_packed_tensors():
    qkv = torch.randn(2, 9, 3, 2, 4, requires_grad=True)
    flash_attn_qkvpacked_func(qkv).square().sum().backward()
    q, k, v = parts = [x.detach().clone().requires_grad_() for x in qkv.unbind(2)]
    expected = torch.autograd.grad(flash_attn_func(q, k, v).square().sum(), parts)
    assert qkv.grad is not None
    assert torch.allclose(qkv.grad, torch.stack(expected, 2))


@pytest.mark.parametrize("window_size", [(3, 1), [3, 1], torch.tensor([3, 1])], ids=["tuple", "list", "tensor"])
def test_window_size_forms(window_size):
    q, k, v = dense()
    assert torch.equal(
        flash_attn_func(q, k, v, window_size=window_size), flash_attn_func(q, k, v, 0.0, None, False, (3, 1))
    )
    assert not torch.equal(flash_attn_func(q, k, v, window_size=window_size), flash_attn_func(q, k, v))


def test_forms_that_mean_none():
    q, k, v = dense()
    expected = flash_attn_func(q, k, v)
    assert torch.equal(flash_attn_func(q, k, v, softcap=None), expected)
    assert torch.equal(flash_attn_func(q, k, v, dropout_p=1e-30), expected)
    assert torch.equal(flash_attn_func(q, k, v, deterministic=True), expected)
    assert torch.equal(flash_attn_func(q, k, v, softmax_scale=8**-0.5), expected)


def test_max_seqlen_may_be_a_tensor():
    q, k, v = (x[0] for x in dense())
    cu_seqlens = cumulative([8, 12])
    expected = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 12, 12)
    longest = torch.tensor(12)
    assert torch.equal(flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest), expected)


@pytest.mark.parametrize("page_size", [0, 4])
def test_max_seqlen_as_a_tensor_in_a_graph(page_size):
    """It cannot be read there: the number of rows bounds it, in pages that of the rows that they hold."""
    data = make(Case(((1, 33), (3, 7)), page_size=page_size))
    k, v, table = data.pages() if page_size else (data.k, data.v, None)
    longest = [torch.tensor(n) for n in (data.case.max_seqlen_q, data.case.max_seqlen_k)]

    def attend(longest_q, longest_k):
        return flash_attn_varlen_func(data.q, k, v, *data.cu_seqlens, longest_q, longest_k, block_table=table)

    in_graph = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.allclose(in_graph(*longest), attend(*longest), atol=1e-6)


def test_return_attn_probs_without_dropout():
    q, k, v = dense()
    out, lse, probs = flash_attn_func(q, k, v, return_attn_probs=True)
    assert out.shape == q.shape
    assert lse.shape == (2, 4, 20)
    assert lse.dtype == torch.float32
    assert probs is None


@pytest.mark.parametrize("window_size", [(-1, -1), (4, 2)])
def test_dense_dropout_probabilities_explain_out(window_size):
    q, k, v = dense()
    out, _, probs = flash_attn_func(q, k, v, dropout_p=0.3, window_size=window_size, return_attn_probs=True)
    assert (probs.abs().amax(-1) == 1.0).all()
    assert (probs < 0).any()
    kept = (probs / probs.abs().sum(-1, keepdim=True)).clamp(min=0) / 0.7
    assert torch.allclose(torch.einsum("bhqk,bkhd->bqhd", kept, v.repeat_interleave(2, 2)), out, atol=1e-5)


def test_varlen_dropout_probabilities_explain_out():
    lengths_q, lengths_k = [5, 0, 9], [7, 3, 4]
    q, k, v = torch.randn(14, 4, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    out, lse, probs = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 9, 7, dropout_p=0.4, causal=True, alibi_slopes=torch.rand(3, 4), return_attn_probs=True
    )
    assert probs.shape == (3, 4, 9, 7)
    assert lse.shape == (4, 14)
    for b, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        of = probs[b, :, :n, :m]
        kept = (of / of.abs().sum(-1, keepdim=True).clamp(min=1)).clamp(min=0) / 0.6
        values = v[cu_k[b] : cu_k[b + 1]].repeat_interleave(2, 1)
        assert torch.allclose(torch.einsum("hqk,khd->qhd", kept, values), out[cu_q[b] : cu_q[b + 1]], atol=1e-5)
        assert (probs[b, :, n:] == 0).all()
        assert (probs[b, :, :, m:] == 0).all()


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("options", [{}, {"causal": True, "window_size": (9, 0)}, {"dropout_p": 0.3}], ids=str)
def test_block_table_reads_pages_in_any_order(block_size, options):
    lengths_q, lengths_k = [5, 1, 0, 3], [20, 33, 4, 0]
    q, k, v = torch.randn(9, 4, 8), torch.randn(57, 2, 8), torch.randn(57, 2, 12)
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
    blocks = [-(-n // block_size) for n in lengths_k]
    order = torch.randperm(sum(blocks) + 3).to(torch.int32)  # three pages nobody uses
    block_table = torch.full((4, max(blocks)), 10**6, dtype=torch.int32)  # unused entries may hold anything
    pages_k = torch.full((len(order), block_size, 2, 8), torch.nan)
    pages_v = torch.full((len(order), block_size, 2, 12), torch.nan)
    for b, n in enumerate(lengths_k):
        for j in range(n):
            page = order[sum(blocks[:b]) + j // block_size]
            block_table[b, j // block_size] = page
            pages_k[page, j % block_size] = k[cu_k[b] + j]
            pages_v[page, j % block_size] = v[cu_k[b] + j]
    results = []
    for keys, values, table in ((k, v, None), (pages_k, pages_v, block_table)):
        torch.manual_seed(1)
        results.append(flash_attn_varlen_func(q, keys, values, cu_q, cu_k, 5, 33, block_table=table, **options))
    assert torch.allclose(results[0], results[1], atol=1e-6)


def test_paged_backward_is_refused_clearly():
    q = torch.randn(3, 1, 4, requires_grad=True)
    pages, table = torch.randn(2, 4, 1, 4), torch.tensor([[1, 0]], dtype=torch.int32)
    out = flash_attn_varlen_func(q, pages, pages, cumulative([3]), cumulative([6]), 3, 6, block_table=table)
    with pytest.raises(RuntimeError, match=r"block_table.*forward only"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("q_shape", "k_shape"),
    [
        ((0, 5, 2, 4), (0, 7, 1, 4)),
        ((2, 0, 2, 4), (2, 7, 1, 4)),
        ((2, 5, 2, 4), (2, 0, 1, 4)),
        ((2, 0, 2, 4), (2, 0, 1, 4)),
        ((1, 9, 2, 4), (1, 3, 1, 4)),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_and_short_shapes_give_defined_results(q_shape, k_shape, causal):
    q, k, v = (torch.randn(s, requires_grad=True) for s in (q_shape, k_shape, k_shape))
    out, lse, _ = flash_attn_func(q, k, v, causal=causal, return_attn_probs=True)
    assert out.shape == q.shape
    assert lse.shape == (q_shape[0], q_shape[2], q_shape[1])
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(dx.shape == x.shape and not dx.isnan().any() for dx, x in zip(gradients, (q, k, v), strict=True))
    without_keys = max(0, q_shape[1] - k_shape[1]) if causal or k_shape[1] == 0 else 0
    assert (out[:, :without_keys] == 0).all()
    assert (lse[:, :, :without_keys] == -torch.inf).all()
    assert lse[:, :, without_keys:].isfinite().all()


@pytest.mark.parametrize("engine", ["sdpa_cpu", "tiled"])
def test_strided_inputs_are_not_copied_whole(engine):
    """What is copied, into tiles or out of the kernel, is never q, k or v as a whole."""
    wide = torch.randn(1, 1024, 3, 8, 16)
    q, k, v = wide.unbind(2)
    with (
        compiled_fa.use_engine(engine),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile,
    ):
        flash_attn_func(q, k, v, causal=True)
    copies = [event for event in profile.events() if event.name in ("aten::clone", "aten::contiguous", "aten::copy_")]
    shapes = [sorted(event.input_shapes[0]) for event in copies if event.input_shapes]
    assert shapes
    assert sorted(q.shape) not in shapes


def test_dtypes_and_head_dims_of_v():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        q, k = (torch.randn(1, 6, 2, 5, dtype=dtype) for _ in range(2))
        out, lse, _ = flash_attn_func(q, k, torch.randn(1, 6, 2, 9, dtype=dtype), return_attn_probs=True)
        assert out.dtype == dtype
        assert out.shape == (1, 6, 2, 9)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast_leaves_fp64_and_integers_as_they_are():
    q, k, v = (x.double() for x in dense())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flash_attn_func(q, k, v), flash_attn_func(q, k, v.clone()))
        assert flash_attn_func(q, k, v).dtype == torch.float64
        with pytest.raises(TypeError, match=r"q must be float16, .*, got torch.int64"):
            flash_attn_func(q.long(), k, v)


def test_lse_is_a_natural_logarithm():
    data = make(Case(((9, 9),), True))
    q, k, v = (data.batched(x) for x in (data.q, data.k, data.v))
    lse = flash_attn_func(q, k, v, return_attn_probs=True)[1]
    assert torch.allclose(lse[0], run_naive(data, torch.float64)["lse"].float(), atol=1e-5)


@pytest.mark.parametrize("slopes", [(4,), (2, 4)], ids=str)
def test_what_vmap_shares_is_not_mapped(slopes):
    """alibi_slopes of either shape and the dropout seed are those of every mapped call; to map them is refused."""
    q, k, v = torch.randn(3, 2, 7, 4, 8), torch.randn(3, 2, 9, 2, 8), torch.randn(3, 2, 9, 2, 8)
    slopes, seed = torch.rand(slopes), torch.tensor([7])

    def attend(q, k, v, slopes=slopes, **dropout):
        return compiled_fa.ops.attention(q, k, v, alibi_slopes=slopes, **dropout)[0]

    found = torch.func.vmap(attend)(q, k, v)
    assert torch.allclose(found, torch.stack([attend(q[n], k[n], v[n]) for n in range(3)]), atol=1e-6)
    dropping = partial(attend, dropout_p=0.5, dropout_seed=seed)
    first = torch.func.vmap(dropping)(q, k, v)[0]
    assert torch.allclose(first, dropping(q[0], k[0], v[0]), atol=1e-6)
    with pytest.raises(NotImplementedError, match="alibi_slopes and dropout_seed are shared by all of them"):
        torch.func.vmap(attend)(q, k, v, slopes.expand(3, *slopes.shape))


def test_engine_by_name(monkeypatch):
    q, k, v = dense()
    with compiled_fa.use_engine("tiled"):
        flash_attn_func(q, k, v)
    with pytest.raises(ValueError, match=r"engine must be .*tiled.*got 'quick'"), compiled_fa.use_engine("quick"):
        pass
    monkeypatch.setenv("COMPILED_FA_ENGINE", "quick")
    with pytest.raises(ValueError, match=r"COMPILED_FA_ENGINE must be .*got 'quick'"):
        flash_attn_func(q, k, v)
