"""The steps as one call runs them: machine code from Inductor on a CPU, plain PyTorch ops elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...inductor import Compiled, Size
from ...scores import Dropout, ScoreProgram, Window
from . import inductor, steps
from .inductor import example
from .steps import Indices

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

    @property
    def plain(self) -> bool:
        return not (self.softcap or self.alibi or self.dropout)

    @property
    def words(self) -> str:
        chosen = {"softcap": self.softcap, "ALiBi": self.alibi, "dropout": self.dropout, "mask": self.masked}
        dtype = str(self.product_dtype).removeprefix("torch.")
        return ", ".join([name for name, present in chosen.items() if present] + [dtype])


TILE, ROWS = ("p", "m", "g", "n"), ("p", "m", "g")  # shapes, in the words of steps.py

# Operations from which Inductor keeps a value: fewer than softcap takes and more than a plain score's; more than any.
KEEP_SCORE, KEEP_NOTHING = 20, 1000

Kernel = Callable[[Features], Compiled | None]


class Kernels:
    """softmax_step and gradient_step of steps.py for one call's score program.

    some_masked: some tiles of the call may have something to hide.
    """

    def __init__(
        self,
        program: ScoreProgram,
        batch: int,
        keep_probability: float,
        dtype: torch.dtype,
        device: torch.device,
        some_masked: bool,
    ) -> None:
        self._program = program
        self._batch = batch
        self._keep_probability = keep_probability
        self._dtype = dtype
        self._some_masked = some_masked
        self._may_compile = device.type == "cpu"
        self._numbers: list[Tensor] | None = None
        self._found: dict[tuple[Kernel, bool, torch.dtype], Compiled | None] = {}

    def softmax_step(
        self, scores: Tensor, row_max: Tensor, row_sum: Tensor, accumulator: Tensor, indices: Indices, masked: bool
    ) -> None:
        run = self._compiled(_softmax_kernel, masked, scores.dtype)
        if run is not None:
            run([scores, row_max, row_sum, accumulator, *_flat(indices), *self._arguments()])
        else:
            steps.softmax_step(scores, row_max, row_sum, accumulator, indices, self._program, masked)

    def gradient_step(
        self, scores: Tensor, dprobs: Tensor, lse: Tensor, delta: Tensor, indices: Indices, masked: bool
    ) -> None:
        run = self._compiled(_gradient_kernel, masked, scores.dtype)
        if run is not None:
            run([scores, dprobs, lse, delta, *_flat(indices), *self._arguments()])
        else:
            steps.gradient_step(scores, dprobs, lse, delta, indices, self._program, masked, self._keep_probability)

    def _compiled(self, kernel: Kernel, masked: bool, product_dtype: torch.dtype) -> Compiled | None:
        """Machine code for this call's features, looked up once a call; None: run the step eagerly."""
        if not self._may_compile:
            return None
        key = kernel, masked, product_dtype
        if key not in self._found:
            self._found[key] = kernel(self._features(masked, product_dtype))
        return self._found[key]

    def _features(self, masked: bool, product_dtype: torch.dtype) -> Features:
        program = self._program
        features = Features(
            program.softcap is not None,
            program.alibi_slopes is not None,
            program.dropout is not None,
            masked,
            self._dtype,
            product_dtype,
        )
        # Beside softcap, ALiBi or dropout a mask costs little: code for tiles without one is only compiled for calls
        # that have no other tiles.
        return features if features.plain else replace(features, masked=self._some_masked)

    def _arguments(self) -> list[Tensor]:
        """The score program's numbers as tensors, in the order in which `_rebuilt` takes them."""
        if self._numbers is None:
            program, window = self._program, self._program.window
            self._numbers = [
                torch.as_tensor(program.seqlen_q, dtype=torch.int32).expand(self._batch).contiguous(),
                torch.as_tensor(program.seqlen_k, dtype=torch.int32).expand(self._batch).contiguous(),
                torch.tensor(UNBOUNDED if window.left is None else window.left, dtype=torch.int32),
                torch.tensor(UNBOUNDED if window.right is None else window.right, dtype=torch.int32),
                torch.tensor(program.softmax_scale, dtype=self._dtype),
            ]
            if program.softcap is not None:
                self._numbers.append(torch.tensor(program.softcap, dtype=self._dtype))
            if program.alibi_slopes is not None:
                self._numbers.append(program.alibi_slopes.to(self._dtype).contiguous())
            if program.dropout is not None:
                self._numbers += [
                    torch.tensor(program.dropout.threshold, dtype=torch.int32),
                    torch.tensor(self._keep_probability, dtype=self._dtype),
                ]
        return self._numbers


def _flat(indices: Indices) -> list[Tensor]:
    return [*indices[:4], *(indices.dropout_row or ())]


def _example_arguments(size: Size, features: Features) -> list[Tensor]:
    indices = [("p", "1", "1", "1"), ("p", "1", "g", "1"), ("m", "1", "1"), ("n",)]
    examples = [example(size, *shape, dtype=torch.int32) for shape in [*indices, ("batch",), ("batch",), (), ()]]
    examples.append(example(size, dtype=features.dtype))
    if features.softcap:
        examples.append(example(size, dtype=features.dtype))
    if features.alibi:
        examples.append(example(size, "batch", "nheads", dtype=features.dtype))
    if features.dropout:
        rows = [example(size, "p", "m", "g", "1", dtype=torch.int32, of_larger=True) for _ in range(2)]
        examples = [
            *examples[:4],
            *rows,
            *examples[4:],
            example(size, dtype=torch.int32),
            example(size, dtype=features.dtype),
        ]
    return examples


def _rebuilt(features: Features, tensors: tuple[Tensor, ...]) -> tuple[Indices, ScoreProgram, Tensor | float]:
    rest = iter(tensors)
    indices = Indices(next(rest), next(rest), next(rest), next(rest))
    if features.dropout:
        indices = indices._replace(dropout_row=(next(rest), next(rest)))
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
    return indices, program, next(rest) if features.dropout else 1.0


def _softmax_kernel(features: Features) -> Compiled | None:
    def step(scores: Tensor, row_max: Tensor, row_sum: Tensor, accumulator: Tensor, *tensors: Tensor) -> None:
        indices, program, _ = _rebuilt(features, tensors)
        steps.softmax_step(scores, row_max, row_sum, accumulator, indices, program, features.masked)

    def examples(size: Size) -> list[Tensor]:
        scores = example(size, *TILE, dtype=features.product_dtype)
        rest = [example(size, *shape, dtype=features.dtype) for shape in (ROWS, ROWS, ("p", "m", "g", "d"))]
        return [scores, *rest, *_example_arguments(size, features)]

    # The row's maximum and its sum are two loops: a capped score is kept between them, and not made twice.
    kept = {"realize_opcount_threshold": KEEP_SCORE} if features.softcap and not features.masked else {}
    return inductor.compiled(("softmax", features), step, examples, f"a forward step ({features.words})", **kept)


def _gradient_kernel(features: Features) -> Compiled | None:
    def step(scores: Tensor, dprobs: Tensor, lse: Tensor, delta: Tensor, *tensors: Tensor) -> None:
        indices, program, keep_probability = _rebuilt(features, tensors)
        steps.gradient_step(scores, dprobs, lse, delta, indices, program, features.masked, keep_probability)

    def examples(size: Size) -> list[Tensor]:
        tiles = [example(size, *TILE, dtype=features.product_dtype) for _ in range(2)]
        rows = [example(size, *ROWS, dtype=features.dtype, of_larger=True) for _ in range(2)]
        return [*tiles, *rows, *_example_arguments(size, features)]

    # All in one loop: nothing needs to be kept.
    kept = {"realize_opcount_threshold": KEEP_NOTHING}
    return inductor.compiled(("gradient", features), step, examples, f"a backward step ({features.words})", **kept)
