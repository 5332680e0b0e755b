"""The control word of a machine instruction: what the compiler tells a warp scheduler about it.

Volta's and Turing's instructions are 128 bits, 21 of which, from bit 105 on, are for the scheduler (Jia et al.,
Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking, arXiv 1804.06826, section 2): cycles to wait before
the warp's next instruction (4 bits), whether another warp may be preferred then (1), which of six scoreboards is held
until the result is written (3) and until the operands are read (3), which scoreboards to wait for before issue (6),
and which operands to keep for the next instruction (4).
"""

from __future__ import annotations

import dataclasses

SCOREBOARDS = 6
_NONE = 7  # of a scoreboard's three bits
_SHIFT = 105 - 64  # within the upper 64 bits


@dataclasses.dataclass(frozen=True)
class Control:
    """stall: cycles until the warp's next instruction may issue; waits: numbers of scoreboards"""

    stall: int
    yields: bool = False
    write_scoreboard: int | None = None
    read_scoreboard: int | None = None
    waits: tuple[int, ...] = ()
    reuse: int = 0


def decode(upper: int) -> Control:
    """Of the upper 64 bits of an instruction."""
    bits = upper >> _SHIFT

    def take(count: int) -> int:
        nonlocal bits
        value = bits & ((1 << count) - 1)
        bits >>= count
        return value

    stall, prefers_itself, write, read, waits, reuse = (take(count) for count in (4, 1, 3, 3, SCOREBOARDS, 4))
    return Control(
        stall=stall,
        yields=not prefers_itself,
        write_scoreboard=None if write == _NONE else write,
        read_scoreboard=None if read == _NONE else read,
        waits=tuple(number for number in range(SCOREBOARDS) if waits >> number & 1),
        reuse=reuse,
    )
