"""Waits for a module to be imported: what there is to be done to Triton and PyTorch costs nothing where they are not.

A finder at the head of sys.meta_path lets the others find the module, and has what it waits for done once the module
has been executed. It is there only as long as something waits.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Then = Callable[[ModuleType], None]

_waiting: dict[str, list[Then]] = {}


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _waiting:
            return None
        for finder in tuple(sys.meta_path):  # which imports on the way may change
            find = getattr(finder, "find_spec", None) if finder is not _Finder else None
            spec: ModuleSpec | None = find(name, path, target) if find else None
            if spec is not None:
                if spec.loader is not None:
                    _tell_afterwards(spec.loader)
                return spec
        return None


def _tell_afterwards(loader: Any) -> None:
    """The loader stays what it is, for who asks it for the source; only its next execution of a module tells."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        execute(module)
        for then in _waiting.pop(module.__name__, ()):
            then(module)
        _come_or_go()

    loader.exec_module = exec_module


def when_imported(name: str, then: Then) -> Callable[[], None]:
    """then(module), now if the module has been imported, or else as soon as it is; returns what calls that off.

    Of a module that is being imported just now, that is now, too: ask before.
    """
    module = sys.modules.get(name)
    if module is not None:
        then(module)
        return lambda: None

    def tell(module: ModuleType) -> None:  # one for each call, to be told from others of the same function
        then(module)

    _waiting.setdefault(name, []).append(tell)
    _come_or_go()

    def call_off() -> None:
        if tell in _waiting.get(name, ()):
            _waiting[name].remove(tell)
            if not _waiting[name]:
                del _waiting[name]
            _come_or_go()

    return call_off


def is_initializing(module: ModuleType) -> bool:
    """Is it being imported just now?"""
    return bool(getattr(module.__spec__, "_initializing", False))


def _come_or_go() -> None:
    finders: list[Any] = sys.meta_path
    if _waiting and _Finder not in finders:
        finders.insert(0, _Finder)
    elif not _waiting and _Finder in finders:
        finders.remove(_Finder)
