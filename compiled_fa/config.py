"""The environment variables, all of them. Nothing else reads one, and docs/environment.md lists these.

They are read at every call, so that a program may set them after it has imported us. A value that means nothing is an
error that names those that do: a switch that is silently ignored is worse than none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

ENGINES = ("auto", "fused", "split_kv", "sdpa_cpu", "tiled")
CPU_CLASSES = ("avx2", "avx512", "avx512_bf16", "zen5", "amx", "arm", "plain")


@dataclass(frozen=True)
class Variable:
    """An environment variable. allowed: its values, of which the first is meant where it is not set, or empty.

    or_a_file: it may also be a path, which who reads it checks.
    """

    name: str
    allowed: tuple[str, ...]
    meaning: str
    or_a_file: bool = False

    def read(self) -> str:
        """Raises ValueError for a value that is not allowed."""
        value = os.environ.get(self.name) or self.allowed[0]
        if value not in self.allowed and not self.or_a_file:
            raise ValueError(f"the environment variable {self.name} must be one of {list(self.allowed)}, got {value!r}")
        return value


ENGINE = Variable("COMPILED_FA_ENGINE", ENGINES, "the engine that serves every call; it serves or raises")
COMPILE = Variable("COMPILED_FA_COMPILE", ("1", "0"), "0: engines on a CPU run their steps as plain PyTorch ops")
CHECK = Variable(
    "COMPILED_FA_CHECK", ("0", "1"), "1: values of cu_seqlens, block_table, cache_seqlens ... are checked on a GPU, too"
)
TUNING = Variable(
    "COMPILED_FA_TUNING",
    ("auto", *CPU_CLASSES, "gpu"),
    "the class of CPU whose table of tuned numbers is in force on a CPU, that of GPUs, or a file",
    True,
)

VARIABLES = (ENGINE, COMPILE, CHECK, TUNING)


def engine() -> str:
    """The engine asked for: "auto", or a name."""
    return ENGINE.read()


def compiles_steps() -> bool:
    """May engines on a CPU compile their steps?"""
    return COMPILE.read() == "1"


def checks_values() -> bool:
    """Are values checked where the host has to wait for them?"""
    return CHECK.read() == "1"


def add_to_python_path(folder: str) -> None:
    """Let processes that this one starts, or becomes, find modules in a folder."""
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = folder if not others else os.pathsep.join((folder, others))
