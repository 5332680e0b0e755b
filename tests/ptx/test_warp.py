"""Warp-wide instructions against the ISA's definitions, written out lane by lane."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.ptx import ConvergenceError

from .harness import examples, execute

LANES = np.arange(32, dtype=np.uint32)
FULL = "0xffffffff"


def lane_read(mode: str, lane: int, step: int, clamp: int) -> tuple[int, bool]:
    """Which lane a lane reads, and whether that one is in its segment."""
    segment, bound = clamp >> 8 & 31, clamp & 31
    last = (lane & segment) | (bound & ~segment)
    first = lane & segment
    other = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": first | (step & ~segment)}[mode]
    inside = other >= last if mode == "up" else other <= last
    return (other if inside else lane), inside


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@examples
@given(step=st.integers(0, 31), segment=st.sampled_from([0, 16, 24, 28, 30, 31]), steps_differ=st.booleans())
def test_shuffles_within_segments(mode: str, step: int, segment: int, steps_differ: bool) -> None:
    clamp = segment << 8 | (0 if mode == "up" else 31)
    steps = (LANES * 7 + step) % 32 if steps_differ else np.full(32, step, np.uint32)
    got = execute(
        f"shfl.sync.{mode}.b32 %r0|%p0, %tid32, %r1, {clamp}, -1;",
        {"%r1": ("u32", steps)},
        {"%r0": "u32", "%p0": "pred"},
    )
    wanted = [lane_read(mode, lane, int(steps[lane]), clamp) for lane in range(32)]
    assert list(zip(got["%r0"].tolist(), got["%p0"].astype(bool).tolist(), strict=True)) == wanted


@examples
@given(bits=st.integers(0, 2**32 - 1) | st.sampled_from([0, 2**32 - 1]))
def test_votes(bits: int) -> None:
    predicate = np.array([bits >> lane & 1 for lane in range(32)])
    text = f"""vote.sync.ballot.b32 %r0, %p1, {FULL}; vote.sync.any.pred %p2, %p1, {FULL};
               vote.sync.all.pred %p3, !%p1, {FULL}; vote.sync.uni.pred %p4, %p1, {FULL};"""
    outputs = {"%r0": "u32", "%p2": "pred", "%p3": "pred", "%p4": "pred"}
    got = {name: set(values.tolist()) for name, values in execute(text, {"%p1": ("pred", predicate)}, outputs).items()}
    assert got == {"%r0": {bits}, "%p2": {bits != 0}, "%p3": {bits == 0}, "%p4": {bits in (0, 2**32 - 1)}}


def test_a_warp_wide_instruction_needs_its_whole_warp() -> None:
    text = "setp.lt.u32 %p0, %tid32, 31; @%p0 shfl.sync.bfly.b32 %r0, %tid32, 1, 31, -1;"
    with pytest.raises(ConvergenceError, match=r"is named, but does not execute.*thread 31.*shfl\.sync") as error:
        execute(text, {}, {"%r0": "u32"})
    assert error.value.thread == 31


def test_a_thread_outside_the_member_mask_is_an_error() -> None:
    with pytest.raises(ConvergenceError, match=r"not named by the member mask.*thread 16"):
        execute("shfl.sync.bfly.b32 %r0, %tid32, 1, 31, 0xffff;", {}, {"%r0": "u32"})


def test_half_a_warp_may_shuffle_alone() -> None:
    text = "setp.lt.u32 %p0, %tid32, 16; @%p0 shfl.sync.bfly.b32 %r0, %tid32, 1, 31, 0xffff;"
    got = execute(text, {}, {"%r0": "u32"})["%r0"]
    assert got.tolist() == [lane ^ 1 if lane < 16 else 0 for lane in range(32)]
