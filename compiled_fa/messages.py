"""What people are told: warnings, once a process; and at a terminal, what it is that they wait for."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TextIO, TypeVar

log = logging.getLogger("compiled_fa")

Result = TypeVar("Result")

LOOK_EVERY = 0.1  # seconds, until there is something to say
PROGRESS_AFTER, PROGRESS_EVERY = 2.0, 1.0

_said: set[str] = set()


def say_once(message: str) -> None:
    """A warning in the log, once a process."""
    if message not in _said:
        _said.add(message)
        log.warning("compiled_fa: %s", message)


def result_of(
    future: Future[Result], what: str, is_compiling: Callable[[], bool], stream: TextIO | None = None
) -> Result:
    """A compilation's result. Says at a terminal, once, that `what` is being compiled, and how long it has taken when
    that is long.

    is_compiling: is it more than loading from the disk's cache? As long as it is not, nothing is said for two seconds.
    stream: a terminal, or not; None: stderr.
    """
    stream = stream or sys.stderr
    if stream is None or not stream.isatty():
        return future.result()

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    start, said = time.perf_counter(), ""
    while not wait([future], PROGRESS_EVERY if said else LOOK_EVERY).done:
        seconds = time.perf_counter() - start
        if said:
            write(f"\r{said} ... {seconds:.0f} s" if seconds >= PROGRESS_AFTER else "")
        elif is_compiling():
            said = f"compiled_fa: compiling {what}, once for this machine"
            write(f"{said} ...")
        elif seconds >= PROGRESS_AFTER:
            said = f"compiled_fa: loading {what}"
            write(f"{said} ...")
    if said:
        write(f"\r{said}: {time.perf_counter() - start:.1f} s\n")
    return future.result()
