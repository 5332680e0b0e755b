"""SageAttention 1.0.6 on a Turing card: its own wrappers, kernels compiled with the stage and executed as PTX.

Its results are held against its algorithm in float64, not against attention: what its int8 scores lose is its own.
Needs `pip install --no-deps sageattention==1.0.6`.
"""

import contextlib

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("sageattention", reason="sageattention is not installed")

import torch
from sageattention import core as sageattention

from tools.offline.launches import CudaOnCpu
from tools.ptx import OutOfBoundsError
from tools.ptx.program import kernels_on_ptx

BLOCK_Q, BLOCK_K = 128, 64  # its tiles, and the rows that share a scale
LOG2_E = 1.44269504
# P V of 64 keys is added up in fp16, and the result is fp16, of which its algorithm in float64 knows nothing.
ABSOLUTE, RELATIVE = 2e-3, 2**-10


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@contextlib.contextmanager
def on_a_t4():
    with kernels_on_ptx() as executed, CudaOnCpu():
        yield executed


def quantised(x, scale, block):
    """(S, D) -> int8 and scales, as if they were float64; rounded half away from zero, in fp32 as it does."""
    x = x.float() * scale
    scales = torch.stack([part.abs().max() / 127 for part in x.split(block)])
    of_rows = scales.repeat_interleave(block)[: len(x), None]
    quotient = x / of_rows
    return (quotient + 0.5 * quotient.sign()).trunc().double(), scales.double()


def padded(x, rows):
    return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x)))


def algorithm(q, k, v, causal):
    """(S, D) of one head, k smoothed already -> out (S, D) in float64. Keys past the end of k are 0, and seen."""
    seqlen_q, seqlen_k = len(q), len(k)
    q8, q_scales = quantised(q, q.shape[1] ** -0.5 * LOG2_E, BLOCK_Q)
    k8, k_scales = quantised(k, 1.0, BLOCK_K)
    key_tiles = -(-seqlen_k // BLOCK_K)
    k8, v = padded(k8, key_tiles * BLOCK_K), padded(v.double(), key_tiles * BLOCK_K)
    row = torch.arange(seqlen_q)[:, None]
    largest = torch.full((seqlen_q, 1), -torch.inf, dtype=torch.float64)
    total, sums = torch.zeros(seqlen_q, 1).double(), torch.zeros(seqlen_q, v.shape[1]).double()
    for tile in range(key_tiles):
        of = slice(tile * BLOCK_K, (tile + 1) * BLOCK_K)
        scales = q_scales.repeat_interleave(BLOCK_Q)[:seqlen_q, None] * k_scales[tile]
        score = q8 @ k8[of].T * scales
        if causal:
            column = tile * BLOCK_K + torch.arange(BLOCK_K)
            score = torch.where(row >= column, score, score - 1e6)
        new = torch.maximum(largest, score.max(1, keepdim=True).values)
        weight, decay = torch.exp2(score - new), torch.exp2(largest - new)
        total = total * decay + weight.sum(1, keepdim=True)
        sums = sums * decay + weight.half().double() @ v[of]
        largest = new
    return sums / total


def heads_of(q, k, v, causal):
    """(S, H, D) each, with fewer key heads -> (S, H, D)."""
    shared = q.shape[1] // k.shape[1]
    return torch.stack([algorithm(q[:, h], k[:, h // shared], v[:, h // shared], causal) for h in range(q.shape[1])], 1)


def smoothed(k):
    return k - k.mean(0, keepdim=True)


def between_halves(*shape):
    """fp16 numbers that int8 rounds alike whatever the last bit of a division: no multiple of 1/64 plus 1/128.

    Every row has a greatest one of 127/64.
    """
    steps = torch.randint(-126, 127, shape) + torch.randint(-3, 4, shape) / 8
    steps[..., 0] = 127 * torch.randint(0, 2, shape[:-1]).mul(2).sub(1)
    return steps / 64


def drawn(seqlen, head_dim, nheads=2, nheads_k=1):
    """q, and k and v with a mean of k, 2, that smoothing takes away without a rounding."""
    torch.manual_seed(seqlen)
    q, half = between_halves(seqlen, nheads, head_dim), between_halves(seqlen // 2, nheads_k, head_dim)
    return q.half(), (torch.cat([half, -half]) + 2).half(), torch.randn(seqlen, nheads_k, head_dim).half()


def check(executed, out, wanted):
    attention = executed[-1].compiled
    assert attention.imma
    assert attention.hmma
    assert attention.spills <= 4
    assert torch.allclose(out.double(), wanted, atol=ABSOLUTE, rtol=RELATIVE)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_dense(head_dim, causal):
    q, k, v = drawn(100, head_dim)
    wanted = heads_of(q, smoothed(k), v, causal)
    with on_a_t4() as executed:
        out = sageattention.sageattn(q[None], k[None].clone(), v[None], tensor_layout="NHD", is_causal=causal)
    check(executed, out[0], wanted)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_varlen(head_dim, causal):
    lengths = [70, 100]
    q, k, v = drawn(sum(lengths), head_dim)
    parts = zip(q.split(lengths), smoothed(k).split(lengths), v.split(lengths), strict=True)
    wanted = torch.cat([heads_of(*part, causal=causal) for part in parts])
    cu_seqlens = torch.tensor([0, 70, 170], dtype=torch.int32)
    with on_a_t4() as executed:
        out = sageattention.sageattn_varlen(q, k.clone(), v, cu_seqlens, cu_seqlens, 100, 100, is_causal=causal)
    check(executed, out, wanted)


# What is its own, with any Triton and on any card; docs/turing.md tells it.


def test_its_full_kernel_sees_keys_past_the_end():
    """One key: its weight would be 1; 63 keys of 0 that are not there share it."""
    q = torch.ones(1, 1, 1, 64).half()
    k, v = torch.zeros(1, 1, 1, 64).half(), torch.ones(1, 1, 1, 64).half()
    k[..., 0] = 1
    with on_a_t4():
        out = sageattention.sageattn(q, k, v, smooth_k=False)
    assert out.max() < 0.05


def test_its_causal_kernel_reads_scales_out_of_bounds():
    """Where seqlen mod 128 is from 1 to 64, the last block of queries asks for a scale more than there are."""
    q, k, v = (x[None] for x in drawn(130, 96, nheads=1))
    with on_a_t4(), pytest.raises(OutOfBoundsError, match="K_scale"):
        sageattention.sageattn(q, k, v, tensor_layout="NHD", is_causal=True)


def test_it_changes_the_keys_that_it_is_given():
    q, k, v = (x[None] for x in drawn(70, 64, nheads=1))
    before = k.clone()
    with on_a_t4():
        sageattention.sageattn(q, k, v, tensor_layout="NHD")
    assert torch.equal(k, before - before.mean(1, keepdim=True))
