"""Keys in pages, read where they lie by the kernels that a T4 would be given, executed: against float64."""

from __future__ import annotations

from typing import Any

import kv
import pytest
import torch
from kv import Call

pytest.importorskip("triton", reason="needs Triton to compile kernels for sm_75")

from compiled_fa.engines import fused
from compiled_fa.engines.fused import pages
from tools.ptx.engine import engine_on_ptx

SHAPE: dict[str, Any] = {"nheads_k": 1, "head_dim": 64, "head_dim_v": 64, "dtype": torch.float16}
CALLS = {
    "pages": Call((75, 9, 0), 2, 1, (30, 1, 0), 16, heads_per_key=4, slopes="batch", softcap=3.0, causal=True, **SHAPE),
    "a dense cache of an odd length": Call((81, 20), batch_idx=True, num_splits=1, **SHAPE),
}


@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_float64(name: str) -> None:
    call = CALLS[name]
    made = kv.make(call)
    before = {cache: made.arguments[cache].clone() for cache in ("k_cache", "v_cache")}
    cache_call = made.cache_call()
    problem = cache_call.unread_problem(made.options, call.num_splits)
    cache_call.append()
    with engine_on_ptx() as launches:
        out, lse = fused.forward(problem)
    plan = pages.plan(problem)
    assert plan is not None
    assert (plan.splits > 1) == (call.num_splits != 1)
    (attention,) = (launch for launch in launches if launch.kernel.is_attention)
    for argument, cache in zip(attention.values[1:3], ("k_cache", "v_cache"), strict=True):
        assert argument.data_ptr() == made.arguments[cache].data_ptr(), "keys are read where they lie"
    assert len(launches) <= 4
    batch = len(call.before)
    kv.check(made, out.unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1), before)
