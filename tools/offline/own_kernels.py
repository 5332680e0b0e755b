"""The triton engine's kernels by name, compiled for sm_75, or another GPU, as a launch of them would be.

compiled = compile_launch(launch_of("forward", 64, "dropout"))
print(compiled.hmma, compiled.spills, compiled.registers, compiled.shared)
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compiled_fa.engines import nvidia
from compiled_fa.engines.triton import attention, launching
from compiled_fa.engines.triton.launching import FORWARD, KEYS, QUERIES, Launch
from compiled_fa.problem import Packed, Problem
from compiled_fa.tuning import TileOptions
from tools.offline.compile import TARGET, Compiled, compile_ast

KERNELS = {"forward": FORWARD, "queries": QUERIES, "keys": KEYS}
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
HEADS, HEADS_K = 8, 2

# The terms of a call, by name: a window is no part of a kernel, and lengths and heads are not either.
TERMS: dict[str, dict[str, Any]] = {
    "causal": {},
    "dropout": {"dropout_p": 0.1, "dropout_seed": torch.zeros(1, dtype=torch.int64)},
    "softcap": {"softcap": 30.0},
}
TERMS["all"] = {**TERMS["dropout"], **TERMS["softcap"], "alibi_slopes": torch.zeros(HEADS)}


@contextlib.contextmanager
def noted(capability: tuple[int, int] = nvidia.TURING) -> Iterator[list[Launch]]:
    """What calls launch meanwhile, of tensors on the CPU, for a GPU of this capability: noted in place of launched."""
    launches: list[Launch] = []

    def note(launch: Launch) -> list[Tensor]:
        launches.append(launch)
        return [launch.arguments[name] for name in launch.kernel.written]

    with (
        mock.patch.object(nvidia, "capability_of", return_value=capability),
        mock.patch.object(nvidia, "prepare"),
        mock.patch.object(launching, "run", note),
    ):
        yield launches


def launch_of(
    kernel: str,
    head_dim: int,
    terms: str = "causal",
    options: TileOptions | None = None,
    *,
    packed: bool = True,
    dtype: torch.dtype = torch.float16,
    capability: tuple[int, int] = nvidia.TURING,
) -> Launch:
    """kernel: of KERNELS. terms: of TERMS. options: those of the engine's table if None."""
    rows = (300,) if packed else (2, 150)
    q, dout = (torch.empty(*rows, HEADS, head_dim, dtype=dtype) for _ in range(2))
    k, v = (torch.empty(*rows, HEADS_K, head_dim, dtype=dtype) for _ in range(2))
    sums = torch.tensor([0, 100, 300], dtype=torch.int32)
    where = Packed(sums, sums.clone(), 200, 200) if packed else None
    problem = dataclasses.replace(Problem.of(q, k, v, where, causal=True), **TERMS[terms])
    with noted(capability) as launches:
        out, lse = attention.forward(problem)
        attention.backward(problem, dout, out, lse)
    found = next(launch for launch in launches if launch.kernel is KERNELS[kernel])
    if options is None:
        return found
    block_m, block_n, num_warps, num_stages = options
    constants = {**found.constants, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return dataclasses.replace(found, constants=constants, num_warps=num_warps, num_stages=num_stages)


def compile_launch(launch: Launch, *, turing: bool = True, capability: tuple[int, int] = nvidia.TURING) -> Compiled:
    """As Triton specialises a kernel for such arguments. turing: with the project's stage; False for stock Triton."""
    constants, types = dict(launch.constants), {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for at, parameter in enumerate(launch.function.params):
        name = parameter.name
        if name not in constants and launch.arguments[name] is None:
            constants[name] = None
        if name in constants:
            types[name] = "constexpr"
            continue
        value = launch.arguments[name]
        types[name] = _type(value)
        if _is_divisible(value) and not parameter.do_not_specialize:
            attributes[(at,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.function, types, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    major, minor = capability
    target = TARGET if capability == nvidia.TURING else GPUTarget("cuda", 10 * major + minor, 32)
    return compile_ast(source, turing, options, target)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{DTYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def parameters(launch: Launch) -> Mapping[str, Any]:
    """The arguments that the compiled kernel takes, in order."""
    names = [parameter.name for parameter in launch.function.params]
    return {name: launch.arguments[name] for name in names if launch.arguments.get(name) is not None}
