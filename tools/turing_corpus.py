"""The corpus (tools/corpus): kernels of every kind, by the Turing stage and by stock Triton, and what they compute.

    python -m tools.turing_corpus [--json FILE] [--only NAME ...] [--seconds 120]

Each case's kernels are compiled for sm_75 both ways, at its full sizes; stock Triton is given up after --seconds. At
its small sizes the PTX of ours is executed on the CPU, and held against float64: its error may be twice that of
PyTorch's ops in the case's dtype. The exit code is 1 if one is wrong, or worse than stock Triton:

- it does not compile, or cannot be launched on a T4, and stock's can;
- it has more spills, or more scalar multiply-adds;
- it has no tensor-core instructions, though its dots are fp16 or int8;
- it has no dots, and its machine code is another.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from compiled_fa.testing.budget import budget, error
from tools.corpus import CASES, Case
from tools.offline.figures import SHARED
from tools.offline.launches import Grid, Launch, in_place_of_launches
from tools.offline.provenance import provenance
from tools.ptx import KernelError
from tools.ptx.program import Executed, kernels_on_ptx
from tools.turing_kernels import Code, Result, compiled_apart

COLUMNS = (
    "case",
    "tiles, warps, stages",
    "HMMA / IMMA / FFMA / spills",
    "registers, shared",
    "stock: HMMA / IMMA / FFMA / spills",
    "stock: registers, shared",
    "error (naive)",
)


@dataclasses.dataclass(frozen=True)
class Errors:
    """Greatest absolute differences from float64: of a case's result, of PyTorch's ops in its dtype, and allowed."""

    ours: float
    naive: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.ours <= self.allowed


def execute(case: Case) -> tuple[Errors, list[Executed]]:
    """At the small sizes. Raises KernelError for what a kernel may not do."""
    inputs = case.make(full=False)
    with kernels_on_ptx() as executed, _nan_where_unwritten():
        found = case.launch(inputs, full=False)
    exact, naive = (case.wanted(inputs, dtype) for dtype in (torch.float64, case.dtype))
    allowed = budget(naive, exact, float(exact.abs().max()))
    return Errors(error(found, exact), error(naive, exact), allowed), executed


@contextlib.contextmanager
def _nan_where_unwritten() -> Iterator[None]:
    """torch.empty filled with NaN, so that what no kernel writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def launches(case: Case, *, full: bool) -> list[Launch]:
    """What a case launches, without launching it."""
    found: list[Launch] = []

    def note(launch: Launch, grid: Grid, arguments: Mapping[str, Any]) -> None:
        found.append(launch)

    inputs = case.make(full=full)
    with in_place_of_launches(note):
        case.launch(inputs, full=full)
    return found


def worse(case: Case, ours: Result, stock: Result) -> list[str]:
    """In what ours is worse than stock, or than it should be; see the module's docstring."""
    if isinstance(ours, str):
        return [f"does not compile: {ours}"] if isinstance(stock, Code) or case.tensor_cores else []
    found = []
    if not case.tensor_cores and ours != stock:
        found.append("has no dots, and other machine code than stock's")
    found += [f"has no {kind.upper()}" for kind in sorted(case.tensor_cores) if not getattr(ours, kind)]
    if isinstance(stock, Code):
        for name, text in (("spills", "spills"), ("ffma", "scalar multiply-adds")):
            if getattr(ours, name) > getattr(stock, name):
                found.append(f"has {getattr(ours, name)} {text}, stock {getattr(stock, name)}")
        if stock.shared <= SHARED < ours.shared:
            found.append("cannot be launched, and stock's can")
    return found


def row_of(case: Case, seconds: float) -> dict[str, Any]:
    """A case's figures at its full sizes, its error at the small ones, and what is wrong with it."""
    (launch,) = launches(case, full=True)
    ours, stock = compiled_apart(launch, True), compiled_apart(launch, False, seconds)
    faults = worse(case, ours, stock)
    errors: Errors | None = None
    try:
        errors, _ = execute(case)
    except KernelError as reason:
        faults.append(f"{type(reason).__name__}: {reason}")
    if errors and not errors.right:
        faults.append(f"its error is {errors.ours:.1e}, allowed {errors.allowed:.1e}")
    return {
        "case": case.name,
        "kernel": launch.name,
        "sizes": dict(case.full),
        "tiles": dict(case.full_tiles),
        "options": dict(launch.options),
        "turing": _as_json(ours),
        "stock": _as_json(stock),
        "errors": dataclasses.asdict(errors) if errors else None,
        "faults": faults,
    }


def _as_json(result: Result) -> Any:
    return dataclasses.asdict(result) if isinstance(result, Code) else result


def markdown(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "| --- " * len(COLUMNS) + "|"
    for row in rows:
        options = row["options"]
        tiles = [_tile(name, value) for name, value in row["tiles"].items() if name not in options]
        cells = [row["case"], ", ".join([*tiles, str(options["num_warps"]), str(options["num_stages"])])]
        for found in (row["turing"], row["stock"]):
            if isinstance(found, str):
                cells += ["does not compile" if ": " in found else found, ""]  # or took too long
                continue
            shared = f"{found['shared'] / 1024:.4g} KB"
            text = f"{found['registers']}, {shared}"
            cells.append(f"{found['hmma']} / {found['imma']} / {found['ffma']} / {found['spills']}")
            cells.append(text if found["shared"] <= SHARED else f"{text}: cannot be launched")
        errors = row["errors"]
        cells.append(f"{errors['ours']:.1e} ({errors['naive']:.1e})" if errors else "not executed")
        yield "| " + " | ".join(cells) + " |"


def _tile(name: str, value: Any) -> str:
    return "x".join(map(str, value)) if name == "tile" else f"{name} {value}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], metavar="NAME", help="these cases")
    parser.add_argument("--seconds", type=float, default=120, help="after which stock Triton is given up (120)")
    asked = parser.parse_args(arguments)
    rows = []
    for case in CASES:
        if asked.only and case.name not in asked.only:
            continue
        rows.append(row_of(case, asked.seconds))
        print(case.name, *rows[-1]["faults"], sep=": ", file=sys.stderr, flush=True)
    print(*markdown(rows), sep="\n")
    if asked.json:
        asked.json.write_text(json.dumps({**provenance("tools.turing_corpus"), "rows": rows}, indent=1) + "\n")
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
