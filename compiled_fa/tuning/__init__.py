"""The numbers that were tuned, all of them, each on the machine that its table names.

form.py       what each number decides, and in what unit
cpu.py        tables of CPUs, by class
classes.py    which class this CPU is of
files.py      tables in files
gpu.py        tile sizes of the fused engine's kernels
gpu_tiles.py  the table of class "gpu": tiles in PyTorch ops, of a GPU's size

A number that follows from something (a format, a kernel's limits, what a system does) stands where it is used; what was
found by trying stands here. bench/NOTES.md has what was tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from .. import config
from .classes import cpu_class
from .cpu import TABLES
from .files import load
from .form import (
    AT_EVERY_CALL,
    AT_NO_CALL,
    NEVER,
    FlexOptions,
    Fused,
    Rule,
    SdpaCpu,
    Sizes,
    SplitKV,
    Tiled,
    TileOptions,
    Tuning,
)
from .gpu_tiles import GPU

__all__ = [
    "AT_EVERY_CALL",
    "AT_NO_CALL",
    "NEVER",
    "FlexOptions",
    "Fused",
    "Rule",
    "SdpaCpu",
    "Sizes",
    "SplitKV",
    "TileOptions",
    "Tiled",
    "Tuning",
    "changed",
    "current",
    "described",
    "on",
    "using",
]

_current: Tuning | None = None


def current() -> Tuning:
    """The table that is in force for engines on a CPU: that of its class, or what COMPILED_FA_TUNING asks for.

    Read once a process. Raises ValueError for a name that is none, and a file that is no table.
    """
    global _current
    if _current is None:
        asked_for = config.TUNING.read()
        if asked_for == "auto":
            _current = TABLES[cpu_class()]
        elif asked_for in TABLES:
            _current = TABLES[asked_for]
        elif asked_for == GPU.name:
            _current = GPU
        elif Path(asked_for).is_file():
            _current = load(Path(asked_for))
        else:
            raise ValueError(
                f"the environment variable {config.TUNING.name} must be one of {list(config.TUNING.allowed)} or a file "
                f"that compiled_fa.tuning.files.save wrote, got {asked_for!r}"
            )
    return _current


def on(device: torch.device) -> Tuning:
    """The table in force on a device: on a CPU `current()`, and for a meta tensor, which asks what the CPU would do."""
    return current() if device.type in ("cpu", "meta") else GPU


@contextmanager
def using(table: Tuning) -> Iterator[None]:
    """This table in place of the one in force, in all threads, while the block runs: to measure what another would do.

    with tuning.using(tuning.changed(split_kv={"split_keys": 8})):
        ...
    """
    global _current
    before, _current = _current, table
    try:
        yield
    finally:
        _current = before


def changed(**parts: Mapping[str, Any]) -> Tuning:
    """The table in force with other numbers, by part."""
    table = current()
    return replace(table, **{part: replace(getattr(table, part), **numbers) for part, numbers in parts.items()})


def described() -> str:
    """The class of this CPU, the table in force, and where its parts were measured, or that they were not."""
    table = current()
    parts = {part.name: getattr(table, part.name).measured_on for part in fields(table) if part.name != "name"}
    measured = "; ".join(f"{name}: {place or 'not measured'}" for name, place in parts.items())
    served = f"{table.name}" if table.name == cpu_class() else f"{table.name}, on a CPU of class {cpu_class()}"
    return f"{served} ({measured})"
