"""The steps as one call runs them: machine code from Inductor on a CPU, plain PyTorch ops elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...inductor import steps as compiled_steps
from ...inductor.graphs import Compiled, Size
from ...inductor.steps import example
from ...scores import ScoreProgram
from ...scores.arguments import Features, ScoreArguments
from ...tuning import current
from . import steps
from .steps import Indices

TILE, ROWS = ("p", "m", "g", "n"), ("p", "m", "g")  # shapes, in the words of steps.py

Kernel = Callable[[Features], Compiled | None]


class Kernels:
    """softmax_step and gradient_step of steps.py for one call's score program.

    some_masked: some tiles of the call may have something to hide. bias: its dtype, and whether its gradient is wanted.
    """

    def __init__(
        self,
        program: ScoreProgram,
        batch: int,
        keep_probability: float,
        dtype: torch.dtype,
        device: torch.device,
        some_masked: bool,
        bias: torch.dtype | None = None,
        bias_gradient: bool = False,
    ) -> None:
        self._program = program
        self._batch = batch
        self._keep_probability = keep_probability
        self._dtype = dtype
        self._some_masked = some_masked
        self._bias, self._bias_gradient = bias, bias_gradient
        self._may_compile = device.type == "cpu"
        self._flat_arguments: list[Tensor] | None = None
        self._found: dict[tuple[Kernel, bool, torch.dtype], Compiled | None] = {}

    def softmax_step(
        self, scores: Tensor, row_max: Tensor, row_sum: Tensor, accumulator: Tensor, indices: Indices, masked: bool
    ) -> None:
        run = self._compiled(_softmax_kernel, masked, scores.dtype)
        if run is not None:
            run([scores, row_max, row_sum, accumulator, *indices.flatten(), *self._arguments()])
        else:
            steps.softmax_step(scores, row_max, row_sum, accumulator, indices, self._program, masked)

    def gradient_step(
        self,
        scores: Tensor,
        dprobs: Tensor,
        lse: Tensor,
        delta: Tensor,
        indices: Indices,
        masked: bool,
        dscores: Tensor | None = None,
    ) -> None:
        run = self._compiled(_gradient_kernel, masked, scores.dtype)
        if run is not None:
            wanted = [] if dscores is None else [dscores]
            run([scores, dprobs, lse, delta, *wanted, *indices.flatten(), *self._arguments()])
        else:
            arguments = indices, self._program, masked, self._keep_probability, dscores
            steps.gradient_step(scores, dprobs, lse, delta, *arguments)

    def _compiled(self, kernel: Kernel, masked: bool, product_dtype: torch.dtype) -> Compiled | None:
        """Machine code for this call's features, looked up once a call; None: run the step eagerly."""
        if not self._may_compile:
            return None
        key = kernel, masked, product_dtype
        if key not in self._found:
            features = self._features(masked, product_dtype)
            wanted = self._bias_gradient and kernel is _gradient_kernel
            self._found[key] = kernel(replace(features, bias_gradient=wanted))
        return self._found[key]

    def _features(self, masked: bool, product_dtype: torch.dtype) -> Features:
        features = replace(Features.of(self._program, masked, self._dtype, product_dtype), bias=self._bias)
        # Beside softcap, ALiBi, dropout or a bias a mask costs little: code for tiles without one is only compiled for
        # calls that have no other tiles.
        return features if features.plain else replace(features, masked=self._some_masked)

    def _arguments(self) -> list[Tensor]:
        if self._flat_arguments is None:
            arguments = ScoreArguments.of(self._program, self._batch, self._keep_probability, self._dtype)
            self._flat_arguments = arguments.flatten()
        return self._flat_arguments


def _examples(size: Size, features: Features) -> list[Tensor]:
    """Of the arguments that follow a step's tiles."""

    def of(*shape: str, dtype: torch.dtype = torch.int32, of_larger: bool = False) -> Tensor:
        return example(size, *shape, dtype=dtype, of_larger=of_larger)

    low, high = (of("p", "m", "g", "1", of_larger=True) if features.dropout else None for _ in range(2))
    bias = None if features.bias is None else _example_bias(size, features.bias)
    indices = Indices(of("p", "1", "1", "1"), of("p", "1", "g", "1"), of("m", "1", "1"), of("n"), low, high, bias)
    return [*indices.flatten(), *ScoreArguments.examples(features, of).flatten()]


def _example_bias(size: Size, dtype: torch.dtype) -> Tensor:
    """A view of a larger tensor, expanded ones, too: its strides are numbers of the call."""
    shape = example(size, *TILE, dtype=dtype).shape
    strides = (size(f"bias {name}", 1 << typical) for name, typical in zip(TILE, (21, 10, 20), strict=False))
    return torch.empty_strided(shape, (*strides, 1), dtype=dtype)


def _rebuilt(features: Features, tensors: tuple[Tensor, ...]) -> tuple[Indices, ScoreArguments]:
    rest = iter(tensors)
    return (
        Indices.unflatten(Indices.names(features.dropout, features.bias is not None), rest),
        ScoreArguments.unflatten(ScoreArguments.names(features), rest),
    )


def _softmax_kernel(features: Features) -> Compiled | None:
    def step(scores: Tensor, row_max: Tensor, row_sum: Tensor, accumulator: Tensor, *tensors: Tensor) -> None:
        indices, arguments = _rebuilt(features, tensors)
        steps.softmax_step(scores, row_max, row_sum, accumulator, indices, arguments.program(), features.masked)

    def examples(size: Size) -> list[Tensor]:
        scores = example(size, *TILE, dtype=features.product_dtype)
        rest = [example(size, *shape, dtype=features.dtype) for shape in (ROWS, ROWS, ("p", "m", "g", "d"))]
        return [scores, *rest, *_examples(size, features)]

    # The row's maximum and its sum are two loops: a capped score is kept between them, and not made twice.
    keep = {"realize_opcount_threshold": current().tiled.softcap_kept_operations}
    kept = keep if features.softcap and not features.masked else {}
    return compiled_steps.compiled(
        ("softmax", features), compiled_steps.writing(step), examples, f"a forward step ({features.words})", **kept
    )


def _gradient_kernel(features: Features) -> Compiled | None:
    def step(scores: Tensor, dprobs: Tensor, lse: Tensor, delta: Tensor, *tensors: Tensor) -> None:
        dscores, tensors = (tensors[0], tensors[1:]) if features.bias_gradient else (None, tensors)
        indices, arguments = _rebuilt(features, tensors)
        keep = 1.0 if arguments.keep_probability is None else arguments.keep_probability
        steps.gradient_step(scores, dprobs, lse, delta, indices, arguments.program(), features.masked, keep, dscores)

    def examples(size: Size) -> list[Tensor]:
        tiles = [example(size, *TILE, dtype=features.product_dtype) for _ in range(2)]
        rows = [example(size, *ROWS, dtype=features.dtype, of_larger=True) for _ in range(2)]
        wanted = [example(size, *TILE, dtype=features.dtype)] if features.bias_gradient else []
        return [*tiles, *rows, *wanted, *_examples(size, features)]

    # All in one loop: nothing needs to be kept.
    kept = {"realize_opcount_threshold": current().tiled.backward_kept_operations}
    return compiled_steps.compiled(
        ("gradient", features), compiled_steps.writing(step), examples, f"a backward step ({features.words})", **kept
    )
