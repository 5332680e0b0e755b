"""What is called flash_attn in this environment, and our own folders of that name."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path

NAME = "flash_attn"
MARK = "compiled_fa.txt"  # in every flash_attn that is ours
PROFILES = ("2.7.4", "2.6.3")  # the versions that we can pass for; the first one unless asked


@dataclass(frozen=True)
class Present:
    """A flash_attn. where: its folder, or what is known of one that has none."""

    ours: bool
    version: str
    where: str

    def __str__(self) -> str:
        return f"{'compiled_fa as flash_attn' if self.ours else 'flash_attn'} {self.version} ({self.where})"


def folder(profile: str) -> Path:
    """Where our flash_attn of this version and its metadata lie. Raises ValueError for another version."""
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {list(PROFILES)}, got {profile!r}")
    return Path(__file__).parent / f"v{profile.replace('.', '_')}"


def on_path(path: list[str] | None = None) -> Present | None:
    """The flash_attn that `import flash_attn` would find without a finder of ours.

    path: as sys.path, which is meant where it is None.
    """
    spec = importlib.machinery.PathFinder.find_spec(NAME, path)
    versions = [found.version for found in importlib.metadata.distributions(name=NAME, path=path or sys.path)]
    version = versions[0] if versions else "of unknown version"
    if spec is None:
        return Present(False, version, "its metadata, without a package") if versions else None
    places = [Path(place) for place in spec.submodule_search_locations or []]
    where = str(places[0]) if places else str(spec.origin)
    return Present(any((place / MARK).exists() for place in places), version, where)


def imported() -> Present | None:
    """The flash_attn that this process has imported."""
    module = sys.modules.get(NAME)
    if module is None:
        return None
    places = list(getattr(module, "__path__", []))
    ours = any((Path(place) / MARK).exists() for place in places)
    where = places[0] if places else str(getattr(module, "__file__", "made without a file"))
    return Present(ours, str(getattr(module, "__version__", "of unknown version")), where)
