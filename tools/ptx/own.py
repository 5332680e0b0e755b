"""Runs the triton engine on the CPU as a T4 would: its own launches, kernels as sm_75 PTX.

with own_on_ptx() as launches:
    out, lse = triton.forward(problem)  # tensors on the CPU
print(launches[-1].counters.global_bytes)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import Tensor

from compiled_fa.engines.triton import launching
from compiled_fa.engines.triton.launching import Launch

from .counters import Counters
from .run import launch as execute


@dataclasses.dataclass(frozen=True)
class Executed:
    """A launch that has been, and the PTX that was executed."""

    launch: Launch
    ptx: str
    counters: Counters


@contextlib.contextmanager
def own_on_ptx(
    *, turing: bool = True, edit: Callable[[str], str] = lambda ptx: ptx, last_block_first: bool = False
) -> Iterator[list[Executed]]:
    """Calls of the triton engine on tensors of the CPU execute PTX; yields the launches, in order.

    turing: with the project's stage; False for stock Triton. edit: changes PTX before it runs, to plant a fault.
    """
    from tools.offline import own_kernels

    from .tensors import as_argument

    launches: list[Executed] = []

    def run(launch: Launch) -> list[Tensor]:
        compiled = own_kernels.compile_launch(launch, turing=turing)
        ptx = edit(compiled.ptx)
        arguments = {name: as_argument(value) for name, value in own_kernels.parameters(launch).items()}
        blocks: Any = [(x, 0, 0) for x in range(launch.programs)]
        counters = execute(
            ptx,
            (launch.programs,),
            arguments,
            shared_bytes=compiled.shared,
            num_warps=compiled.num_warps,
            blocks=blocks[::-1] if last_block_first else blocks,
        )
        launches.append(Executed(launch, ptx, counters))
        return [launch.arguments[name] for name in launch.kernel.written]

    with own_kernels.noted(), mock.patch.object(launching, "run", run):
        yield launches
