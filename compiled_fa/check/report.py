"""The command `python -m compiled_fa`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .. import config, engines
from ..problem import Direction
from ..testing import RESULTS, Case, Inputs, run, run_naive, run_op
from ..testing.budget import error, expected
from ..timing import interleaved_medians
from .cases import CASES, has_sdpa, sdpa
from .environment import describe


def check(name: str, inputs: Inputs[Case], engine: str) -> dict[str, Any]:
    """One row of the report."""
    dtype = inputs.case.dtype
    start = time.perf_counter()
    ours = run_op(inputs, engine)
    first = time.perf_counter() - start
    wanted = expected(inputs)
    found = {result: error(x, wanted[result].exact) for result, x in ours.items()}
    peers: dict[str, Callable[[], object]] = {"ours": lambda: run_op(inputs, engine)}
    peers["naive"] = lambda: run_naive(inputs, dtype)
    if has_sdpa(inputs.case):
        peers["sdpa"] = lambda: run(partial(sdpa, inputs), inputs)
    problem = inputs.problem()
    directions: tuple[Direction, ...] = ("forward", "backward")
    return {
        "case": name,
        "engines": {direction: engines.select(problem, direction, engine).engine.name for direction in directions},
        "errors": {
            result: {"ours": found[result], "naive": of.naive, "budget": of.allowed} for result, of in wanted.items()
        },
        "seconds": interleaved_medians(peers, inputs.device),
        "first_use_seconds": first,
        "ok": all(of.allows(found[result]) for result, of in wanted.items()),
    }


def table(rows: list[dict[str, Any]]) -> str:
    header = f"{'case':<16}" + "".join(f"{name + ' error (naive)':>20}" for name in RESULTS)
    lines = [header + f"{'time / naive':>14}{'/ SDPA':>8}   {'within budget':<16}forward by, gradients by"]
    for row in rows:
        cells = "".join(f"{e['ours']:>10.1e} ({e['naive']:.1e})" for e in row["errors"].values())
        seconds = row["seconds"]
        sdpa = f"{seconds['ours'] / seconds['sdpa']:.2f}" if "sdpa" in seconds else "-"
        verdict, by = "yes" if row["ok"] else "NO", ", ".join(row["engines"].values())
        lines.append(
            f"{row['case']:<16}{cells}{seconds['ours'] / seconds['naive']:>14.2f}{sdpa:>8}   {verdict:<16}{by}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """-> exit status: 1 when a case is out of its error budget."""
    parser = argparse.ArgumentParser(
        prog="python -m compiled_fa",
        description="Tell which engine serves this machine, and hold it against float64, naive attention and SDPA.",
        epilog="python -m compiled_fa report: this, a table of speeds, and a file and a picture of both to share.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--device", default=None, help="default: cuda where available, else cpu")
    parser.add_argument("--engine", default=engines.requested(), choices=config.ENGINES)
    parser.add_argument("--dtype", default=None, choices=["float16", "bfloat16", "float32", "float64"])
    parser.add_argument("--case", action="append", choices=list(CASES), help="repeat for several")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, options.dtype or ("float32" if device.type == "cpu" else "float16"))

    environment = describe(device, options.engine)
    if not options.json:
        print("\n".join(f"{label:<20}{value}" for label, value in environment.items()), flush=True)
        print(f"\nForward and gradients in {dtype}, errors against float64:", flush=True)
    chosen = [name for name in CASES if not options.case or name in options.case]
    rows = []
    for number, name in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {name}: compiling and checking ...", file=sys.stderr, flush=True)
        # Nobody differentiates lse, as in a model.
        inputs = replace(Inputs.of(replace(CASES[name], dtype=dtype), device), dlse=None)
        rows.append(check(name, inputs, options.engine))
        first = rows[-1]["first_use_seconds"]
        print(f"[{number}/{len(chosen)}] {name}: done, first use {first:.1f} s", file=sys.stderr, flush=True)
    ok = all(row["ok"] for row in rows)
    if options.json:
        print(json.dumps({"environment": environment, "dtype": str(dtype), "cases": rows, "ok": ok}, indent=2))
    else:
        print(table(rows))
        print("Times are of forward and gradients together; below 1 ours is faster.")
        print("All within budget." if ok else "OUT OF BUDGET: see the rows marked NO.")
    return 0 if ok else 1
