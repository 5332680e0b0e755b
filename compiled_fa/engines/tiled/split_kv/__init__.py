"""Attention on keys where they lie, by compiled steps without tiles: forward, where matrix products do not pay.

A tile copies keys to multiply them, or multiplies the keys of one head after another, which skips from row to row of
memory; and a product of small matrices is mostly a call. Where that is what takes time, in decoding and for short
sequences, plain multiplications and sums, made into loops by Inductor, read k and v where they lie.

decode.py        few queries on many keys
short_varlen.py  many short packed sequences
step.py          the compiled steps
split_table.py   which splits a decoding call's keys have, and where they lie
decode_plan.py   what decoding calls of one shape share
"""

from __future__ import annotations

from torch import Tensor

from ....problem import Problem
from . import decode, short_varlen


def forward(problem: Problem) -> tuple[Tensor, Tensor] | None:
    """-> out and lse, as the engine's; None: it is for tiles, or there is no compiler."""
    if decode.pays(problem):
        return decode.forward(problem)
    return short_varlen.forward(problem) if short_varlen.pays(problem) else None
