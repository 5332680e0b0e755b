"""The split_kv engine: attention on keys where they lie, without tiles; forward, on a CPU.

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

from typing import NoReturn

import torch
from torch import Tensor

from ...inductor.steps import eager_reason
from ...problem import Direction, Problem
from ...tuning import Rule, current
from ..engine import Prepared
from . import decode, short_varlen, step

__all__ = ["backward", "defers", "forward", "inlines", "name", "prepared", "unsupported_reason"]

name = "split_kv"

FORWARD_ONLY = "it computes forward, and no gradients"


def unsupported_reason(
    device: torch.device, problem: Problem | None = None, direction: Direction = "forward"
) -> str | None:
    """Why this engine cannot serve a device, or a call on it; None: it can."""
    if device.type != "cpu":
        return f"its steps are for CPUs, and this is {device.type}"
    if problem is None:
        return step.missing()
    if direction == "backward":
        return FORWARD_ONLY
    if problem.dropout_seed is not None:
        return "it has no dropout"
    if problem.bias is not None:
        return "it has no bias"
    if not (problem.q.numel() and problem.v.numel()):
        return "there are no queries, or no keys"
    if (why_no_decode := decode.unsupported_reason(problem)) is None:
        return step.missing()
    if (why_no_short := short_varlen.unsupported_reason(problem)) is None:
        return step.missing()
    return f"{why_no_decode}; {why_no_short}"


def rule(problem: Problem, to: str) -> str | None:
    """The name of the tuned rule by which it is faster than the engine `to`; None: it is not."""
    if decode.is_worth_code(problem) and decode.unsupported_reason(problem) is None:
        return decode.rule(problem, to)
    if short_varlen.is_worth_code(problem) and short_varlen.unsupported_reason(problem) is None:
        return short_varlen.rule(problem, to)
    return None


def defers(problem: Problem, direction: Direction, to: str) -> bool:
    """Is the engine `to` faster at a call that this one could serve? By the rules of tuning/cpu.py."""
    if direction == "backward" or problem.q.device.type != "cpu" or eager_reason() is not None:
        return True
    if (name := rule(problem, to)) is None:
        return True
    faster: Rule = getattr(current().split_kv, name)
    return not faster.favours(problem.features)


def inlines(problem: Problem, direction: Direction) -> bool:
    """Its steps are compiled by themselves, for many shapes at once."""
    return False


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """-> out, shaped as q with v's head_dim, and lse, (B, H, Sq) or, packed, (H, T)."""
    return decode.forward(problem) if _decodes(problem) else short_varlen.forward(problem)


def prepared(problem: Problem) -> Prepared | None:
    """As the protocol's."""
    return decode.prepared(problem) if _decodes(problem) else None


def _decodes(problem: Problem) -> bool:
    if problem.packed is None or problem.packed.block_table is not None:  # short sequences are packed, and not in pages
        return True
    if decode.unsupported_reason(problem) is not None:
        return False
    return decode.is_worth_code(problem) or short_varlen.unsupported_reason(problem) is not None


def backward(problem: Problem, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None) -> NoReturn:
    raise RuntimeError(f"the split_kv engine cannot serve this call: {FORWARD_ONLY}")
