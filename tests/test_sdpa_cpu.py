"""The sdpa_cpu engine: parts of plain scores through PyTorch's own kernel."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Case, cases, check_against_float64, cumulative, make, run_engine, run_naive
from tuned import retune

from compiled_fa import tuning
from compiled_fa.engines import sdpa_cpu, select
from compiled_fa.engines.sdpa_cpu import EVERYTHING, kernel
from compiled_fa.engines.sdpa_cpu.groups import calls
from compiled_fa.problem import Packed
from compiled_fa.scores import Window

PLAIN = {"window_size": (-1, -1), "softcap": 0.0, "slopes": "none", "dropout_p": 0.0, "tiles": None}


def plain_cases(dense):
    scales = st.sampled_from([None, 0.05, 1.0])
    drawn = st.tuples(cases(dense=dense, **PLAIN), scales)
    return drawn.map(lambda both: replace(both[0], head_dim_v=both[0].head_dim, softmax_scale=both[1]))


@given(plain_cases(dense=True))
def test_dense_agrees_with_float64(case):
    data = make(case)
    check_against_float64(data, run_engine(sdpa_cpu, data))


@given(plain_cases(dense=False))
def test_varlen_agrees_with_float64(case):
    data = make(case)
    check_against_float64(data, run_engine(sdpa_cpu, data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_without_gradient_of_lse(dtype, causal):
    data = make(Case(((40, 70), (33, 33), (50, 20)), heads_per_key=2, dtype=dtype, causal=causal))
    assert data.dlse is not None
    data.dlse.zero_()
    problem = data.problem()
    out, lse = sdpa_cpu.forward(problem)
    with_dlse, without = (sdpa_cpu.backward(problem, data.dout, out, lse, dlse) for dlse in (data.dlse, None))
    for one, other in zip(with_dlse, without, strict=True):
        assert torch.allclose(one, other, atol=torch.finfo(dtype).eps * 16)


@pytest.fixture
def noted(monkeypatch):
    """Shapes of q, or dout, in every call of PyTorch's kernel from here on, and whether it has a bias."""
    shapes: list[tuple[tuple[int, ...], bool]] = []
    for name in ("_forward", "_backward"):
        called = getattr(kernel, name)

        def noting(*arguments, called=called, **options):
            shapes.append((tuple(arguments[0].shape), options.get("attn_mask") is not None))
            return called(*arguments, **options)

        monkeypatch.setattr(kernel, name, noting)
    return shapes


LENGTHS = ((5, 5), (9, 7), (5, 5), (5, 5), (0, 4), (9, 7), (3, 0), (0, 4), (200, 90), (5, 5), (200, 90))


@pytest.mark.parametrize("causal", [False, True])
def test_short_sequences_of_one_length_share_a_call(monkeypatch, noted, causal):
    retune(monkeypatch, sdpa_cpu={"call_products": 0})
    data = make(Case(LENGTHS, heads_per_key=2, causal=causal))
    check_against_float64(data, run_engine(sdpa_cpu, data))
    assert sorted(shape[0] for shape, _ in noted) == 2 * [1] * 2 + 2 * [2] + 2 * [4]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_short_neighbours_are_one_sequence(noted, dtype, causal):
    """As long as a call of its own costs more than what is computed for nobody: a long one takes a short one."""
    data = make(Case(LENGTHS, nheads_k=3, heads_per_key=2, head_dim=128, head_dim_v=128, causal=causal, dtype=dtype))
    check_against_float64(data, run_engine(sdpa_cpu, data))
    long = 90 if causal else 200
    assert {(shape[2], biased) for shape, biased in noted} == {(36, True), (205, True), (long, False)}
    assert len(noted) == 2 * 3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sequence(noted, value, name, dtype, causal):
    data = make(Case(((5, 6), (49, 49), (33, 33)), heads_per_key=2, dtype=dtype, causal=causal))
    finite = run_engine(sdpa_cpu, data)
    assert {biased for _, biased in noted} == {True}
    getattr(data, name)[7, 1] = value  # of the second sequence
    found = run_engine(sdpa_cpu, data)
    for result, of_sequence in (
        ("out", slice(5, 54)),
        ("dq", slice(5, 54)),
        ("dk", slice(6, 55)),
        ("dv", slice(6, 55)),
    ):
        others = torch.ones(len(found[result]), dtype=torch.bool)
        others[of_sequence] = False
        atol = 4 * torch.finfo(dtype).eps
        assert torch.allclose(found[result][others], finite[result][others], atol=atol), result


@given(plain_cases(dense=False), st.sampled_from([0, 1 << 62]))
def test_shared_calls_agree_with_float64(case, call_products):
    data = make(case)
    with tuning.using(tuning.changed(sdpa_cpu={"call_products": call_products})):
        check_against_float64(data, run_engine(sdpa_cpu, data))


@given(plain_cases(dense=True), st.sampled_from([1, 2, 16]))
def test_few_queries_agree_with_float64(case, threads):
    data, here = make(replace(case, heads_per_key=4)), torch.get_num_threads()
    few = {"few_queries": 1 << 20, "few_queries_from_elements": 0, "few_queries_from_elements_bf16": 0}
    torch.set_num_threads(threads)
    try:
        with tuning.using(tuning.changed(sdpa_cpu=few)):
            check_against_float64(data, run_engine(sdpa_cpu, data))
    finally:
        torch.set_num_threads(here)


@pytest.mark.parametrize(
    ("lengths", "dense", "options", "rows"),
    [
        (((1, 2000),), True, {}, {4}),  # 2 heads for 2 threads
        (((3, 2000),) * 2, True, {}, {12}),
        (((3, 2000),) * 2, False, {}, {12}),
        (((1, 2000), (1, 1500)), False, {"causal": True}, {4}),  # a single query sees all keys
        (((3, 2000),) * 2, True, {"causal": True}, {3, 12}),  # a triangle, and a rectangle
        (((3, 20),), True, {}, {3}),  # few keys: it would not pay
        (((17, 2000),), True, {}, {17}),  # nor with many queries
    ],
)
def test_few_queries_of_many_heads_are_rows_of_one(noted, lengths, dense, options, rows):
    here = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        data = make(Case(lengths, dense, nheads_k=2, heads_per_key=4, head_dim=64, head_dim_v=64, **options))
        check_against_float64(data, run_engine(sdpa_cpu, data))
    finally:
        torch.set_num_threads(here)
    assert {shape[2] for shape, _ in noted} == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_what_is_prepared_is_the_call(monkeypatch, dtype, causal):
    data = make(Case(((30, 30),) * 2, True, nheads_k=2, heads_per_key=2, dtype=dtype, causal=causal))
    problem = data.problem()
    prepared = sdpa_cpu.prepared(problem)
    assert prepared is not None
    for one, other in zip(prepared.run(problem.q, problem.k, problem.v), sdpa_cpu.forward(problem), strict=True):
        assert torch.equal(one, other)
    retune(monkeypatch, sdpa_cpu={"widened_bytes": 1})  # several pieces
    assert (sdpa_cpu.prepared(problem) is None) == (dtype == torch.float16)
    assert sdpa_cpu.prepared(make(Case(((30, 30),) * 2, False, dtype=dtype)).problem()) is None


def test_half_precision_in_pieces(monkeypatch):
    """Heads and sequences whose fp32 copies are over the limit are done one after another."""
    data = make(Case(((30, 40),) * 3, True, nheads_k=3, heads_per_key=2, dtype=torch.float16))
    whole = run_engine(sdpa_cpu, data)
    for limit in (1, 20_000):
        retune(monkeypatch, sdpa_cpu={"widened_bytes": limit})
        pieces = run_engine(sdpa_cpu, data)
        assert all(torch.equal(whole[name], pieces[name]) for name in whole)


@pytest.mark.parametrize(
    "case",
    [
        Case(((339, 1),), True, head_dim=192, head_dim_v=192),
        Case(((339, 1),), True, nheads_k=1, heads_per_key=12, head_dim=192, head_dim_v=192),
        Case(((128, 128),), True, head_dim=128, head_dim_v=128),
        Case(((700, 40), (130, 711)), heads_per_key=4),
        Case(((114, 114), (711, 711)), nheads_k=1, heads_per_key=4, head_dim=128, head_dim_v=128, causal=True),
    ],
    ids=["one key", "one key of 12 heads", "128 tokens", "packed", "packed, causal"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_rounded_once(case, dtype):
    """Not after every block of queries, nor after every query head that reads a key head."""
    data = replace(make(replace(case, dtype=dtype)), dlse=None)
    exact, found = run_naive(data, torch.float64), run_engine(sdpa_cpu, data)
    for name in ("dq", "dk", "dv"):
        # Half a unit of the gradient, and what out's rounding does to delta.
        assert torch.allclose(found[name].double(), exact[name], rtol=0.51 * torch.finfo(dtype).eps, atol=0.02), name


def test_any_strides():
    """The kernel believes head_dim to be contiguous, and does not look."""
    data = make(Case(((20, 20),) * 2, True, causal=True))
    expected = run_engine(sdpa_cpu, data)
    for name in ("q", "k", "v", "dout"):
        x = getattr(data, name)
        setattr(data, name, x.transpose(1, 2).contiguous().transpose(1, 2))
    found = run_engine(sdpa_cpu, data)
    assert all(torch.allclose(expected[name], found[name], atol=1e-6) for name in expected)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(-1, 35), st.integers(-1, 35), st.booleans())
def test_windows_that_hide_nothing_are_none(seqlen_q, seqlen_k, left, right, causal):
    case = Case(((seqlen_q, seqlen_k),), True, window_size=(left, right), causal=causal)
    problem = make(case).problem()
    position, key = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q, torch.arange(seqlen_k)
    kept = problem.window.contains(position, key.expand(seqlen_q, seqlen_k))
    assert torch.equal(problem.window_in_force.contains(position, key.expand(seqlen_q, seqlen_k)), kept)
    if kept.all():
        assert select(problem, "forward").engine.name == "sdpa_cpu"


def test_what_it_leaves_to_others():
    for options in (
        {"softcap": 5.0},
        {"slopes": "heads"},
        {"dropout_p": 0.1},
        {"window_size": (3, 0)},
        {"softmax_scale": -1.0},
    ):
        problem = make(Case(((9, 9),), True, **options)).problem()
        assert select(problem, "forward").engine.name == "tiled"
        with pytest.raises(RuntimeError, match="sdpa_cpu engine was asked for"):
            select(problem, "forward", "sdpa_cpu")


def test_calls_of_lengths_that_come_again_are_found_once(monkeypatch):
    retune(monkeypatch, sdpa_cpu={"call_products": 0})

    def found(*lengths, window=EVERYTHING):
        return calls(Packed(cumulative(lengths), cumulative(lengths), 9, 9), window, 32)

    assert found(5, 9, 5) is found(5, 9, 5)
    assert found(5, 9, 5) is not found(5, 9, 5, window=Window(right=0))
    assert [len(call.queries.take(torch.empty(19, 1))) for call in found(5, 9, 5)] == [2, 1]
    assert [len(call.queries.take(torch.empty(19, 1))) for call in found(9, 5, 5)] == [1, 2]
