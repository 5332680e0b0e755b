"""Functions that PTX defines up to an error: computed in float64, then rounded once.

The result is within half a unit in the last place of the exact one (float64's own error aside), which every bound of
the ISA allows: ex2.approx.f32 2 ulp, lg2.approx 2**-22 absolute or relative, rcp and sqrt.approx 1 ulp, rsqrt.approx
2**-22.9 relative, sin and cos.approx 2**-20.5 absolute, tanh.approx.f32 2**-11 relative, div.full and div.approx 2 ulp
(div.approx by more than 2**126 is exact here and 0 there).
So a kernel's error measured here lacks what the hardware's own approximations add, up to those bounds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arithmetic import integer_division
from .arrays import Array
from .definitions import Context, Execute, defines, split, unsupported
from .elementwise import elementwise, float_function
from .parser import Instruction

_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@defines(*_FUNCTIONS)
def _function(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "approx", "rn", "ftz")
    exact = _FUNCTIONS[instruction.opcode]
    # rcp.rn and sqrt.rn: rounding float64's result once more is right for float32 (53 >= 2 * 24 + 2 bits).
    rounded = instruction.opcode in ("rcp", "sqrt") and "rn" in flags
    if kind == "f64" or ("approx" in flags) == rounded:
        raise unsupported(instruction)
    function = float_function(lambda a: exact(a.astype(np.float64)).astype(a.dtype), flags)
    return elementwise(instruction, context, function, kind, [kind])


@defines("div")
def _divide(instruction: Instruction, context: Context) -> Execute:
    (kind,), flags = split(instruction, "approx", "full", "ftz", "rn")
    if kind[0] in "us":
        return integer_division(instruction, context, kind)
    if kind != "f32" or len(flags & {"approx", "full", "rn"}) != 1:
        raise unsupported(instruction)
    function = float_function(lambda a, b: (a.astype(np.float64) / b).astype(np.float32), flags)
    return elementwise(instruction, context, function, kind, [kind, kind])
