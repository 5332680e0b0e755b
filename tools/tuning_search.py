"""How tools.tune finds what is best here: a number, by timing it beside others; a rule, from timings of random calls.

Either is settled in so many seconds, or the machine was too noisy for it: then the table keeps what it has.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch

from bench.timing import Ratio, compared
from compiled_fa import tuning
from compiled_fa.problem import Problem
from compiled_fa.tuning import NEVER, Rule, Tuning

from .rule_fit import Timed, fit, mean_regret

Run = Callable[[], object]

SPREAD = 0.05  # of a ratio, below which it is believed
GAIN = 0.02  # what another number, or rule, must win to be taken in place of the table's
FEWEST = 20  # calls from which a rule is fitted
ENOUGH = 60  # such calls, where others of another rule would tell more
CPU = torch.device("cpu")


class TooNoisyError(RuntimeError):
    """A ratio whose spread stayed above SPREAD; the message has it."""


@dataclass(frozen=True)
class Found:
    """What became of a number, or of a rule. why: what was measured, or what was wrong; settled: False where nothing
    was measured."""

    name: str
    old: int | Rule
    new: int | Rule
    why: str
    settled: bool = True

    def __str__(self) -> str:
        if not self.settled:
            return f"{self.name} {told(self.old)}: kept, {self.why}"
        change = f"{told(self.old)} -> {told(self.new)}" if self.new != self.old else f"{told(self.old)}: kept"
        return f"{self.name} {change}   {self.why}"


def told(number: int | Rule) -> str:
    if isinstance(number, Rule):
        weights = {field.name: getattr(number, field.name) for field in fields(Rule)}
        return f"({', '.join(f'{name} {weight:g}' for name, weight in weights.items() if weight)})"
    return "never" if number == NEVER else str(number)


def _believed(ratio: Ratio, where: str = "") -> Ratio:
    if ratio.spread >= SPREAD:
        raise TooNoisyError(f"the machine was too noisy: {where}{ratio.median:.2f} with a spread of {ratio.spread:.0%}")
    return ratio


@dataclass(frozen=True)
class Pick:
    """The fastest of a few values of a number. run: what is timed, with each of them in force."""

    name: str
    what: str
    values: tuple[int, ...]
    run: Callable[[], Run]

    def settle(self, table: Tuning, seconds: float) -> Found:
        old = number_of(table, self.name)
        call, values = self.run(), [type(old)(value) for value in self.values]  # a flag's, too
        runs: dict[str, Run] = {}
        for value in (old, *(value for value in values if value != old)):
            runs[told(value)] = partial(_under, with_value(table, self.name, value), call)
        _, ratios = compared(runs, CPU, seconds, SPREAD)
        try:
            for other, ratio in ratios.items():
                _believed(ratio, f"{told(old)} / {other} ")
        except TooNoisyError as error:
            return Found(self.name, old, old, f"{error}", settled=False)
        best = max(values, key=lambda value: ratios[told(value)].median if value != old else 1.0)
        gain = ratios[told(best)] if best != old else None
        taken = best if gain is not None and gain.low > 1.0 and gain.median > 1.0 + GAIN else old
        others = ", ".join(f"{value} {1 / ratio.median:.2f}" for value, ratio in ratios.items())
        return Found(self.name, old, taken, f"{self.what}, / {told(old)}: {others}")


def _under(table: Tuning, call: Run) -> object:
    with tuning.using(table):
        return call()


def number_of(table: Tuning, name: str) -> int:
    value = value_of(table, name)
    if isinstance(value, Rule):
        raise TypeError(f"{name} is a rule, and no number")
    return value


def value_of(table: Tuning, name: str) -> int | Rule:
    part, field = name.split(".")
    value: int | Rule = getattr(getattr(table, part), field)
    return value


def with_value(table: Tuning, name: str, value: int | Rule) -> Tuning:
    part, field = name.split(".")
    found: object = bool(value) if isinstance(value_of(table, name), bool) else value
    with tuning.using(table):
        return tuning.changed(**{part: {field: found}})


def settle_all(
    picks: Sequence[Pick], table: Tuning, seconds: float, tell: Callable[[Found], Any]
) -> tuple[Tuning, list[Found]]:
    """One number after another, each with those before it in force, in so many seconds altogether; and the last table.

    A number for which no time is left is not settled.
    """
    end, found = time.perf_counter() + seconds, []
    for at, pick in enumerate(picks):
        left = end - time.perf_counter()
        if left <= 0.0:
            old = value_of(table, pick.name)
            result = Found(pick.name, old, old, "no time was left for it", settled=False)
        else:
            result = pick.settle(table, left / (len(picks) - at))
        table = with_value(table, result.name, result.new)
        found.append(result)
        tell(result)
    return table, found


# ---------------------------------------------------------------------------------------------------------------- rules


@dataclass
class Measured:
    """Timings of random calls: by the name of a rule, those that it decides. noisy: calls not known well enough."""

    calls: dict[str, list[Timed]] = field(default_factory=dict)
    noisy: int = 0

    def wants(self, name: str) -> bool:
        """Is the time of a call that this rule decides well spent? It is for others that have fewer."""
        return len(self.calls.get(name, [])) < ENOUGH

    def add(self, name: str, problem: Problem, one: float, other: float) -> None:
        self.calls.setdefault(name, []).append(Timed(problem.features, math.log(one / other)))


def settled_rule(name: str, table: Tuning, measured: Measured) -> Found:
    """The rule that fits what was measured, where it loses less than the table's by more than GAIN."""
    old, calls = value_of(table, name), measured.calls.get(name, [])
    if not isinstance(old, Rule):
        raise TypeError(f"{name} is a number, and no rule")
    if len(calls) < FEWEST:
        noise = f", {measured.noisy} calls of all were too noisy" if measured.noisy else ""
        return Found(name, old, old, f"{len(calls)} calls are too few to fit it{noise}", settled=False)
    rule = fit(calls)
    before, after = mean_regret(old, calls), mean_regret(rule, calls)
    taken = rule if after < before - GAIN else old
    return Found(name, old, taken, f"{len(calls)} calls: mean regret {before:.3f} as it was, {after:.3f} fitted")
