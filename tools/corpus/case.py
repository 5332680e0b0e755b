"""What a case of the corpus is: kernels as somebody launches them, inputs of two sizes, and what is to come out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Sizes = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """Kernels as their wrapper launches them.

    call: launches them with the inputs by name, and the tiles; returns their result
    inputs: makes the inputs of some sizes; random numbers are torch's
    reference: the same result by PyTorch's ops in a dtype, of the inputs by name
    dtype: in which the reference is naive; its error against float64 is the measure of the kernels'
    tensor_cores: the instructions that its dots should become: "hmma", "imma", both, or none
    small, full: sizes for inputs to be executed, and to be compiled for; of full ones nothing is computed
    small_tiles, full_tiles: what the wrapper is given besides: tiles, num_warps, num_stages
    """

    name: str
    call: Callable[..., Tensor]
    inputs: Callable[..., Inputs]
    reference: Callable[..., Tensor]
    small: Sizes
    small_tiles: Sizes
    full: Sizes
    full_tiles: Sizes
    tensor_cores: frozenset[str] = frozenset({"hmma"})
    dtype: torch.dtype = torch.float16

    def make(self, *, full: bool) -> Inputs:
        """The inputs; those of the same size are always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.inputs(**(self.full if full else self.small))

    def launch(self, inputs: Inputs, *, full: bool) -> Tensor:
        return self.call(**inputs, **(self.full_tiles if full else self.small_tiles))

    def wanted(self, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        return self.reference(dtype, **inputs)


def halves(*shape: int) -> Tensor:
    """fp16 numbers with a variance of 1."""
    return torch.randn(shape).half()


def small_integers(*shape: int) -> Tensor:
    """int8, about as many of each."""
    return torch.randint(-127, 128, shape, dtype=torch.int8)
