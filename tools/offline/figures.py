"""What the machine code of an engine kernel says about its speed on a T4: occupancy, and what bounds its loops."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from compiled_fa.engines.fused.kernels import Spec
from compiled_fa.engines.triton.launching import FORWARD, KEYS, QUERIES, Launch
from tools.offline.compile import Compiled
from tools.offline.engine import compile_spec
from tools.offline.machine_code import UNITS, inner_loops

# One SM
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 64 << 10, 1024, 16
MULTIPLY_ADDS = 128  # a cycle, of one sub-core's tensor cores, in fp16
SUB_CORES = 4
FEWEST_DOT_INSTRUCTIONS = 16  # of a loop over tiles; other loops have none


@dataclasses.dataclass(frozen=True)
class Loop:
    """One of a kernel's loops over tiles. The template writes two of each kind: for full tiles, and for masked ones.

    cycles: of each unit, that a warp needs for an iteration; see machine_code.py
    ideal: tensor-core cycles that an iteration's multiply-adds take when every warp has an equal part of them
    """

    kind: str  # "out", "dk dv" or "dq"
    elements: int  # of the score matrix that an iteration covers, over all warps
    cycles: dict[str, int]
    ideal: float

    @property
    def bound(self) -> int:
        return max(self.cycles.values())

    @property
    def bound_by(self) -> str:
        return max(UNITS, key=lambda unit: self.cycles[unit])

    @property
    def tensor_share(self) -> float:
        """Of the tensor cores' peak rate, while the loop runs; work that several warps repeat counts."""
        return self.cycles["tensor"] / self.bound


@dataclasses.dataclass(frozen=True)
class Figures:
    """loops: empty where the machine code's loops are not the template's, one to one."""

    hmma: int
    ffma: int
    spills: int
    registers: int
    shared: int
    blocks_per_sm: int
    loops: tuple[Loop, ...]

    @property
    def fits(self) -> bool:
        """A block can be launched."""
        return self.shared <= SHARED and self.blocks_per_sm > 0

    @property
    def tensor_share(self) -> float:
        """Of the loop that is bound most by something else."""
        return min((loop.tensor_share for loop in self.loops), default=0.0)

    @property
    def useful_share(self) -> float:
        """Of the tensor cores' peak, counting each multiply-add once: what all loops would reach in perfect overlap."""
        bound = sum(loop.bound / loop.elements for loop in self.loops)
        return sum(loop.ideal / loop.elements for loop in self.loops) / bound if bound else 0.0

    @property
    def bound_by(self) -> str:
        """The unit that bounds most of the loops."""
        return collections.Counter(loop.bound_by for loop in self.loops).most_common(1)[0][0] if self.loops else "-"

    def as_dict(self) -> dict[str, object]:
        derived = {name: getattr(self, name) for name in ("fits", "tensor_share", "useful_share", "bound_by")}
        return {**dataclasses.asdict(self), **derived}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Figures":
        """From what `as_dict` gave, by way of JSON perhaps."""
        known = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**known, "loops": tuple(Loop(**loop) for loop in values["loops"])})


def measure(spec: Spec, *, turing: bool) -> Figures:
    """Compiles a kernel, by stock Triton or with the project's stage. Call it in a process of its own."""
    return figures_of(spec, compile_spec(spec, turing=turing))


def figures_of(spec: Spec, compiled: Compiled) -> Figures:
    return figures(compiled, kinds_of_loops(spec))


def kinds_of_loops(spec: Spec) -> list[tuple[str, int, int]]:
    """Of a kernel of the template: name, scores of a tile, multiply-adds of a score."""
    d, d_v, size = spec.head_dim, spec.head_dim_v, dict(spec.options)
    if spec.direction == "forward":
        return [("out", size["BLOCK_M"] * size["BLOCK_N"], d + d_v)] * 2
    of_keys = "dk dv", size["BLOCK_M1"] * size["BLOCK_N1"], 2 * d + 2 * d_v
    return [of_keys] * 2 + [("dq", size["BLOCK_M2"] * size["BLOCK_N2"], 2 * d + d_v)] * 2


def figures_of_launch(launch: Launch, compiled: Compiled) -> Figures:
    """Of a kernel of the triton engine."""
    size = launch.constants
    d, d_v = size["HEAD_DIM"], size["HEAD_DIM_V"]
    kinds = {FORWARD: ("out", d + d_v), QUERIES: ("dq", 2 * d + d_v), KEYS: ("dk dv", 2 * d + 2 * d_v)}
    kind, depth = kinds[launch.kernel]
    return figures(compiled, [(kind, size["BLOCK_M"] * size["BLOCK_N"], depth)] * 2)


def figures(compiled: Compiled, kinds: Sequence[tuple[str, int, int]]) -> Figures:
    """kinds: of its loops over tiles, as of `kinds_of_loops`."""
    return Figures(
        hmma=compiled.hmma,
        ffma=compiled.ffma,
        spills=compiled.spills,
        registers=compiled.registers,
        shared=compiled.shared,
        blocks_per_sm=blocks_per_sm(compiled.registers, compiled.shared, compiled.num_warps),
        loops=tuple(loops_over_tiles(compiled, kinds)),
    )


def blocks_per_sm(registers: int, shared: int, num_warps: int) -> int:
    """How many blocks an SM holds at once. Registers are given to a warp by the 256, shared memory by the 256 bytes."""
    of_a_warp = -(-registers * 32 // 256) * 256
    limits = [REGISTERS // SUB_CORES // of_a_warp * SUB_CORES // num_warps, THREADS // (32 * num_warps), BLOCKS]
    if shared:
        limits.append(SHARED // (-(-shared // 256) * 256))
    return min(limits)


def loops_over_tiles(compiled: Compiled, kinds: Sequence[tuple[str, int, int]]) -> list[Loop]:
    """In the order of the code: of each kind first for masked tiles, then for full ones.

    Which kind comes first is the compiler's choice, so loops are told apart by their work: the more multiply-adds an
    iteration of a kind has, the more cycles of tensor cores (or multiply-adds elsewhere) its loops have.
    """
    found = [loop for loop in inner_loops(compiled.sass) if loop.dot_instructions >= FEWEST_DOT_INSTRUCTIONS]
    if len(found) != len(kinds):
        return []
    by_work = sorted(range(len(found)), key=lambda i: (found[i].bounds["tensor"], found[i].dot_instructions))
    # Both orders are stable: kinds of equal work are in the order of `kinds`.
    kind_of = dict(zip(by_work, sorted(kinds, key=lambda kind: kind[1] * kind[2]), strict=True))
    return [
        Loop(kind, elements, dict(loop.bounds), elements * depth / MULTIPLY_ADDS / compiled.num_warps)
        for loop, (kind, elements, depth) in ((loop, kind_of[i]) for i, loop in enumerate(found))
    ]
