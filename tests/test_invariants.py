"""What must hold whatever attention computes: order, tiling, splitting, merging, shifting, causality, determinism."""

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import Case, cases, make, replace, run_tiled

from compiled_fa import ops
from compiled_fa.engines.tiled import TileSizes


def assert_close(found, expected, tolerance=1e-5):
    for name, x in expected.items():
        assert torch.allclose(found[name], x, rtol=tolerance, atol=tolerance), name


def pieces(data, side):
    """Row ranges of the sequences in q's (0) or k's (1) tensors."""
    bounds = data.cu_seqlens[side].tolist()
    return [torch.arange(a, b) for a, b in pairwise(bounds)]


FP32 = {"dtype": torch.float32, "dropout_p": 0.0, "softmax_scale": None}


@given(cases(dense=False, **FP32), st.randoms(use_true_random=False))
def test_permuting_sequences_permutes_results(case, random):
    data = make(case)
    order = list(range(len(case.lengths)))
    random.shuffle(order)
    permuted = make(replace(case, lengths=tuple(case.lengths[b] for b in order)))
    rows = [torch.cat([pieces(data, side)[b] for b in order] or [torch.arange(0)]) for side in (0, 1)]
    permuted.q, permuted.k, permuted.v = data.q[rows[0]], data.k[rows[1]], data.v[rows[1]]
    permuted.dout, permuted.dlse = data.dout[rows[0]], data.dlse[:, rows[0]]
    if case.slopes == "batch":
        permuted.alibi_slopes = data.alibi_slopes[order]
    else:
        permuted.alibi_slopes = data.alibi_slopes
    expected = run_tiled(data)
    expected = {
        name: x[:, rows[0]] if name == "lse" else x[rows[0] if name in ("out", "dq") else rows[1]]
        for name, x in expected.items()
    }
    assert_close(run_tiled(permuted), expected)


@given(cases(dense=False, **FP32))
def test_splitting_a_batch_changes_nothing(case):
    data = make(case)
    whole = run_tiled(data)
    for b, lengths in enumerate(case.lengths):
        alone = make(replace(case, lengths=(lengths,)))
        rows = [pieces(data, side)[b] for side in (0, 1)]
        alone.q, alone.k, alone.v = data.q[rows[0]], data.k[rows[1]], data.v[rows[1]]
        alone.dout, alone.dlse = data.dout[rows[0]], data.dlse[:, rows[0]]
        alone.alibi_slopes = data.alibi_slopes[b : b + 1] if case.slopes == "batch" else data.alibi_slopes
        found = run_tiled(alone)
        for name, x in whole.items():
            mine = x[:, rows[0]] if name == "lse" else x[rows[0] if name in ("out", "dq") else rows[1]]
            assert torch.allclose(found[name], mine, rtol=1e-5, atol=1e-5), name


@given(cases(dense=False, dtype=torch.float64, tiles=None))
def test_tile_sizes_change_only_rounding(case):
    expected = run_tiled(make(case))
    for tiles in (TileSizes(16, 16, 2), TileSizes(5, 7, 3), TileSizes(1, 64, 1)):
        assert_close(run_tiled(make(replace(case, tiles=tiles))), expected, 1e-9)


@given(cases(dense=True, causal=False, window_size=(-1, -1), slopes="none", **FP32), st.data())
def test_merging_key_halves_by_lse_gives_the_whole(case, drawn):
    """Attention over two halves of the keys, weighted by exp(lse - lse of the whole), is attention over all."""
    assume(case.lengths and min(case.lengths[0]) > 0)
    data = make(case)
    q, k, v = (data.batched(x) for x in (data.q, data.k, data.v))
    cut = drawn.draw(st.integers(0, k.shape[1]))
    out, lse = ops.attention(q, k, v, *data.options)
    halves = [ops.attention(q, k[:, part], v[:, part], *data.options) for part in (slice(0, cut), slice(cut, None))]
    merged_lse = torch.logaddexp(halves[0][1], halves[1][1])
    merged = sum(o * (part - merged_lse).exp().mT[..., None] for o, part in halves)
    assert torch.allclose(merged_lse, lse, atol=1e-5)
    assert torch.allclose(merged, out, atol=1e-5)


@given(cases(dense=True, causal=False, window_size=(-1, -1), slopes="none", **FP32), st.data())
def test_backward_of_a_key_half_takes_the_merged_lse(case, drawn):
    """dq of the halves under the lse and out of the whole add up to dq of the whole; dk and dv are its parts."""
    assume(case.lengths and min(case.lengths[0]) > 0)
    data = make(case)
    q, k, v, dout = (data.batched(x) for x in (data.q, data.k, data.v, data.dout))
    cut = drawn.draw(st.integers(0, k.shape[1]))
    out, lse = ops.attention(q, k, v, *data.options)
    whole = ops.attention_backward(dout, None, out, lse, q, k, v, *data.options)
    halves = [
        ops.attention_backward(dout, None, out, lse, q, k[:, part], v[:, part], *data.options)
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert torch.allclose(halves[0][0] + halves[1][0], whole[0], atol=1e-5)
    for at in (1, 2):
        assert torch.allclose(torch.cat([half[at] for half in halves], 1), whole[at], atol=1e-5)


@given(cases(dense=False, **{**FP32, "softmax_scale": 1.0}, softcap=0.0, head_dim=8), st.floats(-50, 50))
def test_adding_a_constant_to_a_row_changes_nothing(case, constant):
    """One more dimension, q's value times k's 1, adds a constant to every score of a row, and to its lse."""
    data = make(case)
    shifted = make(replace(case, head_dim=9))
    offset = torch.full((data.q.shape[0], case.nheads, 1), constant)
    shifted.q = torch.cat([data.q, offset], -1)
    shifted.k = torch.cat([data.k, torch.ones(*data.k.shape[:-1], 1)], -1)
    for name in ("v", "dout", "dlse", "alibi_slopes"):
        setattr(shifted, name, getattr(data, name))
    shifted.dlse = data.dlse = torch.zeros_like(data.dlse)
    expected, found = run_tiled(data), run_tiled(shifted)
    expected["lse"] = expected["lse"] + torch.tensor(constant, dtype=torch.float32)
    found["dq"], found["dk"] = found["dq"][..., :8], found["dk"][..., :8]
    assert_close(found, expected, 2e-4)


@given(cases(dense=False, causal=True), st.integers(0, 2**31))
def test_causal_ignores_the_future_bit_for_bit(case, other_seed):
    """Later keys and values may be anything finite: out and lse of earlier queries stay the same bits."""
    data, generator = make(case), torch.Generator().manual_seed(other_seed)
    before = run_tiled(data)
    for (seqlen_q, seqlen_k), rows in zip(case.lengths, pieces(data, 1), strict=True):
        future = rows[max(0, (seqlen_k - seqlen_q) + seqlen_q // 2 + 1) :]
        data.k[future] = (torch.randn(data.k[future].shape, generator=generator) * 9).to(case.dtype)
        data.v[future] = (torch.randn(data.v[future].shape, generator=generator) * 9).to(case.dtype)
    after = run_tiled(data)
    for (seqlen_q, _), rows in zip(case.lengths, pieces(data, 0), strict=True):
        past = rows[: seqlen_q // 2 + 1]
        assert torch.equal(before["out"][past], after["out"][past])
        assert torch.equal(before["lse"][:, past], after["lse"][:, past])


@given(cases(dense=False))
def test_ignored_keys_have_no_gradient_and_empty_rows_are_zero(case):
    data = make(case)
    results = run_tiled(data)
    left, right = case.window_size
    right = 0 if case.causal else right
    for (seqlen_q, seqlen_k), q_rows, k_rows in zip(case.lengths, pieces(data, 0), pieces(data, 1), strict=True):
        position, key = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q, torch.arange(seqlen_k)
        seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
        seen &= (key >= position - left) if left >= 0 else seen
        seen &= (key <= position + right) if right >= 0 else seen
        ignored, empty = k_rows[~seen.any(0)], q_rows[~seen.any(1)]
        for name, rows in (("dk", ignored), ("dv", ignored), ("out", empty), ("dq", empty)):
            assert (results[name][rows] == 0).all(), name
        assert (results["lse"][:, empty] == -torch.inf).all()
    assert all(not x.isnan().any() for x in results.values())


@given(cases(dense=False))
def test_same_inputs_same_bits(case):
    first, second = run_tiled(make(case)), run_tiled(make(case))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("slopes", ["none", "heads"])
def test_one_long_sequence_among_many_short_ones(slopes):
    case = Case(((300, 300), *[(3, 5)] * 40, (1, 200)), heads_per_key=2, causal=True, slopes=slopes)
    data = make(case)
    whole = run_tiled(data)
    alone = make(replace(case, lengths=case.lengths[:1]))
    for name in ("q", "k", "v", "dout"):
        setattr(alone, name, getattr(data, name)[:300])
    alone.dlse, alone.alibi_slopes = data.dlse[:, :300], data.alibi_slopes
    for name, x in run_tiled(alone).items():
        mine = whole[name][:, :300] if name == "lse" else whole[name][:300]
        assert torch.allclose(x, mine, rtol=1e-5, atol=1e-5), name
