"""The compiler stage: Triton IR (TTIR) to layouts and pipelines (TTGIR), for Turing's tensor cores.

Since Triton 3.3 a dot below sm_80 becomes scalar FMAs. The lowering to Turing's mma.sync is still in the library; only
the pass that chooses it is gated. So the stage runs Triton's own Ampere pipeline, marks the MMA layouts that it chose
as Turing's (version 2.1 for 2.0), replaces asynchronous copies, and hands the module on as one for sm_75. Marking moves
no element: Triton gives both versions the same layouts, of the accumulator and of both operands; m16n8k16's fragments
are those of two m16n8k8 side by side.
"""

import dataclasses
import logging
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

from compiled_fa_turing import dots, ir_text, pipeline, transposed, triton_private
from compiled_fa_turing.ir_text import UnexpectedIRError
from compiled_fa_turing.target import CAPABILITY, SHARED_MEMORY

Stage = Callable[[Any, dict[str, Any]], Any]  # (module, metadata) -> module

_AMPERE = 80
_MMA = re.compile(
    r"^(?P<alias>#mma\d*) = #ttg\.nvidia_mma<\{versionMajor = 2, versionMinor = 0, (?P<rest>.*"
    r"instrShape = \[(?:1, )?16, 8\]\})>$"
)
_KERNEL = re.compile(r"tt\.func public @(?P<name>\w+)")
_log = logging.getLogger("compiled_fa.turing")
_warned: set[str] = set()


def turing_stage(backend: Any, options: Any, stock: Stage) -> Stage:
    """The replacement of Triton's `ttgir` stage for sm_75; `stock` is the stage it replaces, for kernels left alone."""

    def stage(module: Any, metadata: dict[str, Any]) -> Any:
        text = str(module)
        for most_stages in (2, 1):
            try:
                prepared = ir_text.parse(text)
                if not dots.prepare(prepared, most_stages):
                    _debug(text, "left alone: it has no dot for Turing's tensor cores")
                    break
            except UnexpectedIRError as reason:
                _warn(f"leaves a kernel without tensor cores: {reason}")
                break
            try:
                lowered = _lower(backend, options, prepared, most_stages, module.context, metadata)
                fits = triton_private.shared_bytes(lowered, module.context, options, CAPABILITY) <= SHARED_MEMORY
                if fits or most_stages == 1:
                    _debug(text, f"its dots are on tensor cores, its loops have at most {most_stages} stages")
                    return triton_private.parse_module(lowered, module.context)
            except (UnexpectedIRError, RuntimeError) as reason:
                _warn(f"could not lower a kernel with num_stages={most_stages}: {reason}")
        return stock(module, metadata)

    return stage


def _lower(
    backend: Any, options: Any, prepared: ir_text.Module, most_stages: int, context: Any, metadata: dict[str, Any]
) -> str:
    module = triton_private.parse_module(str(prepared), context)
    options = dataclasses.replace(options, num_stages=min(options.num_stages, most_stages))
    prefetch = dots.may_be_prefetched(prepared)
    ampere = triton_private.make_ttgir(backend, module, metadata, options, _AMPERE, prefetch)
    lowered = ir_text.parse(str(ampere))
    pipeline.without_async_copies(lowered)
    _mark_as_turing(lowered)
    early, late = ir_text.parse(str(lowered)), ir_text.parse(str(lowered))
    if not transposed.from_shared_memory(early, late=False):
        return str(lowered)
    transposed.from_shared_memory(late, late=True)
    needs = [triton_private.shared_bytes(str(text), context, options, CAPABILITY) for text in (early, late)]
    return str(early if needs[0] < needs[1] else late)


def _mark_as_turing(module: ir_text.Module) -> None:
    """Ampere's MMA layouts become Turing's; raises if anything in the module is not for Turing."""
    turing_layouts = set()
    for i, line in enumerate(module.before):
        if "nvidia_mma" not in line:
            continue
        match = _MMA.match(line)
        if not match:
            raise UnexpectedIRError(f"layout: {line}")
        module.before[i] = f"{match['alias']} = #ttg.nvidia_mma<{{versionMajor = 2, versionMinor = 1, {match['rest']}>"
        turing_layouts.add(match["alias"])
    header = module.operation.line
    module.operation.line = header.replace(f'ttg.target = "cuda:{_AMPERE}"', f'ttg.target = "cuda:{CAPABILITY}"')
    if module.operation.line == header:
        raise UnexpectedIRError(f"target: {header}")
    for operation in module.operations():
        if operation.name.startswith(("ttng.", "nvws.", "ttg.async_", "ttg.warp_")):
            raise UnexpectedIRError(f"not for Turing: {operation.line.strip()}")
        if operation.name == "tt.dot":
            dot = dots.Dot.of(operation)
            layout = re.search(r"#mma\d*|nvidia_mma", dot.d_type)
            if layout and (layout[0] not in turing_layouts or dot.elements not in dots.TENSOR_CORE):
                raise UnexpectedIRError(f"a dot that Turing's tensor cores cannot do: {operation.line.strip()}")


def _debug(text: str, what: str) -> None:
    name = _KERNEL.search(text)
    _log.debug("process %d: kernel %s: %s", os.getpid(), name["name"] if name else "?", what)


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"compiled_fa.turing {message}", RuntimeWarning, stacklevel=2)
