"""What an engine is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..problem import Direction, Problem


class CannotServeError(RuntimeError):
    """An engine that should have served a call found out that it cannot, before it computed anything: the message says
    why."""


class Prepared(NamedTuple):
    """A forward that is left of calls alike, when all is done that they share. Of sequences with Sq queries each.

    run: q (B, Sq, H, D), and k and v as the problem has them -> out (B, Sq, H, Dv) and lse (B, H, Sq).
    nbytes: of tensors that it holds.
    """

    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    nbytes: int = 0


class Engine(Protocol):
    """A way to compute attention: a module of this package that has all of these. Engines never import each other;
    what they share is the score program and the problem.
    """

    @property
    def name(self) -> str: ...

    def unsupported_reason(
        self, device: torch.device, problem: Problem | None = None, direction: Direction = "forward"
    ) -> str | None:
        """Why it cannot serve a device, or a call on it; None: it can."""

    def defers(self, problem: Problem, direction: Direction, to: str) -> bool:
        """Is the engine `to`, which would serve in its place, faster, provided that this one could serve the call?

        Asked first, of every call: it must be quick, and read no values off a CPU.
        """

    def inlines(self, problem: Problem, direction: Direction) -> bool:
        """Is its call a handful of operators, which may stand in a compiled graph of these shapes in the op's place?

        Asked before any other question, of problems whose tensors are fake and whose sizes may be symbols: it must not
        read values, nor compare symbols.
        """

    def prepared(self, problem: Problem) -> Prepared | None:
        """What `forward` does for all calls with the problem's signature; None: that is not less.

        Asked of problems that it could serve, which have a signature.
        """

    # Both may raise CannotServeError, of kernels that cannot be compiled for a device, or not be launched there.

    def forward(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """-> out, shaped as q with v's head_dim, and lse, (B, H, Sq) or, packed, (H, T)."""

    def backward(
        self, problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """-> dq, dk, dv, from the lse given, which may be merged over more keys than these; dlse: its gradient.

        And dbias where problem.bias_gradient: of problem.bias's shape and dtype, contiguous.
        """


def nothing_prepared(problem: Problem) -> None:
    """`prepared` of an engine whose calls have no less to do than `forward` does."""
