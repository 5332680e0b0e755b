"""What a peer is."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ..cases import Case, Direction, Inputs

Attend = Callable[..., Tensor]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


@dataclass
class Prepared:
    """A peer with a case's tensors in its own layout. To bring them there is not timed; to call it is.

    leaves: q, k, v. attend: leaves -> out. dout: gradient of out.
    packed: out, or the gradient of a leaf -> (T, heads, head_dim).
    checked: what parity calls in place of attend, where attend drops probabilities at random: with the dropout_seed
        given, or without dropout.
    moves: bytes that a call moves, of one that computes nothing (`copy`).
    """

    leaves: tuple[Tensor, Tensor, Tensor]
    attend: Attend
    dout: Tensor
    packed: Callable[[Tensor], Tensor] = field(default=_flat)
    checked: Attend | None = None
    dropout_seed: Tensor | None = None
    moves: int | None = None


@dataclass(frozen=True)
class Peer:
    """refusal: why it cannot do a case on a kind of device, None where it can. prepare: inputs in its layout."""

    refusal: Callable[[Case, Direction, str], str | None]
    prepare: Callable[[Inputs], Prepared]


def dense(inputs: Inputs, attend: Attend, checked: Attend | None = None, seed: Tensor | None = None) -> Prepared:
    """For peers that take (B, S, H, D)."""
    q, k, v, dout = (inputs.batched(x) for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    return Prepared((q, k, v), attend, dout, checked=checked, dropout_seed=seed)


def packed(inputs: Inputs, attend: Attend) -> Prepared:
    """For peers that take (T, H, D)."""
    return Prepared((inputs.q, inputs.k, inputs.v), attend, inputs.dout, lambda x: x)


def not_installed(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else "not installed"
