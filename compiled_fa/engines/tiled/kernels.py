"""The steps as one call runs them: machine code from Inductor on a CPU, plain PyTorch ops elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...inductor import Compiled, Size
from ...scores import ScoreProgram
from . import step_compiler, steps
from .features import Features, example_numbers, numbers, rebuilt
from .step_compiler import example
from .steps import Indices

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
        features = Features.of(self._program, masked, self._dtype, product_dtype)
        # Beside softcap, ALiBi or dropout a mask costs little: code for tiles without one is only compiled for calls
        # that have no other tiles.
        return features if features.plain else replace(features, masked=self._some_masked)

    def _arguments(self) -> list[Tensor]:
        if self._numbers is None:
            self._numbers = numbers(self._program, self._batch, self._keep_probability, self._dtype)
        return self._numbers


def _flat(indices: Indices) -> list[Tensor]:
    return [*indices[:4], *(indices.dropout_row or ())]


def _example_arguments(size: Size, features: Features) -> list[Tensor]:
    indices = [("p", "1", "1", "1"), ("p", "1", "g", "1"), ("m", "1", "1"), ("n",)]
    examples = [example(size, *shape, dtype=torch.int32) for shape in indices]
    if features.dropout:
        examples += [example(size, "p", "m", "g", "1", dtype=torch.int32, of_larger=True) for _ in range(2)]
    return examples + example_numbers(size, features)


def _rebuilt(features: Features, tensors: tuple[Tensor, ...]) -> tuple[Indices, ScoreProgram, Tensor | float]:
    rest = iter(tensors)
    indices = Indices(next(rest), next(rest), next(rest), next(rest))
    if features.dropout:
        indices = indices._replace(dropout_row=(next(rest), next(rest)))
    return indices, *rebuilt(features, rest)


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
    return step_compiler.compiled(
        ("softmax", features), step_compiler.writing(step), examples, f"a forward step ({features.words})", **kept
    )


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
    return step_compiler.compiled(
        ("gradient", features), step_compiler.writing(step), examples, f"a backward step ({features.words})", **kept
    )
