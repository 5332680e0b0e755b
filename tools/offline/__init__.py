"""Compiles kernels for a Tesla T4 (sm_75) on a machine without a GPU, and reads their machine code.

    from tools.offline import Kernel, compile_spec, in_own_process

    ours = in_own_process(compile_spec, Kernel("forward", 64, "causal").spec, turing=True)
    print(ours.hmma, ours.spills, ours.registers, ours.shared)

`compile_spec` compiles a kernel of the fused engine, `compile_jit` a plain @triton.jit function. Nothing is ever
launched.
"""

from tools.offline.compile import Compiled, KernelSource, compile_jit, compile_source
from tools.offline.engine import capture, compile_spec
from tools.offline.engine_kernels import Kernel
from tools.offline.process import in_own_process

__all__ = [
    "Compiled",
    "Kernel",
    "KernelSource",
    "capture",
    "compile_jit",
    "compile_source",
    "compile_spec",
    "in_own_process",
]
