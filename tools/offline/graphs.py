"""Inductor's Triton source for a graph of fake CUDA tensors, and the kernels it compiles to."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tools.offline import fake_t4
from tools.offline.compile import Compiled, KernelSource, compile_source

Graph = tuple[Callable[..., Any], Sequence[torch.Tensor]]


class _Unlaunched:
    """In place of a compiled kernel in the wrapper code that Inductor generates."""

    def run(self, *args: Any, **kwargs: Any) -> None: ...


def capture(build: Callable[[], Graph]) -> list[KernelSource]:
    """The template kernels (fused attention) that Inductor writes for a graph on a T4.

    `build` is called where torch.empty(..., device="cuda") makes a fake tensor; it returns a function and its inputs.
    Call it in a process of its own.
    """
    fake_t4.install()
    import torch._inductor.async_compile as async_compile
    import torch._inductor.compile_fx as compile_fx
    from torch._inductor import config
    from torch._subclasses.fake_tensor import FakeTensorMode

    sources: dict[str, str] = {}

    def triton(self: Any, name: str, source: str, device_str: str = "cuda") -> _Unlaunched:
        sources[name] = source
        return _Unlaunched()

    original = async_compile.AsyncCompile.triton
    async_compile.AsyncCompile.triton = triton  # type: ignore[method-assign, assignment]
    # Inductor's pattern matcher and constant folding run on real tensors of the device.
    settings = {
        "force_disable_caches": True,
        "compile_threads": 1,
        "pattern_matcher": False,
        "joint_graph_constant_folding": False,
    }
    try:
        with config.patch(settings), FakeTensorMode(allow_non_fake_inputs=True):
            function, inputs = build()
            compile_fx.compile_fx_inner(make_fx(function)(*inputs), list(inputs))
    finally:
        async_compile.AsyncCompile.triton = original  # type: ignore[method-assign]
    return [KernelSource(name, text) for name, text in sources.items() if name.startswith("triton_tem")]


def compile_graph(build: Callable[[], Graph], *, turing: bool) -> list[Compiled]:
    """The template kernels of a graph, compiled for sm_75; see capture()."""
    return [compile_source(source, turing=turing) for source in capture(build)]
