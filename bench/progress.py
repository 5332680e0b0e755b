"""A progress bar on stderr; nothing where that is no terminal."""

from __future__ import annotations

import sys

WIDTH = 30


class Progress:
    def __init__(self, total: int) -> None:
        self._total = max(1, total)
        self._shown = sys.stderr.isatty()

    def show(self, done: float, text: str) -> None:
        """done: of the total, parts of one included."""
        if self._shown:
            filled = int(WIDTH * done / self._total)
            bar = ("█" * filled).ljust(WIDTH, "░")
            print(f"\r\033[K{bar} {int(done)}/{self._total}  {text}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for a line on stdout."""
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
