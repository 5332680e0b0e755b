"""Forward-mode AD of the ops: torch.func.jvp, jacfwd and linearize, and the dual tensors of torch.autograd.forward_ad.

torch.library knows no forward rule, and drops tangents as if results were constants.

Private API: torch.autograd.forward_ad._current_level, torch._C._functorch.peek_interpreter_stack,
torch._C._set_fwd_grad_enabled and torch._guards.TracingContext, tried with torch 2.11.0, 2.13.0 and 2.15.0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import forward_ad

from .registration import Kernel, Results, register_autograd

Rule = Callable[[Sequence[Any], Sequence[Tensor | None], Results], Results]


def register(op: Any, differentiated: Kernel, jvp: Any) -> None:
    """op(q, k, v, *options) has the tangents jvp(q, k, v, tangents of these three, *results of op, *options).

    differentiated: the op's kernel for autograd, in reverse mode.
    """

    def rule(primals: Sequence[Any], tangents: Sequence[Tensor | None], results: Results) -> Results:
        if any(tangent is not None for tangent in tangents[3:]):
            _raise(op, tangents)
        pairs = zip(primals[:3], tangents[:3], strict=True)
        given = [torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in pairs]
        found: Results = jvp(*primals[:3], *given, *results, *primals[3:])
        return found

    _register(op, differentiated, rule)


def refuse(op: Any, differentiated: Kernel) -> None:
    """A tangent raises NotImplementedError, as it does in F.scaled_dot_product_attention."""
    _register(op, differentiated, None)


def differentiated(x: Tensor) -> str | None:
    """What x has that asks for a derivative, in words; None: nothing."""
    if x.requires_grad and torch.is_grad_enabled():
        return "a tensor that requires gradients"
    return "a tensor with a tangent" if forward_ad.unpack_dual(x, level=0).tangent is not None else None


def refuse_tangents(name: str, **tensors: Tensor | None) -> None:
    """Raises NotImplementedError for an argument of function `name` that has a tangent. In compiled code nothing is
    asked."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return
    for argument, x in tensors.items():
        if x is not None and forward_ad.unpack_dual(x, level=0).tangent is not None:
            raise NotImplementedError(f"{name} does not support forward-mode AD in {argument}, which has a tangent")


def _raise(op: Any, tangents: Sequence[Tensor | None]) -> NoReturn:
    parameters = zip(op._schema.arguments, tangents, strict=False)
    *_, name = (parameter.name for parameter, tangent in parameters if tangent is not None)
    raise NotImplementedError(f"{op._name} does not support forward-mode AD in {name}, which has a tangent")


def _register(op: Any, differentiated: Kernel, rule: Rule | None) -> None:
    def kernel(keyset: Any, *arguments: Any) -> Any:
        # A look at a tensor takes 5 µs. First, whether there can be tangents at all.
        in_transform = torch._C._functorch.peek_interpreter_stack() is not None
        if not in_transform and forward_ad._current_level < 0:
            return differentiated(keyset, *arguments)
        primals, tangents = _unpacked(arguments)
        if all(tangent is None for tangent in tangents):
            return differentiated(keyset, *arguments)
        if rule is None:
            _raise(op, tangents)
        if not in_transform and TracingContext.try_get() is not None:
            # The graph would enter a level that Python does not know of, and `kernel` would not see it there.
            raise NotImplementedError(f"{op._name} supports torch.func.jvp in compiled code, and no dual_level")
        # Not of the primals: what is saved keeps its tangents, so that a gradient that would have some is refused.
        enabled = torch._C._is_fwd_grad_enabled()
        torch._C._set_fwd_grad_enabled(False)
        try:
            results = differentiated(keyset, *arguments)
        finally:
            torch._C._set_fwd_grad_enabled(enabled)
        pairs = zip(results, rule(primals, tangents, results), strict=True)
        return tuple(forward_ad.make_dual(result, tangent, level=0) for result, tangent in pairs)

    register_autograd(op, kernel)


def _unpacked(arguments: Sequence[Any]) -> tuple[list[Any], list[Tensor | None]]:
    """Primals and tangents. PyTorch has one level of dual tensors, 0, for torch.func.jvp too."""
    primals: list[Any] = list(arguments)
    tangents: list[Tensor | None] = [None] * len(primals)
    for at, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            primals[at], tangents[at] = forward_ad.unpack_dual(argument, level=0)
    return primals, tangents
