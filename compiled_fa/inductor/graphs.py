"""Inductor without torch.compile around it: graphs traced by make_fx, compiled, and called without guards.

What engines compile runs inside an op, thousands of times a call or under a model that is itself compiled: the guards
of a torch.compile'd function (20 µs) would cost more than small tiles do, and its graphs would count against the
recompile limits of the model that calls us. So a graph is traced once with symbolic sizes and handed to Inductor
itself.

Private API: torch._inductor.compile_fx.compile_fx_inner and what it needs (its argument cpp_wrapper, too, without which
Inductor's config of that name does nothing here); its check for bfloat16; torch._inductor.cpp_builder.get_cpp_compiler;
PythonWrapperCodegen.bind_input_symbol; FakeTensor and statically_known_true; _disable_current_modes; the counters of
torch._dynamo.utils, without which nobody is told why they wait for less than two seconds. Tried with torch 2.11.0,
2.13.0 and 2.15.0. Of CPython: the name of the file that imports modules.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..messages import result_of

Result = TypeVar("Result")
Compiled = Callable[[list[Tensor]], Any]
Size = Callable[[str, int], Any]  # (name, typical value) -> a symbolic size, the same one for the same name

# Inductor compiles one graph at a time: in two threads at once it fails, and FX has one flag for all threads that says
# whether somebody traces. Threads whose code is compiled already (caches.py) wait for nobody.
_lock = threading.Lock()

# The thread that compiles: the caller's may be inside someone's tracing or dispatch modes. One for all graphs: of torch
# 2.11 with CUDA, on a machine without, fake tensors in a second one are a crash.
_NAME = "compiled_fa compiles"
_worker = ThreadPoolExecutor(1, _NAME)

_IMPORTING = "<frozen importlib._bootstrap>"  # the file of the functions that wait for a module's code


def _start_anew() -> None:
    global _worker
    _worker = ThreadPoolExecutor(1, _NAME)


if hasattr(os, "register_at_fork"):  # a child does not have the thread
    os.register_at_fork(after_in_child=_start_anew)


@functools.cache
def compiler() -> str | None:
    """The C++ compiler that Inductor would use, as the path or name it knows it by."""
    from torch._inductor import exc
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return None


def compiled_graph(
    function: Callable[..., Any],
    example_inputs: Callable[[Size], Sequence[Tensor]],
    what: str,
    decompositions: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
    **config: Any,
) -> Compiled:
    """`function` as machine code for a list of tensors, compiled now or found on disk; callers keep it (caches.py).

    example_inputs: makes fake tensors of symbolic sizes. what: its name, for people who wait. decompositions: of
    operators, besides Inductor's own. config: Inductor's.
    """
    if _must_not_wait():
        return traced_apart(compile_graph, function, example_inputs, config, decompositions)
    misses = _cache_misses()
    compilation = _worker.submit(compile_graph, function, example_inputs, config, decompositions)
    return result_of(compilation, what, lambda: _cache_misses() != misses)


def traced_apart(function: Callable[..., Result], *arguments: Any) -> Result:
    """function(*arguments), which traces: no part of what this thread may be tracing."""
    if _must_not_wait():
        with _disable_current_modes():
            return function(*arguments)
    return _worker.submit(function, *arguments).result()


def _must_not_wait() -> bool:
    """Is this the thread that compiles, or one that imports a module, for which that one would wait?

    To pickle a memory format, as Inductor does for its cache, Python waits until all modules are imported whose import
    has begun.
    """
    if threading.current_thread().name.startswith(_NAME):
        return True
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != _IMPORTING:
        frame = frame.f_back
    return frame is not None


def is_traced(tensor: Tensor) -> bool:
    """Does a graph trace its operators? Then it has no values, and what is computed shall be part of that graph."""
    return type(tensor) is not Tensor and isinstance(tensor, _fake_tensor())


@functools.cache
def _fake_tensor() -> type:
    from torch._subclasses.fake_tensor import FakeTensor  # slow to import

    return FakeTensor


def is_known(condition: bool | torch.SymBool) -> bool:
    """Is it true of all sizes that a graph is traced for? To ask makes it a graph for no fewer sizes."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _cache_misses() -> int:
    """How many graphs Inductor has not found in its cache on disk. It counts one before it compiles it."""
    counters = getattr(sys.modules.get("torch._dynamo.utils"), "counters", None)
    return 0 if counters is None else int(counters["inductor"]["fxgraph_cache_miss"])


def compile_graph(
    function: Callable[..., Any],
    example_inputs: Callable[[Size], Sequence[Tensor]],
    config: dict[str, Any],
    decompositions: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
) -> Compiled:
    """`compiled_graph` in this thread, and without a word to people who wait."""
    import torch._inductor.config as inductor_config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    if _asserts_name_sizes():
        config = {**config, "size_asserts": True}
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with _lock, torch.inference_mode(False), torch.no_grad(), inductor_config.patch(config):
        with mode:
            inputs = list(example_inputs(symbolic_sizes(mode)))
            traced = make_fx(function, decomposition_table={**select_decomp_table(), **decompositions})(*inputs)
        with torch._guards.tracing(torch._guards.TracingContext(mode)), _bfloat16_allowed():
            artifact: Any = compile_fx_inner(traced, inputs, cpp_wrapper=config.get("cpp_wrapper", False))
    call: Compiled = artifact.current_callable
    return call


def _asserts_name_sizes() -> bool:
    """Does Inductor, as of torch 2.14, name the symbols of inputs' sizes only where it asserts them?"""
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen

    return hasattr(PythonWrapperCodegen, "bind_input_symbol")


@contextlib.contextmanager
def _bfloat16_allowed() -> Iterator[None]:
    """Inductor gives up on bfloat16 below sm_80, because it is slow there. Triton compiles it, by way of fp32."""
    import torch._inductor.compile_fx as compile_fx

    check = compile_fx._check_triton_bf16_support
    compile_fx._check_triton_bf16_support = lambda graph: None
    try:
        yield
    finally:
        compile_fx._check_triton_bf16_support = check


def symbolic_sizes(mode: Any) -> Size:
    """Symbols of a fake mode with a ShapeEnv, by name. Their typical values steer Inductor's choices, and bind
    nothing."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    symbols: dict[str, Any] = {}

    def size(name: str, typical: int) -> Any:
        if name not in symbols:
            source = ConstantSource(name)
            symbol = mode.shape_env.create_symbol(typical, source, DimDynamic.DYNAMIC, constraint_dim=None)
            symbols[name] = mode.shape_env.create_symintnode(symbol, hint=typical, source=source)
        return symbols[name]

    return size
