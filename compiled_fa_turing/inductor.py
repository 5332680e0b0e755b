"""Every use of PyTorch's Inductor, whose interfaces here are private; tried with torch 2.11.0, 2.13.0 and 2.15.0.

Nothing here imports torch: each module is changed once it has been imported, by whoever needs it, and stays changed.
What the changes do depends on whether the stage is enabled; where it is not, they do nothing.

Inductor's caches on disk (FX graphs, AOTAutograd, autotuning) all depend on torch_key(), the hash of the sources of the
compiler that wrote them; to them the stage is one more such source. Inductor's configuration would be the public way,
but its values belong to a thread, and backward graphs are compiled on another one.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from compiled_fa_turing import late

_CODECACHE = "torch._inductor.codecache"
_ASYNC_COMPILE = "torch._inductor.async_compile"
_SUBPROC_POOL = "torch._inductor.compile_worker.subproc_pool"

Compile = Callable[..., Any]

_patched = False
_compile_in_worker: dict[bool, Compile] = {}
_enabled: bool | None = None  # None: neither enabled nor disabled yet


def patch(key: Callable[[], str], with_stage: Compile, without: Compile) -> None:
    """Makes Inductor's caches depend on key(), "" where the stage is not enabled. Once is enough.

    Args:
        with_stage: what a compile worker runs for a kernel from the first change on that enables the stage
        without: the same from the next one on that disables it
    """
    global _patched
    if _patched:
        return
    _patched = True
    _compile_in_worker.update({True: with_stage, False: without})
    original: list[Any] = []

    def codecache(module: ModuleType) -> None:
        if not _has(module, "torch_key", "PyCodeCache.cache_clear"):
            return
        original.append(module.__dict__["torch_key"])

        def torch_key() -> bytes:
            return bytes(original[0]()) + key().encode()

        torch_key.__dict__.update(original[0].__dict__)  # its cache
        _set(module, torch_key=torch_key)

    def async_compile(module: ModuleType) -> None:
        names = ("torch_key", "_worker_compile_triton", "CompiledTritonKernels.cache_clear", "shutdown_compile_workers")
        if not _has(module, *names) or not original:
            return
        _set(module, torch_key=sys.modules[_CODECACHE].__dict__["torch_key"])
        if _enabled is not None:
            _set(module, _worker_compile_triton=_compile_in_worker[_enabled])

    def subproc_pool(module: ModuleType) -> None:
        """Workers add their own key to the one they are started with."""
        if original and _has(module, "torch_key"):
            _set(module, torch_key=original[0])

    late.when_imported(_CODECACHE, codecache)
    late.when_imported(_SUBPROC_POOL, subproc_pool)
    late.when_imported(_ASYNC_COMPILE, async_compile)


def changed(*, enabled: bool) -> None:
    """The stage has been enabled, or disabled: drops what Inductor keeps in memory by a source alone.

    Functions already compiled hold their own references, and keep working.
    """
    global _enabled
    _enabled = enabled
    codecache, async_compile = _whole(_CODECACHE), _whole(_ASYNC_COMPILE)
    if codecache is not None:
        codecache.PyCodeCache.cache_clear()
    if async_compile is not None:
        _set(async_compile, _worker_compile_triton=_compile_in_worker[enabled])
        async_compile.CompiledTritonKernels.cache_clear()
        if async_compile.config.worker_start_method != "subprocess":  # forked workers inherit this process's state
            async_compile.shutdown_compile_workers()


def worker_compile_triton(*args: Any) -> Any:
    """What an Inductor compile worker runs for one kernel."""
    from torch._inductor.runtime import compile_tasks

    return compile_tasks._worker_compile_triton(*args)


def _whole(name: str) -> Any:
    """An imported module; None while it is being imported, when it has nothing to forget."""
    module = sys.modules.get(name)
    return None if module is None or late.is_initializing(module) else module


def _set(module: ModuleType, **values: Any) -> None:
    module.__dict__.update(values)


def _has(module: ModuleType, *paths: str) -> bool:
    """Whether all is there; says what is not."""
    for path in paths:
        found: Any = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is None:
            import logging

            logging.getLogger("compiled_fa.turing").warning(
                "torch has no %s.%s: its caches may give kernels with the stage to processes without it, and the "
                "other way round",
                module.__name__,
                path,
            )
            return False
    return True
