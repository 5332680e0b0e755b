"""How long the loops of a kernel take on a Turing GPU, simulated from its machine code: nothing here needs a GPU.

    python -m tools.turing_cycles                                 the fused engine's kernels, on a Tesla T4
    python -m tools.turing_cycles --card "TITAN RTX" --head-dim 64 --features causal
    python -m tools.turing_cycles --kernel matmul --signature "*fp16:16, *fp16:16, *fp32:16, i32:16, 64" file.py
    python -m tools.turing_cycles --stages 1 script.py            every kernel that a script launches

What is simulated, and what not, stands in tools/offline/issue.py; the times of units and memories, each with its
source, in tools/offline/turing_sm.py. How far that is from what was measured on cards is in docs/turing.md.

A line a loop with dots: cycles a block takes for an iteration while as many blocks as fit share the SM; the share of
that time in which the tensor cores, and shared memory, are busy; and what the schedulers wait for when they issue
nothing. A script and a signature are as for tools.turing_kernels. Of the engine's kernels, `peak` is what they reach of
the card's tensor cores on long sequences, each multiply-add counted once: of the loops over tiles without a mask.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tools.offline import Kernel, in_own_process
from tools.offline.compile import Compiled, compile_ast
from tools.offline.engine import compile_spec
from tools.offline.engine_kernels import CLASSES, DIRECTIONS, HEAD_DIMS, PLAIN, all_kernels
from tools.offline.figures import (
    FEWEST_DOT_INSTRUCTIONS,
    MULTIPLY_ADDS,
    SUB_CORES,
    blocks_per_sm,
    kinds_of_loops,
    loops_over_tiles,
)
from tools.offline.issue import Run, simulate
from tools.offline.launches import launches_of
from tools.offline.machine_code import inner_loops
from tools.offline.turing_sm import CARDS, T4, Card
from tools.turing_kernels import launch_of

MENTIONED = 0.05  # of the schedulers' time


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Of a kernel: its loops with dots, in the order of the code; empty where no block fits in an SM."""

    blocks: int
    registers: int
    spills: int
    shared: int
    runs: tuple[Run, ...]

    def of_a_block(self, loop: int) -> float:
        return self.runs[loop].cycles / self.blocks


@dataclasses.dataclass(frozen=True)
class OfKernel:
    """peak: of the card's tensor cores, on long sequences; teraflops: the same as a rate, as papers count"""

    cycles: Cycles
    peak: float
    teraflops: float


def cycles_of(compiled: Compiled, card: Card = T4) -> Cycles:
    blocks = blocks_per_sm(compiled.registers, compiled.shared, compiled.num_warps)
    loops = [loop for loop in inner_loops(compiled.sass) if loop.dot_instructions >= FEWEST_DOT_INSTRUCTIONS]
    runs = [simulate(loop.instructions, compiled.num_warps, blocks, card) for loop in loops] if blocks else []
    return Cycles(blocks, compiled.registers, compiled.spills, compiled.shared, tuple(runs))


def measure(kernel: Kernel, card: Card = T4) -> OfKernel:
    """Compiles a kernel of the engine. Call it in a process of its own.

    Raises:
        ValueError: no block of it fits in an SM, or its loops are not the template's
    """
    compiled = compile_spec(kernel.spec, turing=True)
    cycles = cycles_of(compiled, card)
    loops = loops_over_tiles(compiled, kinds_of_loops(kernel.spec))
    if not cycles.runs or len(loops) != len(cycles.runs):
        raise ValueError(f"{kernel}: {cycles.blocks} blocks an SM, {len(cycles.runs)} loops with dots")
    unmasked = {loop.kind: i for i, loop in enumerate(loops)}  # of each kind, the last
    an_element = sum(cycles.of_a_block(i) / loops[i].elements for i in unmasked.values())  # of the score matrix
    multiply_adds = kernel.head_dim * (2 if kernel.direction == "forward" else 5)
    done = multiply_adds / an_element  # a cycle, of an SM
    return OfKernel(
        cycles=cycles,
        peak=done / (SUB_CORES * MULTIPLY_ADDS * T4.hmma / card.hmma),
        teraflops=2 * done * card.sms * card.hertz / 1e12,
    )


def lines(name: str, cycles: Cycles) -> Iterator[str]:
    yield (
        f"{name}: {cycles.registers} registers, {cycles.spills} spills, {cycles.shared / 1024:.4g} KB, "
        f"{cycles.blocks} blocks/SM"
    )
    for i, run in enumerate(cycles.runs):
        waits = sorted(run.waits.items(), key=lambda item: -item[1])
        told = ", ".join(f"{reason} {share:.0%}" for reason, share in waits if share >= MENTIONED)
        yield (
            f"    {cycles.of_a_block(i):6.0f} cycles, tensor cores {run.busy['tensor']:.0%}, shared memory "
            f"{run.busy['shared']:.0%}, issues {run.issued:.0%}; waits for {told or 'little'}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default=T4.name)
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS)
    parser.add_argument("--head-dim", nargs="+", type=int, choices=HEAD_DIMS, default=HEAD_DIMS)
    parser.add_argument("--features", nargs="+", choices=CLASSES, default=[PLAIN])
    parser.add_argument("--kernel", help="a @triton.jit function of the file, which is imported, not run")
    parser.add_argument("--signature", help="the types of its arguments, and the values of its constants")
    parser.add_argument("--warps", type=int, help="in place of the launch's num_warps; of --kernel (4)")
    parser.add_argument("--stages", type=int, help="in place of the launch's num_stages; of --kernel (2)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures here too")
    parser.add_argument("file", type=pathlib.Path, nargs="?", help="a Python file with Triton kernels")
    asked = parser.parse_args(arguments)
    if bool(asked.kernel) != bool(asked.signature) or (asked.kernel and not asked.file):
        parser.error("--kernel, --signature and a file are wanted together")
    if asked.file and not asked.file.is_file():
        parser.error(f"file: there is no {asked.file}")
    card = CARDS[asked.card]
    rows = _of_a_file(asked, card) if asked.file else _of_the_engine(asked, card)
    found = []
    for row, text in rows:
        print(*text, sep="\n", flush=True)
        found.append(row)
    if asked.json:
        content = {"command": " ".join(["python", "-m", "tools.turing_cycles", *(arguments or sys.argv[1:])])}
        asked.json.write_text(json.dumps({**content, "card": dataclasses.asdict(card), "rows": found}, indent=1) + "\n")
    return 0


Row = tuple[Mapping[str, Any], Sequence[str]]


def _of_the_engine(asked: argparse.Namespace, card: Card) -> Iterator[Row]:
    for kernel in all_kernels():
        wanted = kernel.direction in asked.direction and kernel.head_dim in asked.head_dim
        if wanted and kernel.features in asked.features:
            found = in_own_process(measure, kernel, card)
            options = ", ".join(str(value) for _, value in kernel.spec.options)
            name = f"{kernel.direction} {kernel.head_dim}, {kernel.features} ({options})"
            told = f"{name}: {found.peak:.0%} of peak, {found.teraflops:.1f} TFLOP/s"
            yield {"kernel": name, **dataclasses.asdict(found)}, list(lines(told, found.cycles))


def _of_a_file(asked: argparse.Namespace, card: Card) -> Iterator[Row]:
    changed = {"num_warps": asked.warps, "num_stages": asked.stages}
    changed = {name: value for name, value in changed.items() if value is not None}
    if asked.kernel:
        options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
        launches = [launch_of(asked.file, asked.kernel, asked.signature, options)]
    else:
        launches, error = launches_of(asked.file, [])
        if error is not None:
            print(f"{asked.file} ended with {type(error).__name__}: {error}", file=sys.stderr)
    seen = set()
    for launch in launches:
        options = {**launch.options, **changed}
        constants = ", ".join(f"{name}={value}" for name, value in launch.constants.items())
        name = f"{launch.name}({constants}), {options['num_warps']} warps, {options['num_stages']} stages"
        if name in seen:  # an autotuner's configurations differ in what was changed
            continue
        seen.add(name)
        cycles = cycles_of(compile_ast(launch.source, True, options), card)
        if cycles.runs:
            yield {"kernel": name, **dataclasses.asdict(cycles)}, list(lines(name, cycles))


if __name__ == "__main__":
    sys.exit(main())
