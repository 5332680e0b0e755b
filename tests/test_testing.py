"""compiled_fa.testing: what it says of an attention problem is so, and what is wrong does not pass."""

import pytest
import torch
from hypothesis import given
from on_cpu import examples
from support import RESULTS, Case, cases, check_against_float64, make, packed, replace, run_function, run_naive, run_op

from compiled_fa.testing.budget import Expected, budget, error, expected, magnitudes

MANY = Case(((9, 20), (0, 3), (5, 0), (33, 30)), heads_per_key=2, slopes="batch", causal=True, dropout_p=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", RESULTS)
def test_wrong_results_do_not_pass(dtype, name):
    """Ten times what is allowed, in one element; NaN; a row less."""
    data = make(replace(MANY, dtype=dtype))
    allowed, right = expected(data)[name].allowed, run_naive(data, torch.float64)
    check_against_float64(data, right)
    at = right[name].isfinite().nonzero()[7]
    for wrong in (float(right[name][tuple(at)]) + 10 * allowed, torch.nan, torch.inf):
        results = {name: x.clone() for name, x in right.items()}
        results[name][tuple(at)] = wrong
        with pytest.raises(AssertionError, match=f"^{name}: error"):
            check_against_float64(data, results)
    with pytest.raises(AssertionError, match=f"^{name}: shape"):
        check_against_float64(data, {**right, name: right[name][1:]})


def test_infinities_must_be_the_same():
    minus = torch.tensor([-torch.inf, 0.0])
    assert error(minus, minus) == 0.0
    assert error(minus, -minus) == torch.inf
    assert error(torch.tensor([torch.nan, 0.0]), minus) == torch.inf


def test_the_budget_is_what_it_is():
    """Worked out by hand: a budget that grows unseen lets everything pass."""
    data = make(Case(((2, 3),), nheads_k=1, head_dim=4, head_dim_v=4, softmax_scale=-0.1, dropout_p=0.5))
    for name, value in {"q": 1.0, "k": -0.5, "v": 3.0, "dout": 2.0, "dlse": 0.25}.items():  # norms 2, 1, 6, 4
        getattr(data, name).fill_(value)
    dscore = (4 * 6 / 0.5 + 0.25) * 1.2
    walk = 2**0.5
    wanted = {"out": 7.2, "lse": 1.2, "dq": 0.05 * dscore, "dk": 0.1 * dscore * walk, "dv": 4.8 * walk}
    assert magnitudes(data) == pytest.approx(wanted)
    data.bias = torch.full((1, 1, 2, 1), -0.5)  # 2 elements of 6 scores; out's rounding, here of fp32 as all is
    of_bias = ((4 * 6 / 0.5 + 0.25) * 1.7 + 4 * 6 / 0.5 / 8) * 3**0.5
    assert magnitudes(data)["dbias"] == pytest.approx(of_bias)
    exact = torch.tensor([16.0, -torch.inf])
    naive = torch.tensor([15.0, -torch.inf], dtype=torch.float16)
    assert budget(naive, exact, 3.0) == pytest.approx(2.0 * 1.0 + 2.0**-10 * 16.0 + 8 * 2.0**-23 * 3.0, rel=1e-9)
    assert budget(naive[:0], exact[:0], 3.0) == pytest.approx(8 * 2.0**-23 * 3.0)


def test_where_naive_attention_overflows_not_everything_passes():
    wanted = Expected.of(torch.tensor([torch.nan]), torch.tensor([1.0]), 1.0)
    assert wanted.allows(1e-3)
    assert not wanted.allows(torch.inf)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 2.0, "slopes": "heads"}], ids=str)
def test_functions_run_as_ops_do(dense, options):
    lengths = ((9, 20),) * 2 if dense else MANY.lengths
    data = make(Case(lengths, dense, heads_per_key=2, softmax_scale=0.2, window_size=(15, 3), **options))
    found, expected_results = run_function(data), run_op(data)
    assert list(found) == list(RESULTS)
    assert all(torch.equal(found[name], x) for name, x in expected_results.items())


@examples(4)
@given(cases(dense=False, page_size=5, dtype=torch.float32, heads_per_key=1))
def test_pages_hold_the_keys(case):
    """Each key and value once, in the page that the table names; everything else is nobody's."""
    data = make(case)
    k, v, table = data.pages()
    found = 0
    for b, (_, seqlen_k) in enumerate(case.lengths):
        for j, (key, value) in enumerate(zip(data.sequence(data.k, b, 1), data.sequence(data.v, b, 1), strict=True)):
            page = table[b, j // 5]
            assert torch.equal(k[page, j % 5], key)
            assert torch.equal(v[page, j % 5], value)
        assert (table[b, -(-seqlen_k // 5) :] >= len(k)).all()
        found += seqlen_k
    assert k.isfinite().all((-1, -2)).sum() == v.isfinite().all((-1, -2)).sum() == found


@pytest.mark.parametrize("run", [run_op, run_function])
def test_paged_cases_run(run):
    data = make(Case(((5, 20), (1, 33), (0, 4), (3, 0)), page_size=4, heads_per_key=2, slopes="heads", causal=True))
    results = run(data)
    assert list(results) == ["out", "lse"]
    check_against_float64(data, results)


@pytest.mark.parametrize("slopes", ["heads", "batch"])
@pytest.mark.parametrize("queries", [33, 7])
def test_a_part_is_a_problem_of_its_own(slopes, queries):
    """Its out, lse and dq are those of the whole; with all queries dk and dv, too. Dropout drops the same."""
    data = make(replace(MANY, slopes=slopes, seed=3))
    whole, part = run_naive(data, torch.float64), data.part(3, 1, queries)
    found, heads = run_naive(part, torch.float64), slice(2, 4)
    of_q = {name: data.sequence(whole[name], 3, 0)[-queries:, heads] for name in ("out", "dq")}
    of_k = {name: data.sequence(whole[name], 3, 1)[:, 1:2] for name in ("dk", "dv")} if queries == 33 else {}
    assert torch.allclose(found["lse"], whole["lse"][heads, -queries:])
    for name, x in {**of_q, **of_k}.items():
        assert torch.allclose(found[name], x), name
    assert torch.allclose(run_naive(part.part(0, 0, 5), torch.float64)["out"], found["out"][-5:])


def test_results_of_dense_ops_are_packed():
    data = make(Case(((2, 3),) * 2, True))
    named = packed(data, (torch.arange(64).view(2, 2, 2, 8), torch.arange(8).view(2, 2, 2)))
    assert torch.equal(named["out"], torch.arange(64).view(4, 2, 8))
    assert torch.equal(named["lse"], torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]]))


def test_what_makes_no_case_is_refused():
    with pytest.raises(ValueError, match="lengths must be alike where dense is True"):
        Case(((3, 4), (4, 4)), dense=True)
    with pytest.raises(ValueError, match="dropout_p must be 0"):
        run_function(make(MANY))
