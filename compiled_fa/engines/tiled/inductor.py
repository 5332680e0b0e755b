"""Steps compiled by Inductor, and what happens where they cannot be.

A step runs thousands of times a call, so the guards of a torch.compile'd function (20 µs) would cost more than small
tiles do; and its graphs would count against the recompile limits of the model that calls us. So a step is traced once
with symbolic shapes and handed to Inductor itself: one piece of machine code for all shapes and all numbers (scale,
softcap, window, ... travel as tensors), called without guards.

Private API: torch._inductor.compile_fx.compile_fx_inner and what it needs. Tried with torch 2.13.0. Where it is missing
or fails, where there is no C++ compiler, and with COMPILED_FA_COMPILE=0, steps run eagerly, and a warning says so once.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("compiled_fa")

Step = Callable[..., None]

# A traced size is a symbol of its own only where no other size has the same value, and none is 0 or 1.
# Inductor takes them for typical: small leading ones make it spread rows over threads, not pairs of heads.
_PAIRS, _HEADS, _QUERIES, _KEYS, _HEAD_DIM, _BATCH, _NHEADS = 4, 3, 509, 521, 67, 5, 7

_OPTIONS: dict[str, Any] = {
    "cpp.dynamic_threads": True,  # as many threads as torch.set_num_threads says when called
    "cpp.threads": 64,  # so that enough loops are made parallel for any machine
}

_compiled: dict[object, Callable[[list[Tensor]], object] | None] = {}
_lock = threading.Lock()
_said: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        log.warning("compiled_fa: %s", message)


def why_not() -> str | None:
    """Why steps run eagerly; None: they are compiled."""
    if os.environ.get("COMPILED_FA_COMPILE", "1") == "0":
        return "COMPILED_FA_COMPILE=0: the tiled engine runs its steps eagerly, several times slower"
    if compiler() is None:
        return "no C++ compiler (set CXX, or install g++ or clang++): the tiled engine runs its steps eagerly, slower"
    return None


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that Inductor would use, as the path or name it knows it by."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return None


def example(*shape: str, dtype: torch.dtype) -> Tensor:
    """A tensor to trace with: dimensions named p, g, m, n, d, batch, nheads, or none."""
    sizes = {"p": _PAIRS, "g": _HEADS, "m": _QUERIES, "n": _KEYS, "d": _HEAD_DIM, "batch": _BATCH, "nheads": _NHEADS}
    return torch.zeros([sizes.get(name) or int(name) for name in shape], dtype=dtype)


def compiled(
    key: object, step: Step, examples: Callable[[], Sequence[Tensor]]
) -> Callable[[list[Tensor]], object] | None:
    """`step`, which writes into its arguments and returns nothing, as machine code for a list of tensors; or None.

    key: names the step in the process's cache. examples: makes tensors to trace with.
    """
    if reason := why_not():
        _say_once(reason)
        return None
    with _lock:
        if key not in _compiled:
            try:
                # A thread of its own: the caller's may be inside someone's tracing or dispatch modes.
                with ThreadPoolExecutor(1) as pool:
                    _compiled[key] = pool.submit(_compile, step, examples()).result()
            except Exception as error:
                _say_once(f"Inductor could not compile a step ({type(error).__name__}: {error}); it runs eagerly")
                _compiled[key] = None
        return _compiled[key]


def _compile(step: Step, examples: Sequence[Tensor]) -> Callable[[list[Tensor]], object]:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.func import functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    def returns_nothing(*tensors: Tensor) -> tuple[()]:
        step(*tensors)
        return ()

    with torch.inference_mode(False), torch.no_grad(), config.patch(_OPTIONS):
        graph = make_fx(
            functionalize(returns_nothing, remove="mutations_and_views"),
            decomposition_table=select_decomp_table(),
            tracing_mode="symbolic",
        )(*examples)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        with torch._guards.tracing(torch._guards.TracingContext(inputs[0].fake_mode)):
            artifact: Any = compile_fx_inner(graph, inputs)
    call: Callable[[list[Tensor]], object] = artifact.current_callable
    return call
