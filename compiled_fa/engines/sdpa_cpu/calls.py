"""Forward and backward of a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from math import isnan

from torch import SymInt, Tensor

from ...memory import new_empty
from ...problem import Direction, Packed, Problem
from ...scores import Window
from ..engine import Prepared
from .groups import Shared, calls
from .parts import (
    Gradients,
    at_once,
    attend,
    attend_at_once,
    attend_at_once_widened,
    differentiate,
    is_causal,
    is_one_piece,
    widens,
    widens_backward,
)


def is_one_call(problem: Problem, direction: Direction) -> bool:
    """Is it one call of the kernel, on tensors as they are, whose sizes are numbers?"""
    q, k = problem.q, problem.k
    if problem.packed is not None or (widens(q) if direction == "forward" else widens_backward(q)):
        return False
    symbolic = any(isinstance(number, SymInt) for number in (*q.shape, *k.shape, *problem.window))
    return not symbolic and at_once(problem, q, k)


def prepared(problem: Problem) -> Prepared | None:
    """As the engine's: of a call that is one of the kernel's."""
    q, k = problem.q, problem.k
    if problem.packed is not None or problem.bias is not None or not at_once(problem, q, k):
        return None
    run: Callable[..., tuple[Tensor, Tensor]]
    if not widens(q):
        run = attend_at_once
    elif is_one_piece(q, k):
        run = attend_at_once_widened
    else:
        return None
    return Prepared(functools.partial(run, is_causal(problem, q, k), problem.softmax_scale))


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out, shaped as q, and lse, (B, H, Sq) or, packed, (H, T)."""
    q, k, v = problem.q, problem.k, problem.v
    if problem.packed is None:
        return attend(problem, q, k, v)
    out = new_empty(q, q.shape)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=problem.lse_dtype)

    def compute(some: Shared) -> tuple[Tensor, ...]:
        queries, keys, bias = some
        some_out, some_lse = attend(_as_one(problem, bias), queries.take(q), keys.take(k), keys.take(v))
        queries.put(out, some_out)
        queries.put(lse.mT, some_lse.mT)
        return (some_out,)

    _compute_all(problem, problem.packed, compute)
    return out, lse


def backward(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None) -> Gradients:
    """-> dq, dk, dv, from the lse given, which may be merged over more keys than these; dlse: its gradient, or None."""
    q, k, v = problem.q, problem.k, problem.v
    if problem.packed is None:
        return differentiate(problem, (q, dout, out), (k, v), lse, dlse)
    gradients = new_empty(q, q.shape), new_empty(k, k.shape), new_empty(v, v.shape)

    def compute(some: Shared) -> tuple[Tensor, ...]:
        queries, keys, bias = some
        of_queries = queries.take(q), queries.take(dout), queries.take(out)
        some_dlse = None if dlse is None else queries.take(dlse.mT).mT
        of_keys, some_lse = (keys.take(k), keys.take(v)), queries.take(lse.mT).mT
        found = differentiate(_as_one(problem, bias), of_queries, of_keys, some_lse, some_dlse)
        for rows, gradient, values in zip((queries, keys, keys), gradients, found, strict=True):
            rows.put(gradient, values)
        return found

    _compute_all(problem, problem.packed, compute)
    return gradients


def _compute_all(problem: Problem, packed: Packed, compute: Callable[[Shared], tuple[Tensor, ...]]) -> None:
    """compute: a call of the kernel -> its results, which it has put where they belong.

    A hidden key weighs 0, and 0 * inf is not a number: what is not finite in one of the sequences that run as one would
    reach the others. It shows in their sums, and then all are computed by themselves.
    """
    _, heads, head_dim = problem.q.shape
    where = packed, problem.window_in_force, heads * head_dim
    for some in calls(*where):
        results = compute(some)
        if some.bias is not None and any(isnan(float(x.sum())) for x in results):
            for one in calls(*where, apart=True):
                compute(one)
            return


def _as_one(problem: Problem, bias: Tensor | None) -> Problem:
    """The problem of sequences that run as one, of which the bias says what they see; None: the call's own."""
    if bias is None:
        return problem
    return replace(problem, packed=None, window=Window(), bias=bias, signature=None, notes={})
