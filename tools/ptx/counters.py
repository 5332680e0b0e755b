"""What a launch did, counted as it ran: instructions by class, memory traffic, shared-memory transactions."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from .arrays import Array, Bools
from .parser import Instruction

SECTOR = 32  # bytes: what a GPU reads from or writes to global memory at once
BANKS = 32  # of shared memory, 4 bytes wide

_CLASSES = {
    "tensor": {"mma"},
    "special function": {"ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"},
    "conversion": {"cvt"},
    "move": {"mov", "selp", "cvta"},
    "branch": {"bra", "ret", "exit"},
    "barrier": {"bar", "barrier", "membar", "fence"},
    "shuffle": {"shfl", "vote", "activemask"},
    "atomic": {"atom", "red"},
    "matrix load": {"ldmatrix"},
}
_CLASS_OF = {opcode: name for name, opcodes in _CLASSES.items() for opcode in opcodes}


def class_of(instruction: Instruction) -> str:
    if instruction.opcode in _CLASS_OF:
        return _CLASS_OF[instruction.opcode]
    if instruction.opcode in ("ld", "st"):
        space = next((m for m in instruction.modifiers if m in ("global", "shared", "param", "local")), "generic")
        return f"{space} {'load' if instruction.opcode == 'ld' else 'store'}"
    if instruction.opcode == "div" and instruction.modifiers[-1][0] == "f":
        return "float division"
    if instruction.modifiers and instruction.modifiers[-1] in ("f16", "f16x2", "f32", "f64"):
        return "float"
    return "integer"


@dataclass
class Traffic:
    """One buffer's traffic. `bytes` counts what threads asked for, `sectors` what their warps' requests touch (each
    instruction on its own: what L1 passes on if it holds nothing), `touched` the distinct sectors of the launch (what
    memory must move at least, with a perfect cache)."""

    bytes_read: int = 0
    bytes_written: int = 0
    sectors_read: int = 0
    sectors_written: int = 0
    touched_read: int = 0
    touched_written: int = 0


@dataclass
class SharedTraffic:
    """`transactions` are the passes over the 32 banks that the accesses take, `conflicts` those among them that an
    access without two words of one bank would not have taken."""

    accesses: int = 0
    transactions: int = 0
    conflicts: int = 0


@dataclass
class Counters:
    """Counts of one launch. Instructions are counted once a warp, as the hardware issues them."""

    instructions: Counter[str] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    buffers: dict[str, Traffic] = field(default_factory=dict)
    shared_loads: SharedTraffic = field(default_factory=SharedTraffic)
    shared_stores: SharedTraffic = field(default_factory=SharedTraffic)
    tensor_flops: int = 0
    blocks: int = 0
    barriers: int = 0
    _patterns: dict[bytes, tuple[int, int]] = field(default_factory=dict, repr=False)

    @property
    def global_bytes(self) -> int:
        """The least that global memory moves for this launch: every sector it touches, once a direction."""
        return SECTOR * sum(traffic.touched_read + traffic.touched_written for traffic in self.buffers.values())

    @property
    def sector_bytes(self) -> int:
        """What the launch asks of the caches below L1."""
        return SECTOR * sum(traffic.sectors_read + traffic.sectors_written for traffic in self.buffers.values())

    @property
    def shared_transactions(self) -> int:
        return self.shared_loads.transactions + self.shared_stores.transactions

    @property
    def bank_conflicts(self) -> int:
        """Those of `shared_transactions` that conflicts cost."""
        return self.shared_loads.conflicts + self.shared_stores.conflicts

    @property
    def arithmetic_intensity(self) -> float:
        """Tensor-core operations a byte of `global_bytes`."""
        return self.tensor_flops / max(self.global_bytes, 1)

    def count_shared(self, kind: SharedTraffic, addresses: Array, active: Bools, size: int) -> None:
        """Counts one access of `size` bytes (at most 16) a thread.

        A pass serves 32 words: a warp's at 4 bytes a thread, half a warp's at 8, a quarter's at 16. Threads that want
        the same word share it; words of the same bank take turns.
        """
        key = b"%d" % size + addresses.tobytes() + active.tobytes()
        if key not in self._patterns:
            words = max(size // 4, 1)
            word = (addresses[:, None] // 4 + np.arange(words)).reshape(-1, BANKS)
            groups = word.shape[0]
            word = np.sort(np.where(np.repeat(active, words).reshape(-1, BANKS), word, -1), axis=1)
            distinct = word >= 0
            distinct[:, 1:] &= word[:, 1:] != word[:, :-1]
            slot = np.arange(groups)[:, None] * BANKS + word % BANKS
            in_bank = np.bincount(slot[distinct], minlength=groups * BANKS).reshape(groups, BANKS)
            passes = in_bank.max(axis=1)
            self._patterns[key] = int(passes.sum()), int((passes - (passes > 0)).sum())
        transactions, conflicts = self._patterns[key]
        kind.accesses += 1
        kind.transactions += transactions
        kind.conflicts += conflicts


def sectors_of_warps(addresses: Array, active: Bools, size: int) -> int:
    """How many sectors the warps of one access touch, each warp on its own."""
    first, last = addresses // SECTOR, (addresses + size - 1) // SECTOR
    sector: Array = np.where(active, first, -1).reshape(-1, 32)
    if not np.array_equal(first, last):  # aligned accesses of up to 32 bytes never straddle; others do not occur
        raise AssertionError("an access straddles two sectors")
    sector = np.sort(sector, axis=1)
    return int((sector[:, 0] >= 0).sum() + (np.diff(sector, axis=1) != 0).sum())
