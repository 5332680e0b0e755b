"""A block's registers as arrays over its threads, and operands as views of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Array, Bools, DType, Mask
from .faults import UnknownInstructionError
from .parser import SIZES, Immediate, Kernel, Not, Operand, Register, Sink, Special, Symbol

Write = Callable[[Array, Mask], None]

DTYPES: dict[str, type[np.generic]] = {
    "f16": np.float16, "f16x2": np.float16, "f32": np.float32, "f64": np.float64, "pred": np.bool_,
    **{f"{kind}{bits}": getattr(np, f"{'int' if kind == 's' else 'uint'}{bits}")
       for kind in "bus" for bits in (8, 16, 32, 64)},
}  # fmt: skip


class Registers:
    """One array a register, `num_threads` long, made when an instruction first names it.

    Arrays keep their identity for as long as the machine lives, so that an instruction, once decoded, is a function
    over fixed arrays.
    """

    def __init__(self, kernel: Kernel, num_threads: int, symbols: dict[str, int]) -> None:
        self.kernel = kernel
        self.num_threads = num_threads
        self.threads = np.arange(num_threads)
        self.symbols = symbols
        self.arrays: dict[str, Array] = {}
        self.specials: dict[str, Array] = {}

    def clear(self) -> None:
        for array in self.arrays.values():
            array[...] = 0

    def array(self, register: Register) -> Array:
        if register.name not in self.arrays:
            kind = self.kernel.register_type(register.name)
            if kind not in DTYPES:
                raise UnknownInstructionError(f"register {register.name} of type {kind}")
            # Bits, whatever the declared type: instructions say how they read them.
            dtype = np.dtype(np.bool_ if kind == "pred" else f"u{SIZES[kind]}")
            self.arrays[register.name] = np.zeros(self.num_threads, dtype)
        return self.arrays[register.name]

    def source(self, operand: Operand, kind: str, *, narrow: bool = False) -> Array:
        """The operand read as PTX type `kind`; f16x2 gives two elements a thread.

        With `narrow`, the register may be wider than the type, whose value is then in its low bits (ld, st, cvt);
        what comes back is a view all the same.
        """
        dtype = np.dtype(DTYPES[kind])
        width = SIZES.get(kind, 1)
        if isinstance(operand, Register | Special):
            array = self.array(operand) if isinstance(operand, Register) else self.special(operand)
            if array.dtype == np.bool_ or dtype == np.bool_:
                if array.dtype != dtype:
                    raise UnknownInstructionError(f"{operand.name} read as {kind}")
                return array
            if narrow and array.dtype.itemsize > width:
                return array.view(dtype).reshape(self.num_threads, -1)[:, 0]
            if array.dtype.itemsize != width:
                raise UnknownInstructionError(f"{operand.name} read as {kind}")
            return array.view(dtype)
        if isinstance(operand, Immediate):
            return self._constant(operand, dtype, width)
        if isinstance(operand, Symbol) and operand.name in self.symbols:
            return np.full(self.num_threads, self.symbols[operand.name], f"u{width}").view(dtype)
        raise UnknownInstructionError(f"operand {operand} read as {kind}")

    def _constant(self, operand: Immediate, dtype: DType, width: int) -> Array:
        if dtype == np.bool_:
            return np.full(self.num_threads, operand.value != 0)
        bits = operand.value
        if operand.float_bits:
            if dtype.kind == "f" and operand.float_bits != 8 * width:
                # A literal of one precision where another is wanted, as in `0d...` for f32.
                value = np.array([bits], f"u{operand.float_bits // 8}").view(f"f{operand.float_bits // 8}")
                bits = int(value.astype(dtype).view(f"u{width}")[0])
            elif operand.float_bits > 8 * width:
                raise UnknownInstructionError(f"literal of {operand.float_bits} bits in {8 * width}")
        return np.full(self.num_threads, bits & ((1 << 8 * width) - 1), f"u{width}").view(dtype)

    def predicate(self, operand: Operand) -> Callable[[], Bools]:
        if isinstance(operand, Not):
            array = self.array(operand.register)
            return lambda: ~array
        array = self.source(operand, "pred")
        return lambda: array

    def special(self, operand: Special) -> Array:
        if operand.name not in self.specials:
            raise UnknownInstructionError(f"special register {operand.name}")
        return self.specials[operand.name]

    def target(self, operand: Operand, kind: str, *, extend: bool = False) -> Write:
        """A function (values, mask) that writes values of PTX type `kind` to the operand's register.

        With `extend`, the register may be wider than the type: signed types extend their sign, others zeros.
        """
        if isinstance(operand, Sink):
            return lambda values, mask: None
        if not isinstance(operand, Register):
            raise UnknownInstructionError(f"destination {operand}")
        array = self.array(operand)
        dtype = np.dtype(DTYPES[kind])
        width = SIZES.get(kind, 1)
        if extend and array.dtype != np.bool_ and array.dtype.itemsize > width:
            if dtype.kind == "f":
                return _widening(array, np.dtype(f"u{width}"), array.dtype)
            return _widening(array, dtype, np.dtype(f"{dtype.kind}{array.dtype.itemsize}"))
        if array.dtype.itemsize != width or (array.dtype == np.bool_) != (dtype == np.bool_):
            raise UnknownInstructionError(f"{operand.name} written as {kind}")
        view = array.view(dtype)
        if kind == "f16x2":

            def write_pairs(values: Array, mask: Mask) -> None:
                np.copyto(view, values, where=True if mask is None else np.repeat(mask, 2))

            return write_pairs

        def write(values: Array, mask: Mask) -> None:
            if mask is None:
                view[...] = values
            else:
                np.copyto(view, values, where=mask)

        return write


def _widening(array: Array, narrow: DType, wide: DType) -> Write:
    view = array.view(wide)

    def write(values: Array, mask: Mask) -> None:
        np.copyto(view, values.view(narrow).astype(wide), where=True if mask is None else mask)

    return write
