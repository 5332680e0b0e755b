"""The kernel of compiled_fa.int8 as a Turing card executes it: its machine code, and its PTX beside PyTorch's ops."""

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from compiled_fa.int8 import kernel, quantise, tiles
from compiled_fa.int8.interface import LOG2_E
from tools.offline.figures import SHARED
from tools.offline.machine_code import inner_loops
from tools.ptx.program import kernels_on_ptx


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


OF_FP16 = 2 * 128 * 8  # cycles of a sub-core's tensor cores for a tile of 128 x 64 at head_dim 64, if all were fp16
BOUND = {False: 0.77, True: 0.92}  # of these, by the unit that is busiest, as docs/int8.md says

# batch, lengths of q and k, query and key heads, head_dims, causal
CASES = {
    "64, causal, queries without keys, GQA": (1, 130, 90, 2, 1, 64, 64, True),
    "128, causal, more keys": (1, 9, 150, 1, 1, 128, 128, True),
    "96 and 40": (2, 20, 70, 1, 1, 96, 40, False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_executed(case):
    batch, seqlen_q, seqlen_k, nheads, nheads_k, head_dim, head_dim_v, causal = case
    torch.manual_seed(0)
    q, k = torch.randn(batch, seqlen_q, nheads, head_dim), torch.randn(batch, seqlen_k, nheads_k, head_dim)
    v = torch.randn(batch, nheads_k, seqlen_k, head_dim_v).half().transpose(1, 2)  # of strides of its own
    queries = quantise.quantise(q * (head_dim**-0.5 * LOG2_E), quantise.BLOCK_Q)
    keys = quantise.quantise(quantise.smoothed(k), quantise.BLOCK_K)
    wanted = tiles.attend(queries, keys, v, causal, torch.float16)
    with kernels_on_ptx() as executed:
        out = kernel.attend(queries, keys, v, causal, torch.float16)
    # A weight that lies between two fp16 numbers may be rounded either way, and so may a result.
    assert torch.allclose(out.float(), wanted.float(), atol=2**-11, rtol=2**-10)
    ((code, counters),) = [(found.compiled, found.counters) for found in executed]
    assert code.spills == 0
    assert code.imma >= 128
    assert code.hmma >= 128
    assert code.ffma <= 72
    assert code.shared <= SHARED
    assert counters.barriers
    loops = [loop for loop in inner_loops(code.sass) if loop.counts["HMMA"]]
    assert len(loops) == 2
    for loop in loops:  # for full tiles, and for masked ones
        assert max(loop.bounds.values()) <= BOUND[head_dim > 64] * OF_FP16
