"""Runs a program's @triton.jit kernels on the CPU as a T4 would: each launch compiled for sm_75, its PTX executed.

    with kernels_on_ptx() as executed:
        out = attention(q, k, v)  # tensors on the CPU; its wrapper launches kernels
    print(executed[-1].compiled.hmma, executed[-1].counters.global_bytes)

A wrapper that asks whether its tensors are on CUDA is told so under `tools.offline.launches.CudaOnCpu`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tools.offline.compile import Compiled, compile_ast
from tools.offline.launches import Grid, Launch, in_place_of_launches

from .counters import Counters
from .run import launch
from .tensors import as_argument


@dataclasses.dataclass(frozen=True)
class Executed:
    launch: Launch
    compiled: Compiled
    counters: Counters


@contextlib.contextmanager
def kernels_on_ptx(*, turing: bool = True) -> Iterator[list[Executed]]:
    """Yields what has been executed, in order. turing: compiled with the project's stage; False: by stock Triton.

    What a kernel may not do raises KernelError where it is launched.
    """
    executed: list[Executed] = []
    compiled: dict[str, Compiled] = {}

    def execute(asked: Launch, grid: Grid, arguments: Mapping[str, Any]) -> None:
        key = f"{asked.source.hash()} {sorted(asked.options.items())}"
        if key not in compiled:
            compiled[key] = compile_ast(asked.source, turing, asked.options)
        code = compiled[key]
        passed = {name: as_argument(value) for name, value in arguments.items()}
        counters = launch(code.ptx, grid, passed, shared_bytes=code.shared, num_warps=code.num_warps)
        executed.append(Executed(asked, code, counters))

    with in_place_of_launches(execute):
        yield executed
