"""How tools.tune finds a number: from timings of one way to serve a call beside another.

A `Rim` is a number from which on one way is the faster; a `Pick` is one of a few values. Either is settled in so many
seconds, or the machine was too noisy for it: then the table keeps what it has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.timing import Ratio, compared
from compiled_fa import tuning
from compiled_fa.tuning import NEVER, Tuning

Run = Callable[[], object]

SPREAD = 0.05  # of a ratio, below which it is believed
GAIN = 0.02  # what another number must win somewhere, to be taken in place of the table's
CLOSE = 1.2  # two sizes so near to each other have no other measured between them
CPU = torch.device("cpu")


class TooNoisyError(RuntimeError):
    """A ratio whose spread stayed above SPREAD; the message has it."""


@dataclass(frozen=True)
class Found:
    """What became of a number. why: the ratios, or what was wrong; settled: False where it was not measured."""

    name: str
    old: int
    new: int
    why: str
    settled: bool = True

    def __str__(self) -> str:
        if not self.settled:
            return f"{self.name} {told(self.old)}: kept, {self.why}"
        change = f"{told(self.old)} -> {told(self.new)}" if self.new != self.old else f"{told(self.old)}: kept"
        return f"{self.name} {change}   {self.why}"


def told(number: int) -> str:
    return "never" if number == NEVER else str(number)


def ratio_of(first: Run, other: Run, seconds: float) -> Ratio:
    """Seconds of the first over those of the other. Raises TooNoisyError."""
    _, ratios = compared({"first": first, "other": other}, CPU, seconds, SPREAD)
    return _believed(ratios["other"])


def _believed(ratio: Ratio, where: str = "") -> Ratio:
    if ratio.spread >= SPREAD:
        raise TooNoisyError(f"the machine was too noisy: {where}{ratio.median:.2f} with a spread of {ratio.spread:.0%}")
    return ratio


@dataclass(frozen=True)
class Rim:
    """From such a size on one way is faster than another.

    name: "part.field". pair: a size -> the way that serves from there on, and the one below it. sizes: tried first,
    ascending; then those between the last of which the second is faster and the first where it is not. halvings: how
    often. up_to: the first way serves up to this size instead; it is one of `sizes`, or 0.
    """

    name: str
    what: str
    sizes: tuple[int, ...]
    pair: Callable[[int], tuple[Run, Run]]
    halvings: int = 2
    up_to: bool = False

    def settle(self, table: Tuning, seconds: float) -> Found:
        old = value_of(table, self.name)
        each = seconds / (len(self.sizes) + self.halvings)
        try:
            with tuning.using(table):
                new, points = self._search(each)
        except TooNoisyError as error:
            return Found(self.name, old, old, f"{error}", settled=False)
        ratios = ", ".join(f"{size} {ratio.median:.2f}" for size, ratio in sorted(points.items()))
        return Found(self.name, old, old if self._alike(old, new, points) else new, f"{self.what} {ratios}")

    def _search(self, seconds: float) -> tuple[int, dict[int, Ratio]]:
        points: dict[int, Ratio] = {}

        def measure(size: int) -> None:
            try:
                points[size] = ratio_of(*self.pair(size), seconds)
            except TooNoisyError as error:
                raise TooNoisyError(f"{error}, at {size}") from None

        for size in self.sizes:
            measure(size)
        if self.up_to:
            return _last(points), points
        for _ in range(self.halvings):
            below, rim = _bracket(points)
            if below is None or rim is None or rim / below < CLOSE:
                break
            measure(round(math.sqrt(below * rim)))
        return _crossing(points), points

    def _alike(self, old: int, new: int, points: Mapping[int, Ratio]) -> bool:
        """Would they serve all that was measured alike, or as fast?"""
        between = [
            ratio for size, ratio in points.items() if self._first_serves(size, old) != self._first_serves(size, new)
        ]
        return all(abs(math.log(ratio.median)) <= max(GAIN, ratio.spread / 2) for ratio in between)

    def _first_serves(self, size: int, number: int) -> bool:
        return size <= number if self.up_to else size >= number


def _bracket(points: Mapping[int, Ratio]) -> tuple[int | None, int | None]:
    """The sizes between which the first way becomes the faster, so that all the others lose least: None at an end.

    Of all the ways to cut the sizes in two, the one with the least product of ratios above it.
    """
    sizes = sorted(points)
    losses = [sum(math.log(points[size].median) for size in sizes[cut:]) for cut in range(len(sizes) + 1)]
    cut = min(range(len(losses)), key=lambda number: (losses[number], -number))
    return (sizes[cut - 1] if cut else None), (sizes[cut] if cut < len(sizes) else None)


def _crossing(points: Mapping[int, Ratio]) -> int:
    """Where the ratio is 1, between the two sizes on either side of it."""
    below, rim = _bracket(points)
    if rim is None:
        return NEVER
    if below is None:
        return rim
    slower, faster = math.log(points[below].median), math.log(points[rim].median)
    if not slower > 0.0 > faster:
        return rim
    return math.ceil(below * math.exp(math.log(rim / below) * slower / (slower - faster)))


def _last(points: Mapping[int, Ratio]) -> int:
    """The largest size up to which the first way is the faster; 0: none."""
    mirrored = {-size: ratio for size, ratio in points.items()}
    _, rim = _bracket(mirrored)
    return 0 if rim is None else -rim


@dataclass(frozen=True)
class Pick:
    """The fastest of a few values of a number. run: what is timed, with each of them in force."""

    name: str
    what: str
    values: tuple[int, ...]
    run: Callable[[], Run]

    def settle(self, table: Tuning, seconds: float) -> Found:
        old = value_of(table, self.name)
        call = self.run()
        runs: dict[str, Run] = {}
        for value in (old, *(value for value in self.values if value != old)):
            runs[told(value)] = partial(_under, with_value(table, self.name, value), call)
        _, ratios = compared(runs, CPU, seconds, SPREAD)
        try:
            for other, ratio in ratios.items():
                _believed(ratio, f"{told(old)} / {other} ")
        except TooNoisyError as error:
            return Found(self.name, old, old, f"{error}", settled=False)
        best = max(self.values, key=lambda value: ratios[told(value)].median if value != old else 1.0)
        gain = ratios[told(best)] if best != old else None
        taken = best if gain is not None and gain.low > 1.0 and gain.median > 1.0 + GAIN else old
        others = ", ".join(f"{value} {1 / ratio.median:.2f}" for value, ratio in ratios.items())
        return Found(self.name, old, taken, f"{self.what}, / {told(old)}: {others}")


def _under(table: Tuning, call: Run) -> object:
    with tuning.using(table):
        return call()


def value_of(table: Tuning, name: str) -> int:
    part, number = name.split(".")
    value: int = getattr(getattr(table, part), number)
    return value


def with_value(table: Tuning, name: str, value: int) -> Tuning:
    part, number = name.split(".")
    value = bool(value) if isinstance(value_of(table, name), bool) else value
    with tuning.using(table):
        return tuning.changed(**{part: {number: value}})


Step = Rim | Pick


def settle_all(
    steps: list[Step], table: Tuning, seconds: float, tell: Callable[[Found], Any]
) -> tuple[Tuning, list[Found]]:
    """One number after another, each with those before it in force, in so many seconds altogether; and the last table.

    A number for which no time is left is not settled.
    """
    end, found = time.perf_counter() + seconds, []
    for number, step in enumerate(steps):
        left = end - time.perf_counter()
        if left <= 0.0:
            old = value_of(table, step.name)
            result = Found(step.name, old, old, "no time was left for it", settled=False)
        else:
            result = step.settle(table, left / (len(steps) - number))
        table = with_value(table, result.name, result.new)
        found.append(result)
        tell(result)
    return table, found
