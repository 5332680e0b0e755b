"""What a person at a terminal is told while something compiles; a program, whose stderr is none, is told nothing."""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future, wait
from typing import TextIO, TypeVar

Result = TypeVar("Result")

SAY_AFTER = 0.5  # seconds; what comes from the disk's cache is there before
PROGRESS_AFTER = 2.0


def result_of(future: Future[Result], what: str, stream: TextIO | None = None) -> Result:
    """A compilation's result. Says once that `what` is being compiled, and how long it has taken when that is long.

    stream: a terminal, or not; None: stderr.
    """
    stream = stream or sys.stderr
    if stream is None or not stream.isatty():
        return future.result()

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    start = time.perf_counter()
    if not wait([future], SAY_AFTER).done:
        write(f"compiled_fa: compiling {what}, once for this machine ...")
        wait([future], PROGRESS_AFTER - SAY_AFTER)
        while not future.done():
            write(f"\rcompiled_fa: compiling {what}, once for this machine ... {time.perf_counter() - start:.0f} s")
            wait([future], 1.0)
        write(f"\rcompiled_fa: compiling {what}, once for this machine: {time.perf_counter() - start:.1f} s\n")
    return future.result()
