"""Measure this machine, and write a table of tuned numbers for it.

    python -m tools.tune --output mine.json
    COMPILED_FA_TUNING=mine.json python -m compiled_fa         # says that it is in force

A number that cuts tiles is the fastest of a few, timed in turns; a rule that chooses between engines is fitted to
random calls, timed by each engine that could serve them, in turns. Ratios are known to 5 %, or at least which engine is
the faster: what cannot be known so well in the time that there is stays as it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import choice
from bench.cases import Case, Inputs
from bench.cases import Direction as CaseDirection
from bench.records import cpu_model
from bench.timing import compared
from compiled_fa import ops, tuning, use_engine
from compiled_fa.engines import ENGINES, sdpa_cpu, split_kv
from compiled_fa.inductor.steps import eager_reason
from compiled_fa.problem import Direction, Problem
from compiled_fa.tuning import NEVER, Rule, Tuning
from compiled_fa.tuning.classes import cpu_class
from compiled_fa.tuning.files import PARTS, save

from .tuning_search import SPREAD, Found, Measured, Pick, Run, settle_all, settled_rule, told, with_value

LENGTH = 2048  # at which tiles are cut
PART_OF_NUMBERS = 0.25  # of the time; the rest is for the calls that rules are fitted to
MOST_CALLS, SEED = 2000, 1 << 16  # not those that bench choice draws
MOST_PRODUCTS = 1 << 30  # of one
SECONDS_A_CALL = 0.15
SURE = 0.4  # a ratio beyond which the faster is known, however noisy
BF16 = torch.bfloat16


def _together(*runs: Run) -> Run:
    def run() -> None:
        for one in runs:
            one()

    return run


def _way(case: Case, way: Direction, engine: str) -> Run:
    return _by_engines(Inputs.of(case), way, [engine])[engine]


def _forward(case: Case, engine: str) -> Run:
    return _way(case, "forward", engine)


def _both(case: Case, engine: str) -> Run:
    return _together(_way(case, "forward", engine), _way(case, "backward", engine))


# ------------------------------------------------------------------------------------------------------------- numbers


def picks(table: Tuning) -> list[Pick]:
    """Numbers, and what each is timed with."""
    whole, causal = Case.uniform(LENGTH, nheads_k=4), Case.uniform(LENGTH, nheads_k=4, causal=True)
    half = Case.uniform(LENGTH, nheads_k=4, dtype=BF16)
    found = [
        Pick("sdpa_cpu.widens_bf16", "bf16, 512 tokens", (0, 1),
             partial(_forward, Case.uniform(512, nheads_k=4, dtype=BF16), "sdpa_cpu")),
        Pick("tiled.tile", f"forward + backward, {LENGTH} tokens", (256, 512, 1024), partial(_both, whole, "tiled")),
        Pick("tiled.banded_tile", f"causal, {LENGTH} tokens", (128, 256, 512), partial(_both, causal, "tiled")),
        Pick("tiled.score_bytes_a_core", f"forward + backward, {LENGTH} tokens", (1 << 19, 1 << 20, 1 << 21),
             partial(_both, whole, "tiled")),
    ]  # fmt: skip
    if table.tiled.bf16_from_scores != NEVER:  # else its products are in fp32
        found.append(
            Pick("tiled.bf16_tile_queries", f"bf16, {LENGTH} tokens", (512, 1024, 2048), partial(_both, half, "tiled"))
        )
    return found


# --------------------------------------------------------------------------------------------------------------- rules


def rules(table: Tuning) -> list[str]:
    """Their names, "part.field"."""
    parts = {name: getattr(table, name) for name in PARTS}
    return [
        f"{name}.{field.name}" for name, part in parts.items() for field in fields(part) if field.type == Rule.__name__
    ]


def _by_engines(inputs: Inputs, way: Direction, names: Sequence[str]) -> dict[str, Run]:
    leaves, attend = choice.op_of(inputs)

    def forward(name: str) -> Tensor:
        with use_engine(name):
            return attend(*leaves)

    if way == "forward":
        return {name: partial(forward, name) for name in names}
    backward: Callable[..., object]
    if inputs.varlen:
        results = ops.varlen_attention(*leaves, *inputs.packing, None, *inputs.options)
        backward = partial(
            ops.varlen_attention_backward, inputs.dout, None, *results, *leaves, *inputs.packing, None, *inputs.options
        )
    else:
        results = ops.attention(*leaves, *inputs.options)
        backward = partial(
            ops.attention_backward, inputs.laid_out(inputs.dout), None, *results, *leaves, *inputs.options
        )
    return {name: partial(backward, name) for name in names}


def decided(problem: Problem, way: Direction, able: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The rules that decide between engines which could serve a call: their names, and the engines."""
    found: dict[str, tuple[str, str]] = {}
    if {"tiled", "sdpa_cpu"} <= set(able) and (name := sdpa_cpu.rule(problem, way)) is not None:
        found[f"sdpa_cpu.{name}"] = "tiled", "sdpa_cpu"
    for other in ("tiled", "sdpa_cpu"):
        if {"split_kv", other} <= set(able) and (name := split_kv.rule(problem, other)) is not None:
            found[f"split_kv.{name}"] = "split_kv", other
    return found


def measure(case: Case, direction: CaseDirection, measured: Measured, seconds: float) -> None:
    """One call, by all engines that can serve it, for the rules that decide between them and want more calls."""
    inputs = Inputs.of(case)
    problem = inputs.problem()
    for way in choice.ways(direction):
        able = [e.name for e in ENGINES if e.unsupported_reason(problem.q.device, problem, way) is None]
        rules_here = decided(problem, way, able)
        if not any(map(measured.wants, rules_here)):
            continue
        timings, ratios = compared(_by_engines(inputs, way, able), problem.q.device, seconds, SPREAD, None, SURE)
        times = {name: timing.median for name, timing in timings.items()}
        if any(ratio.spread >= SPREAD and ratio.low < 1.0 < ratio.high for ratio in ratios.values()):
            measured.noisy += 1
            continue
        for name, (one, other) in rules_here.items():
            measured.add(name, problem, times[one], times[other])


def measure_calls(seconds: float, tell: Callable[[str], object]) -> Measured:
    """Random calls, as many as there is time for."""
    measured, end = Measured(), time.perf_counter() + seconds
    for number, (case, direction) in enumerate(choice.calls(MOST_CALLS, SEED, MOST_PRODUCTS)):
        if time.perf_counter() >= end:
            break
        measure(case, direction, measured, SECONDS_A_CALL)
        if number % 50 == 49:
            tell(f"{number + 1} calls, {max(0.0, end - time.perf_counter()):.0f} s left, {measured.noisy} too noisy")
    return measured


# --------------------------------------------------------------------------------------------------------- the table


def here() -> str:
    """This machine and the day, as a table names it."""
    threads = torch.get_num_threads()
    return f"{threads} cores of {cpu_model()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, by tools.tune"


def signed(table: Tuning, before: Tuning, found: list[Found], place: str) -> Tuning:
    """The table with a name, and in measured_on what was measured here and where the rest is from."""
    parts: dict[str, Any] = {}
    for part, form in PARTS.items():
        settled = [result.name.partition(".")[2] for result in found if result.settled and result.name.startswith(part)]
        numbers, old = getattr(table, part), getattr(before, part).measured_on
        if settled:
            rest = "" if len(settled) == len(fields(form)) - 1 else f"; the rest: {old or 'not measured'}"
            numbers = replace(numbers, measured_on=f"{place}: {', '.join(settled)}{rest}")
        parts[part] = numbers
    return replace(table, name=f"{before.name}, tuned here", **parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune",
        description="Measures this machine and writes a table of tuned numbers, which COMPILED_FA_TUNING=FILE takes.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="it takes no longer, or hardly (default: 10)")
    parser.add_argument("--output", type=Path, default=Path("tuning.json"), metavar="FILE", help="default: tuning.json")
    parser.add_argument("--match", default="", metavar="TEXT", help="only numbers whose names contain this")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """-> exit status: 1 where nothing could be measured, and nothing was written."""
    options = _parser().parse_args(arguments)
    if (reason := eager_reason()) is not None:
        print(f"nothing to measure: engines on this CPU do not run compiled, as people have them: {reason}")
        return 1
    before = tuning.current()
    print(f"{here()}; class {cpu_class()}, table {before.name}", flush=True)
    seconds, say = 60.0 * options.minutes, partial(print, flush=True)
    numbers = [pick for pick in picks(before) if options.match in pick.name]
    asked_for = [name for name in rules(before) if options.match in name]
    with torch.no_grad():
        table, found = settle_all(numbers, before, seconds * (PART_OF_NUMBERS if asked_for else 1.0), say)
        if asked_for:
            with tuning.using(table):
                measured = measure_calls(seconds * (1.0 - PART_OF_NUMBERS if numbers else 1.0), say)
            for name in asked_for:
                result = settled_rule(name, table, measured)
                table = with_value(table, name, result.new)
                found.append(result)
                say(result)
    if not any(result.settled for result in found):
        print("nothing was measured: no file is written")
        return 1
    save(signed(table, before, found, here()), options.output)
    changes = [result for result in found if result.new != result.old]
    kept = [result for result in found if not result.settled]
    print(
        f"\n{len(changes)} of {len(found)} numbers changed against the table {before.name}, {len(kept)} not measured:"
    )
    for result in changes:
        print(f"  {result.name} {told(result.old)} -> {told(result.new)}")
    print(f"COMPILED_FA_TUNING={options.output} puts {options.output} in force")
    return 0


if __name__ == "__main__":
    sys.exit(main())
