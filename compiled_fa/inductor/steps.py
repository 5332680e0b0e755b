"""Steps of engines on a CPU, compiled by Inductor, and what happens where they cannot be.

One piece of machine code serves all shapes and all numbers: scale, softcap, window, ... travel as tensors. Where
Inductor fails or has no C++ compiler, and with COMPILED_FA_COMPILE=0, steps run eagerly, and a warning says so once.

Private API is in graphs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize

from .. import config
from ..caches import Cache
from ..messages import say_once
from . import graphs
from .fast_math import DECOMPOSITIONS
from .graphs import Compiled, Size

Step = Callable[..., None]
Function = Callable[..., tuple[Tensor, ...]]

# Typical sizes: small leading ones make Inductor spread rows over threads, not pairs of heads.
TYPICAL = {"p": 4, "m": 509, "g": 3, "n": 521, "d": 67, "batch": 5, "nheads": 7, "b": 6, "x": 83, "runs": 3, "s": 19}

_CONFIG: dict[str, Any] = {
    "cpp.dynamic_threads": True,  # as many threads as torch.set_num_threads says when called
    "cpp.threads": 64,  # so that enough loops are made parallel for any machine
}

STEPS: Cache[object, Compiled | None] = Cache("compiled steps", entries=512)  # None: Inductor failed


def eager_reason() -> str | None:
    """Why steps run eagerly on a CPU; None: they are compiled."""
    if not config.compiles_steps():
        return "COMPILED_FA_COMPILE=0: engines on a CPU run their steps eagerly, several times slower"
    if graphs.compiler() is None:
        return "no C++ compiler (set CXX, or install g++ or clang++): engines on a CPU run their steps eagerly, slower"
    return None


def example(size: Size, *shape: str, dtype: torch.dtype, of_larger: bool = False) -> Tensor:
    """A tensor to trace with: dimensions named as in TYPICAL, or "1".

    of_larger: contiguous but for the first stride, as rows of a larger buffer are. Such a tensor is for reading only:
    Inductor would write to another and copy.
    """
    sizes = [size(name, TYPICAL[name]) if name in TYPICAL else int(name) for name in shape]
    if not of_larger:
        return torch.empty(sizes, dtype=dtype)
    inner = torch.empty(sizes[1:], dtype=dtype)
    return torch.empty_strided(sizes, (size("stride of " + ", ".join(shape), 1 << 22), *inner.stride()), dtype=dtype)


def writing(step: Step) -> Function:
    """`step`, which writes into its arguments, as `compiled` takes it: Inductor wants these writes last, as copies."""

    def returns_nothing(*tensors: Tensor) -> tuple[()]:
        step(*tensors)
        return ()

    return functionalize(returns_nothing, remove="mutations_and_views")


def compiled(
    key: object, function: Function, examples: Callable[[Size], Sequence[Tensor]], what: str, **options: Any
) -> Compiled | None:
    """`function` as machine code for a list of tensors; None: there is none, and it runs eagerly.

    key: names it in the process's cache. examples: makes fake tensors to trace with. what: its name for people.
    options: Inductor's config for this function.
    """
    if reason := eager_reason():
        say_once(reason)
        return None

    def compile_it() -> Compiled | None:
        try:
            return graphs.compiled_graph(function, examples, what, DECOMPOSITIONS, **_CONFIG, **options)
        except Exception as error:
            say_once(f"Inductor could not compile a step ({type(error).__name__}: {error}); it runs eagerly")
            return None

    return STEPS.get(key, compile_it)
