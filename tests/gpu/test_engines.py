"""The engines on the device against float64: forward, gradients, every dtype; models, CUDA graphs, no host sync."""

from typing import Any

import pytest
import torch
from support import Case, check_against_float64, cumulative, make, replace, run_engine
from torch.utils.checkpoint import checkpoint

from compiled_fa import flash_attn_func, flash_attn_varlen_func, use_engine
from compiled_fa.engines import fused, tiled, triton
from compiled_fa.testing import Bias

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window, slopes": {"window_size": (100, 20), "slopes": "batch"},
    "softcap": {"causal": True, "softcap": 5.0},
    "dropout": {"causal": True, "dropout_p": 0.2},
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LENGTHS = {
    "dense": ((300, 300),) * 2,
    "dense, blocks": ((256, 512),) * 2,
    "rectangular": ((130, 411),) * 2,
    "empty rows": ((300, 200),) * 2,
    "varlen": ((67, 90), (0, 3), (5, 0), (500, 500), (33, 20), (1, 700)),
}


def run_on(device, engine, data):
    """Results of an engine on the device, brought back to the CPU."""
    return {name: x.cpu() for name, x in run_engine(engine, data.to(device)).items()}


@pytest.mark.parametrize("engine", [fused, triton, tiled], ids=["fused", "triton", "tiled"])
@pytest.mark.parametrize("options", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(device, engine, options, lengths, dtype):
    dense = len(set(lengths)) == 1
    data = make(Case(lengths, dense, heads_per_key=2, head_dim=64, head_dim_v=64, dtype=dtype, **options))
    check_against_float64(data, run_on(device, engine, data))


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(8, 8), (32, 32), (80, 80), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("engine", [fused, triton], ids=["fused", "triton"])
def test_head_dims(device, engine, head_dim, head_dim_v):
    case = Case(((200, 200),), True, head_dim=head_dim, head_dim_v=head_dim_v, dtype=torch.float16, causal=True)
    check_against_float64(make(case), run_on(device, engine, make(case)))


@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 5.0, "dropout_p": 0.2}], ids=str)
@pytest.mark.parametrize("bias", [Bias("hqk", torch.float16), Bias("bk", torch.bool), Bias(expanded=True)], ids=str)
def test_a_bias_agrees_with_float64(device, bias, options):
    """Its gradient by tiles, everything else by the fused engine, too."""
    sizes: dict[str, Any] = {"heads_per_key": 2, "head_dim": 64, "head_dim_v": 64, "dtype": torch.float16}
    data = make(Case(((130, 411),) * 2, True, bias=bias, **sizes, **options))
    check_against_float64(data, run_on(device, tiled, data))
    check_against_float64(data, run_on(device, WithoutBiasGradient, data))


class WithoutBiasGradient:
    """The fused engine, asked for what it serves."""

    forward = staticmethod(fused.forward)

    @staticmethod
    def backward(problem, *arguments):
        return fused.backward(replace(problem, bias_gradient=False), *arguments)


def test_engines_drop_the_same(device):
    data = make(Case(((200, 300),) * 2, True, head_dim=32, head_dim_v=32, dropout_p=0.5))
    expected = run_on(device, tiled, data)
    for engine in (fused, triton):
        found = run_on(device, engine, data)
        assert all(torch.allclose(found[name], x, rtol=1e-2, atol=1e-3) for name, x in expected.items())


class Model(torch.nn.Module):
    def __init__(self, dropout_p=0.0):
        super().__init__()
        self.inner, self.outer, self.dropout_p = torch.nn.Linear(128, 384), torch.nn.Linear(128, 128), dropout_p

    def forward(self, x):
        q, k, v = self.inner(x).unflatten(-1, (3, 4, 32)).unbind(-3)
        return self.outer(flash_attn_func(q, k, v, self.dropout_p, causal=True).flatten(-2))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models(device, mode):
    """reduce-overhead replays CUDA graphs: the same inputs' place, other values each time."""
    model = Model().to(device, torch.float16)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    x = torch.randn(2, 200, 128, device=device, dtype=torch.float16)
    for _ in range(4):
        x = torch.randn_like(x)
        expected = torch.autograd.grad(model(x).float().square().mean(), tuple(model.parameters()))
        model.zero_grad()
        out = compiled(x)
        assert torch.allclose(out, model(x), atol=1e-2)
        out.float().square().mean().backward()
        for p, grad in zip(model.parameters(), expected, strict=True):
            assert p.grad is not None
            assert torch.allclose(p.grad, grad, rtol=1e-2, atol=1e-3)


def test_checkpointing_replays_dropout(device):
    x = torch.randn(2, 200, 128, device=device, requires_grad=True)
    model, gradients = Model(0.5).to(device), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_the_host_never_waits(device, dropout_p):
    q, k, v = (torch.randn(2, 300, 4, 64, device=device, dtype=torch.float16, requires_grad=True) for _ in range(3))
    cu_seqlens = cumulative([100, 0, 500]).to(device)

    def attend():
        with use_engine("fused"):
            out = flash_attn_func(q, k, v, dropout_p, causal=True)
            rows = [x.flatten(0, 1) for x in (q, k, v)]
            packing = cu_seqlens, cu_seqlens, 500, 500
            varlen = flash_attn_varlen_func(rows[0], rows[1], rows[2], *packing, dropout_p, causal=True)
            (out.sum() + varlen.sum()).backward()

    attend()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "packed"])
def test_eager_calls_in_a_cuda_graph(device, dense):
    """Replayed on other values, and on other lengths in the same cu_seqlens."""
    rows = (2, 300, 4, 64) if dense else (600, 4, 64)
    q, k, v = (torch.randn(rows, device=device, dtype=torch.float16, requires_grad=True) for _ in range(3))
    cu_seqlens = cumulative([100, 0, 500]).to(device)

    def step():
        with use_engine("fused"):
            if dense:
                out = flash_attn_func(q, k, v, causal=True)
            else:
                out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 600, 600, causal=True)
            return out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.copy_(torch.randn_like(q))
        cu_seqlens.copy_(cumulative([250, 50, 300]).to(device))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("head_dim", [64, 128, 200, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_can_be_launched(device, dtype, head_dim):
    """With every feature, in both directions."""
    case = Case(
        ((70, 90), (130, 130)), head_dim=head_dim, head_dim_v=head_dim, dtype=dtype, softcap=5.0, slopes="batch"
    )
    if fused.unsupported_reason(device, make(case).to(device).problem()) is None:
        check_against_float64(make(case), run_on(device, fused, make(case)))


def test_same_inputs_same_bits(device):
    data = make(Case(LENGTHS["varlen"], head_dim=64, head_dim_v=64, dtype=torch.float16, causal=True))
    first, second = (run_on(device, fused, data) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
