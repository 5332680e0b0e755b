"""Tiles of a GPU's size on one: right in every budget, within it by the allocator's own count, and without waiting."""

import pytest
import torch
from support import Case, check_against_float64, make, run_engine

from compiled_fa.engines import tiled
from compiled_fa.engines.tiled.large import budget
from compiled_fa.problem import Problem
from compiled_fa.tuning.gpu_tiles import GPU

MB = 1 << 20


@pytest.fixture
def allowed(monkeypatch):
    """allowed(bytes): what a call may take."""

    def allow(nbytes):
        monkeypatch.setattr(budget, "memory", lambda device: nbytes * GPU.tiled.memory_parts)

    return allow


@pytest.mark.parametrize("nbytes", [MB, 8 * MB, 256 * MB])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "varlen"])
def test_agrees_with_float64_in_any_budget(device, allowed, dense, dtype, nbytes):
    allowed(nbytes)
    lengths = ((300, 300),) * 2 if dense else ((67, 90), (0, 3), (5, 0), (500, 500), (33, 20), (1, 700))
    for options in ({}, {"causal": True, "heads_per_key": 2}, {"softcap": 5.0, "slopes": "batch", "dropout_p": 0.2}):
        data = make(Case(lengths, dense, head_dim=64, head_dim_v=32, dtype=dtype, **options))
        found = run_engine(tiled, data.to(device))
        check_against_float64(data, {name: x.cpu() for name, x in found.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0}, {"dropout_p": 0.1}], ids=str)
def test_peak_memory_is_inputs_and_results_and_the_budget(device, allowed, options, dtype):
    allowed(32 * MB)
    data = make(Case(((2000, 2000),), True, nheads_k=8, head_dim=64, head_dim_v=64, dtype=dtype, **options)).to(device)
    problem, dout = data.problem(), data.laid_out(data.dout)
    out, lse = tiled.forward(problem)  # and cuBLAS has its workspace
    tiled.backward(problem, dout, out, lse)
    for run in (lambda: tiled.forward(problem), lambda: tiled.backward(problem, dout, out, lse)):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        results = run()
        peak = torch.cuda.max_memory_allocated(device) - before
        assert 8 * MB < peak - sum(x.nbytes for x in results) <= 32 * MB


def test_a_dense_call_waits_for_nothing(device):
    q = torch.randn(2, 500, 4, 64, device=device, dtype=torch.float16)
    problem = Problem.of(q, q, q, None, None, True)
    tiled.forward(problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = tiled.forward(problem)
        tiled.backward(problem, out, out, lse)
    finally:
        torch.cuda.set_sync_debug_mode("default")
