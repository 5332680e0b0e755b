"""The fused engine's graphs, traced and lowered as the engine does it, and their kernels compiled for sm_75."""

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget

from compiled_fa.engines.fused import pages, tables
from compiled_fa.engines.fused.kernels import Compilable
from compiled_fa.inductor import graphs
from tools.offline import fake_t4
from tools.offline.compile import Compiled, KernelSource, compile_source

# Inductor's pattern matcher and constant folding run on real tensors of the device.
CONFIG: dict[str, Any] = {
    "force_disable_caches": True,
    "compile_threads": 1,
    "pattern_matcher": False,
    "joint_graph_constant_folding": False,
}

ATTENTION = "triton_tem"  # how Inductor names a template's kernels


class _Unlaunched:
    """In place of a compiled kernel in the wrapper code that Inductor generates."""

    def run(self, *args: object, **kwargs: object) -> None: ...


class Written:
    """What Inductor writes for a T4 meanwhile: kernels by name, and wrapper code. For a process of its own."""

    def __init__(self) -> None:
        fake_t4.install()
        self.kernels: dict[str, str] = {}
        self.wrapper = ""

    def __enter__(self) -> "Written":
        import torch._inductor.async_compile as async_compile
        from torch._inductor.graph import GraphLowering

        def triton(_: object, name: str, source: str, device_str: str = "cuda") -> _Unlaunched:
            self.kernels[name] = source
            return _Unlaunched()

        def keep(code: str) -> None:
            self.wrapper += code

        self._patches = (
            mock.patch.object(async_compile.AsyncCompile, "triton", triton),
            mock.patch.object(GraphLowering, "save_output_code", keep),
        )
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self._patches:
            patch.stop()

    @property
    def launches(self) -> list[str]:
        """Names of kernels, in the order of launches."""
        return re.findall(r"^\s*(\w+)\.run\(", self.wrapper, re.MULTILINE)


def written(function: Callable[..., Any], example_inputs: Callable[[graphs.Size], Any]) -> Written:
    """What Inductor writes for a function."""
    with Written() as found:
        graphs.compile_graph(function, example_inputs, dict(CONFIG))
    return found


def written_for(spec: Compilable) -> Written:
    """What Inductor writes for a call of this spec. Call it in a process of its own."""
    return written(spec.function, lambda size: spec.example_inputs("cuda", size))


def launches_of_call(spec: Compilable) -> list[str]:
    """The kernels that a call of this spec launches, in order. Call it in a process of its own."""
    return written_for(spec).launches


def launches_of_tables(shape: tables.Shape | pages.Shape) -> list[str]:
    """The kernels that make tables, in order. Call it in a process of its own."""
    return written(shape.function, lambda size: shape.example_inputs("cuda", size)).launches


def capture(spec: Compilable) -> KernelSource:
    """The attention kernel that Inductor writes for this spec on a T4. Call it in a process of its own."""
    found = written_for(spec).kernels
    # With dropout, forward has a second pass, whose kernel is the shorter one.
    templates = [KernelSource(name, text) for name, text in found.items() if name.startswith(ATTENTION)]
    return max(templates, key=lambda kernel: len(kernel.text))


def compile_spec(spec: Compilable, *, turing: bool, capability: tuple[int, int] = (7, 5)) -> Compiled:
    """The attention kernel of a spec, by stock Triton or with the project's stage; see capture().

    capability: of a newer GPU, for which a spec's options are; what Inductor writes is the same.
    """
    major, minor = capability
    return compile_source(capture(spec), turing=turing, target=GPUTarget("cuda", 10 * major + minor, 32))


def written_for_layers(
    layers: int, lengths: int, packed: bool, dynamic: bool = False, dropout: bool = False, **options: Any
) -> Written:
    """What Inductor writes for a training step of attention layers after each other, as under torch.compile: their ops,
    traced and decomposed. Autograd needs a CUDA build, so its calls are written out here.

    lengths: of sequences, and rows in all where they are packed. dynamic: rows are a symbol. options: the op's. For a
    process of its own.
    """
    fake_t4.install()
    import torch
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    import compiled_fa  # noqa: F401 - its ops
    from compiled_fa.inductor import lowering

    heads, head_dim = 4, 64
    ours = torch.ops.compiled_fa
    lowering.tell_inductor()
    forward, backward = (
        (ours.varlen_attention, ours.varlen_attention_backward) if packed else (ours.attention, ours.attention_backward)
    )

    def step(
        x: torch.Tensor, gradient: torch.Tensor, seed: torch.Tensor, *sums: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        if dropout:
            options.update(dropout_p=0.1, dropout_seed=seed)
        packing = (sums[0], sums[0], lengths, lengths) if packed else ()
        saved = []
        for _ in range(layers):
            q, k, v = x * 2.0, x * 3.0, x * 5.0
            out, lse = forward(q, k, v, *packing, **options)
            saved.append((out, lse, q, k, v))
            x = x + out
        for out, lse, q, k, v in reversed(saved):
            dq, dk, dv = backward(gradient, None, out, lse, q, k, v, *packing, **options)
            gradient = gradient + dq + dk + dv
        return x, gradient

    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    with mode:
        rows = graphs.symbolic_sizes(mode)("rows", lengths) if dynamic else lengths
        shape = (rows, heads, head_dim) if packed else (2, rows, heads, head_dim)
        x, gradient = (torch.empty(shape, dtype=torch.float16, device="cuda") for _ in range(2))
        sums = [torch.empty(3, dtype=torch.int32, device="cuda")] if packed else []
        seed = torch.empty(1, dtype=torch.int64, device="cuda")
        graph = make_fx(step, decomposition_table=select_decomp_table())(x, gradient, seed, *sums)
    with (
        Written() as found,
        torch._inductor.config.patch(CONFIG),
        torch._guards.tracing(torch._guards.TracingContext(mode)),
    ):
        from torch._functorch.compile_utils import fx_graph_cse

        graph = torch.fx.GraphModule(graph, fx_graph_cse(graph.graph))  # as AOTAutograd does
        compile_fx_inner(graph, [x, gradient, seed, *sums])
    return found
