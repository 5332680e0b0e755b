"""A score program in compiled code: which terms it has is fixed there, its numbers are arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...inductor import Size
from ...scores import Dropout, ScoreProgram, Window
from .step_compiler import example

NO_SEED = torch.empty(0, dtype=torch.int32)  # rows come hashed
UNBOUNDED = 1 << 30  # a window's side where it has none, in compiled code; positions stay far below


@dataclass(frozen=True)
class Features:
    """What is fixed in compiled code; every number is an argument of it."""

    softcap: bool
    alibi: bool
    dropout: bool
    masked: bool
    dtype: torch.dtype
    product_dtype: torch.dtype  # of scores and dprobs

    @classmethod
    def of(cls, program: ScoreProgram, masked: bool, dtype: torch.dtype, product_dtype: torch.dtype) -> Features:
        terms = program.softcap is not None, program.alibi_slopes is not None, program.dropout is not None
        return cls(*terms, masked, dtype, product_dtype)

    @property
    def plain(self) -> bool:
        return not (self.softcap or self.alibi or self.dropout)

    @property
    def words(self) -> str:
        chosen = {"softcap": self.softcap, "ALiBi": self.alibi, "dropout": self.dropout, "mask": self.masked}
        dtype = str(self.product_dtype).removeprefix("torch.")
        return ", ".join([name for name, present in chosen.items() if present] + [dtype])


def numbers(program: ScoreProgram, batch: int, keep_probability: float, dtype: torch.dtype) -> list[Tensor]:
    """The score program's numbers as tensors, in the order in which `rebuilt` takes them."""
    sides = (UNBOUNDED if side is None else side for side in program.window)
    lengths = program.seqlen_q, program.seqlen_k
    found = [
        *(x.contiguous() if isinstance(x, Tensor) else _number(x, torch.int32, batch) for x in lengths),
        *(_number(side, torch.int32) for side in sides),
        _number(program.softmax_scale, dtype),
    ]
    if program.softcap is not None:
        found.append(_number(program.softcap, dtype))
    if program.alibi_slopes is not None:
        found.append(program.alibi_slopes.contiguous())
    if program.dropout is not None:
        found += [_number(program.dropout.threshold, torch.int32), _number(keep_probability, dtype)]
    return found


@functools.lru_cache(maxsize=64)
def _number(x: float | Tensor, dtype: torch.dtype, *size: int) -> Tensor:
    """The same tensor for the same number: nothing writes into it."""
    return torch.full(size, float(x), dtype=dtype, device="cpu")


def example_numbers(size: Size, features: Features) -> list[Tensor]:
    examples = [example(size, *shape, dtype=torch.int32) for shape in [("batch",), ("batch",), (), ()]]
    examples.append(example(size, dtype=features.dtype))
    if features.softcap:
        examples.append(example(size, dtype=features.dtype))
    if features.alibi:
        examples.append(example(size, "batch", "nheads", dtype=features.dtype))
    if features.dropout:
        examples += [example(size, dtype=torch.int32), example(size, dtype=features.dtype)]
    return examples


def rebuilt(features: Features, rest: Iterator[Tensor]) -> tuple[ScoreProgram, Tensor | float]:
    """-> the score program of these numbers, and dropout's probability to keep."""
    seqlen_q, seqlen_k, left, right, softmax_scale = (next(rest) for _ in range(5))
    program = ScoreProgram(
        seqlen_q,
        seqlen_k,
        softmax_scale,
        softcap=next(rest) if features.softcap else None,
        alibi_slopes=next(rest) if features.alibi else None,
        window=Window(left, right),
        dropout=Dropout(NO_SEED, next(rest)) if features.dropout else None,
    )
    return program, next(rest) if features.dropout else 1.0
