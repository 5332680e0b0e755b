"""flash_attn_with_kvcache on the device: against float64, without a wait of the host, and in a CUDA graph."""

from __future__ import annotations

from typing import Any

import kv
import pytest
import torch
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
