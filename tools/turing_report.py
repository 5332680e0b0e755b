"""Compiles the fused engine's kernels for a Tesla T4 (sm_75), on a machine without one, and tells what bounds them.

    python -m tools.turing_report [--json FILE]           every kernel of the engine's table, by stock Triton and ours
    python -m tools.turing_report --search [--json FILE]  the table anew: the best of a grid of tiles, warps, stages

It needs triton. Results are kept (in --cache) until the engine or the versions change, so that a run can be continued.
`peak`: the largest share of the tensor cores' fp16 peak that the loops can reach by the machine code's instruction mix,
counting no multiply-add twice; latency, and whatever is outside the loops, comes on top.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
import triton

from compiled_fa.problem import Direction
from compiled_fa.tuning import FlexOptions
from tools import kernel_traffic
from tools.offline.engine_kernels import (
    CLASSES,
    DIRECTIONS,
    EVERYTHING,
    HEAD_DIMS,
    PLAIN,
    Kernel,
    all_kernels,
)
from tools.offline.figures import SHARED, SUB_CORES, Figures, measure
from tools.offline.provenance import provenance

Traffic = Callable[[Kernel], Mapping[str, float]]  # bytes that a kernel moves, by what they are
ROOT = pathlib.Path(__file__).parents[1]
PROCESSES = 2
# What a kernel's machine code and figures depend on, besides its spec.
ENGINE = [f"compiled_fa/engines/fused/{name}.py" for name in ("blocks", "flex", "kernels", "mods")]
OFFLINE = [f"tools/offline/{name}.py" for name in ("compile", "engine", "fake_t4", "figures", "machine_code")]
COMPILING = ["compiled_fa/inductor/graphs.py", "compiled_fa/tuning/gpu.py"]
SOURCES = [*ENGINE, *OFFLINE, *COMPILING, "compiled_fa/scores/*.py", "compiled_fa_turing/*.py"]


@dataclasses.dataclass(frozen=True)
class Task:
    """A kernel to compile; by stock Triton if not turing."""

    kernel: Kernel
    turing: bool = True


Result = Figures | str  # figures, or why there are none


def compiled(tasks: Iterable[Task], cache: pathlib.Path) -> dict[Task, Result]:
    """Compiles what is not in the cache, in PROCESSES processes, with progress on stderr."""
    tasks = list(dict.fromkeys(tasks))
    results = {task: found for task in tasks if (found := _cached(cache, task)) is not None}
    missing = [task for task in tasks if task not in results]
    if not missing:
        return results
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        concurrent.futures.ProcessPoolExecutor(PROCESSES, context, _environment, (folder,)) as pool,
    ):
        futures = {pool.submit(_measure, task): task for task in missing}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            task, result = futures[future], future.result()
            results[task] = result
            _keep(cache, task, result)
            seconds = time.monotonic() - began
            print(f"{done} of {len(missing)}, {seconds:.0f} s: {_name(task)}", file=sys.stderr, flush=True)
    return results


def _environment(folder: str) -> None:
    """The compilers' caches in a folder that goes away."""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[name] = os.path.join(folder, name)


def _measure(task: Task) -> Result:
    try:
        return measure(task.kernel.spec, turing=task.turing)
    except Exception as error:  # a compiler's, of any type: to be shown in the task's row
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"[:200]


def _name(task: Task) -> str:
    kernel = task.kernel
    options = "-".join(str(value) for _, value in kernel.spec.options)
    return f"{kernel.direction} {kernel.head_dim} {options}, {kernel.features}{'' if task.turing else ', stock'}"


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {triton.__version__}".encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _entry(cache: pathlib.Path, task: Task) -> pathlib.Path:
    key = f"{_source_hash()} {task.turing} {task.kernel.spec}"
    return cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _cached(cache: pathlib.Path, task: Task) -> Result | None:
    path = _entry(cache, task)
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return content if isinstance(content, str) else Figures.from_dict(content)


def _keep(cache: pathlib.Path, task: Task, result: Result) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    _entry(cache, task).write_text(json.dumps(_as_json(result)))


def _as_json(result: Result | None) -> Any:
    return result.as_dict() if isinstance(result, Figures) else result


# The report


def report(
    kernels: Sequence[Kernel], cache: pathlib.Path, with_stock: Collection[str], traffic: Traffic | None = None
) -> list[dict[str, Any]]:
    """A row a kernel.

    Args:
        with_stock: the feature classes that stock Triton compiles too
        traffic: measures what a kernel moves, to be shown beside its figures
    """
    ours, stock = ([Task(kernel, turing) for kernel in kernels] for turing in (True, False))
    results: dict[Task, Result | None] = {**dict.fromkeys(stock), **compiled(ours, cache)}
    results |= compiled((task for task in stock if task.kernel.features in with_stock), cache)
    return [
        {
            "direction": kernel.direction,
            "head_dim": kernel.head_dim,
            "features": kernel.features,
            "options": dict(kernel.spec.options),
            "turing": _as_json(results[Task(kernel)]),
            "stock": _as_json(results[Task(kernel, turing=False)]),
            **({"traffic": dict(traffic(kernel))} if traffic else {}),
        }
        for kernel in kernels
    ]


COLUMNS = ("kernel", "tiles, warps, stages", "HMMA / FFMA / spills", "registers", "shared", "blocks/SM", "peak")
STOCK_COLUMNS = ("stock: HMMA / FFMA / spills", "stock: shared", "stock: peak")


def markdown(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The report as a table."""
    has_traffic = any("traffic" in row for row in rows)
    columns = (*COLUMNS, *STOCK_COLUMNS, *(("bytes moved",) if has_traffic else ()))
    yield "| " + " | ".join(columns) + " |"
    yield "| --- " * len(columns) + "|"
    for row in rows:
        ours, stock = row["turing"], row["stock"]
        of_row = [f"{row['direction']} {row['head_dim']}, {row['features']}", *cells(row["options"], ours)]
        if isinstance(stock, Mapping):
            of_row += [_counts(stock), _kilobytes(stock), _peak(stock)]
        else:
            of_row += [stock or "", "", ""]
        if has_traffic:
            of_row.append(", ".join(f"{name} {n:.3g}" for name, n in row.get("traffic", {}).items()))
        yield "| " + " | ".join(of_row) + " |"


def cells(options: Mapping[str, int], figures: Mapping[str, Any] | str) -> list[str]:
    """Of a row, behind the kernel's name."""
    if isinstance(figures, str):
        return [_options_text(options), figures, "", "", "", ""]
    registers, blocks = str(figures["registers"]), str(figures["blocks_per_sm"])
    return [_options_text(options), _counts(figures), registers, _kilobytes(figures), blocks, _peak(figures)]


def _options_text(options: Mapping[str, int]) -> str:
    *tiles, warps, stages = options.values()
    return f"{'x'.join(map(str, tiles)) if len(tiles) == 2 else ','.join(map(str, tiles))}, {warps}, {stages}"


def _counts(figures: Mapping[str, Any]) -> str:
    return f"{figures['hmma']} / {figures['ffma']} / {figures['spills']}"


def _kilobytes(figures: Mapping[str, Any]) -> str:
    text = f"{figures['shared'] / 1024:.4g} KB"
    return text if figures["shared"] <= SHARED else f"{text}: cannot be launched"


def _peak(figures: Mapping[str, Any]) -> str:
    return f"{figures['useful_share']:.0%}" if figures["loops"] else "-"


# The search

# Registers a thread that accumulators and scores take: more would spill, fewer leave a warp too little work.
FEWEST, MOST = 24, 168
NEAR = 0.9  # of the best bound: what hides latency is worth more than the rest


def grid(direction: Direction, head_dim: int) -> list[FlexOptions]:
    """The options that are tried: tiles that divide the block size, 128, and each other where the template's
    loops need it, with accumulators that may fit in the registers; small tiles and no pipeline where those are
    scarce."""
    scarce = head_dim >= 128
    stages = (1, 2) if scarce else (2,)
    found: list[FlexOptions] = []
    names: tuple[str, ...]
    if direction == "forward":
        columns = (16, 32, 64) if scarce else (32, 64)
        for m, n, warps, stage in itertools.product((64, 128), columns, (4, 8), stages):
            # Each warp has rows of its own, 16 at least: row maxima shared by warps would cost a dozen barriers.
            if m >= 16 * warps and FEWEST <= (m * head_dim + m * n) / (32 * warps) <= MOST:
                names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
                found.append(tuple(zip(names, (m, n, warps, stage), strict=True)))
        return found
    # Both halves of the kernel take tiles of one shape, turned: their blocks then have work alike.
    for short, long, warps, stage in itertools.product((16, 32, 64), (32, 64, 128), (4, 8), stages):
        accumulated = (2 * long * head_dim + 2 * short * long) / (32 * warps)
        if short <= long and FEWEST <= accumulated <= MOST:
            names = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages")
            found.append(tuple(zip(names, (short, long, long, short, warps, stage), strict=True)))
    return found


def ranked(results: Mapping[FlexOptions, Result]) -> list[FlexOptions]:
    """Best first: fits in an SM, does not spill, is near the best bound of those.

    Then what lets units overlap and hides loads: two warps a sub-core, the pipeline, two blocks an SM. Then the fewest
    cycles for the same multiply-adds; of equals, the larger tiles, which are loaded fewer times.
    """

    def first(options: FlexOptions) -> tuple[float, ...]:
        result = results[options]
        return (False, not result.fits, result.spills) if _is_usable(result) else (True, True, 0)

    usable = {options: result for options, result in results.items() if _is_usable(result)}
    best_first = min(map(first, usable), default=None)
    best_share = max((result.useful_share for o, result in usable.items() if first(o) == best_first), default=0.0)

    def key(options: FlexOptions) -> tuple[float, ...]:
        result, sizes = results[options], dict(options)
        if not _is_usable(result):
            return first(options)
        return (
            *first(options),
            result.useful_share < NEAR * best_share,
            result.blocks_per_sm * sizes["num_warps"] < 2 * SUB_CORES,
            sizes["num_stages"] == 1,
            result.blocks_per_sm < 2,
            -round(result.useful_share, 2),
            *(-value for name, value in options if name.startswith("BLOCK")),
            result.registers,
        )

    return sorted(results, key=key)


def _is_usable(result: Result) -> TypeGuard[Figures]:
    return isinstance(result, Figures) and bool(result.loops)


def search(cells: Sequence[tuple[Direction, int, str]], cache: pathlib.Path) -> dict[Kernel, list[dict[str, Any]]]:
    """The candidates of each cell (direction, head_dim, feature class), best first."""
    cells_tasks = {cell: [Task(Kernel(*cell, options)) for options in grid(cell[0], cell[1])] for cell in cells}
    results = compiled(itertools.chain.from_iterable(cells_tasks.values()), cache)
    found = {}
    for cell, tasks in cells_tasks.items():
        by_options = {task.kernel.spec.options: results[task] for task in tasks}
        found[Kernel(*cell)] = [
            {"options": dict(options), "turing": _as_json(by_options[options])} for options in ranked(by_options)
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("--search", action="store_true", help="redo the table of options")
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument(
        "--features", nargs="+", choices=CLASSES, help=f"default: all; of --search: {PLAIN}, everything"
    )
    parser.add_argument(
        "--stock", nargs="*", choices=CLASSES, default=CLASSES, help="those that stock Triton compiles too (all)"
    )
    parser.add_argument(
        "--traffic", action="store_true", help="execute the causal kernels' PTX on 256 tokens, and show bytes moved"
    )
    parser.add_argument("--cache", type=pathlib.Path, default=ROOT / "build" / "turing_report", metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.search:
        features = arguments.features or (PLAIN, EVERYTHING)
        cells = list(itertools.product(arguments.direction, arguments.head_dim, features))
        found = search(cells, arguments.cache)
        rows: list[dict[str, Any]] = []
        for kernel, candidates in found.items():
            name = {"direction": kernel.direction, "head_dim": kernel.head_dim, "features": kernel.features}
            rows.append({**name, "candidates": candidates})
            print(f"{kernel.direction} {kernel.head_dim}, {kernel.features}")
            for candidate in candidates[:3]:
                print("  ", candidate_text(candidate))
    else:
        chosen = [
            kernel
            for kernel in all_kernels()
            if kernel.direction in arguments.direction
            and kernel.head_dim in arguments.head_dim
            and kernel.features in (arguments.features or CLASSES)
        ]
        rows = report(chosen, arguments.cache, arguments.stock, _traffic if arguments.traffic else None)
        print("\n".join(markdown(rows)))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({**provenance("tools.turing_report"), "rows": rows}, indent=1) + "\n")
    return 0


def _traffic(kernel: Kernel) -> dict[str, float]:
    """Of a causal kernel with the table's options: bytes by its tiles, and as counted in its executed PTX."""
    if kernel.features != PLAIN or kernel.options is not None:
        return {}
    model = sum(kernel_traffic.modelled(kernel.direction, kernel.head_dim, 256).values())
    return {"modelled": model, **kernel_traffic.measured(kernel.direction, kernel.head_dim, 256)}


def candidate_text(candidate: Mapping[str, Any]) -> str:
    figures = candidate["turing"]
    if isinstance(figures, str):
        return f"{_options_text(candidate['options'])}: {figures}"
    return (
        f"{_options_text(candidate['options'])}: {figures['spills']} spills, {figures['registers']} registers, "
        f"{_kilobytes(figures)}, {figures['blocks_per_sm']} blocks/SM, {_peak(figures)} of peak"
    )


if __name__ == "__main__":
    sys.exit(main())
