"""Seconds of several calls, run in turns, so that what else the machine does slows all of them alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

WARMUP = 2
LEAST_ROUNDS, MOST_ROUNDS = 5, 101
LEAST_COMPARED, MOST_COMPARED = 9, 1001


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


@dataclass(frozen=True)
class Ratio:
    """Seconds of one call over those of another, round by round.

    low, high: where the median lies, 19 times out of 20, whatever the distribution of rounds.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, ratios: list[float]) -> Ratio:
        ordered, count = sorted(ratios), len(ratios)
        left_out = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))  # on either side: of a binomial's middle
        return cls(statistics.median(ordered), ordered[left_out], ordered[-1 - left_out], count)

    @property
    def spread(self) -> float:
        """How far that is, of the median: 0.05 is 5 %. More rounds make it smaller."""
        return (self.high - self.low) / self.median


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


def _turns(
    runs: dict[str, Callable[[], object]], device: torch.device, left_out: Collection[str] = ()
) -> Iterator[dict[str, float]]:
    """Rounds without end: seconds of each, in an order that changes. left_out: who has no more turns."""
    order, shuffled = list(runs), random.Random(0)
    while True:
        shuffled.shuffle(order)  # or one of them would always find the caches that the same other one leaves
        yield {name: once(runs[name], device) for name in order if name not in left_out}


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
    for turn, times in zip(range(rounds), _turns(runs, device), strict=False):
        for name, took in times.items():
            found[name].append(took)
        tick((turn + 1) / rounds)
    return {name: Timing.of(times) for name, times in found.items()}


def compared(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    spread: float,
    rounds: int | None = None,
    hopeless: float = 0.0,
) -> tuple[dict[str, Timing], dict[str, Ratio]]:
    """Timings of each, and the first one's seconds over those of every other, in as many rounds as make all spreads
    smaller than `spread`, or `seconds` allow; or in `rounds`.

    hopeless: another whose ratio is surely below this is not timed any longer.
    """
    first, *others = runs
    for _ in range(WARMUP):
        for run in runs.values():
            once(run, device)
    left_out: set[str] = set()
    found: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    ratios: dict[str, Ratio] = {}
    for turn, times in enumerate(_turns(runs, device, left_out), 1):
        for name, took in times.items():
            found[name].append(took)
        last = turn >= (rounds or MOST_COMPARED)
        if rounds is None and turn >= LEAST_COMPARED:
            last = last or time.perf_counter() - start >= seconds
        if turn % LEAST_COMPARED and not last:
            continue
        # Another that had no turns later: of the rounds in which it had.
        ratios = {o: Ratio.of([a / b for a, b in zip(found[first], found[o], strict=False)]) for o in others}
        left_out |= {other for other, ratio in ratios.items() if ratio.high < hopeless}
        precise = all(ratio.spread < spread for other, ratio in ratios.items() if other not in left_out)
        if last or (rounds is None and precise):
            break
    return {name: Timing.of(times) for name, times in found.items()}, ratios
