"""What must hold whoever computes attention: order, splitting, merging, shifting, sharing, causality, determinism."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from on_cpu import RUNNERS, Runner, every_engine, examples
from support import Case, make, replace

from compiled_fa.testing.naive import visible_keys


def assert_close(found, expected, tolerance=1e-5):
    for name, x in expected.items():
        assert torch.allclose(found[name], x, rtol=tolerance, atol=tolerance), name


def of_sequences(data, side):
    """Row ranges of the sequences in q's (0) or k's (1) tensors."""
    bounds = data.cu_seqlens[side].tolist()
    return [torch.arange(a, b) for a, b in pairwise(bounds)]


def taken(data, case, q_rows, k_rows, alibi_slopes):
    """Inputs of a case, from these rows of other inputs."""
    tensors = {"q": data.q[q_rows], "k": data.k[k_rows], "v": data.v[k_rows], "dout": data.dout[q_rows]}
    return replace(data, case=case, dlse=data.dlse[:, q_rows], alibi_slopes=alibi_slopes, **tensors)


def rows_of(results, q_rows, k_rows):
    sides = {"out": q_rows, "dq": q_rows, "dk": k_rows, "dv": k_rows}
    return {name: x[:, q_rows] if name == "lse" else x[sides[name]] for name, x in results.items()}


FP32 = {"dtype": torch.float32, "dropout_p": 0.0, "softmax_scale": None}
UNMASKED = {"causal": False, "window_size": (-1, -1), "slopes": "none"}


@every_engine(dense=False)
@examples(4)
@given(st.data(), st.randoms(use_true_random=False))
def test_permuting_sequences_permutes_results(runner: Runner, drawn, random):
    case = drawn.draw(runner.cases(dense=False, **FP32))
    data, order = make(case), list(range(len(case.lengths)))
    random.shuffle(order)
    q_rows, k_rows = (torch.cat([of_sequences(data, side)[b] for b in order] or [torch.arange(0)]) for side in (0, 1))
    slopes = data.alibi_slopes
    if slopes is not None and case.slopes == "batch":
        slopes = slopes[order]
    permuted = taken(data, replace(case, lengths=tuple(case.lengths[b] for b in order)), q_rows, k_rows, slopes)
    assert_close(runner.run(permuted), rows_of(runner.run(data), q_rows, k_rows))


@every_engine(dense=False)
@examples(4)
@given(st.data())
def test_splitting_a_batch_changes_nothing(runner: Runner, drawn):
    case = drawn.draw(runner.cases(dense=False, **FP32))
    data = make(case)
    whole = runner.run(data)
    for b, lengths in enumerate(case.lengths):
        q_rows, k_rows = (of_sequences(data, side)[b] for side in (0, 1))
        slopes = data.alibi_slopes
        if slopes is not None and case.slopes == "batch":
            slopes = slopes[b : b + 1]
        alone = taken(data, replace(case, lengths=(lengths,)), q_rows, k_rows, slopes)
        assert_close(runner.run(alone), rows_of(whole, q_rows, k_rows))


@every_engine(dense=True)
@examples(4)
@given(st.data())
def test_dense_is_packed(runner: Runner, drawn):
    """A batch of one length gives what its sequences give packed behind one another; dropout, too."""
    case = drawn.draw(runner.cases(dense=True, dtype=torch.float32))
    assume(case.lengths and min(case.lengths[0]) > 0)
    data = make(case)
    assert_close(runner.run(data), runner.run(replace(data, case=replace(case, dense=False))), 1e-4)


@every_engine(dense=False)
@examples(8)
@given(st.data())
def test_query_heads_that_share_a_key_head_have_it_each(runner: Runner, drawn):
    case = drawn.draw(runner.cases(dense=False, heads_per_key=st.integers(2, 4), **FP32))
    data, times = make(case), case.heads_per_key
    k, v = (x.repeat_interleave(times, 1) for x in (data.k, data.v))
    alone = runner.run(replace(data, case=replace(case, nheads_k=case.nheads, heads_per_key=1), k=k, v=v))
    for name in ("dk", "dv"):
        alone[name] = alone[name].unflatten(1, (case.nheads_k, times)).sum(2)
    assert_close(runner.run(data), alone, 5e-5)


@every_engine(dense=True)
@examples(4)
@given(st.data())
def test_merging_key_halves_by_lse_gives_the_whole(runner: Runner, drawn):
    """Attention over two halves of the keys, weighted by exp(lse - lse of the whole), is attention over all; and their
    gradients under the out and lse of the whole are its parts, and in dq its terms."""
    case = drawn.draw(runner.cases(dense=True, **UNMASKED, **FP32))
    assume(case.lengths and min(case.lengths[0]) > 0)
    data, ((seqlen_q, seqlen_k), *_) = replace(make(case), dlse=None), case.lengths
    cut = drawn.draw(st.integers(0, seqlen_k))
    whole = runner.run(data)
    halves = []
    for keys in (range(cut), range(cut, seqlen_k)):
        k, v = (data.batched(x)[:, list(keys)].flatten(0, 1) for x in (data.k, data.v))
        half = replace(data, case=replace(case, lengths=((seqlen_q, len(keys)),) * case.batch), k=k, v=v)
        forward = runner.run(half)
        problem = half.problem()
        out, lse, dout = data.batched(whole["out"]), data.per_row(whole["lse"]), data.batched(data.dout)
        halves.append((forward, runner.engine.backward(problem, dout, out, lse)))
    (first, of_first), (second, of_second) = halves
    lse = torch.logaddexp(first["lse"], second["lse"])
    part, other = (half["out"] * (half["lse"] - lse).exp().mT[..., None] for half in (first, second))
    dk, dv = (torch.cat([of_first[at], of_second[at]], 1).flatten(0, 1) for at in (1, 2))
    dq = (of_first[0] + of_second[0]).flatten(0, 1)
    assert_close({"out": part + other, "lse": lse, "dq": dq, "dk": dk, "dv": dv}, whole)


@every_engine(dense=False)
@examples(4)
@given(st.data(), st.floats(-50, 50))
def test_adding_a_constant_to_a_row_changes_nothing(runner: Runner, drawn, constant):
    """One more dimension, q's value times k's 1, adds a constant to every score of a row, and to its lse; v gets one of
    zeros."""
    case = drawn.draw(runner.cases(dense=False, **{**FP32, "softmax_scale": 1.0, "softcap": 0.0, "head_dim": 8}))
    data = replace(make(case), dlse=None)

    def one_more(x, value):
        return torch.cat([x, torch.full((*x.shape[:-1], 1), value)], -1)

    tensors = {"q": one_more(data.q, constant), "k": one_more(data.k, 1.0)}
    tensors |= {name: one_more(getattr(data, name), 0.0) for name in ("v", "dout")}
    shifted = replace(data, case=replace(case, head_dim=9, head_dim_v=case.head_dim_v + 1), **tensors)
    expected, found = runner.run(data), runner.run(shifted)
    found = {name: x if name == "lse" else x[..., :-1] for name, x in found.items()}
    expected["lse"] = expected["lse"] + torch.tensor(constant, dtype=torch.float32)
    assert_close(found, expected, 2e-4)


@every_engine(dense=False)
@examples(4)
@given(st.data(), st.integers(0, 2**31))
def test_causal_ignores_the_future_bit_for_bit(runner: Runner, drawn, other_seed):
    """Later keys and values may be anything finite: out and lse of earlier queries stay the same bits."""
    case = drawn.draw(runner.cases(dense=False, causal=True))
    data, generator = make(case), torch.Generator().manual_seed(other_seed)
    before = runner.run(data)
    for (seqlen_q, seqlen_k), rows in zip(case.lengths, of_sequences(data, 1), strict=True):
        future = rows[max(0, (seqlen_k - seqlen_q) + seqlen_q // 2 + 1) :]
        data.k[future] = (torch.randn(data.k[future].shape, generator=generator) * 9).to(case.dtype)
        data.v[future] = (torch.randn(data.v[future].shape, generator=generator) * 9).to(case.dtype)
    after = runner.run(data)
    for (seqlen_q, _), rows in zip(case.lengths, of_sequences(data, 0), strict=True):
        past = rows[: seqlen_q // 2 + 1]
        assert torch.equal(before["out"][past], after["out"][past])
        assert torch.equal(before["lse"][:, past], after["lse"][:, past])


@every_engine(dense=False)
@examples(4)
@given(st.data())
def test_ignored_keys_have_no_gradient_and_empty_rows_are_zero(runner: Runner, drawn):
    case = drawn.draw(runner.cases(dense=False))
    data = make(case)
    results = runner.run(data)
    sequences = zip(case.lengths, of_sequences(data, 0), of_sequences(data, 1), strict=True)
    for (seqlen_q, seqlen_k), q_rows, k_rows in sequences:
        seen = visible_keys(seqlen_q, seqlen_k, case.causal, case.window_size)
        ignored, empty = k_rows[~seen.any(0)], q_rows[~seen.any(1)]
        for name, rows in (("dk", ignored), ("dv", ignored), ("out", empty), ("dq", empty)):
            assert (results[name][rows] == 0).all(), name
        assert (results["lse"][:, empty] == -torch.inf).all()
    assert all(not x.isnan().any() for x in results.values())


@every_engine(dense=False)
@examples(4)
@given(st.data())
def test_same_inputs_same_bits(runner: Runner, drawn):
    case = drawn.draw(runner.cases(dense=False))
    first, second = runner.run(make(case)), runner.run(make(case))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_cases_without_tiles_are_served_without_tiles():
    """Or the tests above would run the tiled engine in the place of these steps."""
    for name, lengths in (("decode", ((1, 40), (1, 7))), ("short_varlen", ((9, 9), (20, 20), (0, 3)))):
        (runner,) = (runner for runner in RUNNERS if runner.name == name)
        served = runner.engine.served
        runner.run(make(Case(lengths)))
        assert runner.engine.served == served + 1


@pytest.mark.parametrize("slopes", ["none", "heads"])
@pytest.mark.parametrize("name", ["auto", "tiled"])
def test_one_long_sequence_among_many_short_ones(name, slopes):
    (runner,) = (runner for runner in RUNNERS if runner.name == name)
    case = Case(((300, 300), *[(3, 5)] * 40, (1, 200)), heads_per_key=2, causal=True, slopes=slopes)
    data, rows = make(case), torch.arange(300)
    alone = taken(data, replace(case, lengths=case.lengths[:1]), rows, rows, data.alibi_slopes)
    assert_close(runner.run(alone), rows_of(runner.run(data), rows, rows))
