"""The kernels that a program launches, told by a run of it on a CPU: nothing is compiled on the way, or launched.

The program believes in a Tesla T4 (fake_t4.py); tensors on "cuda" are on the CPU, and say that they are not. Triton
asks its `jit_cache_hook` before it compiles a kernel: that notes what was asked for, and says that there is nothing to
do. So outputs are never written, and of an autotuned kernel every configuration is seen. Changes the process that it is
used in. in_place_of_launches() is for functions that are called in this one.
"""

import contextlib
import dataclasses
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.compiler import ASTSource

from tools.offline import fake_t4
from tools.offline.driver import Driver

OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion", "launch_cooperative_grid")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel for arguments of one kind: what is compiled once, however often it is launched."""

    name: str
    source: ASTSource
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    @classmethod
    def asked_for(cls, function: Any, compile: Mapping[str, Any]) -> "Launch":
        """As Triton tells its jit_cache_hook, which is asked before a kernel is compiled."""
        constants = {function.arg_names[path[0]]: v for path, v in compile["constants"].items() if len(path) == 1}
        source = function.ASTSource(function, compile["signature"], compile["constants"], compile["configs"][0])
        options = {name: compile[name] for name in OPTIONS if name in compile}
        return cls(function.__name__, source, constants, options)


class CudaOnCpu(TorchFunctionMode):
    """Tensors that are asked for on "cuda" are made on the CPU; all say that they are on CUDA."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensor: Any = torch.Tensor
        if func == tensor.device.__get__:
            return torch.device("cuda", 0)
        if func == tensor.is_cuda.__get__:
            return True
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func in (tensor.cuda, tensor.pin_memory):
            return args[0]
        named = {name: _on_cpu(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if type(named.get("device")) is int:
            named["device"] = "cpu"
        return func(*map(_on_cpu, args), **named)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


def launches_of(script: Path, arguments: Sequence[str]) -> tuple[list[Launch], BaseException | None]:
    """Runs a script as `python script arguments` does, to its end or its error, which is returned."""
    found: dict[str, Launch] = {}

    def note(*, key: str, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        found.setdefault(f"{fn.module}.{fn.name} {key}", Launch.asked_for(fn.jit_function, compile))
        return True

    fake_t4.install()
    runtime: Any = knobs.runtime
    path, argv, hook = sys.path[:], sys.argv, runtime.jit_cache_hook
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    runtime.jit_cache_hook = note
    error: BaseException | None = None
    try:
        with CudaOnCpu():
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as exit_:
        error = exit_ if exit_.code else None
    except Exception as raised:  # of any type: outputs are never written, so that a program's own checks fail
        error = raised
    finally:
        runtime.jit_cache_hook, sys.argv, sys.path[:] = hook, argv, path
    return list(found.values()), error


Grid = tuple[int, ...]
Instead = Callable[[Launch, Grid, Mapping[str, Any]], None]  # arguments: those that are not constant, by name


@contextlib.contextmanager
def in_place_of_launches(do: Instead) -> Iterator[None]:
    """Launches of @triton.jit functions on tensors of the CPU call do() instead, as on a Tesla T4, in this process."""
    original = triton.JITFunction.run
    runtime: Any = knobs.runtime

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        asked: list[Launch] = []

        def note(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
            asked.append(Launch.asked_for(fn.jit_function, compile))
            return True

        with mock.patch.object(runtime, "jit_cache_hook", note):
            original(self, *args, grid=grid, warmup=True, **kwargs)
        bound = self.signature.bind(*args, **{name: value for name, value in kwargs.items() if name in self.arg_names})
        bound.apply_defaults()
        (launch,) = asked
        constant = {name for name, kind in launch.source.signature.items() if kind == "constexpr"}
        arguments = {name: value for name, value in bound.arguments.items() if name not in constant}
        do(launch, tuple(grid(dict(bound.arguments)) if callable(grid) else grid), arguments)

    with (
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(triton.runtime.driver, "_active", Driver()),
    ):
        yield
