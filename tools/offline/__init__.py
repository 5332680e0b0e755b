"""Compiles kernels for a Tesla T4 (sm_75) on a machine without a GPU, and reads their machine code.

    import functools
    from tools.offline import compile_graph, flex_graphs, in_own_process

    build = functools.partial(flex_graphs.forward, head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2)
    ours, = in_own_process(compile_graph, build, turing=True)
    print(ours.hmma, ours.spills, ours.registers, ours.shared)

`build` is any function that returns (function, inputs), called where tensors on "cuda" are fake: the function's graph
is what Inductor lowers. `compile_jit` does the same for a plain @triton.jit function. Nothing is ever launched.
"""

from tools.offline.compile import Compiled, KernelSource, compile_jit, compile_source
from tools.offline.graphs import capture, compile_graph
from tools.offline.process import in_own_process

__all__ = [
    "Compiled",
    "KernelSource",
    "capture",
    "compile_graph",
    "compile_jit",
    "compile_source",
    "in_own_process",
]
