"""flash_attn_with_kvcache on the device: against float64, without a wait of the host, and in a CUDA graph."""

from __future__ import annotations

from typing import Any

import kv
import pytest
import torch
import torch._dynamo.testing
from kv import Call

from compiled_fa import flash_attn_with_kvcache, use_engine

BEFORE = (300, 17, 0)
CALLS = {
    "dense": Call(BEFORE, new=1, dtype=torch.float16),
    "batch_idx, leftpad, rotary": Call(
        BEFORE, 2, 2, (30, 1, 0), batch_idx=True, rotary="neox", causal=True, dtype=torch.float16
    ),
    "pages": Call(BEFORE, 1, 1, page_size=16, slopes="batch", dtype=torch.float16),
    "pages, leftpad": Call(BEFORE, 3, 3, (30, 1, 0), page_size=64, causal=True, dtype=torch.float16),
    "prefill": Call((0, 0), 200, 200, page_size=256, causal=True, softcap=5.0),
    "pages that are gathered": Call(BEFORE, 1, 1, page_size=24, dtype=torch.float16),
    **{
        f"head_dim {d}, pages of {size}": Call(
            (3000, 17), 1, 1, page_size=size, heads_per_key=4, head_dim=d, head_dim_v=d, dtype=torch.float16
        )
        for d in (64, 128, 256)
        for size in (0, 16, 64, 256)
    },
    "odd heads, strides": Call(
        BEFORE, 2, 2, page_size=16, heads_per_key=3, head_dim=64, head_dim_v=32, strides="heads first", causal=True
    ),
}


def on_device(made: kv.Made, device: torch.device) -> dict[str, Any]:
    arguments = made.arguments.items()
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments}


@pytest.mark.parametrize("engine", ["fused", "tiled"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_agrees_with_float64(device, engine, call):
    made = kv.make(call)
    before = {name: made.arguments[name].clone() for name in ("k_cache", "v_cache")}
    arguments = on_device(made, device)
    with use_engine(engine):
        out, lse = flash_attn_with_kvcache(**arguments)
    for name in before:
        made.arguments[name].copy_(arguments[name])
    kv.check(made, out.cpu(), lse.cpu(), before)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_host_never_waits(device, call):
    arguments = on_device(kv.make(call), device)
    with use_engine("fused"):
        flash_attn_with_kvcache(**arguments)  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            flash_attn_with_kvcache(**arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_a_step_of_a_cache_that_grows(device):
    made = kv.make(Call((40, 7), new=1, page_size=16, spare=2, dtype=torch.float16))
    arguments, others = on_device(made, device), on_device(made, device)
    with use_engine("fused"):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            flash_attn_with_kvcache(**arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, _ = flash_attn_with_kvcache(**arguments)
        for _ in range(3):
            graph.replay()
            expected, _ = flash_attn_with_kvcache(**others)
            assert torch.equal(out, expected)
            assert torch.equal(arguments["k_cache"].nan_to_num(), others["k_cache"].nan_to_num())
            for some in (arguments, others):
                some["cache_seqlens"] += 1


def test_num_splits_1_gives_bits_that_do_not_depend_on_the_batch(device):
    call = Call((900, 17, 333), page_size=64, num_splits=1, head_dim=64, head_dim_v=64, dtype=torch.float16)
    arguments = on_device(kv.make(call), device)
    with use_engine("fused"):
        out, _ = flash_attn_with_kvcache(**arguments)
        for row in range(3):
            per_row = {name: arguments[name][row : row + 1] for name in ("q", "cache_seqlens", "block_table")}
            alone, _ = flash_attn_with_kvcache(**{**arguments, **per_row})
            assert torch.equal(alone, out[row : row + 1])


@pytest.mark.parametrize("page_size", [0, 16, 256])
def test_the_cache_is_read_where_it_lies(device, page_size):
    """A call takes little beside a cache of 64 MB."""
    shape: dict[str, Any] = {"head_dim": 128, "head_dim_v": 128, "nheads_k": 4, "dtype": torch.float16}
    arguments = on_device(kv.make(Call((31000, 500), new=1, page_size=page_size, **shape)), device)
    with use_engine("fused"):
        flash_attn_with_kvcache(**arguments)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        flash_attn_with_kvcache(**arguments)
    assert torch.cuda.max_memory_allocated(device) - before < 4 << 20


def test_a_decode_loop_compiles_once(device):
    """Inside torch.compile, on a cache whose lengths the graph itself moves on; every step as eager."""
    made = kv.make(Call((40, 7), new=1, page_size=16, spare=2, head_dim=64, head_dim_v=64, dtype=torch.float16))
    arguments, others = on_device(made, device), on_device(made, device)
    arguments.pop("return_softmax_lse"), others.pop("return_softmax_lse")

    def step(given):
        out = flash_attn_with_kvcache(**given)
        given["cache_seqlens"].add_(1)
        return out

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    with torch.no_grad():
        for _ in range(12):
            assert torch.equal(compiled(arguments), step(others))
    assert counter.frame_count == 1
