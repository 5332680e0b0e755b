"""What a short call costs: the host's time, the device's, and how many kernels it launches; called eagerly, from code
that torch.compile has compiled, and replayed as a CUDA graph.

`issued` is the time until a call returns, with calls behind each other and nobody waiting for the device, `finished`
the time of a call that is waited for; on a CPU they are the same. `launches` are kernels on a GPU; on a CPU, eagerly,
PyTorch ops below autograd, views aside. Peers are held against float64 first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Inputs
from .peers import PEERS, Prepared
from .race import References, prepare, results
from .records import described
from .suites import Entry
from .timing import Timing

Mode = Literal["eager", "compile", "CUDA graph"]
MODES: tuple[Mode, ...] = ("eager", "compile", "CUDA graph")
CALLS = 50  # behind each other, of which one number is made


def latency_records(
    entries: list[Entry], device: torch.device, seconds: float, quick: bool
) -> Iterator[dict[str, Any]]:
    """A record for every case, direction, peer and way to call."""
    for entry in entries:
        inputs = Inputs.of(entry.case, device)
        for direction in entry.directions:
            references = References(inputs, direction)
            for peer in entry.peers:
                for mode in MODES:
                    about = described(entry.case, direction) | {"peer": peer, "mode": mode}
                    if reason := PEERS[peer].refusal(entry.case, direction, device.type) or _refusal(
                        peer, mode, device
                    ):
                        yield about | {"status": "refused", "reason": reason}
                        continue
                    try:
                        prepared = _called(prepare(peer, inputs), mode)
                        complaint = references.complaint(peer, prepared)
                        if complaint is not None:
                            yield about | {"status": "mismatch", "reason": complaint}
                            continue
                        call: Callable[[], object] = partial(results, prepared, direction, prepared.attend)
                        if mode == "CUDA graph":
                            call = _captured(call)
                        yield about | {"status": "timed", **_measured(call, mode, device, seconds, quick)}
                    except Exception as error:
                        yield about | {"status": "unable", "reason": f"{type(error).__name__}: {str(error)[:160]}"}


def _refusal(peer: str, mode: Mode, device: torch.device) -> str | None:
    if peer == "flex" and mode == "eager":
        return "meant to be compiled"
    return "not on a CPU" if mode == "CUDA graph" and device.type != "cuda" else None


def _called(prepared: Prepared, mode: Mode) -> Prepared:
    if mode != "compile":
        return prepared
    torch.compiler.reset()  # what other cases compiled counts against the limit of recompilations
    return replace(prepared, attend=torch.compile(prepared.attend, fullgraph=True, dynamic=False))


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _measured(
    call: Callable[[], object], mode: Mode, device: torch.device, seconds: float, quick: bool
) -> dict[str, Any]:
    synchronize: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    calls = 3 if quick else CALLS

    def issued() -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def finished() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
            synchronize()
        return (time.perf_counter() - start) / calls

    for _ in range(2):
        call()
    a_round = calls * finished()
    rounds = 3 if quick else min(max(int(seconds / 2 / max(a_round, 1e-9)), 5), 101)
    times = {"issued": Timing.of([issued() for _ in range(rounds)])}
    times["finished"] = Timing.of([finished() for _ in range(rounds)]) if device.type == "cuda" else times["issued"]
    found: dict[str, Any] = {f"{name}_us": timing.median * 1e6 for name, timing in times.items()}
    found |= {f"{name}_iqr_us": timing.iqr * 1e6 for name, timing in times.items()}
    return found | {"rounds": rounds, "launches": _launches(call, mode, device)}


def _launches(call: Callable[[], object], mode: Mode, device: torch.device) -> int | None:
    if device.type == "cuda":
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        return sum("CUDA" in str(event.device_type) for event in profile.events() or ())
    if mode != "eager":
        return None
    ops: Any = _Ops()
    with ops:
        call()
    count: int = ops.count
    return count


class _Ops(TorchDispatchMode):
    """Counts ops that compute something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = function._schema.returns
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.count += not view and "empty" not in function.overloadpacket.__name__
        return function(*args, **(kwargs or {}))
