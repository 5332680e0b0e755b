"""Dropout: the quality of its decisions, and that only seed and indices decide."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Case, make, run_tiled

from compiled_fa import flash_attn_func, flash_attn_varlen_func
from compiled_fa.engines.tiled import TileSizes
from compiled_fa.testing.naive import keep_decisions

SIGMAS = 6.0  # of a binomial: one false alarm in 500 million draws


def decisions(p, seed=1, batch=2, nheads=4, seqlen_q=512, seqlen_k=512):
    return keep_decisions(torch.tensor([seed]), p, batch, nheads, seqlen_q, seqlen_k).double()


def assert_binomial(kept, p, n):
    """kept: counts among n draws each."""
    bound = SIGMAS * math.sqrt(n * p * (1 - p)) + 1
    assert (kept - n * (1 - p)).abs().max() <= bound


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**62 - 1])
def test_keep_rates(p, seed):
    keep = decisions(p, seed)
    assert_binomial(keep.sum(), p, keep.numel())
    assert_binomial(keep.sum(-1), p, 512)  # each row
    assert_binomial(keep.sum(-2), p, 512)  # each column
    assert_binomial(keep.sum((-1, -2)), p, 512 * 512)  # each head of each sequence


def test_keep_rate_over_seeds():
    """One element under many seeds is as random as many elements under one."""
    kept = torch.stack([decisions(0.3, seed, 1, 1, 2, 2)[0, 0] for seed in range(4000)]).sum(0)
    assert_binomial(kept, 0.3, 4000)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("step", [1, 2, 16, 64, 128])
@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "head", "q index", "k index"])
def test_neighbours_are_independent(p, step, dim):
    keep = decisions(p, batch=128 + 1, nheads=1, seqlen_q=64, seqlen_k=64) if dim == 0 else None
    if dim == 1:
        keep = decisions(p, batch=1, nheads=128 + 1, seqlen_q=64, seqlen_k=64)
    if keep is None:
        keep = decisions(p, batch=1, nheads=2)
    size = keep.shape[dim]
    both = keep.narrow(dim, 0, size - step) * keep.narrow(dim, step, size - step)
    expected = (1 - p) ** 2
    bound = SIGMAS * math.sqrt(expected * (1 - expected) / both.numel()) * 2  # overlapping pairs: twice the deviation
    assert abs(both.mean().item() - expected) <= bound


def test_neighbouring_seeds_are_independent():
    both = (decisions(0.5, 10) * decisions(0.5, 11)).mean().item()
    assert abs(both - 0.25) <= SIGMAS * math.sqrt(0.25 * 0.75 / (8 * 512 * 512))


def test_no_two_rows_drop_alike():
    """Also not shifted: 32 bits of state would let some of these rows meet."""
    keep = keep_decisions(torch.tensor([3]), 0.5, 4, 16, 512, 64).flatten(0, 2)
    assert keep.unique(dim=0).shape[0] == keep.shape[0]


@given(st.integers(-(2**63), 2**63 - 1), st.floats(0.01, 0.99))
def test_tiling_does_not_matter(seed, p):
    """A corner of a large mask is the small mask: decisions know nothing of shapes."""
    large = keep_decisions(torch.tensor([seed]), p, 2, 3, 20, 30)
    assert torch.equal(large[:1, :2, :7, :11], keep_decisions(torch.tensor([seed]), p, 1, 2, 7, 11))


def test_tile_sizes_drop_the_same():
    case = Case(((50, 60), (7, 80)), heads_per_key=2, dropout_p=0.5, dtype=torch.float64)
    results = [
        run_tiled(make(Case(**{**case.__dict__, "tiles": tiles})))
        for tiles in (None, TileSizes(16, 16, 1), TileSizes(7, 5, 9))
    ]
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.allclose(other[name], expected, rtol=1e-9, atol=1e-11), name


def test_manual_seed_governs_it():
    q = torch.randn(1, 20, 2, 8)
    torch.manual_seed(5)
    first, second = (flash_attn_func(q, q, q, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, flash_attn_func(q, q, q, dropout_p=0.5))
    assert not torch.equal(first, second)


def test_expectation_is_attention_without_dropout():
    q, k, v = torch.randn(3, 1, 6, 1, 4, dtype=torch.float64)
    outs = torch.stack([flash_attn_func(q, k, v, dropout_p=0.4) for _ in range(4000)])
    deviation = outs.std(0) / math.sqrt(4000)
    assert ((outs.mean(0) - flash_attn_func(q, k, v)).abs() <= SIGMAS * deviation).all()


def hashed(x):
    """lowbias32 on unsigned integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0.01, 0.5, 0.9]), st.data())
def test_decisions_are_those_of_every_version(seed, p, drawn):
    """The construction of scores/dropout.py, on Python's integers: a seed must drop tomorrow what it drops today."""
    batch, head, i, j = (drawn.draw(st.integers(0, 5)) for _ in range(4))
    low, high = hashed(seed % 2**32), hashed(seed % 2**64 >> 32 ^ 0x9E3779B9)
    for index in (batch, head, i):
        low = hashed((low + index) % 2**32)
        high = hashed((high + low) % 2**32)
    element = hashed((hashed((low + j) % 2**32) + high) % 2**32)
    signed = element - 2**32 if element >= 2**31 else element
    kept = keep_decisions(torch.tensor([seed]), p, 1, 1, 1, j + 1, (batch, head, i))[0, 0, 0, j]
    assert bool(kept) == (signed + 2**31 >= round(p * 2**32))


def test_a_refused_call_draws_no_seed():
    q, k = torch.randn(2, 8, 2, 4), torch.randn(2, 8, 2, 5)
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="k must be of q's head_dim"):
        flash_attn_func(q, k, k, dropout_p=0.5)
    with pytest.raises(ValueError, match="k must be of q's head_dim"):
        flash_attn_varlen_func(q[0], k[0], k[0], cu_seqlens, cu_seqlens, 5, 5, dropout_p=0.5)
    with pytest.raises(TypeError, match="cu_seqlens_k must be of dtype int32"):
        flash_attn_varlen_func(q[0], q[0], q[0], cu_seqlens, cu_seqlens.long(), 5, 5, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), before)
