"""Many short packed sequences: blocks of queries, in windows of memory. The step runs eagerly, but in the last test."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES, WINDOW_SIDE, Case, check_against_float64, make, replace
from tuned import retune

from compiled_fa.caches import clear_caches
from compiled_fa.engines import select, split_kv
from compiled_fa.engines.split_kv import short_varlen


def shrink(patch):
    """Few scores at once."""
    retune(patch, split_kv={"short_from_elements": 1, "score_bytes": 1 << 12})


@st.composite
def batches(draw):
    length = st.one_of(st.integers(0, 40), st.sampled_from([1, 4, 7, 8, 9, 16]))
    lengths = draw(st.lists(st.tuples(length, length), min_size=1, max_size=9))
    return Case(
        tuple((n, n) for n, _ in lengths) if draw(st.booleans()) else tuple(lengths),
        nheads_k=draw(st.integers(1, 3)),
        heads_per_key=draw(st.sampled_from([1, 2, 3, 5])),
        head_dim=draw(st.sampled_from([1, 3, 8, 33])),
        head_dim_v=draw(st.sampled_from([1, 5, 32, 64])),
        dtype=draw(DTYPES),
        causal=draw(st.booleans()),
        window_size=draw(st.one_of(st.just((-1, -1)), st.tuples(WINDOW_SIDE, WINDOW_SIDE))),
        softmax_scale=draw(st.sampled_from([None, 0.05, -0.3])),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        seed=draw(st.integers(0, 2**31)),
    )


@given(case=batches())
def test_agrees_with_float64(case):
    data = make(case)
    problem = data.problem()
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        refusal = split_kv.unsupported_reason(problem.q.device, problem)
        if refusal == "there are no queries, or no keys":
            assert not problem.v.numel() or not problem.q.numel()
            return
        if (refusal := short_varlen.unsupported_reason(problem)) is None:
            assert short_varlen.is_worth_code(problem)
            found = short_varlen.forward(problem)
            again = short_varlen.forward(problem)
    longest = max(n for _, n in case.lengths)
    if refusal is not None:  # memory of less than a window
        assert refusal == "there are fewer rows than it reads at once"
        assert data.q.shape[0] < 4 or data.k.shape[0] < max(1, -(-longest // 16)) * 16
        return
    assert all(x.is_contiguous() for x in found)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))  # by the plan of the first
    check_against_float64(data, dict(zip(("out", "lse"), found, strict=True)))


def test_sequences_keep_to_themselves(monkeypatch):
    """NaN in one, before, after or between others."""
    shrink(monkeypatch)
    lengths = (5, 9, 3, 16, 1)
    data = make(Case(tuple((n, n) for n in lengths)))
    out, lse = short_varlen.forward(data.problem())
    first = data.cu_seqlens[0].tolist()
    for ill, (start, stop) in enumerate(pairwise(first)):
        q, k, v = (x.clone() for x in (data.q, data.k, data.v))
        q[start:stop] = k[start:stop] = v[start:stop] = torch.nan
        some_out, some_lse = short_varlen.forward(replace(data.problem(), q=q, k=k, v=v))
        for b in set(range(len(lengths))) - {ill}:
            assert torch.equal(some_out[first[b] : first[b + 1]], out[first[b] : first[b + 1]])
            assert torch.equal(some_lse[:, first[b] : first[b + 1]], lse[:, first[b] : first[b + 1]])


def test_who_serves_short_sequences(compiled_steps, monkeypatch):
    def served(lengths, **options):
        data = make(Case(tuple((n, n) for n in lengths), nheads_k=8, head_dim=64, head_dim_v=64, **options))
        problem = data.problem()
        return select(problem, "forward").engine.name

    assert served([60] * 20) == served([60] * 20, dtype=torch.bfloat16) == served([90] * 9, softcap=1.0) == "split_kv"
    assert served([60] * 2) == served([60] * 20 + [97]) == "sdpa_cpu"
    assert served([60] * 20, slopes="heads") == served([97], softcap=1.0) == "tiled"
    monkeypatch.setenv("COMPILED_FA_COMPILE", "0")  # tiles run eagerly then, slower than sdpa_cpu
    assert served([60] * 20) == "sdpa_cpu"


@pytest.mark.parametrize(("dtype", "causal"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_compiled(compiled_steps, monkeypatch, dtype, causal):
    clear_caches()
    for lengths in ((9, 30, 0, 61, 7, 8, 8, 64, 1), (50, 20)):
        data = make(Case(tuple((n, n) for n in lengths), False, 3, 2, 32, 64, dtype, causal))
        found = short_varlen.forward(data.problem())
        check_against_float64(data, dict(zip(("out", "lse"), found, strict=True)))
        retune(monkeypatch, split_kv={"short_from_elements": 1})
        route = select(data.problem(), "forward")
        assert route.engine is split_kv
        assert torch.equal(found[0], route.engine.forward(data.problem())[0])
