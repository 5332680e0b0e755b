"""The triton engine's kernels, as they are compiled for a T4, executed from end to end; and faults planted in them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton to compile kernels for sm_75")

from support import Case, Data, check_against_float64, make, packed

from compiled_fa.engines import triton
from tools.ptx import RaceError
from tools.ptx.own import Executed, own_on_ptx

SHAPE: dict[str, Any] = {"nheads_k": 1, "head_dim": 64, "head_dim_v": 64, "dtype": torch.float16}
# Longer than a tile of each kernel, and no multiple of one; sequences without queries, and without keys.
DROPOUT = Case(((70, 100), (0, 3), (5, 0)), causal=True, dropout_p=0.2, **SHAPE)


@pytest.fixture(scope="module")
def data() -> Data:
    return make(DROPOUT)


@pytest.fixture(scope="module")
def executed(data: Data) -> tuple[list[Executed], dict[str, Any]]:
    """The launches of forward and backward, and their results."""
    with own_on_ptx() as launches:
        out, lse = triton.forward(data.problem())
        gradients = triton.backward(data.problem(), data.dout, out, lse, data.dlse)
    return launches, packed(data, (out, lse, *gradients))


def test_with_dropout_it_agrees_with_float64(data: Data, executed: tuple[list[Executed], dict[str, Any]]) -> None:
    launches, results = executed
    assert [launch.launch.kernel.function for launch in launches] == [
        "attention_forward",
        "attention_backward_queries",
        "attention_backward_keys",
    ]
    check_against_float64(data, results)


def test_rows_are_read_where_they_lie_and_once(executed: tuple[list[Executed], dict[str, Any]]) -> None:
    """Forward: no table, no copy; each row of q by one program, and dropout takes no second pass over k and v."""
    counters = executed[0][0].counters
    assert set(counters.buffers) == {"q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "seed"}
    assert counters.buffers["q"].sectors_read == counters.buffers["q"].touched_read
    assert counters.buffers["k"].sectors_read == counters.buffers["v"].sectors_read
    assert counters.bank_conflicts == 0


def test_planted_absence_of_a_barrier_of_a_loop(data: Data, executed: tuple[list[Executed], dict[str, Any]]) -> None:
    def without_a_barrier(ptx: str) -> str:
        loop = next(re.finditer(r"^(\$L__BB\d+_\d+):(?:(?!^\$L__BB).)*?mma\.sync.*?bra\s+\1;", ptx, re.S | re.M))
        barrier = re.search(r"bar\.sync\s+0;", loop[0])
        assert barrier is not None
        return ptx[: loop.start() + barrier.start()] + ptx[loop.start() + barrier.end() :]

    with pytest.raises(RaceError), own_on_ptx(edit=without_a_barrier):
        triton.forward(data.problem())


def test_planted_mask_off_by_one(data: Data) -> None:
    """No row sees its first key."""
    with own_on_ptx(edit=lambda ptx: re.sub(r"setp\.ge\.s32(\s+%p\d+, %r\d+, %r\d+;)", r"setp.gt.s32\1", ptx)):
        out, lse = triton.forward(data.problem())
    with pytest.raises(AssertionError):
        check_against_float64(data, packed(data, (out, lse)))
