"""The fused engine on a CPU: its block tables against dense masks, and its whole path against float64.

`template` runs what the kernel would, tile by tile, on the block tables and functions that the engine hands it; torch's
own eager flex_attention operators run the same functions on whole matrices.
"""

import importlib.util

import pytest
import template
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Case, cases, check_against_float64, cumulative, make, packed, run_tiled
from torch._subclasses.fake_tensor import FakeTensorMode

from compiled_fa import engines, flash_attn_func, messages, use_engine
from compiled_fa.engines import fused
from compiled_fa.engines.fused import attention, flex
from compiled_fa.engines.fused.aligned import Aligned
from compiled_fa.engines.fused.blocks import BLOCK, Lengths, block_tables
from compiled_fa.engines.fused.layouts import DenseLayout, _dense_block_tables, canonical, layout_of
from compiled_fa.problem import Packed, Problem
from compiled_fa.scores import Window

LENGTHS = st.one_of(st.sampled_from([0, 1, 2, 127, 128, 129, 255, 256, 257, 300, 400]), st.integers(0, 300))
SIDES = st.one_of(st.none(), st.integers(0, 300))
WITHOUT_FP64 = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def run_fused(data, run=None):
    """Forward and backward through the engine; run: in place of its kernel."""
    problem = data.problem()
    dout = data.batched(data.dout) if data.case.dense else data.dout
    with pytest.MonkeyPatch.context() as patch:
        if run is not None:
            patch.setattr(flex, "run", run)
        out, lse = fused.forward(problem)
        gradients = fused.backward(problem, dout, out, lse, data.per_row(data.dlse))
    return packed(data, (out, lse, *gradients))


# ------------------------------------------------------------------------------------------------------ block tables


def dense_tiles(window, lengths, first_q, first_k, blocks_q, blocks_k):
    """(needed, full) of every block of queries and of keys, from masks written out element by element."""
    needed, full = torch.zeros(2, blocks_q, blocks_k, dtype=torch.bool)
    for b, (n, m) in enumerate(lengths):
        position, key = torch.arange(n)[:, None] + m - n, torch.arange(m)
        kept = torch.ones(n, m, dtype=torch.bool)
        kept &= key >= position - window.left if window.left is not None else kept
        kept &= key <= position + window.right if window.right is not None else kept
        for r in range(-(-n // BLOCK)):
            for c in range(-(-m // BLOCK)):
                tile = kept[r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK]
                needed[first_q[b] + r, first_k[b] + c] = tile.any()
                full[first_q[b] + r, first_k[b] + c] = tile.all() and tile.shape[1] == BLOCK
    return needed, full


def listed(indices_of, shape):
    """(needed, full) as block tables have it; each tile once."""
    counts = torch.zeros(2, *shape, dtype=torch.int32)
    for kind, (count, indices) in enumerate((indices_of[:2], indices_of[2:])):
        for block in range(shape[0]):
            for other in indices[0, 0, block, : count[0, 0, block]].tolist():
                counts[kind, block, other] += 1
    assert (counts.sum(0) <= 1).all()
    return counts.sum(0).bool(), counts[1].bool()


@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=5), SIDES, SIDES, st.integers(0, 200))
def test_block_tables_are_those_of_the_mask(lengths, left, right, slack):
    """No needed tile missing, none superfluous, full ones really full and all of them; in both directions."""
    window = Window(left, right)
    cu_q, cu_k = (cumulative([pair[side] for pair in lengths]) for side in (0, 1))
    q, k = Aligned(cu_q, int(cu_q[-1])), Aligned(cu_k, int(cu_k[-1]))
    longest = [max(pair[side] for pair in lengths) + slack for side in (0, 1)]
    found = block_tables(window, q.blocks, k.blocks, Lengths(q.lengths, k.lengths, *longest))
    first_q, first_k = ([0, *((x.lengths + BLOCK - 1) // BLOCK).cumsum(0).tolist()] for x in (q, k))
    sizes = q.blocks.first.shape[0], k.blocks.first.shape[0]
    expected = dense_tiles(window, lengths, first_q, first_k, *sizes)
    for indices_of, shape, turn in ((found.kv, sizes, lambda x: x), (found.q, sizes[::-1], lambda x: x.mT)):
        needed, full = listed(indices_of, shape)
        assert torch.equal(needed, turn(expected[0]))
        assert torch.equal(full, turn(expected[1]))


@given(st.integers(1, 600), st.integers(1, 600), SIDES, SIDES)
def test_dense_block_tables_are_those_of_the_mask(seqlen_q, seqlen_k, left, right):
    window = Window(left, right)
    found = _dense_block_tables(window, seqlen_q, seqlen_k, torch.device("cpu"))
    sizes = -(-seqlen_q // BLOCK), -(-seqlen_k // BLOCK)
    expected = dense_tiles(window, [(seqlen_q, seqlen_k)], [0], [0], *sizes)
    for mine, other in zip(listed(found.kv, sizes), expected, strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(listed(found.q, sizes[::-1]), expected, strict=True):
        assert torch.equal(mine, other.mT)


def varlen_problem(lengths, **options):
    case = Case(tuple((n, n) for n in lengths), nheads_k=1, head_dim=16, head_dim_v=16, dtype=torch.float16, **options)
    return make(case).problem()


def test_block_tables_of_a_large_batch_are_small():
    """128 sequences of 4096 tokens: a few MB; a dense table of blocks would have 64 MB for each of four lists."""
    lengths = Lengths(*(torch.full((128,), 4096, dtype=torch.int32),) * 2, 4096, 4096)
    total = 128 * 4096
    sides = [Aligned(cumulative([4096] * 128), total) for _ in range(2)]
    for window in (Window(None, 0), Window(512, 0)):
        found = block_tables(window, sides[0].blocks, sides[1].blocks, lengths)
        size = sum(x.numel() * x.itemsize for x in found)
        assert size <= 2.5 * 2**20
    assert size <= 0.5 * 2**20  # a window's lists are as narrow as it


def test_dense_block_tables_are_made_once():
    q, k = (torch.randn(1, n, 2, 8) for n in (300, 200))
    problem = Problem.of(q, k, k, None, None, True, 7)
    assert DenseLayout(problem).block_tables is DenseLayout(problem).block_tables


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_host_never_waits(dropout_p):
    """On fake tensors, reading a value is an error: layouts and block tables are made without it."""
    problem = varlen_problem([100, 0, 300], causal=True, dropout_p=dropout_p)
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in (problem.q, problem.k, problem.v))
        cu_q, cu_k = (mode.from_tensor(x) for x in (problem.packed.cu_seqlens_q, problem.packed.cu_seqlens_k))
        seed = mode.from_tensor(torch.tensor([5])) if dropout_p else None
        options = (None, True, -1, -1, 0.0, None, dropout_p, seed)
        for fake in (
            Problem.of(q, k, v, Packed(cu_q, cu_k, 300, 300), *options),
            Problem.of(q[None], k[None], v[None], None, *options),
        ):
            layout = layout_of(fake)
            layout.store_queries(layout.load_queries(fake.q))


def test_lengths_do_not_recompile():
    """What a kernel is compiled for says nothing of lengths or batch, but whether they are multiples of a block."""
    specs = set()

    def run(spec, inputs):
        specs.add(spec)
        return template.run(spec, inputs)

    for lengths in ([100, 20], [7], [300, 1, 0, 130]):
        run_fused(make(Case(tuple((n, n) for n in lengths), causal=True)), run)
    assert len(specs) == 2  # forward and backward
    specs.clear()
    for batch, seqlen in ((1, 100), (3, 77), (2, 300)):
        run_fused(make(Case(((seqlen, seqlen),) * batch, True, causal=True)), run)
    assert len(specs) == 2
    run_fused(make(Case(((256, 256),) * 2, True, causal=True)), run)
    assert len(specs) == 4


# --------------------------------------------------------------------------------------------------------- whole engine

BLOCKWISE = st.sampled_from([0, 1, 7, 100, 127, 128, 129, 200, 257])


@settings(max_examples=60)
@given(cases(dense=True, tiles=None), st.tuples(BLOCKWISE, BLOCKWISE), WITHOUT_FP64)
def test_dense_through_the_template_agrees_with_float64(case, lengths, dtype):
    case = Case(**{**case.__dict__, "lengths": (lengths,) * len(case.lengths), "dtype": dtype})
    check_against_float64(make(case), run_fused(make(case), template.run))


@settings(max_examples=60)
@given(cases(dense=False, tiles=None), st.lists(st.tuples(BLOCKWISE, BLOCKWISE), max_size=4), WITHOUT_FP64)
def test_varlen_through_the_template_agrees_with_float64(case, lengths, dtype):
    case = Case(**{**case.__dict__, "lengths": tuple(lengths), "dtype": dtype})
    check_against_float64(make(case), run_fused(make(case), template.run))


FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (40, 3)},
    "softcap, slopes": {"softcap": 3.0, "slopes": "batch"},
    "dropout": {"dropout_p": 0.3, "causal": True},
}


@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
def test_both_engines_and_torchs_operators_agree(options, dense):
    """Same decisions, same masks: the tiled engine, the template, and torch's eager flex_attention on whole
    matrices."""
    lengths = ((200, 300),) * 2 if dense else ((67, 90), (0, 3), (5, 0), (140, 300), (33, 20))
    data = make(Case(lengths, dense, heads_per_key=2, head_dim=16, head_dim_v=24, **options))
    expected = run_tiled(data)
    for run in (template.run, None):
        found = run_fused(data, run)
        check_against_float64(data, found)
        for name, x in expected.items():
            assert torch.allclose(found[name], x, rtol=1e-4, atol=2e-5), name


def test_paged_keys():
    q = torch.randn(9, 4, 16)
    pages = torch.randn(40, 16, 2, 16)
    table = torch.randperm(40).to(torch.int32)[:30].view(3, 10)
    packing = Packed(cumulative([4, 0, 5]), cumulative([150, 3, 77]), 5, 150, table)
    problem = Problem.of(q, pages, pages, packing, None, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "run", template.run)
        out, lse = fused.forward(problem)
    from compiled_fa.engines import tiled

    expected = tiled.forward(problem)
    assert torch.allclose(out, expected[0], atol=1e-5)
    assert torch.allclose(lse, expected[1], atol=1e-5)


@pytest.mark.parametrize("layout", ["qkv packed", "heads first", "odd"])
def test_strides(layout, monkeypatch):
    """Views of a packed qkv go to the kernel as they are; what it is not compiled for is copied."""
    wide = torch.randn(2, 130, 3, 4, 32)
    q, k, v = wide.unbind(2)
    if layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if layout == "odd":
        q, k, v = (x[..., ::2].repeat_interleave(2, -1)[..., 1::2] for x in (q, k, v))
    seen = []

    def run(spec, inputs):
        seen.append(inputs[0].untyped_storage().data_ptr() == wide.untyped_storage().data_ptr())
        return template.run(spec, inputs)

    monkeypatch.setattr(flex, "run", run)
    problem = Problem.of(q, k, v, None, None, True)
    out, lse = fused.forward(problem)
    gradients = fused.backward(problem, torch.ones_like(out), out, lse)
    exact = q, k, v = tuple(x.double().requires_grad_() for x in (q, k, v))
    expected = flash_attn_func(q, k, v, causal=True)
    assert torch.allclose(out, expected.float(), atol=1e-5)
    for found, other in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert torch.allclose(found, other.float(), atol=1e-4)
    assert seen == [layout == "qkv packed"] * 2


@given(
    st.tuples(*[st.integers(1, 3)] * 3, st.sampled_from([16, 24])),
    st.permutations(range(4)),
    st.lists(st.integers(0, 4096), min_size=4, max_size=4),
)
def test_strides_of_dimensions_of_size_1_mean_nothing(shape, order, numbers):
    """However they lie and whatever stands there: the rows of a batch behind each other, heads within a row."""
    by_place = torch.randn([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(4)])
    strides = [numbers[dim] if shape[dim] == 1 else by_place.stride(dim) for dim in range(4)]
    x = by_place.as_strided(shape, strides)
    found = canonical(x)
    _, heads, rows, columns = shape
    _, head, row, column = found.stride()
    assert torch.equal(found, x)
    assert column == 1
    assert head >= columns
    assert row >= heads * head
    assert found.stride(0) == rows * row


def test_one_query_as_a_rotary_leaves_it_is_not_copied():
    q = torch.randn(2, 16, 1, 64)  # (B, H, 1, D), contiguous
    assert canonical(q).data_ptr() == q.data_ptr()


def test_it_says_why_it_cannot_serve():
    cpu, q = torch.device("cpu"), torch.randn(1, 4, 2, 8)
    assert fused.unsupported_reason(cpu) == "it needs a CUDA device, and this is cpu"
    with (
        use_engine("fused"),
        pytest.raises(RuntimeError, match=r"fused engine was asked for and cannot serve .* needs a CUDA device"),
    ):
        flash_attn_func(q, q, q)


@pytest.mark.parametrize(
    ("capability", "problem", "reason"),
    [
        ((7, 0), None, "needs compute capability 7.5, and this device has 7.0"),
        ((8, 0), {"dtype": torch.float64}, "these are fp64"),
        ((8, 0), {"head_dim": 300}, "head_dim up to 256, and this is 300"),
        ((8, 0), {"meta": (2, 65536, 64, 128)}, "less than 2**30 elements, and this has 1073741824"),
        ((8, 0), {}, None),
        ((7, 5), {"dtype": torch.bfloat16}, None),
        ((7, 5), {"dtype": torch.bfloat16, "head_dim": 160}, "for torch.bfloat16 end at head_dim 128, and this is 160"),
        ((7, 5), {"dtype": torch.float16, "head_dim": 160}, None),
    ],
)
def test_reasons_on_a_gpu(monkeypatch, capability, problem, reason):
    pytest.importorskip("triton", reason="the fused engine needs Triton")
    monkeypatch.setattr(attention, "capability_of", lambda device: capability)
    given_problem = None
    if problem is not None and "meta" in problem:
        q = torch.empty(problem["meta"], device="meta")
        given_problem = Problem.of(q, q, q, None)
    elif problem is not None:
        given_problem = make(Case(((4, 4),), True, **problem)).problem()
    found = fused.unsupported_reason(torch.device("cuda"), given_problem)
    assert found is None if reason is None else reason in (found or "")


def test_serving_by_second_choice_is_said_once(monkeypatch, caplog):
    """Off the CPU, where the fused engine is expected."""
    monkeypatch.setattr(messages, "_said", set())
    q = torch.empty(1, 4, 2, 8, device="meta")
    for _ in range(2):
        assert engines.select(Problem.of(q, q, q, None), "forward").engine.name == "tiled"
    assert len(caplog.records) == 1
    assert "tiled engine serves on meta, not fused: it needs a CUDA device" in caplog.text


def test_without_triton(monkeypatch):
    monkeypatch.setattr(attention, "capability_of", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fused.unsupported_reason(torch.device("cuda")) == "Triton is not installed"
