"""Few queries on many keys: splits of the cache, wherever they lie. The step runs eagerly, but in the last test."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES, WINDOW_SIDE, Case, check_against_float64, make
from tuned import retune

from compiled_fa.caches import clear_caches
from compiled_fa.engines import select, split_kv, tiled
from compiled_fa.engines.split_kv import decode, decode_plan
from compiled_fa.inductor.steps import STEPS
from compiled_fa.problem import Packed, Problem
from compiled_fa.scores import Window

NOBODY = 10**6  # a block that does not exist


def shrink(patch):
    """Splits of 8 keys, of 16 in caches of 64 and more; few scores at once."""
    keys = {"split_keys": 8, "long_split_keys": 16, "long_split_from_keys": 64}
    retune(patch, split_kv={"decode_from_keys": 1, "decode_from_elements": 1, "score_bytes": 1 << 10, **keys})


@pytest.fixture
def small_splits(monkeypatch):
    shrink(monkeypatch)


@st.composite
def decodings(draw):
    queries, dense = draw(st.integers(1, 3)), draw(st.booleans())
    length = st.one_of(st.integers(0, 100), st.sampled_from([1, 7, 8, 9, 16, 63, 64, 65]))
    lengths = [draw(length)] * draw(st.integers(1, 3)) if dense else draw(st.lists(length, min_size=1, max_size=5))
    return Case(
        tuple((queries, n) for n in lengths),
        dense,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 3, 8, 33])),
        draw(st.sampled_from([1, 5, 32, 64])),
        draw(DTYPES),
        draw(st.booleans()),
        draw(st.one_of(st.just((-1, -1)), st.tuples(WINDOW_SIDE, WINDOW_SIDE))),
        draw(st.sampled_from([None, 0.05, -0.3])),
        draw(st.sampled_from([0.0, 2.0])),
        draw(st.sampled_from(["none", "heads", "batch"])),
        seed=draw(st.integers(0, 2**31)),
    )


def in_pages(data, page, generator):
    """The same call, with keys in pages in any order; what is not theirs is NaN, and blocks that are not, nowhere."""
    problem, lengths = data.problem(), [n for _, n in data.case.lengths]
    used = [-(-n // page) for n in lengths]
    free = torch.randperm(sum(used) + 2, generator=generator).tolist()
    table = torch.full((len(lengths), max(used) + 1), NOBODY, dtype=torch.int32)
    pool_k, pool_v = (x.new_full((len(free), page, *x.shape[1:]), torch.nan) for x in (data.k, data.v))
    for b, (n, first) in enumerate(zip(lengths, data.cu_seqlens[1].tolist(), strict=False)):
        for slot in range(used[b]):
            table[b, slot] = block = free.pop()
            some = slice(first + slot * page, first + min((slot + 1) * page, n))
            pool_k[block, : some.stop - some.start] = data.k[some]
            pool_v[block, : some.stop - some.start] = data.v[some]
    cu_q, cu_k = data.cu_seqlens
    packed = Packed(cu_q, cu_k, data.case.lengths[0][0], max(lengths), table)
    return replace(problem, q=data.q, k=pool_k, v=pool_v, packed=packed)


def as_packed(data, out, lse):
    return {"out": out, "lse": lse} if out.dim() == 3 else {"out": out.flatten(0, 1), "lse": lse.mT.flatten(0, 1).mT}


@given(case=decodings(), page=st.sampled_from([0, 0, 1, 5, 8, 12, 16, 32]))
def test_agrees_with_float64(case, page):
    data = make(case)
    problem = in_pages(data, page, torch.Generator().manual_seed(case.seed)) if page else data.problem()
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        refusal = split_kv.unsupported_reason(problem.q.device, problem)
        if refusal is None:
            found = split_kv.forward(problem)
        else:  # no keys, or memory of less than a split
            assert not data.k.shape[0] or (page == 0 and data.k.shape[0] < 8)
            assert refusal.startswith(("there are no queries, or no keys", "it decodes where there are keys"))
            found = tiled.forward(problem)
    assert all(x.is_contiguous() for x in found)
    check_against_float64(data, as_packed(data, *found))


def test_rows_of_a_larger_tensor(small_splits):
    """qkv side by side, a cache that is not full yet, k and v side by side in pages; and what is no rows at all."""
    qkv = torch.randn(2, 40, 3, 2, 8)
    q, k, v = qkv[:, -1:, 0], qkv[:, :, 1], qkv[:, :, 2]
    expected = decode.forward(Problem.of(q.contiguous(), k.contiguous(), v.contiguous(), None))
    kv = torch.stack([k, v])
    for problem in (Problem.of(q, k, v, None), Problem.of(q, kv[0], kv[1], None)):
        for one, other in zip(decode.forward(problem), expected, strict=True):
            assert torch.equal(one, other)
    longer = torch.full((2, 2, 100, 2, 8), torch.nan)
    longer[0, :, :40], longer[1, :, :40] = k, v
    problem = Problem.of(q, longer[0, :, :40], longer[1, :, :40], None)
    for one, other in zip(decode.forward(problem), expected, strict=True):
        assert torch.equal(one, other)
    cu_q, cu_k = torch.arange(3, dtype=torch.int32), torch.tensor([0, 40, 80], dtype=torch.int32)
    pages = torch.stack([x.reshape(10, 8, 2, 8) for x in (k, v)], 1)
    table = torch.arange(10, dtype=torch.int32).view(2, 5)
    problem = Problem.of(q[:, 0], pages[:, 0], pages[:, 1], Packed(cu_q, cu_k, 1, 40, table))
    assert torch.equal(decode.forward(problem)[0][:, None], expected[0])
    heads_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(decode.forward(Problem.of(q, heads_first, heads_first, None))[1], expected[1])
    no_rows = Problem.of(q, k.mT.contiguous().mT, v, None)
    assert "rows at even distances in memory" in (decode.unsupported_reason(no_rows) or "")
    assert torch.allclose(select(no_rows, "forward").engine.forward(no_rows)[0], expected[0], atol=1e-6)


def test_a_pool_without_a_page_in_use(small_splits):
    pool, cu_seqlens_k = torch.full((3, 8, 2, 8), torch.nan), torch.zeros(3, dtype=torch.int32)
    for columns in (0, 2):
        table = torch.full((2, columns), NOBODY, dtype=torch.int32)
        packed = Packed(torch.arange(3, dtype=torch.int32), cu_seqlens_k, 1, 8, table)
        problem = Problem.of(torch.randn(2, 4, 8), pool, pool, packed)
        assert split_kv.unsupported_reason(pool.device, problem) is not None
        out, lse = select(problem, "forward").engine.forward(problem)
        assert torch.equal(out, torch.zeros(2, 4, 8))
        assert torch.equal(lse, torch.full((4, 2), -torch.inf))


@pytest.mark.parametrize("slopes", ["none", "heads", "batch"])
def test_calls_of_one_shape_share_a_plan_but_no_slopes_or_pages(small_splits, slopes):
    clear_caches()
    for seed in range(3):
        data = make(Case(((1, 40), (1, 70)), heads_per_key=2, slopes=slopes, seed=seed))
        for problem in (data.problem(), in_pages(data, 16, torch.Generator().manual_seed(seed))):
            check_against_float64(data, as_packed(data, *decode.forward(problem)))
    assert len(decode_plan._plans) == 2


def test_sequences_share_a_call_while_scores_are_few():
    assert list(decode_plan._groups([5], 3)) == [(0, 1)]
    assert list(decode_plan._groups([9, 1, 1, 1, 9, 0, 2], 3)) == [(0, 1), (1, 4), (4, 5), (5, 7)]


def test_keys_outside_the_window_are_not_read(small_splits):
    """Parts begin with the window: 48 of 800 keys, and no more of those before them than a part."""
    q, k, v = torch.randn(2, 1, 2, 8), torch.randn(2, 800, 2, 8), torch.randn(2, 800, 2, 8)
    k[:, : 800 - 48 - 16] = v[:, : 800 - 48 - 16] = torch.nan
    problem = Problem.of(q, k, v, None, None, False, 47)
    out, lse = decode.forward(problem)
    expected, expected_lse = tiled.forward(replace(problem, k=k[:, 752:], v=v[:, 752:]))
    assert torch.allclose(out, expected, atol=1e-6)
    assert torch.allclose(lse, expected_lse, atol=1e-6)


def test_who_decodes(compiled_steps, monkeypatch):
    """Long caches, and many, in any layout: split_kv. Others, and many heads a key head: sdpa_cpu, or else tiles."""

    def served(keys, queries=1, nheads=8, batch=2, dtype=torch.float32, **options):
        q, k = torch.empty(batch, queries, nheads, 64, dtype=dtype), torch.empty(batch, keys, 4, 64, dtype=dtype)
        problem = Problem.of(q, k, k, None, **options)
        return select(problem, "forward").engine.name

    assert served(1024) == served(256, batch=16) == served(5000, 4) == served(1024, 1, 64) == "split_kv"
    assert served(600) == served(40, batch=99) == served(1024, 16) == served(5000, 1, 128) == "sdpa_cpu"
    assert served(128, dtype=torch.bfloat16) == served(128, dtype=torch.float16) == "split_kv"
    assert served(100, dtype=torch.bfloat16) == "sdpa_cpu"
    assert served(100, batch=4, softcap=1.0) == "split_kv"
    assert served(60, softcap=1.0) == served(5000, 1, 128, softcap=1.0) == "tiled"
    monkeypatch.setenv("COMPILED_FA_COMPILE", "0")  # tiles run eagerly then, slower than sdpa_cpu
    assert served(1024) == "sdpa_cpu"


def test_sequences_of_unequal_queries_are_for_others(small_splits):
    data = make(Case(((1, 90), (2, 90))))
    problem = data.problem()
    assert "one number of queries" in (decode.unsupported_reason(problem) or "")
    assert select(problem, "forward").engine.name != "split_kv"
    with pytest.raises(RuntimeError, match="the split_kv engine was asked for and cannot serve this call: it decodes"):
        select(problem, "forward", "split_kv")
    out, lse = select(problem, "forward").engine.forward(problem)
    check_against_float64(data, {"out": out, "lse": lse})


def test_it_has_no_gradients(small_splits):
    q, k = torch.randn(1, 1, 2, 8), torch.randn(1, 90, 2, 8)
    problem = Problem.of(q, k, k, None)
    assert select(problem, "forward", "split_kv").engine is split_kv
    with pytest.raises(RuntimeError, match="split_kv engine was asked for and cannot serve this call: it computes for"):
        select(problem, "backward", "split_kv")
    with pytest.raises(RuntimeError, match="cannot serve this call"):
        split_kv.backward(problem, q, q, q[..., 0])


@given(decodings())
def test_what_is_prepared_serves_all_calls_alike(case):
    """Whose keys have the same places, and slopes: others, and other tensors of the same shapes, have other bits."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        problem, other = (make(replace(case, seed=seed)).problem() for seed in (1, 2))
        if decode.unsupported_reason(problem) is not None:
            return
        prepared = split_kv.prepared(problem)
        assert (prepared is None) == (not case.dense or case.slopes != "none")
        if prepared is not None:
            assert prepared.nbytes
            for some in (problem, other):
                for q in (some.q, some.q.mT.contiguous().mT):
                    for one, expected in zip(prepared.run(q, some.k, some.v), decode.forward(some), strict=True):
                        assert torch.equal(one, expected)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"causal": True, "window_size": (500, 0), "softcap": 3.0, "slopes": "heads"}),
    ],
    ids=str,
)
def test_compiled(compiled_steps, monkeypatch, dtype, options):
    """One piece of code for dense, packed and paged keys, one sequence or several, whole splits or none."""
    clear_caches()
    for lengths, dense in (
        ((600,), True),
        ((640, 640, 640), True),
        ((5000,), True),
        ((1030, 0, 3, 64, 65), False),
    ):
        case = Case(tuple((1, n) for n in lengths), dense, 3, 2, 32, 64, dtype, **options)
        data = make(case)
        problem = data.problem()
        found = decode.forward(replace(problem, q=problem.q.mT.contiguous().mT))  # any strides
        assert found is not None
        check_against_float64(data, as_packed(data, *found))
        for page in (16, 256):
            found = decode.forward(in_pages(data, page, torch.Generator()))
            check_against_float64(data, as_packed(data, *found))
    assert len(STEPS) == 1


def test_a_step_makes_its_tensors_in_cpp(compiled_steps):
    """Not in Python, which takes as long for its thirty as a short cache does: Inductor's functions for that are not
    called from there."""
    problem, calls = make(Case(((1, 600),), True, 3, 2, 32, 64)).problem(), []
    prepared = split_kv.prepared(problem)
    assert prepared is not None
    prepared.run(problem.q, problem.k, problem.v)
    sys.setprofile(lambda frame, event, called: calls.append(called) if event == "c_call" else None)
    try:
        prepared.run(problem.q, problem.k, problem.v)
    finally:
        sys.setprofile(None)
    names = {called.__name__ for called in calls}
    assert "as_strided" in names
    assert not [name for name in names if "empty_strided" in name or "reinterpret" in name]


@pytest.mark.parametrize(
    ("seqlen_q", "window", "dense", "dtype", "name"),
    [
        (2, Window(right=0), True, torch.bfloat16, "decode_beside_sdpa_16bit_masked"),
        (2, Window(left=9), True, torch.float16, "decode_beside_sdpa_16bit_masked"),
        (2, Window(), True, torch.bfloat16, "decode_beside_sdpa_16bit"),
        (1, Window(right=0), True, torch.bfloat16, "decode_beside_sdpa_16bit"),  # it hides nothing
        (2, Window(right=0), False, torch.bfloat16, "decode_beside_sdpa_16bit"),
        (2, Window(right=0), True, torch.float32, "decode_beside_sdpa"),
        (9, Window(right=0), True, torch.float32, None),
    ],
)
def test_which_rule_decides_beside_pytorchs_kernel(monkeypatch, seqlen_q, window, dense, dtype, name):
    retune(monkeypatch, split_kv={"decode_rows_beside_sdpa": 8})
    case = Case(((seqlen_q, 50),) * 2, dense, 2, 1, 8, 8, dtype)
    problem = replace(make(case).problem(), window=window)
    assert decode.rule(problem, "sdpa_cpu") == name
    assert decode.rule(problem, "tiled") == "decode_beside_tiles"
