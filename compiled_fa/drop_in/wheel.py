"""A distribution named flash-attn, so that an environment has flash_attn: pip, type checkers, all processes.

It holds our folder of that name and its metadata, asks for compiled-fa, and is made on the spot.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from . import present
from .present import NAME, PROFILES


def contents(profile: str = PROFILES[0]) -> dict[str, bytes]:
    """The files of flash_attn in a profile: what has not changed, and what has in its place."""
    found: dict[str, bytes] = {}
    for version in dict.fromkeys((PROFILES[0], profile)):
        top = present.folder(version)
        files = [file for file in sorted((top / NAME).rglob("*")) if file.is_file() and "__pycache__" not in file.parts]
        found |= {file.relative_to(top).as_posix(): file.read_bytes() for file in files}
    return found


def build(folder: Path, profile: str = PROFILES[0]) -> Path:
    """Write the wheel into a folder that exists -> its path."""
    info = f"{NAME}-{profile}.dist-info"
    files = contents(profile)
    files |= {f"{info}/{file.name}": file.read_bytes() for file in sorted((present.folder(profile) / info).iterdir())}
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: compiled_fa\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    path = folder / f"{NAME}-{profile}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return path


def install(profile: str = PROFILES[0]) -> present.Present:
    """Have pip install it into this environment, in place of one of ours that is there.

    Raises:
        ValueError: there is no such profile.
        RuntimeError: there is a real flash_attn; there is no pip; pip failed.
    """
    found = present.on_path()
    if found is not None and not found.ours:
        raise RuntimeError(f"there is a real {found} in this environment: pip uninstall flash-attn first, or use it")
    if not any(importlib.metadata.distributions(name="pip")):  # to look for the module would import half of setuptools
        raise RuntimeError("there is no pip in this environment: write the wheel by --wheel FOLDER, and install that")
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder), profile)
        options = ["--no-deps", "--no-index", "--force-reinstall", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([sys.executable, "-m", "pip", "install", *options, str(wheel)], check=False)
    found = present.on_path()
    if done.returncode or found is None:
        raise RuntimeError(f"pip could not install {wheel.name}")
    return found


def status() -> tuple[bool, str]:
    """(Does `import flash_attn` find ours, as it is now? What there is, in words.)"""
    found = present.on_path()
    if found is None:
        return False, "no flash_attn here; python -m compiled_fa.drop_in --install makes this package it"
    if not found.ours:
        return False, f"a real {found}: compiled_fa does not serve it"
    here = Path(found.where).parent
    wanted = contents(found.version) if found.version in PROFILES else {}
    if Path(found.where).is_relative_to(Path(__file__).parent):
        return True, f"{found}, on sys.path"
    if any(not (here / name).is_file() or (here / name).read_bytes() != data for name, data in wanted.items()):
        return False, f"{found}, of another version of compiled_fa: python -m compiled_fa.drop_in --install renews it"
    return True, f"{found}; pip uninstall flash-attn removes it"


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
