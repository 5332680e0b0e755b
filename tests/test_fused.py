"""The fused engine on a CPU: its block tables against dense masks, and its whole path against float64.

`template` runs what the kernel would, tile by tile, on the tables and functions that the engine hands it; torch's own
eager flex_attention operators run the same functions on whole matrices.
"""

import contextlib
import dataclasses
import importlib.util
import types
from typing import Any

import pytest
import template
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Case, cases, check_against_float64, cumulative, make, packed, run_tiled
from torch._subclasses.fake_tensor import FakeTensorMode

from compiled_fa import engines, flash_attn_func, messages, use_engine
from compiled_fa.engines import fused, nvidia
from compiled_fa.engines.fused import kernels, tables
from compiled_fa.engines.fused.blocks import BLOCK, BlockTables, bounded
from compiled_fa.engines.fused.kernels import canonical
from compiled_fa.problem import Packed, Problem
from compiled_fa.scores import Window

LENGTHS = st.one_of(st.sampled_from([0, 1, 2, 127, 128, 129, 255, 256, 257, 300, 400]), st.integers(0, 300))
SIDES = st.one_of(st.none(), st.integers(0, 300))
WITHOUT_FP64 = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def run_fused(data, on=template.in_place_of_the_kernel):
    """Forward and backward through the engine; on: in place of its kernel."""
    problem = data.problem()
    dout = data.batched(data.dout) if data.case.dense else data.dout
    with on():
        out, lse = fused.forward(problem)
        gradients = fused.backward(problem, dout, out, lse, data.per_row(data.dlse))
    return packed(data, (out, lse, *gradients))


# ------------------------------------------------------------------------------------------------------------ tables


def kept(window, lengths, rows_q, rows_k, first_k=None):
    """The mask over whole tensors of rows, written out element by element. first_k: of each sequence's keys."""
    mask = torch.zeros(rows_q, rows_k, dtype=torch.bool)
    start_q = start_k = 0
    for b, (n, m) in enumerate(lengths):
        start_k = start_k if first_k is None else first_k[b]
        position, key = torch.arange(n)[:, None] + m - n, torch.arange(m)
        inside = torch.ones(n, m, dtype=torch.bool)
        inside &= key >= position - window.left if window.left is not None else inside
        inside &= key <= position + window.right if window.right is not None else inside
        mask[start_q : start_q + n, start_k : start_k + m] = inside
        start_q, start_k = start_q + n, start_k + m
    return mask


def by_block(mask, last_may_be_short):
    """(needed, full, within a block's run) of every tile. last_may_be_short: tiles whose columns end with the mask."""
    rows, columns = mask.shape
    shape = -(-rows // BLOCK), -(-columns // BLOCK)
    needed, full, run = torch.zeros(3, *shape, dtype=torch.bool)
    for r in range(shape[0]):
        seen = mask[r * BLOCK : (r + 1) * BLOCK]
        some = seen.any(0).nonzero().flatten().tolist()
        for c in range(shape[1]):
            tile = seen[:, c * BLOCK : (c + 1) * BLOCK]
            needed[r, c] = tile.any()
            full[r, c] = tile.all() and (tile.shape[1] == BLOCK or last_may_be_short)
        if some:
            run[r, some[0] // BLOCK : some[-1] // BLOCK + 1] = True
    return needed, full, run


def listed(table, shape, batch=0):
    """(needed, full) as block tables have it; each tile once."""
    counts = torch.zeros(2, *shape, dtype=torch.int32)
    for block in range(shape[0]):
        for other, full in template.tiles(table, batch, block):
            counts[int(full), block, other] += 1
    assert (counts.sum(0) <= 1).all()
    return counts.sum(0).bool(), counts[1].bool()


def check_tables(found, window, lengths, rows_q, rows_k, first_k=None):
    mask = kept(window, lengths, rows_q, rows_k, first_k)
    column = torch.arange(rows_k)
    rows = (column >= found["start"][:rows_q, None]) & (column < found["stop"][:rows_q, None])
    assert torch.equal(rows, mask)
    lists = [found[name] for name in BlockTables._fields]
    # Of keys past the end something would be added; of queries past the end nothing is.
    for table, seen, short in ((lists[:4], mask, False), (lists[4:], mask.mT, True)):
        needed, full, run = by_block(seen, short)
        if short and seen.shape[0] % BLOCK:
            full[-1] = False
        mine = listed(table, needed.shape)
        assert torch.equal(mine[0], run)
        assert torch.equal(mine[1], full)
        assert (mine[0] | ~needed).all()


@given(st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=5), SIDES, SIDES, st.integers(0, 200), st.booleans())
def test_tables_of_packed_rows_are_those_of_the_mask(lengths, left, right, slack, alike):
    """What a row sees, exactly; of tiles none missing, full ones really full and all of them; in both directions."""
    lengths = [(n, n) for n, _ in lengths] if alike else lengths
    cu_q, cu_k = (cumulative([pair[side] for pair in lengths]) for side in (0, 1))
    rows_q, rows_k = int(cu_q[-1]) + slack % 7, int(cu_k[-1]) + slack % 7
    longest = [max(pair[side] for pair in lengths) + slack for side in (0, 1)]
    q, k = (torch.empty(rows, 1, 8, device="meta") for rows in (rows_q, rows_k))
    packing = Packed(cu_q, cu_q if alike else cu_k, *longest)
    problem = Problem.of(
        q, k, k, packing, window_left=-1 if left is None else left, window_right=-1 if right is None else right
    )
    sizes = tables.sizes_of(problem, "packed")
    found = tables.Shape("packed", False).tables(
        sizes, bounded(problem.window), cu_q.device, cu_q, packing.cu_seqlens_k
    )
    check_tables(found, problem.window, lengths, rows_q, rows_k)


@given(st.integers(1, 600), st.integers(1, 600), SIDES, SIDES)
def test_dense_tables_are_those_of_the_mask(seqlen_q, seqlen_k, left, right):
    window = Window(left, right)
    q, k = (torch.empty(1, n, 1, 8, device="meta") for n in (seqlen_q, seqlen_k))
    problem = Problem.of(
        q, k, k, None, window_left=-1 if left is None else left, window_right=-1 if right is None else right
    )
    found = tables.Shape("dense", False).tables(tables.sizes_of(problem, "dense"), bounded(window), torch.device("cpu"))
    check_tables(found, window, [(seqlen_q, seqlen_k)], seqlen_q, seqlen_k)


@given(st.lists(st.tuples(st.integers(0, 9), LENGTHS), min_size=1, max_size=5), SIDES, SIDES, st.sampled_from([0, 16]))
def test_tables_of_padded_queries_are_those_of_the_mask(lengths, left, right, block_size):
    """Few queries a sequence, on packed keys and on keys in pages."""
    cu_q, cu_k = (cumulative([pair[side] for pair in lengths]) for side in (0, 1))
    longest_q, longest_k = (max(max(pair[side] for pair in lengths), 1) for side in (0, 1))
    blocks = -(-longest_k // block_size) if block_size else 0
    spacing = blocks * block_size
    rows_k = spacing * len(lengths) if block_size else int(cu_k[-1])
    q = torch.empty(int(cu_q[-1]), 1, 8, device="meta")
    k = torch.empty((3, block_size, 1, 8) if block_size else (rows_k, 1, 8), device="meta")
    table = torch.empty(len(lengths), blocks, device="meta") if block_size else None
    problem = Problem.of(q, k, k, Packed(cu_q, cu_k, longest_q, longest_k, table))
    window = Window(left, right)
    shape, sizes = tables.Shape("padded", bool(block_size)), tables.sizes_of(problem, "padded")
    found = shape.tables(sizes, bounded(window), cu_q.device, cu_q, cu_k)
    column = torch.arange(rows_k)
    for b, (n, m) in enumerate(lengths):
        first = b * spacing if block_size else int(cu_k[b])
        mask = kept(window, [(n, m)], longest_q, rows_k, [first])
        start, stop = (found[name][b, :longest_q, None] for name in ("start", "stop"))
        assert torch.equal((column >= start) & (column < stop), mask)
        needed, _, run = by_block(mask, False)
        full = by_block(mask[:n], False)[1] if n else torch.zeros_like(needed)
        mine = listed([found[name] for name in BlockTables._fields[:4]], needed.shape, b)
        assert torch.equal(mine[0], run)
        assert torch.equal(mine[1], full)
        assert found["source"][b, :n].tolist() == list(range(int(cu_q[b]), int(cu_q[b + 1])))
    rows = [b * longest_q + i for b, (n, _) in enumerate(lengths) for i in range(n)]
    assert found["home"].tolist() == rows


def varlen_problem(lengths, **options):
    case = Case(tuple((n, n) for n in lengths), nheads_k=1, head_dim=16, head_dim_v=16, dtype=torch.float16, **options)
    return make(case).problem()


def test_tables_of_a_large_batch_are_small():
    """128 sequences of 4096 tokens: some MB; a list of all blocks for each block would have 64 MB four times."""
    cu_seqlens = cumulative([4096] * 128)
    q = torch.empty(128 * 4096, 1, 8, device="meta")
    for window, most in (((-1, 0), 5.5), ((512, 0), 0.5)):
        problem = Problem.of(q, q, q, Packed(cu_seqlens, cu_seqlens, 4096, 4096), None, False, *window)
        sizes = tables.sizes_of(problem, "packed")
        found = tables.Shape("packed", False).tables(
            sizes, bounded(problem.window), cu_seqlens.device, cu_seqlens, cu_seqlens
        )
        assert sum(found[name].nbytes for name in BlockTables._fields) <= most * 2**20


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
def test_tables_are_made_once(dense):
    def found(problem, direction):
        return tables.tables_of(problem, tables.layout_of(problem, direction), 0)

    if dense:
        q, k = (torch.randn(1, n, 2, 8) for n in (300, 200))
        first, other = (Problem.of(q, k, k, None, None, True, left) for left in (7, 8))
        again = Problem.of(q + 1.0, k, k, None, None, True, 7, -1, 2.0)
    else:
        first = varlen_problem([100, 0, 300])
        q, packing = first.q, dataclasses.replace(first.packed, cu_seqlens_k=first.packed.cu_seqlens_q)
        first, other = (Problem.of(q, q, q, packing, None, True, left) for left in (7, 8))
        again = Problem.of(q + 1.0, q, q, packing, None, True, 7, -1, 2.0)
    assert found(first, "forward") is found(again, "backward")
    assert found(first, "forward") is not found(other, "forward")
    if not dense:
        before = found(first, "forward")
        packing.cu_seqlens_q.add_(0)  # who writes to them makes them new
        assert found(first, "forward") is not before
        clone = dataclasses.replace(
            packing, cu_seqlens_q=(other_sums := packing.cu_seqlens_q.clone()), cu_seqlens_k=other_sums
        )
        assert found(Problem.of(q, q, q, clone, None, True, 7), "forward") is not found(first, "forward")


def test_tables_go_with_the_tensors_that_they_are_of():
    tables._packed.clear()
    problem = varlen_problem([100, 30])
    tables.tables_of(problem, "packed", 0)
    assert len(tables._packed) == 1
    del problem
    assert len(tables._packed) == 0


def test_a_captured_graph_makes_its_own_tables():
    problem = varlen_problem([100, 30])
    first, second = (tables.tables_of(problem, "packed", None) for _ in range(2))
    assert first is not second
    one, two = (tables.number(0.5, problem.q.device, None) for _ in range(2))
    assert one is not two


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("layout", ["dense", "packed", "padded"])
def test_compiled_tables_have_their_names(layout, paged):
    """In the order in which they leave compiled code."""
    shape = tables.Shape(layout, paged and layout != "dense")
    sums = [] if layout == "dense" else [torch.tensor([0, 3, 9], dtype=torch.int32)] * 2
    sizes = tables.Sizes(9, 9, 1, 9, 6, 1, 1)
    expected = shape.tables(sizes, Window(3, 0), torch.device("cpu"), *sums)
    bounds = [tables.number(side, torch.device("cpu"), 0) for side in (3, 0)]
    found = dict(zip(tables._names(shape), shape.function(*sizes, *bounds, *sums), strict=True))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_compiled_code_is_of_one_gpu(monkeypatch):
    """Inductor writes a device's number into it: it launches kernels and takes memory there."""
    problem = varlen_problem([100, 30])
    with template.in_place_of_the_kernel() as calls:
        fused.forward(problem)
    ((spec, given),) = calls
    shape = tables.Shape("dense", False)
    results = [torch.empty(0)] * len(tables._names(shape))
    traced_on = []

    def compiled_graph(function, example_inputs, what, **config):
        with FakeTensorMode():
            inputs = example_inputs(lambda name, typical: typical)
        traced_on.append({x.device for x in inputs if isinstance(x, torch.Tensor)})
        return lambda inputs: results

    monkeypatch.setattr("compiled_fa.inductor.graphs.compiled_graph", compiled_graph)
    monkeypatch.setattr(tables, "number", lambda value, device, stream: torch.tensor(value))
    devices = [torch.device("cuda", index) for index in (1, 0, 1)]
    for cache in (kernels.KERNELS, tables._makers):
        cache.clear()
    try:
        for device in devices:
            stand_in: Any = types.SimpleNamespace(device=device)
            kernels.run(spec, {**given, "q": stand_in})
            tables._made(shape, tables.Sizes(9, 9, 0, 0, 0, 1, 1), Window(3, 0), device, 0)
    finally:
        for cache in (kernels.KERNELS, tables._makers):
            cache.clear()
    assert traced_on == [{devices[0]}] * 2 + [{devices[1]}] * 2


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_host_never_waits(dropout_p):
    """On fake tensors, reading a value is an error: a call is put together without it."""
    problem = varlen_problem([100, 0, 300], causal=True, dropout_p=dropout_p)
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x) for x in (problem.q, problem.k, problem.v))
        cu_q, cu_k = (mode.from_tensor(x) for x in (problem.packed.cu_seqlens_q, problem.packed.cu_seqlens_k))
        seed = mode.from_tensor(torch.tensor([5])) if dropout_p else None
        options = (None, True, -1, -1, 0.0, None, dropout_p, seed)
        for fake in (
            Problem.of(q, k, v, Packed(cu_q, cu_k, 300, 300), *options),
            Problem.of(q, k, v, Packed(cu_q, cu_k, 100, 300), *options),
            Problem.of(q[None], k[None], v[None], None, *options),
        ):
            out, lse = fused.forward(fake)
            fused.backward(fake, out, out, lse)


def specs_of(*cases):
    with template.in_place_of_the_kernel() as calls:
        for case in cases:
            data = make(case)
            problem, dout = data.problem(), data.batched(data.dout) if case.dense else data.dout
            fused.backward(problem, dout, *fused.forward(problem))
    return {spec for spec, _ in calls}


def test_lengths_do_not_recompile():
    """What a kernel is compiled for says nothing of lengths or batch, but whether they are multiples of a block."""
    packed = [Case(tuple((n, n) for n in lengths), causal=True) for lengths in ([200, 20], [190], [300, 1, 0, 130])]
    assert len(specs_of(*packed)) == 2  # forward and backward
    dense = [Case(((seqlen, seqlen),) * batch, True, causal=True) for batch, seqlen in ((1, 100), (3, 77), (2, 300))]
    assert len(specs_of(*dense)) == 2
    assert len(specs_of(*dense, Case(((256, 256),) * 2, True, causal=True))) == 4


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
def test_numbers_do_not_recompile(dense):
    """Nor do softmax_scale, the window, softcap and dropout's probability, where there is one."""
    lengths = ((140, 150),) * 2
    windows = [Case(lengths, dense, window_size=window) for window in ((-1, -1), (-1, 0), (3, 5), (70, 0))]
    scaled = [Case(lengths, dense, softmax_scale=scale) for scale in (0.1, 2.0)]
    assert len(specs_of(*windows, *scaled, Case(lengths, dense, causal=True))) == 2
    assert len(specs_of(*(Case(lengths, dense, softcap=x, dropout_p=p) for x, p in ((1.0, 0.1), (9.0, 0.3))))) == 2


# --------------------------------------------------------------------------------------------------------- whole engine

BLOCKWISE = st.sampled_from([0, 1, 7, 100, 127, 128, 129, 200, 257])


@settings(max_examples=60)
@given(cases(dense=True, tiles=None), st.tuples(BLOCKWISE, BLOCKWISE), WITHOUT_FP64)
def test_dense_through_the_template_agrees_with_float64(case, lengths, dtype):
    case = Case(**{**case.__dict__, "lengths": (lengths,) * len(case.lengths), "dtype": dtype})
    check_against_float64(make(case), run_fused(make(case)))


@settings(max_examples=60)
@given(cases(dense=False, tiles=None), st.lists(st.tuples(BLOCKWISE, BLOCKWISE), max_size=4), WITHOUT_FP64)
def test_varlen_through_the_template_agrees_with_float64(case, lengths, dtype):
    case = Case(**{**case.__dict__, "lengths": tuple(lengths), "dtype": dtype})
    check_against_float64(make(case), run_fused(make(case)))


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
    for on in (template.in_place_of_the_kernel, contextlib.nullcontext):
        found = run_fused(data, on)
        check_against_float64(data, found)
        for name, x in expected.items():
            assert torch.allclose(found[name], x, rtol=1e-4, atol=2e-5), name


def test_paged_keys():
    q = torch.randn(9, 4, 16)
    pages = torch.randn(40, 16, 2, 16)
    table = torch.randperm(40).to(torch.int32)[:30].view(3, 10)
    packing = Packed(cumulative([4, 0, 5]), cumulative([150, 3, 77]), 5, 150, table)
    problem = Problem.of(q, pages, pages, packing, None, True)
    with template.in_place_of_the_kernel():
        out, lse = fused.forward(problem)
    from compiled_fa.engines import tiled

    expected = tiled.forward(problem)
    assert torch.allclose(out, expected[0], atol=1e-5)
    assert torch.allclose(lse, expected[1], atol=1e-5)


@pytest.mark.parametrize("layout", ["qkv packed", "heads first", "odd"])
def test_strides(layout):
    """Views of a packed qkv go to the kernel as they are; what it is not compiled for is copied."""
    wide = torch.randn(2, 130, 3, 4, 32)
    q, k, v = wide.unbind(2)
    if layout == "heads first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    if layout == "odd":
        q, k, v = (x[..., ::2].repeat_interleave(2, -1)[..., 1::2] for x in (q, k, v))
    problem = Problem.of(q, k, v, None, None, True)
    with template.in_place_of_the_kernel() as calls:
        out, lse = fused.forward(problem)
        gradients = fused.backward(problem, torch.ones_like(out), out, lse)
    exact = q, k, v = tuple(x.double().requires_grad_() for x in (q, k, v))
    expected = flash_attn_func(q, k, v, causal=True)
    assert torch.allclose(out, expected.float(), atol=1e-5)
    for found, other in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert torch.allclose(found, other.float(), atol=1e-4)
    seen = [given["q"].untyped_storage().data_ptr() == wide.untyped_storage().data_ptr() for _, given in calls]
    assert seen == [layout == "qkv packed"] * 2


@given(
    st.tuples(*[st.integers(1, 3)] * 3, st.sampled_from([1, 16, 24])),
    st.permutations(range(4)),
    st.lists(st.integers(0, 4096), min_size=4, max_size=4),
    st.booleans(),
)
def test_strides_of_dimensions_of_size_1_mean_nothing(shape, order, numbers, packed):
    """However they lie and whatever stands there: the rows of a batch behind each other, heads within a row."""
    by_place = torch.randn([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(4)])
    strides = [numbers[dim] if shape[dim] == 1 else by_place.stride(dim) for dim in range(4)]
    x = by_place.as_strided(shape, strides)
    x = x[0] if packed else x
    found = canonical(x)
    *_, heads, columns = shape
    *outer, row, head, column = found.stride()
    assert torch.equal(found, x)
    assert column == 1
    assert head >= columns
    assert row >= heads * head
    assert outer == ([] if packed else [shape[1] * row])


def test_one_query_as_a_rotary_leaves_it_is_not_copied():
    q = torch.randn(2, 16, 1, 64).transpose(1, 2)
    assert q.stride() == (1024, 64, 64, 1)
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
        (
            (8, 0),
            {"head_dim": 600, "dtype": torch.bfloat16},
            "in 163 KB of shared memory end at head_dim 512, and this is 600",
        ),
        ((8, 0), {"meta": (4, 65536, 64, 128)}, "less than 2**31 elements, and this takes 2147483648"),
        ((8, 0), {}, None),
        ((8, 6), {"head_dim": 200, "dtype": torch.float32}, None),
        ((9, 0), {"head_dim": 260, "dtype": torch.float32}, "end at head_dim 256"),
        ((7, 5), {"dtype": torch.bfloat16}, None),
        (
            (7, 5),
            {"dtype": torch.bfloat16, "head_dim": 160},
            "for torch.bfloat16 in 64 KB of shared memory end at head_dim 128, and this is 160",
        ),
        ((7, 5), {"dtype": torch.float16, "head_dim": 160}, None),
    ],
)
def test_reasons_on_a_gpu(monkeypatch, capability, problem, reason):
    pytest.importorskip("triton", reason="the fused engine needs Triton")
    monkeypatch.setattr(nvidia, "capability_of", lambda device: capability)
    given_problem = None
    if problem is not None and "meta" in problem:
        q = torch.empty(problem["meta"], device="meta")
        given_problem = Problem.of(q, q, q, None)
    elif problem is not None:
        given_problem = make(Case(((4, 4),), True, **problem)).problem()
    found = fused.unsupported_reason(torch.device("cuda"), given_problem)
    assert found is None if reason is None else reason in (found or "")


def test_tensors_made_on_the_way_are_not_too_large_either(monkeypatch):
    pytest.importorskip("triton", reason="the fused engine needs Triton")
    monkeypatch.setattr(nvidia, "capability_of", lambda device: (8, 0))

    def is_too_large(direction, q, k, v=None, packing=None):
        q, k, v = (torch.empty(shape, device="meta") for shape in (q, k, k if v is None else v))
        reason = fused.unsupported_reason(torch.device("cuda"), Problem.of(q, k, v, packing), direction)
        return reason is not None and "2**31" in reason

    half = (1, 1 << 18, 64, 64)  # 2**30 elements
    assert not is_too_large("forward", half, (1, 9, 8, 64))
    assert is_too_large("forward", half, (1, 9, 8, 64), (1, 9, 8, 128))  # out
    assert is_too_large("forward", (1, 1 << 21, 64, 8), (1, 9, 8, 8))  # q with head_dim padded

    sums, batch = torch.empty(4097, dtype=torch.int32, device="meta"), 4096
    rows, keys = (batch + 127, 32, 128), (9999, 8, 128)
    assert is_too_large("forward", rows, keys, packing=Packed(sums, sums.clone(), 128, 5000))  # queries as a batch
    assert not is_too_large("forward", rows, keys, packing=Packed(sums, sums.clone(), 129, 5000))
    assert not is_too_large("backward", rows, keys, packing=Packed(sums, sums.clone(), 128, 5000))

    table = torch.empty(batch, 64, dtype=torch.int32, device="meta")
    gathered, in_place = (17, 250, 8, 128), (16, 256, 8, 128)  # pages of 250 are gathered
    assert is_too_large("forward", rows, gathered, packing=Packed(sums, sums.clone(), 1, 5000, table))
    assert not is_too_large("forward", rows, gathered, packing=Packed(sums, sums.clone(), 1, 5000, table[:, :1]))
    assert not is_too_large("forward", rows, in_place, packing=Packed(sums, sums.clone(), 1, 5000, table))
    many = (1 << 21, 32, 128)  # and rows that are few in each block
    assert is_too_large("forward", many, in_place, packing=Packed(sums, sums.clone(), 1, 5000, table))


def test_serving_by_second_choice_is_said_once(monkeypatch, caplog):
    """Off the CPU, where the fused engine is expected."""
    monkeypatch.setattr(messages, "_said", set())
    q = torch.empty(1, 4, 2, 8, device="meta")
    for _ in range(2):
        assert engines.select(Problem.of(q, q, q, None), "forward").engine.name == "tiled"
    assert len(caplog.records) == 1
    assert "tiled engine serves on meta, not fused: it needs a CUDA device" in caplog.text


def test_an_amd_gpu_is_for_tiles(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(nvidia, "capability_of", lambda device: (9, 0))  # as PyTorch says of a gfx906
    assert "this is AMD's" in (fused.unsupported_reason(torch.device("cuda")) or "")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(nvidia, "capability_of", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    nvidia._missing.cache_clear()
    try:
        assert fused.unsupported_reason(torch.device("cuda")) == "Triton is not installed"
    finally:
        nvidia._missing.cache_clear()


# ------------------------------------------------------------------------------------- kernels that cannot be launched


@pytest.fixture
def unlaunchable(monkeypatch):
    """A machine where the fused engine serves CPU tensors by kernels that are too large for it; counts compilations."""
    tried: list[str] = []

    def compiled_graph(function, example_inputs, what, **config):
        tried.append(what)
        raise RuntimeError("out of resource: shared memory, Required: 345344, Hardware limit: 232448")

    run = kernels.run

    def on_a_gpu(spec, given):
        stand_in: Any = types.SimpleNamespace(device=torch.device("cuda", 0))
        return run(spec, {**given, "q": stand_in})

    monkeypatch.setattr(kernels, "run", on_a_gpu)
    monkeypatch.setattr("compiled_fa.inductor.graphs.compiled_graph", compiled_graph)
    monkeypatch.setattr(fused, "unsupported_reason", lambda device, problem=None, direction="forward": None)
    monkeypatch.setattr(messages, "_said", set())
    kernels.KERNELS.clear()
    yield tried
    kernels.KERNELS.clear()


def test_another_engine_serves_in_place_of_a_kernel_that_cannot_be_launched(unlaunchable, caplog):
    q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))
    for _ in range(2):
        out = flash_attn_func(q, k, v, causal=True)
        out.sum().backward()
    with use_engine("tiled"):
        assert torch.allclose(out, flash_attn_func(q, k, v, causal=True), atol=1e-6)
    assert len(unlaunchable) == 2  # once a direction: it is known the second time
    assert caplog.text.count("in place of fused, which cannot") == 2
    assert "Hardware limit: 232448" in caplog.text


def test_asked_for_by_name_a_kernel_that_cannot_be_launched_raises(unlaunchable):
    q = torch.randn(1, 9, 2, 8)
    with (
        use_engine("fused"),
        pytest.raises(RuntimeError, match=r"asked for and cannot serve this call: .* shared memory"),
    ):
        flash_attn_func(q, q, q)
