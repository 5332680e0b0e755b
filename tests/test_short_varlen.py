"""Many short packed sequences: blocks of queries, in windows of memory. The step runs eagerly, but in the last test."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DTYPES, WINDOW_SIDE, Case, check_against_float64, make, replace

from compiled_fa import untiled
from compiled_fa.engines import choose, tiled
from compiled_fa.engines.tiled.split_kv import short_varlen, step


def shrink(patch):
    """Few scores at once; eager."""
    patch.setattr(untiled, "SHORT_ELEMENTS", 1)
    patch.setattr(short_varlen, "SCORES", 1 << 12)
    patch.setattr(short_varlen, "_plans", {})
    patch.setattr(step, "alone", lambda shape: lambda tensors: step.attend_alone(shape, *tensors))


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
        if not short_varlen.pays(problem):  # there is nothing
            assert not problem.v.numel() or not problem.q.numel()
            return
        found = short_varlen.forward(problem)
        again = short_varlen.forward(problem)
    longest = max(n for _, n in case.lengths)
    if found is None:  # memory of less than a window
        assert (
            data.q.shape[0] < 4
            or data.k.shape[0] < max(1, -(-longest // short_varlen.MULTIPLE)) * short_varlen.MULTIPLE
        )
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
        name = choose("auto", problem.q.device, problem)[0]
        return f"step of {name}" if name == "tiled" and short_varlen.pays(problem) else name

    assert (
        served([60] * 20) == served([60] * 20, dtype=torch.bfloat16) == served([90] * 9, softcap=1.0) == "step of tiled"
    )
    assert served([60] * 2) == served([60] * 20 + [97]) == "sdpa_cpu"
    assert served([60] * 20, slopes="heads") == served([97], softcap=1.0) == "tiled"
    monkeypatch.setenv("COMPILED_FA_COMPILE", "0")  # tiles run eagerly then, slower than sdpa_cpu
    assert served([60] * 20) == "sdpa_cpu"


@pytest.mark.parametrize(("dtype", "causal"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_compiled(compiled_steps, monkeypatch, dtype, causal):
    monkeypatch.setattr(short_varlen, "_plans", {})
    for lengths in ((9, 30, 0, 61, 7, 8, 8, 64, 1), (50, 20)):
        data = make(Case(tuple((n, n) for n in lengths), False, 3, 2, 32, 64, dtype, causal))
        found = short_varlen.forward(data.problem())
        assert found is not None
        check_against_float64(data, dict(zip(("out", "lse"), found, strict=True)))
        monkeypatch.setattr(untiled, "SHORT_ELEMENTS", 1)
        assert torch.equal(found[0], tiled.forward(data.problem())[0])
