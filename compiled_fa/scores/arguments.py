"""A score program as arguments of compiled code: which terms it has is fixed there, its numbers are tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caches import Cache
from ..flattening import Flattened
from .dropout import Dropout
from .masks import Window
from .program import ScoreProgram

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
    bias: torch.dtype | None = None  # None: there is none
    bias_gradient: bool = False

    @classmethod
    def of(cls, program: ScoreProgram, masked: bool, dtype: torch.dtype, product_dtype: torch.dtype) -> Features:
        terms = program.softcap is not None, program.alibi_slopes is not None, program.dropout is not None
        return cls(*terms, masked, dtype, product_dtype)

    @property
    def plain(self) -> bool:
        return not (self.softcap or self.alibi or self.dropout or self.bias)

    @property
    def words(self) -> str:
        chosen = {"softcap": self.softcap, "ALiBi": self.alibi, "dropout": self.dropout, "mask": self.masked}
        chosen["bias"] = self.bias is not None
        dtype = str(self.product_dtype).removeprefix("torch.")
        return ", ".join([name for name, present in chosen.items() if present] + [dtype])


_numbers: Cache[tuple[object, ...], list[Tensor]] = Cache("score numbers", entries=256)


@dataclass(frozen=True)
class ScoreArguments(Flattened):
    """One call's score program as tensors, with dropout's probability to keep.

    seqlen_q, seqlen_k: int32 (batch,). window_left, window_right: int32 (), UNBOUNDED where there is no bound.
    softmax_scale, softcap: () in the dtype of the arithmetic. alibi_slopes: (batch, nheads). dropout_threshold: int32
    (), and keep_probability; rows come hashed (Dropout.row).
    """

    seqlen_q: Tensor
    seqlen_k: Tensor
    window_left: Tensor
    window_right: Tensor
    softmax_scale: Tensor
    softcap: Tensor | None = None
    alibi_slopes: Tensor | None = None
    dropout_threshold: Tensor | None = None
    keep_probability: Tensor | None = None

    @classmethod
    def of(cls, program: ScoreProgram, batch: int, keep_probability: float, dtype: torch.dtype) -> ScoreArguments:
        """On a CPU. Calls with the same numbers share their tensors: nothing writes into them."""
        lengths = program.seqlen_q, program.seqlen_k
        threshold = None if program.dropout is None else program.dropout.threshold
        keep = None if program.dropout is None else keep_probability
        numbers = [
            *((batch, torch.int32, None if isinstance(length, Tensor) else length) for length in lengths),
            *((None, torch.int32, UNBOUNDED if side is None else side) for side in program.window),
            (None, dtype, program.softmax_scale),
            (None, dtype, program.softcap),
            (None, torch.int32, threshold),
            (None, dtype, keep),
        ]

        def make() -> list[Tensor]:
            return [
                torch.full(() if size is None else (size,), 0.0 if x is None else float(x), dtype=kind, device="cpu")
                for size, kind, x in numbers
            ]

        q, k, left, right, scale, softcap, threshold_tensor, keep_tensor = _numbers.get(tuple(numbers), make)
        seqlen_q, seqlen_k = (
            given.contiguous() if isinstance(given, Tensor) else made
            for given, made in zip(lengths, (q, k), strict=True)
        )
        return cls(
            seqlen_q,
            seqlen_k,
            left,
            right,
            scale,
            None if program.softcap is None else softcap,
            None if program.alibi_slopes is None else program.alibi_slopes.contiguous(),
            None if program.dropout is None else threshold_tensor,
            None if program.dropout is None else keep_tensor,
        )

    @classmethod
    def examples(cls, features: Features, example: Callable[..., Tensor]) -> ScoreArguments:
        """To trace with. example: (*names of dimensions, dtype=) -> a tensor."""
        seqlen_q, seqlen_k = (example("batch", dtype=torch.int32) for _ in range(2))
        left, right = (example(dtype=torch.int32) for _ in range(2))
        scale = example(dtype=features.dtype)
        slopes = example("batch", "nheads", dtype=features.dtype) if features.alibi else None
        threshold = example(dtype=torch.int32) if features.dropout else None
        softcap = example(dtype=features.dtype) if features.softcap else None
        keep = example(dtype=features.dtype) if features.dropout else None
        return cls(seqlen_q, seqlen_k, left, right, scale, softcap, slopes, threshold, keep)

    @classmethod
    def names(cls, features: Features) -> tuple[str, ...]:
        """Of the fields that are present."""
        optional = {"softcap": features.softcap, "alibi_slopes": features.alibi}
        optional |= {"dropout_threshold": features.dropout, "keep_probability": features.dropout}
        return tuple(name for name in cls.__dataclass_fields__ if optional.get(name, True))

    def program(self) -> ScoreProgram:
        dropout = None if self.dropout_threshold is None else Dropout(NO_SEED, self.dropout_threshold)
        window: Any = Window(self.window_left, self.window_right)
        lengths = self.seqlen_q, self.seqlen_k
        return ScoreProgram(*lengths, self.softmax_scale, self.softcap, self.alibi_slopes, window, dropout)
