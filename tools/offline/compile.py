"""One Triton kernel to sm_75 machine code, by stock Triton or with the project's stage, and what is in it."""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import compiled_fa.turing

TARGET = GPUTarget("cuda", 75, 32)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel compiled for sm_75, or another GPU that was asked for."""

    name: str
    num_warps: int
    registers: int  # a thread
    shared: int  # bytes a block
    ttgir: str
    ptx: str
    sass: str  # with the encoding
    cubin: bytes

    def count(self, *opcodes: str) -> int:
        """How many instructions of the machine code have one of these opcodes, modifiers aside."""
        return len(re.findall(rf"(?<![\w.])(?:{'|'.join(opcodes)})(?=[\s.;])", self.sass))

    @functools.cached_property
    def hmma(self) -> int:
        """Tensor-core instructions on fp16."""
        return self.count("HMMA")

    @functools.cached_property
    def imma(self) -> int:
        """Tensor-core instructions on int8."""
        return self.count("IMMA")

    @functools.cached_property
    def ffma(self) -> int:
        return self.count("FFMA")

    @functools.cached_property
    def spills(self) -> int:
        """Loads and stores of local memory."""
        return self.count("LDL", "STL")

    @functools.cached_property
    def barriers(self) -> int:
        return self.count("BAR")


@dataclasses.dataclass(frozen=True)
class KernelSource:
    """A Triton kernel as Inductor writes it: a Python module with one decorated function."""

    name: str
    text: str


def compile_jit(
    function: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any] | None = None,
    *,
    turing: bool,
    divisible_by_16: tuple[str, ...] | None = None,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Compiled:
    """Compiles a @triton.jit function for sm_75.

    Args:
        signature: the type of each argument that is not constant, as Triton writes it: "*fp16", "i32"
        constants: the value of each tl.constexpr argument
        turing: with the project's stage; False for stock Triton
        divisible_by_16: arguments that may be taken as multiples of 16; None for all pointers, as PyTorch's are
    """
    constants = dict(constants or {})
    if divisible_by_16 is None:
        divisible_by_16 = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    source = ASTSource(
        fn=function,
        signature={**signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16},
    )
    return compile_ast(source, turing, {"num_warps": num_warps, "num_stages": num_stages})


def compile_source(source: KernelSource, *, turing: bool, target: GPUTarget = TARGET) -> Compiled:
    """Compiles a kernel that Inductor wrote, or took into its code from us, with the warps and stages that it wrote
    with it. target: a T4, or a newer GPU."""
    function, keywords = _load(source)
    meta = keywords["triton_meta"]
    ast = ASTSource(fn=function, signature=meta["signature"], constexprs=meta["constants"], attrs=meta["configs"][0])
    written = keywords if "num_warps" in keywords else keywords["configs"][0]
    options = {name: written[name] for name in ("num_warps", "num_stages")}
    return compile_ast(ast, turing, options, target)


@contextlib.contextmanager
def stage(turing: bool) -> Iterator[None]:
    """The project's stage enabled, or disabled, for a while."""
    was_enabled = compiled_fa.turing.is_enabled()
    switch = {True: compiled_fa.turing.enable, False: compiled_fa.turing.disable}
    switch[turing]()
    try:
        yield
    finally:
        switch[was_enabled]()


def compile_ast(source: ASTSource, turing: bool, options: Mapping[str, Any], target: GPUTarget = TARGET) -> Compiled:
    """options: num_warps, num_stages and what else Triton's compiler knows."""
    with stage(turing):
        binary = triton.compile(source, target=target, options=dict(options))
    cubin = binary.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _tool(knobs.nvidia.nvdisasm.path, "-hex", file.name)
    return Compiled(
        name=binary.metadata.name,
        num_warps=binary.metadata.num_warps,
        registers=int(re.findall(r"REG:(\d+)", usage)[0]),
        shared=binary.metadata.shared,
        ttgir=str(binary.asm["ttgir"]),
        ptx=binary.asm["ptx"],
        sass=sass,
        cubin=cubin,
    )


def _tool(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _load(source: KernelSource) -> tuple[Any, dict[str, Any]]:
    """The @triton.jit function of a module that Inductor wrote, and the keywords of its decorator."""
    from torch._inductor.runtime import triton_heuristics

    caught: list[tuple[Any, dict[str, Any]]] = []

    def template(**keywords: Any) -> Callable[[Any], Any]:
        return lambda function: caught.append((function, keywords))

    patches = (mock.patch.object(triton_heuristics, name, template) for name in ("template", "user_autotune"))
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        for patch in patches:
            stack.enter_context(patch)
        path = os.path.join(folder, f"{source.name}.py")
        with open(path, "w") as file:
            file.write(source.text)
        spec = importlib.util.spec_from_file_location(source.name, path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        (pair,) = caught
        pair[0].src  # noqa: B018 - read before the file is gone
    return pair
