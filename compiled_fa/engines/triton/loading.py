"""The kernels for a set of terms: modules of forward.py and backward.py with that score program's functions in them.

Triton and Inductor read the source of a function, and that of the functions that it finds among its globals. So each
set of terms has a module of its own, and the printed text is where Python finds the source of code that is in no file.
"""

from __future__ import annotations

import importlib.util
import linecache
import types
from typing import Any

from ...caches import Cache
from ...inductor import graphs
from . import program
from .program import Terms

_modules: Cache[tuple[str, Terms], types.ModuleType] = Cache("kernels by the terms of a score", entries=16)
_texts: Cache[Terms, str] = Cache("score programs as Triton code", entries=8)


def module(name: str, terms: Terms) -> Any:
    """name: "forward" or "backward". Raises CannotServeError where a term has no Triton code."""

    def load() -> types.ModuleType:
        # To trace the score program is no part of what the caller's thread may be tracing.
        return _load(name, terms, _texts.get(terms, lambda: graphs.traced_apart(program.text, terms)))

    return _modules.get((name, terms), load)


def _load(name: str, terms: Terms, text: str) -> types.ModuleType:
    functions = _functions(terms, text)
    place = importlib.util.find_spec(f"{__package__}.{name}")
    if place is None or place.origin is None:
        raise ImportError(f"the kernels' source, {name}.py, is not beside this module")
    spec = importlib.util.spec_from_file_location(f"{__package__}.{name}", place.origin)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place.origin} cannot be loaded")
    found = importlib.util.module_from_spec(spec)
    vars(found).update(functions)
    spec.loader.exec_module(found)
    return found


def _functions(terms: Terms, text: str) -> dict[str, Any]:
    """The score program's functions, by name."""
    filename = f"<compiled_fa score program: {terms.words}>"
    linecache.cache[filename] = len(text), None, text.splitlines(keepends=True), filename
    namespace: dict[str, Any] = {"__name__": f"{__package__}.printed"}
    exec(compile(text, filename, "exec"), namespace)
    return {name: value for name, value in namespace.items() if hasattr(value, "arg_names")}
