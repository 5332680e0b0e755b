"""Tensor cores: ldmatrix and mma of sm_75, on all warps of a block at once.

A warp's fragment registers, laid side by side, are already the matrix: lane 4 g + t holds elements 2 t and 2 t + 1 of
row g in one 32-bit register. So (warps, 32 lanes, 2 halves) read as (warps, 8 rows, 8 columns) is an 8x8 matrix of
fp16, and every larger operand is a stack of these.
"""

from __future__ import annotations

import numpy as np

from .access import addresses_of
from .arrays import Array, Mask
from .definitions import Context, Execute, defines, split, unsupported
from .parser import Instruction, Vector
from .rounding import canonical
from .warp import WARP, converged_warps


@defines("ldmatrix")
def _load_matrix(instruction: Instruction, context: Context) -> Execute:
    """Thread 8 m + r of a warp gives the address of row r of matrix m; register m gets the fragment of matrix m."""
    shared = {"shared", "shared::cta"}
    (kind,), flags = split(instruction, "sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", *shared)
    if kind != "b16" or not flags & shared or not flags >= {"sync", "aligned", "m8n8"}:
        raise unsupported(instruction)
    registers = context.registers
    target, source = instruction.operands
    parts = target.parts if isinstance(target, Vector) else (target,)
    count = len(parts)
    if f"x{count}" not in flags:
        raise unsupported(instruction)
    writes = [registers.target(part, "b32") for part in parts]
    addresses = addresses_of(source, context)
    transposed = "trans" in flags

    def run(mask: Mask) -> None:
        warps = converged_warps(mask, None, registers.num_threads)
        threads = (warps[:, None] * WARP + np.arange(8 * count)).ravel()
        rows = context.memory.shared.read_rows(instruction, threads, addresses()[threads])
        matrices: Array = rows.reshape(warps.size, count, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        for i, write in enumerate(writes):
            fragment = np.zeros((registers.num_threads // WARP, 8, 8), np.uint16)
            fragment[warps] = matrices[:, i]
            write(fragment.view(np.uint32).ravel(), mask)

    return run


@defines("mma")
def _multiply_matrices(instruction: Instruction, context: Context) -> Execute:
    kinds, flags = split(instruction, "sync", "aligned", "m16n8k8", "m8n8k16", "row", "col", "satfinite")
    if not flags >= {"sync", "aligned", "row", "col"} or not all(isinstance(o, Vector) for o in instruction.operands):
        raise unsupported(instruction)
    if "m16n8k8" in flags and kinds[1:3] == ["f16", "f16"] and kinds[0] == kinds[3] and "satfinite" not in flags:
        return _multiply_halves(instruction, context, kinds[0])
    if "m8n8k16" in flags and {kinds[1], kinds[2]} <= {"s8", "u8"} and kinds[0] == kinds[3] == "s32":
        return _multiply_bytes(instruction, context, kinds[1], kinds[2], "satfinite" in flags)
    raise unsupported(instruction)


def _parts(instruction: Instruction, counts: tuple[int, int, int, int]) -> list[Vector]:
    vectors = [operand for operand in instruction.operands if isinstance(operand, Vector)]
    if tuple(len(vector.parts) for vector in vectors) != counts:
        raise unsupported(instruction)
    return vectors


def _multiply_halves(instruction: Instruction, context: Context, accumulator: str) -> Execute:
    """m16n8k8: D (16, 8) = A (16, 8) B (8, 8) + C.

    PTX leaves order and rounding of the sum open, "at least single precision". Here the products, which are exact, and
    the accumulator are summed in float64 and rounded once; tensor cores truncate partial sums instead.
    """
    if accumulator not in ("f16", "f32"):
        raise unsupported(instruction)
    registers = context.registers
    threads = registers.num_threads
    halves = 2 if accumulator == "f16" else 4
    to, a_parts, b_parts, c_parts = _parts(instruction, (halves, 2, 1, halves))
    warps = threads // WARP

    def tile(array: Array) -> Array:
        return array.reshape(warps, 8, 8)

    a = [tile(registers.source(part, "f16x2")) for part in a_parts.parts]  # rows 0 to 7, and 8 to 15
    b = tile(registers.source(b_parts.parts[0], "f16x2")).swapaxes(1, 2)  # a lane's pair lies along k, in column g
    flops = 2 * 16 * 8 * 8

    if accumulator == "f16":
        c16 = [tile(registers.source(part, "f16x2")) for part in c_parts.parts]
        writes16 = [registers.target(part, "f16x2") for part in to.parts]

        def run16(mask: Mask) -> None:
            context.counters.tensor_flops += flops * converged_warps(mask, None, threads).size
            right = b.astype(np.float64)
            sums = [left.astype(np.float64) @ right + c for left, c in zip(a, c16, strict=True)]
            for write, total in zip(writes16, sums, strict=True):
                write(canonical(total.astype(np.float16)).ravel(), mask)

        return run16

    c32 = [registers.source(part, "f32") for part in c_parts.parts]
    writes = [registers.target(part, "f32") for part in to.parts]

    def run(mask: Mask) -> None:
        context.counters.tensor_flops += flops * (warps if mask is None else converged_warps(mask, None, threads).size)
        left = np.concatenate(a, axis=1).astype(np.float64)
        product = (left @ b.astype(np.float64)).reshape(warps, 2, WARP, 2)
        # (warp, upper or lower half of the rows, lane, which of the lane's two columns)
        # All sums before the first write: D and C may be the same registers.
        sums = [product[:, i // 2, :, i % 2].ravel() + c32[i] for i in range(4)]
        for write, total in zip(writes, sums, strict=True):
            write(canonical(total.astype(np.float32)), mask)

    return run


def _multiply_bytes(instruction: Instruction, context: Context, a_kind: str, b_kind: str, saturates: bool) -> Execute:
    """m8n8k16: D (8, 8) = A (8, 16) B (16, 8) + C in int32, which wraps around unless .satfinite."""
    registers = context.registers
    threads = registers.num_threads
    warps = threads // WARP
    to, a_parts, b_parts, c_parts = _parts(instruction, (2, 1, 1, 2))

    def tile(vector: Vector, kind: str) -> Array:
        return (
            registers.source(vector.parts[0], "b32").view(np.int8 if kind == "s8" else np.uint8).reshape(warps, 8, 16)
        )

    a, b = tile(a_parts, a_kind), tile(b_parts, b_kind).swapaxes(1, 2)
    c = [registers.source(part, "s32") for part in c_parts.parts]
    writes = [registers.target(part, "s32") for part in to.parts]

    def run(mask: Mask) -> None:
        context.counters.tensor_flops += 2 * 8 * 8 * 16 * converged_warps(mask, None, threads).size
        product = (a.astype(np.int64) @ b.astype(np.int64)).reshape(threads, 2)
        sums = [product[:, i] + c[i] for i in range(2)]
        if saturates:
            sums = [np.clip(total, -(2**31), 2**31 - 1) for total in sums]
        for write, total in zip(writes, sums, strict=True):
            write(total.astype(np.int32), mask)

    return run
