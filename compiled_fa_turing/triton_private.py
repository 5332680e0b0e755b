"""Every use of Triton that its public interface does not promise, in one place.

Tried with triton 3.6.0, 3.7.1, 3.8.0 and 3.9.0. `missing()` looks for all of it, so that enabling fails at once and
says what is not there, rather than later inside a compilation.
"""

import importlib
import os
import tempfile
import types
from collections.abc import Callable
from typing import Any

_TRITON = {
    "triton.knobs": ("runtime.add_stages_inspection_hook",),
    "triton._C.libtriton": (
        "ir.parse_mlir_module",
        "ir.pass_manager",
        "passes.convert.add_scf_to_cf",
        "passes.gluon.add_inliner",
        "nvidia.passes.ttgpuir.add_allocate_shared_memory_nv",
    ),
    "triton.compiler.compiler": ("get_cache_key",),
    "triton.runtime.jit": ("compute_cache_key",),
    "triton.backends.nvidia.compiler": ("CUDABackend.make_ttgir", "get_ptx_version_from_options"),
}


def version() -> tuple[int, ...] | None:
    """(3, 9) of Triton 3.9.0; None if it is not installed."""
    try:
        import triton
    except ImportError:
        return None
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def missing() -> str | None:
    """What is wanted and not installed, as a sentence; None if everything is there."""
    if version() is None:
        return "triton 3.6 or newer is wanted and not installed; pip install 'triton>=3.6'"
    import triton

    for module_name, paths in _TRITON.items():
        for path in paths:
            try:
                found: Any = importlib.import_module(module_name)
                for name in path.split("."):
                    found = getattr(found, name)
            except (ImportError, AttributeError):
                return (
                    "triton 3.6 or newer (tried: 3.6 to 3.9) is wanted; "
                    f"here (triton {triton.__version__}) there is no {module_name}.{path}"
                )
    return None


def parse_module(text: str, context: Any) -> Any:
    """The MLIR module of a text. MLIR reads it from a file, and verifies it; RuntimeError if it is not valid."""
    from triton._C.libtriton import ir

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "module.mlir")
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        module = ir.parse_mlir_module(path, context)
    module.context = context
    return module


class _Replaced:
    """A namespace in which one thing is another."""

    def __init__(self, original: Any, name: str, new: Any):
        self._original = original
        setattr(self, name, new)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def make_ttgir(backend: Any, module: Any, metadata: Any, options: Any, capability: int, prefetch: bool) -> Any:
    """Triton's own lowering from TTIR to TTGIR; prefetch: with its pass of that name, where it has one.

    The pass is left out of a copy of Triton's function, so that other threads keep it.
    """
    lower = backend.make_ttgir
    passes: Any = getattr(lower, "__globals__", {}).get("passes")
    if not prefetch and hasattr(getattr(passes, "ttgpuir", None), "add_prefetch"):
        of_gpus = _Replaced(passes.ttgpuir, "add_prefetch", lambda _: None)
        names = {**lower.__globals__, "passes": _Replaced(passes, "ttgpuir", of_gpus)}
        lower = types.FunctionType(lower.__code__, names, lower.__name__, lower.__defaults__, lower.__closure__)
    return lower(module, metadata, options, capability)


def shared_bytes(text: str, context: Any, options: Any, capability: int) -> int:
    """How much shared memory Triton will allocate for a TTGIR module: the first passes of its next stage."""
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.nvidia.compiler import get_ptx_version_from_options

    module = parse_module(text, context)
    manager = ir.pass_manager(context)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    ptx_version = get_ptx_version_from_options(options, capability)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, ptx_version)
    manager.run(module, "shared_bytes")
    return int(module.get_int_attr("ttg.shared"))


def patch_triton(key: Callable[[], str]) -> Callable[[], None]:
    """Makes Triton's caches, on disk and in memory, depend on key(); returns what undoes it.

    From 3.7 Triton asks the hook itself for its key. 3.6 has the hook, and forgets it in its keys.
    """
    if (version() or ()) >= (3, 7):
        return lambda: None
    from triton.compiler import compiler
    from triton.runtime import jit

    on_disk, in_memory = compiler.get_cache_key, jit.compute_cache_key

    def get_cache_key(*args: Any, **kwargs: Any) -> str:
        return f"{on_disk(*args, **kwargs)}-{key()}"

    def compute_cache_key(known: Any, specialization: Any, options: Any) -> Any:
        return in_memory(known, [*specialization, key()], options)

    return _replace((compiler, "get_cache_key", get_cache_key), (jit, "compute_cache_key", compute_cache_key))


def _replace(*replacements: tuple[Any, str, Any]) -> Callable[[], None]:
    """Replaces attributes (module, name, new value); returns what restores those that nobody has replaced since."""
    originals = [getattr(module, name) for module, name, _ in replacements]
    for module, name, new in replacements:
        setattr(module, name, new)

    def restore() -> None:
        for (module, name, new), original in zip(replacements, originals, strict=True):
            if getattr(module, name) is new:
                setattr(module, name, original)

    return restore
