"""The way into a program: one finder at the end of sys.meta_path."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from . import late, present, refused
from .present import NAME, PROFILES


class Finder(MetaPathFinder):
    """Finds flash_attn and its metadata in a folder, and tells of flash_attn's modules that are not there why.

    It stands last: whatever else knows a module of that name comes first. folder: None where flash_attn and its
    metadata lie on sys.path, so that only the reasons are missing.
    """

    def __init__(self, folder: Path | None = None, profile: str = "") -> None:
        self.folder, self.profile = folder, profile

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raises ModuleNotFoundError for a part of flash_attn that is not offered, but for those that others look for
        to tell versions apart: of them it knows nothing."""
        if fullname == NAME and self.folder is not None:
            return PathFinder.find_spec(fullname, [str(self.folder)])
        if fullname.startswith(NAME + ".") and fullname not in refused.LOOKED_FOR:
            raise ModuleNotFoundError(refused.of_module(fullname), name=fullname)
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        wanted = None if context is None or context.name is None else context.name.lower().replace("-", "_")
        if self.folder is not None and wanted in (None, NAME):
            for place in self.folder.glob("*.dist-info"):
                yield importlib.metadata.PathDistribution(place)


def install(profile: str = PROFILES[0]) -> None:
    """Let this process find flash_attn here. Twice is as once.

    Call it before transformers, diffusers and the like are imported: most of them look for flash_attn only then. Of
    transformers what it remembers is cleared; for others that were imported before, a RuntimeWarning says what to do.
    Processes that this one starts know nothing of it, unless they run the call themselves; see compiled_fa.run.

    Args:
        profile: the version to pass for: "2.7.4"; or "2.6.3", whose unpad_input gives four results, and whose private
            forwards give eight and take window_size.

    Raises:
        ValueError: there is no such profile.
        RuntimeError: there is a real flash_attn, or ours of another profile; the message says where.
    """
    folder = present.folder(profile)
    if found := _installed() or present.imported() or present.on_path():
        if not found.ours:
            raise RuntimeError(
                f"there is a real {found} in this environment: uninstall it (pip uninstall flash-attn), or use it"
            )
        if found.version != profile:
            raise RuntimeError(f"{found} is here already: uninstall it before profile {profile!r} is asked for")
        return
    sys.meta_path.append(Finder(folder, profile))
    importlib.invalidate_caches()
    late.tell_clients(profile)


def uninstall() -> None:
    """Undo install: flash_attn is not found any more, and forgotten where it was imported. What holds its functions,
    holds them."""
    ours = [finder for finder in sys.meta_path if isinstance(finder, Finder) and finder.folder is not None]
    if not ours:
        return
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    for name in [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    late.tell_clients(None)


def tell_why() -> None:
    """For our flash_attn, however it was found: from now on, imports of what it lacks say why."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())


def _installed() -> present.Present | None:
    for finder in sys.meta_path:
        if isinstance(finder, Finder) and finder.folder is not None:
            return present.Present(True, finder.profile, str(finder.folder))
    return None
