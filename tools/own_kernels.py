"""Compiles the triton engine's kernels for a Tesla T4 (sm_75), on a machine without one, and tells what bounds them.

    python -m tools.own_kernels [--json FILE]           every kernel of the engine's table
    python -m tools.own_kernels --search [--json FILE]  the table anew: the best of a grid of tiles, warps and stages

The figures are those of `python -m tools.turing_report`, which has flex_attention's kernels, and the share of the peak
that `python -m tools.turing_cycles` simulates, in tiles without a mask. It needs triton. Results
are kept (in --cache) until kernels or versions change, so that a run can be continued.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton

from compiled_fa.engines.triton.launching import FORWARD, KEYS, QUERIES, Launch
from compiled_fa.tuning import FlexOptions, TileOptions
from tools import turing_report
from tools.offline.compile import Compiled
from tools.offline.figures import MULTIPLY_ADDS, SUB_CORES, Figures, figures_of_launch
from tools.offline.own_kernels import KERNELS, TERMS, compile_launch, launch_of
from tools.offline.provenance import provenance
from tools.turing_cycles import cycles_of

ROOT = turing_report.ROOT
HEAD_DIMS = (64, 96, 128, 192, 256)
SEARCHED = (32, 64, 128, 256)  # the others take the tiles of the next power of two
NAMES = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
SOURCES = (
    "compiled_fa/engines/triton/*.py",
    "compiled_fa/scores/*.py",
    "compiled_fa_turing/*.py",
    *(
        f"tools/offline/{name}.py"
        for name in ("compile", "figures", "issue", "machine_code", "own_kernels", "turing_sm")
    ),
)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """kernel: "forward", "queries" or "keys". terms: a key of TERMS. options: those of the table if None."""

    kernel: str
    head_dim: int
    terms: str
    options: TileOptions | None = None

    def __str__(self) -> str:
        return f"{self.kernel} {self.head_dim}, {self.terms}"


@dataclasses.dataclass(frozen=True)
class Measured:
    """figures: or why there are none. simulated: share of a T4's peak in tiles without a mask, latency and all, as
    tools/turing_cycles.py has it."""

    figures: turing_report.Result
    simulated: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        figures = self.figures.as_dict() if isinstance(self.figures, Figures) else self.figures
        return {"turing": figures, "simulated": self.simulated}

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> "Measured":
        figures = kept["turing"]
        return cls(figures if isinstance(figures, str) else Figures.from_dict(figures), kept["simulated"])


def simulated(launch: Launch, compiled: Compiled) -> float:
    found = cycles_of(compiled)
    if len(found.runs) != 2:
        return 0.0
    size = launch.constants
    d, d_v = size["HEAD_DIM"], size["HEAD_DIM_V"]
    multiply_adds: int = {FORWARD: d + d_v, QUERIES: 2 * d + d_v, KEYS: 2 * d + 2 * d_v}[launch.kernel]
    cycles: float = found.of_a_block(1) / (size["BLOCK_M"] * size["BLOCK_N"])  # of a score
    return multiply_adds / cycles / (SUB_CORES * MULTIPLY_ADDS)


def measured(kernel: Kernel, cache: pathlib.Path) -> Measured:
    launch = launch_of(*dataclasses.astuple(kernel))
    key = f"{_source_hash()} {kernel} {launch.constants} {launch.num_warps} {launch.num_stages}"
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if path.exists():
        return Measured.from_dict(json.loads(path.read_text()))
    try:
        compiled = compile_launch(launch)
        result = Measured(figures_of_launch(launch, compiled), simulated(launch, compiled))
    except Exception as error:  # a compiler's, of any type: to be shown in the kernel's row
        result = Measured(f"{type(error).__name__}: {error}".splitlines()[0][:200])
    cache.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.as_dict()))
    return result


def _source_hash() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {triton.__version__}".encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def grid(kernel: str, head_dim: int) -> Iterator[TileOptions]:
    """The options that are tried: accumulators that may fit in the registers, and a whole row, or column, of them for
    each warp, whose maxima and sums would be shared between warps else."""
    for m, n, warps, stages in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2)):
        rows, columns = (n, m) if kernel == "keys" else (m, n)
        accumulated = {
            "forward": rows * head_dim + rows * columns,
            "queries": rows * head_dim + 2 * rows * columns,
            "keys": 2 * rows * head_dim + 2 * rows * columns,
        }[kernel] / (32 * warps)
        shared_by_warps = kernel == "forward" and rows < 16 * warps
        small = columns > rows or rows < (64 if kernel == "forward" else 32)
        if not small and not shared_by_warps and turing_report.FEWEST <= accumulated <= turing_report.MOST:
            yield m, n, warps, stages


def search(cells: Sequence[Kernel], cache: pathlib.Path) -> Iterator[tuple[Kernel, list[dict[str, Any]]]]:
    """The candidates of each cell, best first, in the order of tools/turing_report.py."""
    for cell in cells:
        results: dict[FlexOptions, Measured] = {}
        for options in grid(cell.kernel, cell.head_dim):
            named = tuple(zip(NAMES, options, strict=True))
            results[named] = measured(dataclasses.replace(cell, options=options), cache)
        ranked = turing_report.ranked({named: result.figures for named, result in results.items()})
        yield cell, [{"options": dict(named), **results[named].as_dict()} for named in ranked]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--search", action="store_true", help="redo the table of options")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--head-dim", nargs="+", type=int, help=f"default: {HEAD_DIMS}; of --search: {SEARCHED}")
    parser.add_argument("--terms", nargs="+", choices=TERMS, default=["causal", "dropout", "all"])
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "build" / "own_kernels", metavar="FOLDER")
    asked = parser.parse_args(arguments)
    head_dims = asked.head_dim or (SEARCHED if asked.search else HEAD_DIMS)
    kernels = [Kernel(*names) for names in itertools.product(asked.kernel, head_dims, asked.terms)]
    rows: list[dict[str, Any]] = []
    if asked.search:
        for kernel, candidates in search(kernels, asked.cache):
            rows.append({**dataclasses.asdict(kernel), "candidates": candidates})
            print(kernel)
            for candidate in candidates[:4]:
                text = f"{turing_report.candidate_text(candidate)}, simulated {candidate['simulated']:.0%}"
                print("  ", text, flush=True)
    else:
        columns = (*turing_report.COLUMNS, "simulated")
        print("| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|", sep="\n", flush=True)
        for kernel in kernels:
            launch, result = launch_of(*dataclasses.astuple(kernel)), measured(kernel, asked.cache)
            options = {name: launch.keywords[name] for name in NAMES}
            row = {"options": options, **result.as_dict()}
            rows.append({**dataclasses.asdict(kernel), **row})
            told = [str(kernel), *turing_report.cells(options, row["turing"]), f"{result.simulated:.0%}"]
            print("| " + " | ".join(told) + " |", flush=True)
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps({**provenance("tools.own_kernels"), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
