"""The engines, and which of them serves a call.

An engine is a module with `forward(problem)` and `backward(problem, dout, out, lse, dlse)`;
`unsupported_reason(device, problem)` tells why it cannot serve, and `defers(problem, direction)` whether it leaves a
call to the engines after it.
Engines never import each other; what they share is the score program and the problem.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from ..inductor import say_once
from ..problem import Direction, Problem
from . import fused, sdpa_cpu, tiled

# In the order of preference: the first that can serve a device does.
ENGINES: dict[str, ModuleType] = {"fused": fused, "sdpa_cpu": sdpa_cpu, "tiled": tiled}

FIRST_CHOICE = "first choice"

_override: str | None = None


def _known(name: str, argument: str) -> str:
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"{argument} must be 'auto' or one of {list(ENGINES)}, got {name!r}")
    return name


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Serve every call inside by this engine ("auto": the best one), in all threads.

    Raises ValueError for an unknown name; a call raises RuntimeError where the engine cannot serve it.

        with compiled_fa.use_engine("tiled"):
            out = flash_attn_func(q, k, v)
    """
    global _override
    before, _override = _override, _known(name, "engine")
    try:
        yield
    finally:
        _override = before


def requested() -> str:
    """The engine asked for by `use_engine`, else by the environment variable COMPILED_FA_ENGINE, else "auto"."""
    return _override or os.environ.get("COMPILED_FA_ENGINE") or "auto"


def choose(
    name: str, device: torch.device, problem: Problem | None = None, direction: Direction = "forward"
) -> tuple[str, str]:
    """-> the engine that serves a device, or a call on it, and why.

    One asked for by name serves or raises RuntimeError.
    """
    if _known(name, "engine") != "auto":
        reason = ENGINES[name].unsupported_reason(device, problem)
        if reason is not None:
            raise RuntimeError(f"the {name} engine was asked for and cannot serve this call: {reason}")
        return name, "asked for by name"
    refusals: list[str] = []
    for candidate, engine in ENGINES.items():
        reason = engine.unsupported_reason(device, problem)
        if reason is None and problem is not None and engine.defers(problem, direction):
            reason = "another is faster"
        if reason is None:
            return candidate, "; ".join(refusals) or FIRST_CHOICE
        refusals.append(f"not {candidate}: {reason}")
    raise RuntimeError("no engine can serve this device: " + "; ".join(refusals))


def inlined(name: str, problem: Problem, direction: Direction) -> ModuleType | None:
    """The engine whose operators may stand in a compiled graph in place of the op; None: the op stays.

    One asked for by name is asked when the op is called.
    """
    if name != "auto" or not sdpa_cpu.is_one_call(problem):
        return None
    chosen, _ = choose(name, problem.q.device, problem, direction)
    return sdpa_cpu if chosen == "sdpa_cpu" else None


def serving(name: str, problem: Problem, direction: Direction) -> ModuleType:
    """The engine that serves a call. Off the CPU it is said once, and why, when that is not the first choice."""
    device = problem.q.device
    chosen, why = choose(name, device, problem, direction)
    if name == "auto" and why != FIRST_CHOICE and device.type != "cpu":
        say_once(f"the {chosen} engine serves on {device.type}, {why}")
    return ENGINES[chosen]
