"""Installs the stage in a process: Triton's stage-inspection hook, Inductor's caches and compile workers.

Little is imported here, since an environment can have every Python that starts import this module: the stage itself is
loaded when Triton first compiles a kernel for Turing.
"""

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from compiled_fa_turing import inductor, late
from compiled_fa_turing.target import CAPABILITY

if TYPE_CHECKING:
    from types import ModuleType

LOG = "compiled_fa.turing"  # the logger
FIRST_WITHOUT_TENSOR_CORES = (3, 3)  # the Triton version

_lock = threading.RLock()
_installed: "_Hook | None" = None


@functools.cache
def source_hash() -> str:
    """Of this package's own code: whatever was compiled by other code than this is not to be reused."""
    import hashlib
    import pathlib

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
        if self.active and capability == CAPABILITY and "ttir" in stages:
            from compiled_fa_turing import stage

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

    Imports triton, and not torch. Triton before 3.3 has the tensor cores itself: with it this does nothing. What was
    done is in the log, at level DEBUG of the logger "compiled_fa.turing".

    Raises:
        RuntimeError: triton is missing something that the stage needs; the message says what.

    Example:
        >>> import compiled_fa_turing
        >>> compiled_fa_turing.enable()
        >>> model = torch.compile(model.half())
    """
    global _installed
    if _installed:
        return
    # Triton is imported before the lock is taken: a thread that imports it just now may come here at the end of that.
    if has_tensor_cores():
        _debug("Triton before 3.3 has Turing's tensor cores: left as it is")
        return
    if reason := missing():
        raise RuntimeError(f"compiled_fa.turing cannot be enabled: {reason}")
    from triton import __version__, knobs

    from compiled_fa_turing import triton_private

    with _lock:
        if _installed:
            return
        hook = _Hook(knobs.runtime.add_stages_inspection_hook)
        hook.undo.append(triton_private.patch_triton(source_hash))
        knobs.runtime.add_stages_inspection_hook = hook
        _installed = hook
        inductor.patch(_key, compile_in_worker, compile_in_worker_without)
        inductor.changed(enabled=True)
        _debug(f"enabled: kernels that Triton {__version__} compiles for sm_75 from here on")


def disable() -> None:
    """Undo enable(): what is compiled from here on is compiled as if it had never been called."""
    global _installed
    with _lock:
        _call_off()
        if not _installed:
            return
        from triton import knobs

        _installed.active = False
        if knobs.runtime.add_stages_inspection_hook is _installed:
            knobs.runtime.add_stages_inspection_hook = _installed.previous
        for undo in _installed.undo:
            undo()
        _installed = None
        inductor.changed(enabled=False)
        _debug("disabled")


def is_enabled() -> bool:
    """Whether enable() is in effect in this process."""
    return _installed is not None


def missing() -> str | None:
    """What enable() needs and does not find, as a sentence; None if everything is there."""
    from compiled_fa_turing import triton_private

    return triton_private.missing()


def has_tensor_cores() -> bool:
    """Is there a Triton that compiles dots for Turing's tensor cores without us?"""
    from compiled_fa_turing import triton_private

    version = triton_private.version()
    return version is not None and version < FIRST_WITHOUT_TENSOR_CORES


def enable_with_triton() -> None:
    """enable() as soon as this process imports Triton, if it does; disable() calls it off.

    What is missing then is a warning in the log, once: whoever imports Triton has not asked for this.
    """
    global _call_off
    with _lock:
        if _installed:
            return
        _call_off()
        # Before Triton, since Inductor may be half imported when it imports Triton.
        inductor.patch(_key, compile_in_worker, compile_in_worker_without)
        _call_off = late.when_imported("triton", _enable_or_warn)


def _nothing() -> None:
    """No import is waited for."""


_call_off: Callable[[], None] = _nothing


def _enable_or_warn(_: "ModuleType") -> None:
    try:
        enable()
    except RuntimeError as reason:
        import logging

        logging.getLogger(LOG).warning("%s", reason)


def _key() -> str:
    """What caches of compiled code depend on besides the source: this code, where it is enabled."""
    return source_hash() if _installed else ""


def _debug(message: str) -> None:
    import logging
    import os

    logging.getLogger(LOG).debug("process %d: %s", os.getpid(), message)


def compile_in_worker(*args: Any) -> Any:
    """One kernel in an Inductor compile worker, a process that also serves compilations without the stage."""
    return _in_worker(True, *args)


def compile_in_worker_without(*args: Any) -> Any:
    """The same without the stage, in a worker that may have had it from its start."""
    return _in_worker(False, *args)


def _in_worker(wanted: bool, *args: Any) -> Any:
    was_enabled = is_enabled()
    (enable if wanted else disable)()
    try:
        return inductor.worker_compile_triton(*args)
    finally:
        (enable if was_enabled else disable)()
