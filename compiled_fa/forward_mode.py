"""Forward-mode AD of the ops: torch.func.jvp, jacfwd and linearize, and the dual tensors of torch.autograd.forward_ad.

A custom op has no forward rule, and drops tangents: its outputs would be constants. Here it raises.

Private API: torch._library.autograd.make_autograd_impl, torch.autograd.forward_ad._current_level and
torch._C._functorch.peek_interpreter_stack, tried with torch 2.13.0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import make_autograd_impl
from torch.autograd import forward_ad

_LIBRARY = torch.library.Library("compiled_fa", "FRAGMENT")

# Where custom_op registers one rule under the name of all of them, "Autograd". These come before it.
# custom_op registers its rule for all backends by the name of "Autograd"; one for a backend comes before it.
_BACKENDS = ("CPU", "CUDA", "XPU", "MPS", "HPU", "IPU", "Lazy", "XLA", "Meta", "PrivateUse1", "NestedTensor", "Other")


def _tangent(argument: object) -> Tensor | None:
    return forward_ad.unpack_dual(argument, level=0).tangent if isinstance(argument, Tensor) else None


def refuse(*ops: Any) -> None:
    """A tangent raises NotImplementedError, as it does in F.scaled_dot_product_attention."""
    for op in ops:
        _refuse(op)


def _refuse(op: Any) -> None:
    differentiated = make_autograd_impl(op._opoverload, op)

    def kernel(keyset: Any, *arguments: Any) -> Any:
        # A look at a tensor takes 5 µs: first, whether there can be tangents at all.
        if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None:
            for parameter, argument in zip(op._opoverload._schema.arguments, arguments, strict=False):
                if _tangent(argument) is not None:
                    raise NotImplementedError(
                        f"{op._qualname} does not support forward-mode AD, and {parameter.name} has a tangent"
                    )
        return differentiated(keyset, *arguments)

    for backend in _BACKENDS:
        _LIBRARY.impl(op._opoverload, kernel, f"Autograd{backend}", with_keyset=True)
