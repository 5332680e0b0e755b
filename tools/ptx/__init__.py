"""Executes the PTX that Triton emits for sm_75 on the CPU, checking every access and counting as it goes.

    from tools.ptx import launch_triton
    counters = launch_triton(compiled, grid=(8,), arguments={"x": x, "y": y, "n": 1000})

`launch` takes PTX text; README.md says what a run proves and what it does not.
"""

from .counters import Counters, SharedTraffic, Traffic
from .faults import (
    BarrierError,
    ConvergenceError,
    KernelError,
    MisalignedError,
    OutOfBoundsError,
    RaceError,
    TrapError,
    UninitialisedError,
    UnknownInstructionError,
)
from .parser import parse
from .run import Pointer, launch, launch_triton

__all__ = [
    "BarrierError",
    "ConvergenceError",
    "Counters",
    "KernelError",
    "MisalignedError",
    "OutOfBoundsError",
    "Pointer",
    "RaceError",
    "SharedTraffic",
    "Traffic",
    "TrapError",
    "UninitialisedError",
    "UnknownInstructionError",
    "launch",
    "launch_triton",
    "parse",
]
