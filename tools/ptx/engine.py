"""Runs the fused engine on the CPU as a T4 would: the code that Inductor writes for it, kernels as sm_75 PTX.

    with engine_on_ptx() as launches:
        out, lse = fused.forward(problem)  # tensors on the CPU
    print(launches[-1].kernel.name, launches[-1].counters.global_bytes)

All of the engine is its own: layouts, block tables, specs with Turing's options. Only `kernels.run` is replaced: its
graph is compiled for a T4 in a process that believes in one, and the wrapper that Inductor generated, which allocates
buffers and launches kernels, is executed here with launches that go to the interpreter.

Private API: what that wrapper uses of PyTorch. Tried with torch 2.13.0.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import multiprocessing
import pathlib
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from compiled_fa.engines.fused import attention, kernels
from compiled_fa.engines.fused.options import options_for
from compiled_fa.engines.nvidia import TURING
from compiled_fa.problem import Problem

from .counters import Counters
from .run import launch
from .tensors import as_argument

# Of the small kernels around the template's, for which a GPU's tiles are chosen by trial.
TILES = {"XBLOCK": 64, "YBLOCK": 8, "R0_BLOCK": 8}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a graph. arguments: what the wrapper passes, in order; the compiler may have made some constant."""

    name: str
    ptx: str
    num_warps: int
    shared_bytes: int
    arguments: tuple[str, ...]
    constant: frozenset[str]
    last_block_first: bool = False

    @property
    def is_attention(self) -> bool:
        """The template's, not one of the small ones around it."""
        return self.name.startswith("triton_tem")

    def launch(self, values: Sequence[Any]) -> Counters:
        """Executes the kernel with the wrapper's arguments; tensors are updated in place."""
        count = len(self.arguments)
        named = dict(zip(self.arguments, values[:count], strict=True))
        # A template is followed by its grid; of the others, Inductor derives it from sizes and tiles.
        grid = values[count:] if self.is_attention else [_tiles(named, axis) for axis in "xyz"]
        passed = {name: as_argument(value) for name, value in named.items() if name not in self.constant}
        blocks = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(grid)))]
        if self.last_block_first:
            blocks.reverse()
        return launch(self.ptx, grid, passed, shared_bytes=self.shared_bytes, num_warps=self.num_warps, blocks=blocks)


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch that has been: values are the wrapper's arguments, their tensors as the graph left them."""

    kernel: Kernel
    values: tuple[Any, ...]
    counters: Counters


@dataclasses.dataclass(frozen=True)
class Graph:
    """A compiled graph: its kernels by name, and the text of the module whose `call` launches them."""

    kernels: dict[str, Kernel]
    wrapper: str

    def run(self, inputs: Sequence[Tensor], launches: list[Launch]) -> tuple[Tensor, ...]:
        """Executes the wrapper on tensors of the CPU; adds to `launches`."""

        def find(_: Any, name: str, *__: Any, **___: Any) -> Any:
            def run(*values: Any, stream: int) -> None:
                launches.append(Launch(self.kernels[name], values, self.kernels[name].launch(values)))

            return types.SimpleNamespace(run=run)

        from torch._inductor.async_compile import AsyncCompile

        module: dict[str, Any] = {"__name__": "wrapper"}
        with (
            mock.patch.object(AsyncCompile, "triton", find),
            mock.patch.object(AsyncCompile, "wait"),
            mock.patch.object(torch._C, "_cuda_getCurrentRawStream", create=True, return_value=0),
        ):
            exec(compile(self.wrapper, "<Inductor's wrapper>", "exec"), module)
        device = types.SimpleNamespace(_DeviceGuard=contextlib.nullcontext, set_device=lambda _: None)
        module["torch"] = types.SimpleNamespace(**{**vars(torch), "cuda": device})
        module["empty_strided_cuda"] = _unwritten
        return tuple(module["call"](list(inputs)))


@contextlib.contextmanager
def engine_on_ptx(*, turing: bool = True, edit: Callable[[Kernel], Kernel] | None = None) -> Iterator[list[Launch]]:
    """Calls of the fused engine on tensors of the CPU execute PTX; yields the launches, in order.

    turing: with the project's stage; False for the same kernels as stock Triton compiles them, without tensor cores.
    edit: changes kernels before they run, to plant a fault.
    """
    launches: list[Launch] = []

    def run(spec: kernels.Compilable, given: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        graph = compile_graph(with_turing_options(spec), turing)
        if edit is not None:
            graph = dataclasses.replace(graph, kernels={name: edit(kernel) for name, kernel in graph.kernels.items()})
        return graph.run([given[name] for name in spec.names], launches)

    with mock.patch.object(kernels, "run", run):
        yield launches


def measure(head_dim: int, seqlen: int) -> dict[str, Counters]:
    """What the attention kernels of one causal fp16 head do, forward and backward: for tables of measured traffic."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, seqlen, 1, head_dim, generator=generator).half() for _ in range(4))
    problem = Problem.of(q, k, v, None, causal=True)
    with engine_on_ptx() as launches:
        out, lse = attention.forward(problem)
        attention.backward(problem, dout, out, lse)
    forward, backward = (launch.counters for launch in launches if launch.kernel.is_attention)
    return {"forward": forward, "backward": backward}


def with_turing_options(spec: kernels.Compilable) -> kernels.Compilable:
    """A spec made on the CPU, with the options that it has on a T4. Those of keys in pages have them."""
    if not isinstance(spec, kernels.Spec):
        return spec
    head_dim = max(spec.head_dim, spec.head_dim_v)
    options = options_for(spec.direction, head_dim, spec.dtype, spec.features, TURING)
    return dataclasses.replace(spec, options=options)


@functools.cache
def compile_graph(spec: kernels.Compilable, turing: bool = True) -> Graph:
    """A spec's graph as it is compiled on a T4."""
    return _compiler().submit(_compile_here, spec, turing).result()


@functools.cache
def _compiler() -> concurrent.futures.Executor:
    """A process that believes in a T4, which cannot be undone in this one."""
    executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    atexit.register(executor.shutdown)
    return executor


def _compile_here(spec: kernels.Compilable, turing: bool) -> Graph:
    from tools.offline.engine import written_for

    found = written_for(spec)
    return Graph({name: _compile_kernel(name, text, turing) for name, text in found.kernels.items()}, found.wrapper)


def _compile_kernel(name: str, source: str, turing: bool) -> Kernel:
    from tools.offline import KernelSource, compile_jit, compile_source

    function, meta = _load(name, source)
    signature, constants = meta["signature"], meta["constants"]
    tiles = {tile: size for tile, size in TILES.items() if tile in signature}
    if name.startswith("triton_tem"):
        compiled = compile_source(KernelSource(name, source), turing=turing)
    else:
        passed = {argument: kind for argument, kind in signature.items() if kind != "constexpr"}
        compiled = compile_jit(function, passed, {**constants, **tiles}, turing=turing)
    arguments = tuple(argument for argument in signature if argument not in tiles)
    constant = frozenset(argument for argument in arguments if signature[argument] == "constexpr")
    return Kernel(name, compiled.ptx, compiled.num_warps, compiled.shared, arguments, constant)


def _load(name: str, source: str) -> tuple[Any, dict[str, Any]]:
    """The @triton.jit function of a module that Inductor wrote, and its `triton_meta`."""
    from torch._inductor.runtime import triton_heuristics

    caught: list[tuple[Any, dict[str, Any]]] = []

    def decorator(*, triton_meta: dict[str, Any], **_: Any) -> Callable[[Any], Any]:
        return lambda function: caught.append((function, triton_meta))

    kinds = ("template", "pointwise", "reduction", "persistent_reduction")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as patches:
        for kind in kinds:
            patches.enter_context(mock.patch.object(triton_heuristics, kind, decorator))
        path = pathlib.Path(folder, f"{name}.py")
        path.write_text(source)
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        specification.loader.exec_module(importlib.util.module_from_spec(specification))
        (pair,) = caught
        pair[0].src  # noqa: B018 - read before the file is gone
    return pair


def _tiles(sizes: dict[str, Any], axis: str) -> int:
    """Blocks along an axis of a kernel that is not a template's."""
    return -(-int(sizes.get(f"{axis}numel", 1)) // TILES.get(f"{axis.upper()}BLOCK", 1))


def _unwritten(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A buffer in which places that no kernel writes show."""
    buffer = torch.empty_strided(shape, stride, dtype=dtype)
    return buffer.fill_(np.nan) if dtype.is_floating_point else buffer.fill_(-1)
