"""How an op is registered: by torch.library.Library, and with a kernel of its own for autograd.

torch.library.custom_op and register_autograd say the same in fewer words, but a call of theirs goes through several
layers of Python more: tools/op_overhead.py measures what they take.

Private API, most of it as custom_op uses it: torch._compile._disable_dynamo, OpOverload.redispatch, and of torch._C
_AutoDispatchBelowAutograd, _after_autograd_keyset, _after_ADInplaceOrView_keyset, DispatchKey and _any_requires_grad,
tried with torch 2.11.0, 2.13.0 and 2.15.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

NAMESPACE = "compiled_fa"

Results = tuple[Tensor, ...]
Kernel = Callable[..., Any]

LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

# needs_exact_strides: compiled or not, engines read rows where they lie.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

# A function that Dynamo shall not look into; torch.compiler.disable is the same, and imports Dynamo.
not_traced = _disable_dynamo

# Where nothing but a device's own kernel is left to be called: no mode, no tracing, no transform.
_DEVICES = frozenset(getattr(torch._C.DispatchKey, name) for name in ("CPU", "CUDA", "XPU", "MPS", "PrivateUse1"))


def define(name: str, schema: str, kernel: Kernel, fake: Kernel) -> torch._ops.OpOverload:
    """torch.ops.compiled_fa.{name}, with one kernel for all devices, and one for tensors without data."""
    LIBRARY.define(f"{name}{schema}", tags=_TAGS)
    # Eager code between graphs calls it too: Dynamo shall not look inside.
    LIBRARY.impl(name, _disable_dynamo(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
    return op


def differentiable(
    op: torch._ops.OpOverload,
    compute: Kernel,
    save: Callable[[Any, tuple[Any, ...], Results], None],
    differentiate: Callable[..., tuple[Tensor | None, ...]],
) -> Kernel:
    """-> (keyset, *arguments) -> the op's results, differentiable in reverse mode: for `register_autograd`.

    compute: the op's kernel. save: (ctx, the op's arguments, its results). differentiate: (ctx, *gradients) -> one for
    each of these arguments. The dispatcher leaves out arguments at the end that are their defaults.
    """

    def below(keyset: Any, arguments: tuple[Any, ...]) -> Results:
        rest = keyset & torch._C._after_ADInplaceOrView_keyset
        results: Results
        if rest.highestPriorityTypeId() in _DEVICES:
            results = compute(*arguments)
            return results
        with torch._C._AutoDispatchBelowAutograd():
            results = op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)
        return results

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *arguments: Any) -> Results:
            results = below(keyset, arguments)
            save(ctx, arguments, results)
            return results

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            return (None, *differentiate(ctx, *gradients))

    Differentiable.__name__ = Differentiable.__qualname__ = f"{op._opname}_autograd"

    def kernel(keyset: Any, *arguments: Any) -> Results:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            results: Results = Differentiable.apply(keyset, *arguments)  # type: ignore[no-untyped-call]
            return results
        return below(keyset, arguments)

    return kernel


def register_autograd(op: torch._ops.OpOverload, kernel: Kernel) -> None:
    """kernel: (keyset, *arguments) -> results."""
    LIBRARY.impl(op, _disable_dynamo(kernel), "Autograd", with_keyset=True)
