"""What an environment variable of ours is, and the one of this package; compiled_fa/config.py has the others.

They are read at every call, so that a program may set them after it has imported us. A value that means nothing is an
error that names those that do: a switch that is silently ignored is worse than none.
"""

from __future__ import annotations

import os

# What os.environ keeps variables in, private in CPython, and how it spells their names there.
_held = getattr(os.environ, "_data", None)
_spelled = getattr(os.environ, "encodekey", None)


class Variable:
    """An environment variable. allowed: its values, of which the first is meant where it is not set, or empty.

    or_a_file: it may also be a path, which who reads it checks. (No dataclass: every Python that starts in an
    environment with the stage imports this module, and dataclasses would be half of what that takes.)
    """

    def __init__(self, name: str, allowed: tuple[str, ...], meaning: str, or_a_file: bool = False):
        self.name = name
        self.allowed = allowed
        self.meaning = meaning
        self.or_a_file = or_a_file
        self._key = name if _spelled is None else _spelled(name)

    def is_unset(self) -> bool:
        """Surely; asked where os.environ.get, which raises and catches two errors then, takes too long."""
        return _held is not None and self._key not in _held

    def read(self) -> str:
        """Raises ValueError for a value that is not allowed."""
        value = os.environ.get(self.name) or self.allowed[0]
        if value not in self.allowed and not self.or_a_file:
            raise ValueError(f"the environment variable {self.name} must be one of {list(self.allowed)}, got {value!r}")
        return value


TURING = Variable(
    "COMPILED_FA_TURING",
    ("auto", "1", "0"),
    "Turing's tensor cores for every Triton kernel. 1: in each process that has our hook, or loads us as a plugin; "
    "0: in none; auto: where an environment has the hook",
)


def ask_for_turing() -> None:
    """In this process, and those that it starts or becomes."""
    os.environ[TURING.name] = "1"


def add_to_python_path(folder: str) -> None:
    """Let processes that this one starts, or becomes, find modules in a folder."""
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = folder if not others else os.pathsep.join((folder, others))
