"""Attention on keys where they lie, by compiled steps without tiles: forward, where matrix products do not pay.

A tile copies keys to multiply them, or multiplies the keys of one head after another, which skips from row to row of
memory; and a product of small matrices is mostly a call. Where that is what takes time, in decoding and for short
sequences, plain multiplications and sums, made into loops by Inductor, read k and v where they lie.

decoding.py  few queries on many keys
short.py     many short packed sequences
step.py      the compiled steps
parts.py     which parts a decoding call's keys have, and where they lie
plans.py     what decoding calls of one shape share
"""

from __future__ import annotations

from torch import Tensor

from ....problem import Problem
from . import decoding, short


def forward(problem: Problem) -> tuple[Tensor, Tensor] | None:
    """-> out and lse, as the engine's; None: it is for tiles, or there is no compiler."""
    if decoding.pays(problem):
        return decoding.forward(problem)
    return short.forward(problem) if short.pays(problem) else None
