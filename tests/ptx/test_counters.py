"""What a launch counts, against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tools.ptx import launch

from .harness import module


def counted(body: str, *arrays: np.ndarray, grid: int = 1, shared_bytes: int = 0, num_threads: int = 32):
    names = ("x", "y")[: len(arrays)]
    ptx = module(body, len(arrays), num_threads=num_threads)
    return launch(ptx, (grid,), dict(zip(names, arrays, strict=True)), shared_bytes=shared_bytes)


def test_instructions_are_counted_once_a_warp_that_executes_them() -> None:
    body = """setp.lt.u32 %p0, %tid32, 40; @!%p0 bra $L_end;
        fma.rn.f32 %r0, %r1, %r2, %r3; ex2.approx.ftz.f32 %r0, %r0; $L_end: add.s32 %r4, %r4, 1; bar.sync 0;"""
    counters = counted(body, num_threads=96, grid=2)
    # 40 threads are two of the block's three warps.
    assert counters.opcodes["fma.rn.f32"] == counters.instructions["float"] == 2 * 2
    assert counters.instructions["special function"] == 2 * 2
    assert counters.opcodes["add.s32"] == 2 * 3
    assert counters.instructions["barrier"] == 2 * 3
    assert counters.barriers == 2
    assert counters.blocks == 2


@pytest.mark.parametrize(("stride", "sectors"), [(4, 4), (8, 8), (32, 32), (128, 32), (0, 1)])
def test_sectors_of_a_warps_load(stride: int, sectors: int) -> None:
    body = f"mad.lo.s64 %d0, %tid64, {stride}, %in0; ld.global.b32 %r0, [%d0]; ld.global.b32 %r1, [%d0];"
    traffic = counted(body, np.zeros(1024, np.float32)).buffers["x"]
    assert traffic.bytes_read == 2 * 128
    assert (traffic.sectors_read, traffic.touched_read) == (2 * sectors, sectors)
    assert traffic.bytes_written == traffic.sectors_written == traffic.touched_written == 0


def test_stores_and_intensity() -> None:
    body = """mad.lo.s64 %d0, %tid64, 16, %in0; setp.lt.u32 %p0, %tid32, 8;
        @%p0 st.global.v4.b32 [%d0], {%r0, %r1, %r2, %r3};
        mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%r0,%r1,%r2,%r3}, {%r4,%r5}, {%r6}, {%r0,%r1,%r2,%r3};"""
    counters = counted(body, np.zeros(128, np.float32))
    assert counters.buffers["x"].bytes_written == 128
    assert counters.buffers["x"].sectors_written == 4
    assert counters.tensor_flops == 2048
    assert counters.global_bytes == counters.sector_bytes == 128
    assert counters.arithmetic_intensity == 16


@pytest.mark.parametrize(
    ("width", "stride", "transactions", "ideal"),
    [
        (4, 4, 1, 1),  # a word each of 32 banks
        (4, 8, 2, 1),
        (4, 16, 4, 1),
        (4, 128, 32, 1),  # all in one bank
        (4, 132, 1, 1),  # padded by a word
        (4, 0, 1, 1),  # one word, broadcast
        (8, 8, 2, 2),
        (16, 16, 4, 4),
        (16, 64, 16, 4),
        (16, 144, 4, 4),
    ],
)
def test_shared_memory_transactions(width: int, stride: int, transactions: int, ideal: int) -> None:
    vector = {4: ("b32", "%r1"), 8: ("v2.b32", "{%r1, %r1}"), 16: ("v4.b32", "{%r1, %r1, %r1, %r1}")}[width]
    load = {4: "%r2", 8: "{%r2, %r3}", 16: "{%r2, %r3, %r4, %r5}"}[width]
    body = f"""mov.b32 %r0, global_smem; mad.lo.s32 %r0, %tid32, {stride}, %r0;
        st.shared.{vector[0]} [%r0], {vector[1]};
        bar.sync 0; ld.shared.{vector[0]} {load}, [%r0];"""
    counters = counted(body, shared_bytes=8192)
    for traffic in (counters.shared_loads, counters.shared_stores):
        assert (traffic.accesses, traffic.transactions, traffic.conflicts) == (1, transactions, transactions - ideal)


@pytest.mark.parametrize(("stride", "transactions"), [(16, 4), (32, 8), (128, 32), (144, 4)])
def test_ldmatrix_takes_a_transaction_a_matrix(stride: int, transactions: int) -> None:
    body = f"""mov.b32 %r0, global_smem; mad.lo.s32 %r0, %tid32, {stride}, %r0;
        st.shared.v4.b32 [%r0], {{%r1, %r1, %r1, %r1}}; bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r2, %r3, %r4, %r5}}, [%r0];"""
    counters = counted(body, shared_bytes=8192)
    assert counters.shared_loads.transactions == transactions
    assert counters.shared_loads.conflicts == transactions - 4
