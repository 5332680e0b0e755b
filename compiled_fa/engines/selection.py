"""Which engine serves a call: decided here, once a call, for the ops, for Inductor's graphs and for the report."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import config
from ..caches import Cache
from ..inductor.steps import eager_reason
from ..messages import say_once
from ..problem import Direction, Problem
from ..tuning import Tuning, current
from . import fused, sdpa_cpu, split_kv, tiled, triton
from .engine import CannotServeError, Engine, Prepared


def _engines(*modules: Engine) -> tuple[Engine, ...]:
    """As they are: mypy holds each against the protocol, and names the member that is wrong."""
    return modules


# In the order of preference. The last one serves everything.
ENGINES = _engines(fused, triton, split_kv, sdpa_cpu, tiled)

_BEFORE_THE_LAST = ENGINES[-2::-1]  # the least preferred first

Results = TypeVar("Results")

IN_CONTEXT = "context"  # an engine's name in compiled code: that which use_engine says where the op is called

# By the call's signature, and the table in force, which is held so that no other has its id.
_served: Cache[Hashable, tuple[Engine, Tuning]] = Cache("routes", entries=2048)

# Likewise, and by the engine asked for. None: there is nothing less to do than the engine's `forward`.
_prepared: Cache[Hashable, tuple[Prepared | None, Tuning]] = Cache(
    "prepared calls", 1024, 32 << 20, lambda found: 0 if found[0] is None else found[0].nbytes
)

_asked_for: ContextVar[str | None] = ContextVar("compiled_fa engine", default=None)
_uses, _uses_lock = 0, threading.Lock()  # of use_engine, at the moment, in all threads and tasks
_in_use = False


class Route(NamedTuple):
    """The engine that serves a call. by_name: it was asked for, and no other may serve."""

    engine: Engine
    problem: Problem
    direction: Direction
    by_name: bool = False

    def forward(self) -> tuple[Tensor, Tensor]:
        """-> out, lse."""
        return self._served(lambda engine: engine.forward(self.problem))

    def backward(self, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None) -> tuple[Tensor, ...]:
        """-> dq, dk, dv; and dbias where it is wanted."""
        return self._served(lambda engine: engine.backward(self.problem, dout, out, lse, dlse))

    def _served(self, by: Callable[[Engine], Results]) -> Results:
        """By the engine; in place of one that finds out that it cannot, which is said once, by the first that can."""
        try:
            return by(self.engine)
        except CannotServeError as error:
            name, found = self.engine.name, error
        if self.by_name:
            raise RuntimeError(f"the {name} engine was asked for and cannot serve this call: {found}") from found
        for engine in ENGINES:
            able = engine.unsupported_reason(self.problem.q.device, self.problem, self.direction) is None
            if engine is not self.engine and able:
                with suppress(CannotServeError):
                    results = by(engine)
                    say_once(f"the {engine.name} engine serves in place of {name}, which cannot: {found}")
                    return results
        raise found

    def refusals(self) -> list[tuple[str, str]]:
        """The engines that come before it, and why they do not serve."""
        device, refusals = self.problem.q.device, []
        for engine in ENGINES[: ENGINES.index(self.engine)]:
            reason = engine.unsupported_reason(device, self.problem, self.direction)
            refusals.append((engine.name, reason or faster(self.engine)))
        return refusals


def faster(engine: Engine) -> str:
    """Why another one, which could, does not serve."""
    return f"{engine.name} is faster"


@contextmanager
def use_engine(name: str) -> Iterator[None]:
    """Serve every call inside by this engine ("auto": the best one), in this thread and task.

    In code that torch.compile has compiled, too; there gradients are by the engine in force where they are computed.

    Raises ValueError for an unknown name; a call raises RuntimeError where the engine cannot serve it.

        with compiled_fa.use_engine("tiled"):
            out = flash_attn_func(q, k, v)
    """
    token = _asked_for.set(_known(name))
    _count_uses(1)
    try:
        yield
    finally:
        _count_uses(-1)
        _asked_for.reset(token)


def _count_uses(change: int) -> None:
    global _uses, _in_use
    with _uses_lock:
        _uses += change
        _in_use = _uses > 0


def requested() -> str:
    """The engine asked for by `use_engine`, else by the environment variable COMPILED_FA_ENGINE, else "auto"."""
    if _in_use:
        # Dynamo cannot read a ContextVar, but it guards this global: the op asks when it is called.
        return IN_CONTEXT if torch.compiler.is_dynamo_compiling() else _asked_for.get() or config.engine()
    return config.engine()


def select(problem: Problem, direction: Direction, name: str = "auto") -> Route:
    """The engine that serves a call: the first that can, and that does not leave it to the best of those after it.

    name: an engine's, which serves or raises RuntimeError.
    """
    name = requested() if name == IN_CONTEXT else _known(name)
    device = problem.q.device
    if name != "auto":
        engine = next(engine for engine in ENGINES if engine.name == name)
        if (reason := engine.unsupported_reason(device, problem, direction)) is not None:
            raise RuntimeError(f"the {name} engine was asked for and cannot serve this call: {reason}")
        return Route(engine, problem, direction, by_name=True)
    if problem.signature is None:
        chosen = _best(problem, direction)
    else:
        key = problem.signature, direction, id(current()), eager_reason()
        chosen, _ = _served.get(key, lambda: (_best(problem, direction), current()))
    return Route(chosen, problem, direction)


def prepared(signature: Hashable, name: str, make_problem: Callable[[], Problem]) -> Prepared | None:
    """The forward that is left of a call on a CPU, by the engine that `select` finds, once for all calls alike.

    signature: make_problem()'s.
    """
    name = requested() if name == IN_CONTEXT else name
    table = current()
    key = signature, name, id(table), eager_reason()

    def prepare() -> tuple[Prepared | None, Tuning]:
        problem = make_problem()
        return select(problem, "forward", name).engine.prepared(problem), table

    found, _ = _prepared.get(key, prepare)
    return found


def _best(problem: Problem, direction: Direction) -> Engine:
    device, chosen = problem.q.device, ENGINES[-1]
    for engine in _BEFORE_THE_LAST:
        defers = engine.defers(problem, direction, chosen.name)
        if not defers and engine.unsupported_reason(device, problem, direction) is None:
            chosen = engine
    refusals = Route(chosen, problem, direction).refusals() if device.type != "cpu" else []
    if any(reason != faster(chosen) for _, reason in refusals):
        why = "; ".join(f"not {other}: {reason}" for other, reason in refusals)
        say_once(f"the {chosen.name} engine serves on {device.type}, {why}")
    return chosen


def inlined(problem: Problem, direction: Direction, name: str = "auto") -> Engine | None:
    """The engine whose operators may stand in a compiled graph in place of the op; None: the op stays.

    One asked for by name is asked when the op is called.
    """
    able = [engine for engine in ENGINES if engine.inlines(problem, direction)] if name == "auto" else []
    if not able:
        return None
    engine = select(problem, direction).engine
    return engine if engine in able else None


def _known(name: str) -> str:
    if name not in config.ENGINES:
        raise ValueError(f"engine must be one of {list(config.ENGINES)}, got {name!r}")
    return name
