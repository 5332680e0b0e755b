"""The environment variables, all of them. Nothing else reads one, and docs/environment.md lists these.

What a variable is, and the variable of compiled_fa_turing, come from there: that package must not import this one.

They are read at every call, so that a program may set them after it has imported us. A value that means nothing is an
error that names those that do: a switch that is silently ignored is worse than none.
"""

from __future__ import annotations

import torch

from compiled_fa_turing.config import TURING, Variable
from compiled_fa_turing.config import add_to_python_path as add_to_python_path

ENGINES = ("auto", "fused", "triton", "split_kv", "sdpa_cpu", "tiled")
CPU_CLASSES = ("avx2", "avx512", "avx512_bf16", "zen5", "amx", "arm", "plain")


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

VARIABLES = (ENGINE, COMPILE, CHECK, TUNING, TURING)


def _read_at_every_call(variable: Variable) -> str:
    """In compiled code as it was then: a look at what os.environ holds would be a guard on all variables."""
    if not torch.compiler.is_compiling() and variable.is_unset():
        return variable.allowed[0]
    return variable.read()


def engine() -> str:
    """The engine asked for: "auto", or a name."""
    return _read_at_every_call(ENGINE)


def compiles_steps() -> bool:
    """May engines on a CPU compile their steps?"""
    return _read_at_every_call(COMPILE) == "1"


def checks_values() -> bool:
    """Are values checked where the host has to wait for them?"""
    return CHECK.read() == "1"
