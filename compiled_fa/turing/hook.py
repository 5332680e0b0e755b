"""Installs the stage in a process: Triton's stage-inspection hook, Inductor's caches and compile workers."""

import functools
import hashlib
import pathlib
import threading
from collections.abc import Callable
from typing import Any

from compiled_fa.turing import private, stage

_lock = threading.RLock()
_installed: "_Hook | None" = None


@functools.cache
def source_hash() -> str:
    """Of this package's own code: whatever was compiled by other code than this is not to be reused."""
    digest = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


class _Hook:
    """One installation in Triton's only slot for a hook, on top of the hook that was there.

    Triton calls it without arguments for a cache key, and with the stages of a compilation to change them. Once retired
    it passes everything on: another hook that was installed on top of it may still call it.
    """

    def __init__(self, previous: Callable[..., Any] | None):
        self.previous = previous
        self.active = True
        self.undo: list[Callable[[], None]] = []

    def __call__(
        self, backend: Any = None, stages: Any = None, options: Any = None, language: Any = None, capability: Any = None
    ) -> Any:
        if backend is None:
            key, digest = self.previous() if self.previous else ("", "")
            ours = f"compiled_fa.turing:{source_hash()}" if self.active else ""
            return f"{key}{ours}", f"{digest}{ours}"
        # A Gluon kernel has no "ttir" stage: its layouts are the author's.
        if self.active and capability == stage.CAPABILITY and "ttir" in stages:
            stages["ttgir"] = stage.turing_stage(backend, options, stages["ttgir"])
        if self.previous:  # after ours, so that a hook that wraps a stage wraps ours
            self.previous(backend, stages, options, language, capability)
        return None


def enable() -> None:
    """Compile the dots of every Triton kernel of this process for Turing's tensor cores, on GPUs of capability 7.5.

    fp16 (with fp16 or fp32 accumulation), int8 and fp8 (E5M2) dots become mma.sync instructions, and loops that only
    load and compute are software-pipelined when num_stages is at least 2. Everything else compiles as before, and so
    does every kernel for another GPU. Functions that torch.compile has compiled already keep their code until
    torch.compiler.reset(). Enabling twice is enabling once.

    Raises:
        RuntimeError: triton or torch is missing something that the stage needs; the message says what.

    Example:
        >>> import compiled_fa.turing
        >>> compiled_fa.turing.enable()
        >>> model = torch.compile(model.half())
    """
    global _installed
    with _lock:
        if _installed:
            return
        if reason := private.missing():
            raise RuntimeError(f"compiled_fa.turing cannot be enabled: {reason}")
        from triton import knobs

        hook = _Hook(knobs.runtime.add_stages_inspection_hook)
        hook.undo.append(private.patch_triton(source_hash()))
        hook.undo.append(private.patch_inductor(source_hash(), compile_in_worker))
        knobs.runtime.add_stages_inspection_hook = hook
        _installed = hook


def disable() -> None:
    """Undo enable(): what is compiled from here on is compiled as if it had never been called."""
    global _installed
    with _lock:
        if not _installed:
            return
        from triton import knobs

        _installed.active = False
        if knobs.runtime.add_stages_inspection_hook is _installed:
            knobs.runtime.add_stages_inspection_hook = _installed.previous
        for undo in _installed.undo:
            undo()
        _installed = None


def is_enabled() -> bool:
    """Whether enable() is in effect in this process."""
    return _installed is not None


def compile_in_worker(*args: Any) -> Any:
    """One kernel in an Inductor compile worker, a process that also serves compilations without the stage."""
    was_enabled = is_enabled()
    enable()
    try:
        return private.worker_compile_triton(*args)
    finally:
        if not was_enabled:
            disable()
