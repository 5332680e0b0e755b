"""Bits and moves, thread by thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Array, Mask
from .definitions import Context, Execute, defines, split, unsupported
from .elementwise import elementwise
from .parser import Immediate, Instruction, Vector
from .registers import DTYPES

_LOGIC: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip


@defines("and", "or", "xor", "not")
def _logic(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    function = _LOGIC[instruction.opcode]
    return elementwise(instruction, context, function, kind, [kind] * (len(instruction.operands) - 1))


@defines("cnot")
def _logical_not(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    return elementwise(instruction, context, lambda a: (a == 0).astype(a.dtype), kind, [kind])


@defines("lop3")
def _any_logic(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    table = instruction.operands[4]
    if not isinstance(table, Immediate):
        raise unsupported(instruction)
    registers = context.registers
    sources = [registers.source(operand, kind) for operand in instruction.operands[1:4]]
    write = registers.target(instruction.operands[0], kind)

    def run(mask: Mask) -> None:
        result = np.zeros_like(sources[0])
        for index in range(8):
            if table.value >> index & 1:
                # Bit `index` of the table is the answer where (a, b, c) spell `index` in binary.
                a, b, c = (
                    source if index >> bit & 1 else ~source for source, bit in zip(sources, (2, 1, 0), strict=True)
                )
                result |= a & b & c
        write(result, mask)

    return run


@defines("shl", "shr")
def _shift(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    dtype = np.dtype(DTYPES[kind])
    bits = 8 * dtype.itemsize
    left = instruction.opcode == "shl"

    def function(a: Array, amount: Array) -> Array:
        small = np.minimum(amount, bits - 1).astype(dtype)
        if not left and dtype.kind == "i":  # a longer shift leaves copies of the sign, as one by bits - 1 does
            shifted: Array = a >> small
            return shifted
        return np.where(amount < bits, a << small if left else a >> small, dtype.type(0))

    return elementwise(instruction, context, function, kind, [kind, "u32"])


@defines("shf")
def _funnel_shift(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "l", "r", "wrap", "clamp")
    if kind != "b32" or not flags & {"wrap", "clamp"}:
        raise unsupported(instruction)

    def function(low: Array, high: Array, amount: Array) -> Array:
        count = (amount & 31 if "wrap" in flags else np.minimum(amount, 32)).astype(np.uint64)
        both = high.astype(np.uint64) << np.uint64(32) | low.astype(np.uint64)
        if "l" in flags:
            return ((both << count) >> np.uint64(32)).astype(np.uint32)
        return (both >> count).astype(np.uint32)

    return elementwise(instruction, context, function, kind, ["b32", "b32", "u32"])


@defines("prmt")
def _permute(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction)  # the named modes (f4e, rc8, ...) are not defined here
    if kind != "b32" or flags:
        raise unsupported(instruction)

    def function(a: Array, b: Array, selector: Array) -> Array:
        both = np.stack([a, b], 1).view(np.uint8)
        choice = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & 15
        picked = np.take_along_axis(both, (choice & 7).astype(np.int64), 1)
        sign = np.where(picked & 128, np.uint8(255), np.uint8(0))
        return np.ascontiguousarray(np.where(choice & 8, sign, picked)).view(np.uint32)[:, 0]

    return elementwise(instruction, context, function, kind, [kind] * 3)


@defines("bfe")
def _extract_field(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    bits = int(kind[1:])

    def function(a: Array, start: Array, length: Array) -> Array:
        position = (start & 255).astype(np.int64)[:, None] + np.arange(bits)
        count = (length & 255).astype(np.int64)[:, None]
        # Beyond the field, or beyond the register: the sign, which is the field's topmost bit that exists; 0 unsigned.
        top = np.minimum(position[:, :1] + count - 1, bits - 1)
        value = a.view(f"u{bits // 8}")[:, None]
        one = value.dtype.type(1)
        bit = (value >> np.minimum(position, bits - 1).astype(value.dtype)) & one
        fill = np.zeros_like(value)
        if kind[0] == "s":
            fill = np.where(count == 0, value.dtype.type(0), (value >> np.maximum(top, 0).astype(value.dtype)) & one)
        inside = (np.arange(bits) < count) & (position < bits)
        chosen = np.where(inside, bit, fill)
        field: Array = (chosen << np.arange(bits, dtype=value.dtype)).sum(1, dtype=value.dtype)
        return field.view(a.dtype)

    return elementwise(instruction, context, function, kind, [kind, "u32", "u32"])


@defines("bfi")
def _insert_field(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    bits = int(kind[1:])

    def function(a: Array, b: Array, start: Array, length: Array) -> Array:
        position = np.arange(bits) - (start & 255).astype(np.int64)[:, None]
        inside = (position >= 0) & (position < (length & 255).astype(np.int64)[:, None])
        one = b.dtype.type(1)
        source = (a[:, None] >> np.clip(position, 0, bits - 1).astype(b.dtype)) & one
        kept = (b[:, None] >> np.arange(bits, dtype=b.dtype)) & one
        chosen = np.where(inside, source, kept)
        result: Array = (chosen << np.arange(bits, dtype=b.dtype)).sum(1, dtype=b.dtype)
        return result

    return elementwise(instruction, context, function, kind, [kind, kind, "u32", "u32"])


def _bits_of(a: Array) -> Array:
    """(threads, bits), the lowest bit first."""
    bits: Array = (a[:, None] >> np.arange(8 * a.dtype.itemsize, dtype=a.dtype)) & a.dtype.type(1)
    return bits


@defines("popc", "clz", "brev")
def _count_bits(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)

    def population(a: Array) -> Array:
        count: Array = _bits_of(a).sum(1)
        return count.astype(np.uint32)

    def leading(a: Array) -> Array:
        bits = _bits_of(a)[:, ::-1]
        return np.where(a == 0, bits.shape[1], bits.argmax(1)).astype(np.uint32)

    def reverse(a: Array) -> Array:
        bits = _bits_of(a)[:, ::-1]
        result: Array = (bits << np.arange(bits.shape[1], dtype=a.dtype)).sum(1, dtype=a.dtype)
        return result

    function, result = {"popc": (population, "u32"), "clz": (leading, "u32"), "brev": (reverse, kind)}[
        instruction.opcode
    ]
    return elementwise(instruction, context, function, result, [kind])


# Moves


@defines("mov")
def _move(instruction: Instruction, context: Context) -> Execute:
    (kind,), _ = split(instruction)
    target, source = instruction.operands
    registers = context.registers
    if isinstance(target, Vector):
        part = f"b{int(kind[1:]) // len(target.parts)}"
        pieces = registers.source(source, kind).view(DTYPES[part]).reshape(registers.num_threads, -1)
        writes = [registers.target(operand, part) for operand in target.parts]

        def unpack(mask: Mask) -> None:
            for i, write in enumerate(writes):
                write(pieces[:, i], mask)

        return unpack
    write = registers.target(target, kind)
    if isinstance(source, Vector):
        part = f"b{int(kind[1:]) // len(source.parts)}"
        parts = [registers.source(operand, part) for operand in source.parts]
        return lambda mask: write(np.stack(parts, 1).view(DTYPES[kind])[:, 0], mask)
    value = registers.source(source, kind)
    return lambda mask: write(value, mask)


@defines("cvta")
def _to_generic(instruction: Instruction, context: Context) -> Execute:
    # Global addresses are generic ones here; shared and local windows are not modelled.
    (kind,), flags = split(instruction, "to", "global")
    if "global" not in flags:
        raise unsupported(instruction)
    return elementwise(instruction, context, lambda a: a, kind, [kind])
