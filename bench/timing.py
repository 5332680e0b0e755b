"""Seconds of several calls, run in turns, so that what else the machine does slows all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

WARMUP = 2
LEAST_ROUNDS, MOST_ROUNDS = 5, 101


@dataclass(frozen=True)
class Timing:
    """Seconds. iqr: the interquartile range, from the first quartile to the third."""

    median: float
    iqr: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        if len(seconds) < 2:
            return cls(seconds[0], 0.0, 1)
        first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), third - first, len(seconds))


def once(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the host's clock on a CPU, the device's own on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    after.synchronize()
    milliseconds: float = before.elapsed_time(after)
    return milliseconds / 1e3


def interleaved(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    rounds: int | None = None,
    tick: Callable[[float], None] = lambda done: None,
) -> dict[str, Timing]:
    """Timings of each, over `rounds` rounds, or as many as about `seconds` allow. tick: told the part that is done."""
    for _ in range(WARMUP):
        a_round = sum(once(run, device) for run in runs.values())
    if rounds is None:
        rounds = min(max(int(seconds / max(a_round, 1e-9)), LEAST_ROUNDS), MOST_ROUNDS)
    found: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffled = list(runs), random.Random(0)
    for turn in range(rounds):
        shuffled.shuffle(order)  # or one of them would always find the caches that the same other one leaves
        for name in order:
            found[name].append(once(runs[name], device))
        tick((turn + 1) / rounds)
    return {name: Timing.of(times) for name, times in found.items()}
