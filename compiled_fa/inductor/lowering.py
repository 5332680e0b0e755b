"""What Inductor makes of an op of ours where an engine is a handful of operators: those operators.

An op's Python (checks, the choice of an engine) takes 40 µs in compiled code, as long as short attention itself. All of
it is known when a graph is made, and the engine's operators stand there in the op's place. Other backends of
torch.compile, and torch.export, see the op.

Private API: torch._guards.TracingContext, register_decomposition and fast_random_decomps of
torch._inductor.decomposition, make_fallback of torch._inductor.lowering, tried with torch 2.11.0, 2.13.0 and 2.15.0;
where the last three are missing, ops stay ops in compiled code, and a warning says so once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._guards import TracingContext

from ..messages import say_once

Rule = Callable[..., Any]  # the op's arguments -> its results, or NotImplemented: it stays an op

_untold: dict[Any, Rule] = {}
_preparations: list[Callable[[], None]] = []


def register(op: Any, rule: Rule) -> None:
    """For the next graph that Inductor compiles."""
    _untold[op] = rule


def prepare(function: Callable[[], None]) -> None:
    """To be called before an op of ours is traced for Inductor the first time."""
    _preparations.append(function)


def traced() -> None:
    """To be called when an op is traced. Whoever traces for no compiler, as DTensor does, shall not wait for one."""
    if TracingContext.try_get() is not None:
        tell_inductor()


def tell_inductor() -> None:
    """Whoever compiles with Inductor has imported it by then; others shall not wait for that."""
    if not _untold or "torch._inductor" not in sys.modules:
        return
    rules = dict(_untold)
    _untold.clear()
    for function in _preparations:
        function()
    try:
        from torch._inductor.decomposition import fast_random_decomps, register_decomposition
        from torch._inductor.lowering import make_fallback

        for op, rule in rules.items():
            make_fallback(op, warn=False, override_decomp=True)  # where it stays: by itself, it could not after a rule
            register_decomposition([op])(rule)
        fast_random_decomps.cache_clear()  # a copy of the table
    except (ImportError, AttributeError) as error:
        say_once(f"torch {torch.__version__}: ops are called from compiled code as they are, which is slower: {error}")
