"""The fused engine's own kernels, as they are compiled for a T4, executed from end to end; and faults planted in them.

Calls are whole: layouts, block structure, both passes of dropout, and Inductor's code around the kernels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton to compile kernels for sm_75")

import triton
from support import RESULTS, Case, Data, check_against_float64, make, packed, run_naive

from compiled_fa.engines import fused
from compiled_fa.engines.fused import kernels
from compiled_fa.problem import Direction
from compiled_fa.testing.budget import budget, error, magnitudes
from tools import kernel_traffic
from tools.offline.engine_kernels import DIRECTIONS
from tools.ptx import OutOfBoundsError, RaceError
from tools.ptx.engine import Kernel, Launch, engine_on_ptx, measure

Edit = Callable[[Kernel], Kernel]
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)  # its code loads more; docs/turing.md


def case_of(head_dim: int = 64, **options: Any) -> Case:
    shape = {"nheads_k": 1, "heads_per_key": 1, "head_dim": head_dim, "head_dim_v": head_dim}
    return Case(**{"dtype": torch.float16, "causal": True, **shape, **options})


# Over one block of the block structure, 128, and off every tile's multiples.
CAUSAL = case_of(lengths=((130, 130),), dense=True)
CASES: dict[str, dict[str, Any]] = {
    "causal": {"lengths": ((200, 200),), "dense": True},
    "more keys, GQA": {"lengths": ((70, 150),), "dense": True, "heads_per_key": 2},
    "varlen": {"lengths": ((70, 40), (0, 3), (5, 0), (33, 140))},
    "window, ALiBi, softcap": {
        "lengths": ((150, 140), (20, 60)),
        "causal": False,
        "window_size": (50, 10),
        "slopes": "batch",
        "softcap": 5.0,
    },
    "dropout": {"lengths": ((60, 140),), "dense": True, "dropout_p": 0.2},
}


def forward(data: Data, **options: Any) -> tuple[dict[str, Tensor], list[Launch]]:
    """out and lse, in the layout of the op."""
    with engine_on_ptx(**options) as launches:
        out, lse = fused.forward(data.problem())
    return {"out": out, "lse": lse}, launches


def backward(data: Data, of: dict[str, Tensor], **options: Any) -> tuple[dict[str, Tensor], list[Launch]]:
    """dq, dk and dv, given forward's results."""
    dout = data.batched(data.dout) if data.case.dense else data.dout
    with engine_on_ptx(**options) as launches:
        gradients = fused.backward(data.problem(), dout, of["out"], of["lse"], data.per_row(data.dlse))
    return dict(zip(RESULTS[2:], gradients, strict=True)), launches


def both(data: Data, **options: Any) -> dict[str, Tensor]:
    """All results, packed."""
    of, _ = forward(data, **options)
    gradients, _ = backward(data, of, **options)
    return packed(data, (*of.values(), *gradients.values()))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str, head_dim: int) -> None:
    data = make(case_of(head_dim, **CASES[name]))
    results = both(data)
    check_against_float64(data, results)
    # fp16's budget is wide for lse, which stays fp32 from the products to the end.
    exact, naive = (run_naive(data, dtype)["lse"] for dtype in (torch.float64, torch.float32))
    magnitude = magnitudes(data)["lse"]
    assert error(results["lse"], exact) <= budget(naive, exact, magnitude)


def test_bfloat16_agrees_with_float64() -> None:
    """Slow on a T4, which has no tensor cores for it, but right."""
    data = make(case_of(lengths=((70, 70),), dense=True, dtype=torch.bfloat16))
    check_against_float64(data, both(data))


def test_repeats_itself_whatever_the_order_of_blocks() -> None:
    data = make(CAUSAL)
    first, again = both(data), both(data, edit=lambda kernel: dataclasses.replace(kernel, last_block_first=True))
    assert all(torch.equal(first[name], again[name]) for name in RESULTS)


def test_views_of_a_packed_qkv_are_read_where_they_lie() -> None:
    data = make(CAUSAL)
    of, _ = forward(data)
    problem = data.problem()
    q, k, v = torch.stack((problem.q, problem.k, problem.v), dim=2).unbind(2)
    with engine_on_ptx() as launches:
        out, lse = fused.forward(dataclasses.replace(problem, q=q, k=k, v=v))
    assert launches[0].values[0].data_ptr() == q.data_ptr()
    assert torch.equal(out, of["out"])
    assert torch.equal(lse, of["lse"])


def test_stock_triton_kernels_without_tensor_cores_agree() -> None:
    """The stage changes how products are computed; not what."""
    data = make(CAUSAL)
    (ours, _), (stock, _) = forward(data), forward(data, turing=False)
    for name in ours:
        # Sums in fp32 in another order: here and there a rounding of P or the result goes the other way.
        unit = torch.finfo(ours[name].dtype).eps
        assert error(ours[name], stock[name]) <= 2 * unit * float(stock[name].abs().max()), name


# What is counted.


def test_counts_of_the_attention_kernels() -> None:
    length, head_dim = 200, 64
    counters = measure(head_dim, length)
    rows = 2 * head_dim * length  # bytes of q, or of any of the others
    for direction, written, products in (
        ("forward", ["out_ptr0"], 2),
        ("backward", ["arg_DQ", "arg_DV", "out_ptr0"], 5),
    ):
        counts = counters[direction]
        assert [name for name, traffic in counts.buffers.items() if traffic.bytes_written >= rows] == written
        assert all(counts.buffers[name].bytes_written == rows for name in written)
        for name in ("arg_Q", "arg_K", "arg_V"):
            assert counts.buffers[name].touched_read * 32 == rows
        # Whole tiles: more than the causal half of the scores.
        assert counts.tensor_flops > products * head_dim * length**2
        assert counts.arithmetic_intensity == counts.tensor_flops / counts.global_bytes
        assert counts.shared_transactions > counts.bank_conflicts
    forward = counters["forward"]
    assert forward.buffers["arg_Q"].sectors_read == forward.buffers["arg_Q"].touched_read  # each row by one block


# Planted faults.


@dataclasses.dataclass(frozen=True)
class Intact:
    """One direction of a call without faults: its kernel, and how to run it with one."""

    data: Data
    launch: Launch
    run: Callable[[Edit], dict[str, Tensor]]

    def is_wrong_with(self, ptx: str) -> bool:
        def edit(kernel: Kernel) -> Kernel:
            return dataclasses.replace(kernel, ptx=ptx) if kernel.is_attention else kernel

        results = self.run(edit)
        try:
            check_against_float64(self.data, {name: _packed(self.data, name, x) for name, x in results.items()})
        except AssertionError:
            return True
        return False

    @property
    def ptx(self) -> str:
        return self.launch.kernel.ptx


@pytest.fixture(scope="module", params=["forward", "backward"])
def intact(request: pytest.FixtureRequest) -> Intact:
    data = make(CAUSAL)
    of, launches = forward(data)
    run: Callable[[Edit], dict[str, Tensor]] = lambda edit: forward(data, edit=edit)[0]  # noqa: E731
    if request.param == "backward":
        _, launches = backward(data, of)
        run = lambda edit: backward(data, of, edit=edit)[0]  # noqa: E731
    (launch,) = (launch for launch in launches if launch.kernel.is_attention)
    return Intact(data, launch, run)


def _packed(data: Data, name: str, x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1) if name == "lse" else x.flatten(0, 1)


def _replace(ptx: str, pattern: str, replacement: str, which: int) -> str:
    matches = list(re.finditer(pattern, ptx))
    assert matches, f"the kernel has no {pattern!r} to plant a fault in"
    match = matches[which]
    changed = ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]
    assert changed != ptx
    return changed


def test_without_a_fault_nothing_is_wrong(intact: Intact) -> None:
    assert not intact.is_wrong_with(intact.ptx)


# Keys that a row sees: from its first one on, and here that is the first of all.
COMPARISON = r"setp\.ge(\.s32\s+%p\d+, %r\d+, %r\d+;)"


def _without_the_first(comparison: re.Match[str]) -> str:
    return f"setp.gt{comparison[1]}"


def test_planted_mask_off_by_one(intact: Intact) -> None:
    assert len(re.findall(COMPARISON, intact.ptx)) >= 32
    assert intact.is_wrong_with(re.sub(COMPARISON, _without_the_first, intact.ptx))


def test_planted_mask_off_by_one_in_one_register(intact: Intact) -> None:
    """Of the scores that a thread holds, one of the first eight is of the first key."""
    comparisons = list(re.finditer(COMPARISON, intact.ptx))[:8]
    faulty = [intact.ptx[: c.start()] + _without_the_first(c) + intact.ptx[c.end() :] for c in comparisons]
    assert any(intact.is_wrong_with(ptx) for ptx in faulty)


@pytest.mark.parametrize("which", [0, 100, 128])
def test_planted_swap_of_fragment_registers(intact: Intact, which: int) -> None:
    """In the loop of partial tiles, and in the next; of instructions whose rows exist in this case."""
    pattern = r"(mma\.sync[^{]*\{[^}]*\}, )\{ (%r\d+), (%r\d+) \}"
    assert intact.is_wrong_with(_replace(intact.ptx, pattern, r"\1{ \3, \2 }", which))


def test_planted_absence_of_each_barrier_of_a_loop(intact: Intact) -> None:
    """The pipelined loops: each barrier stands between a store and a load of it, or a load and the next store."""
    barriers = [
        (loop.start() + barrier.start(), loop.start() + barrier.end())
        for loop in re.finditer(r"^(\$L__BB\d+_\d+):.*?bra\s+\1;", intact.ptx, re.DOTALL | re.MULTILINE)
        for barrier in re.finditer(r"bar\.sync\s+0;", loop[0])
    ]
    assert len(barriers) >= 4
    for start, end in barriers:
        kernel = dataclasses.replace(intact.launch.kernel, ptx=intact.ptx[:start] + intact.ptx[end:])
        with pytest.raises(RaceError) as error:
            kernel.launch(intact.launch.values)
        assert error.value.instruction is not None
        assert error.value.thread is not None


def test_planted_store_past_the_end(intact: Intact) -> None:
    kernel = intact.launch.kernel
    ptx = _replace(intact.ptx, r"@%p\d+ (st\.global\.v4\.b32)", r"\1", -1)
    with pytest.raises(OutOfBoundsError, match=r"st\.global\.v4\.b32"):
        dataclasses.replace(kernel, ptx=ptx).launch(intact.launch.values)


def test_the_engine_is_itself_again_afterwards() -> None:
    run = kernels.run
    with engine_on_ptx():
        assert kernels.run is not run
    assert kernels.run is run


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_traffic_is_what_the_tiles_say(direction: Direction) -> None:
    """tools/kernel_traffic.py's model against what the executed PTX loads and stores: little beside the tiles."""
    model = sum(kernel_traffic.modelled(direction, 64, 256).values())
    most = 1.15 if OLD else 1.1
    assert model <= measure(64, 256)[direction].sector_bytes <= most * model
