"""One case: every peer that can do it is held against float64, and those that are right are timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .cases import Case, Direction, Inputs
from .layer import in_layer
from .parity import PEER_SLACK, Reference
from .peers import PEERS, Prepared
from .timing import Timing, interleaved

CACHED = 256 << 20  # bytes of keys that may be found in a CPU's or a GPU's caches

Status = Literal["timed", "mismatch", "unable", "refused"]


@dataclass(frozen=True)
class Outcome:
    """What became of a peer. reason: why it was not timed; timing, tflops: where it was."""

    peer: str
    status: Status
    reason: str = ""
    timing: Timing | None = None
    tflops: float | None = None


def results(prepared: Prepared, direction: Direction, attend: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """(out,) or (out, dq, dk, dv), in the peer's own layout."""
    if direction == "forward":
        with torch.no_grad():
            return (attend(*prepared.leaves),)
    leaves = [x.requires_grad_() for x in prepared.leaves]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, prepared.dout)


class References:
    """The reference of a case, once with each dropout seed and once without dropout."""

    def __init__(self, inputs: Inputs, direction: Direction) -> None:
        self._inputs, self._direction = inputs, direction
        self._made: dict[bool, Reference] = {}

    def complaint(self, name: str, prepared: Prepared) -> str | None:
        """What is wrong with a peer's results; None: nothing."""
        seed = prepared.dropout_seed
        if (seed is not None) not in self._made:
            self._made[seed is not None] = Reference(self._inputs, self._direction, seed)
        found = results(prepared, self._direction, prepared.checked or prepared.attend)
        ours = name.startswith("ours")
        packed = tuple(prepared.packed(x.detach()) for x in found)
        return self._made[seed is not None].complaint(packed, 1.0 if ours else PEER_SLACK)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def prepare(name: str, inputs: Inputs) -> Prepared:
    prepared = PEERS[name].prepare(inputs)
    q, k, v = (x.detach() for x in prepared.leaves)
    prepared = replace(prepared, leaves=(q, k, v))
    if inputs.case.layer:
        prepared = replace(prepared, attend=in_layer(prepared.attend, q))
    if inputs.case.compiled:
        prepared = replace(prepared, attend=torch.compile(prepared.attend, fullgraph=True, dynamic=False))
    return prepared


def _with_its_own(prepared: Prepared, inputs: Inputs) -> Prepared:
    shared = {x.untyped_storage().data_ptr() for x in (inputs.q, inputs.k, inputs.v)}
    q, k, v = (x.clone() if x.untyped_storage().data_ptr() in shared else x for x in prepared.leaves)
    return replace(prepared, leaves=(q, k, v))


def race(
    case: Case,
    direction: Direction,
    peers: Sequence[str],
    device: torch.device,
    seconds: float = 5.0,
    rounds: int | None = None,
    tick: Callable[[float], None] = lambda done: None,
    apart: bool = False,
) -> list[Outcome]:
    """An outcome for every peer, in their order. seconds, rounds, tick: as timing.interleaved. apart: each peer has
    tensors of its own, and finds nothing in a cache because another one has read the same."""
    torch.compiler.reset()  # what other cases compiled counts against the limit of recompilations
    inputs = Inputs.of(case, device)
    references = References(inputs, direction)
    outcomes: dict[str, Outcome] = {}
    runs: dict[str, Callable[[], object]] = {}
    factors: dict[str, float] = {}  # of a peer's seconds, where it moves other bytes than the case has
    for name in peers:
        if reason := PEERS[name].refusal(case, direction, device.type):
            outcomes[name] = Outcome(name, "refused", reason)
            continue
        try:
            prepared = prepare(name, inputs)
            if apart and case.key_bytes <= CACHED:
                prepared = _with_its_own(prepared, inputs)
            complaint = references.complaint(name, prepared) if prepared.moves is None else None
        except Exception as error:
            outcomes[name] = Outcome(name, "unable", _words(error))
            continue
        if complaint is not None:
            outcomes[name] = Outcome(name, "mismatch", complaint)
            continue
        factors[name] = 1.0 if prepared.moves is None else case.key_bytes / prepared.moves
        runs[name] = partial(results, prepared, direction, prepared.attend)
    timings = interleaved(runs, device, seconds, rounds, tick) if runs else {}
    for name, timing in timings.items():
        factor = factors[name]
        timing = Timing(timing.median * factor, timing.iqr * factor, timing.rounds)
        tflops = case.flops(direction) / timing.median / 1e12 if factor == 1.0 else None
        outcomes[name] = Outcome(name, "timed", timing=timing, tflops=tflops)
    return [outcomes[name] for name in peers]
