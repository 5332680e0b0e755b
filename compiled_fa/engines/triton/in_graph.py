"""A launch in a graph that is traced: one that gives tensors, in place of one that writes into them.

torch.library.wrap_triton puts the latter into a graph, which is right where PyTorch makes it functional afterwards.
What becomes of an op of ours is put into one that is functional already: there a launch that gives nothing may be left
out.

Private API: TracingTritonHOPifier, TraceableTritonKernelWrapper and triton_kernel_wrapper_functional of
torch._higher_order_ops.triton_kernel_wrap. Tried with torch 2.11.0, 2.13.0 and 2.15.0. Where they are missing,
the op stays an op in compiled code.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

MODULE = "torch._higher_order_ops.triton_kernel_wrap"
NEEDED = ("TracingTritonHOPifier", "TraceableTritonKernelWrapper", "triton_kernel_wrapper_functional")


@functools.cache
def is_possible() -> bool:
    try:
        module = importlib.import_module(MODULE)
    except ImportError:
        return False
    return all(hasattr(module, name) for name in NEEDED)


def launch(
    function: Any, grid: tuple[Any, ...], keywords: Mapping[str, Any], written: Sequence[str]
) -> dict[str, Tensor]:
    """function: a Triton kernel. written: names of the arguments that it writes to. -> those tensors, afterwards."""
    module: Any = importlib.import_module(MODULE)

    class Functional(module.TracingTritonHOPifier):  # type: ignore[misc]
        def call_HOP(self, variable: Any, grids: Any, combined_args: Any, *_: Any) -> Any:  # noqa: N802
            graphable, constants = self.store_non_graphable_args(combined_args)
            return module.triton_kernel_wrapper_functional(
                kernel_idx=variable.kernel_idx,
                constant_args_idx=constants,
                grid=grids,
                tma_descriptor_metadata={},
                kwargs=graphable,
                tensors_to_clone=list(written),
            )

    wrapped = module.TraceableTritonKernelWrapper(function, None, None)[grid]
    results: dict[str, Tensor] = Functional().call_triton_kernel(wrapped, (), dict(keywords), None)
    return {name: results[name] for name in written}
