"""The stage as a distribution of its own, compiled-fa-turing: built, and used by a Python that has nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or newer is not installed")
tomllib = pytest.importorskip("tomllib", reason="Python before 3.11")

ROOT = Path(__file__).resolve().parents[2]
ALONE = ROOT / "distributions" / "compiled-fa-turing"
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


def project(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel's content, built from a copy: building writes beside the sources."""
    copy, wheels, unpacked = (tmp_path_factory.mktemp(name) for name in ("copy", "wheels", "unpacked"))
    for folder in (ALONE, ROOT / "compiled_fa_turing"):
        ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(folder, copy / folder.relative_to(ROOT), ignore=ignored)
    subprocess.run(
        [sys.executable, "-c", BUILD, wheels], cwd=copy / ALONE.relative_to(ROOT), check=True, capture_output=True
    )
    (wheel,) = wheels.glob("*.whl")
    assert wheel.name.startswith("compiled_fa_turing-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_it_has_the_package_and_nothing_else(installed):
    packed = {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()}
    source = {
        path.relative_to(ROOT)
        for path in (ROOT / "compiled_fa_turing").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path for path in packed if not path.parts[0].endswith(".dist-info")} == source
    metadata = next(installed.glob("*.dist-info/METADATA")).read_text()
    assert "Requires-Dist" not in metadata


def test_a_python_without_torch_or_triton(installed):
    program = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); from compiled_fa_turing import __main__, missing;"
        "print(missing()); print(__main__.main(['--status']), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("triton 3.6 or newer is wanted and not installed")
    assert lines[-1] == "1 False"


def test_both_say_the_same():
    whole, alone = project(ROOT), project(ALONE)
    for name in ("version", "license", "requires-python", "entry-points"):
        assert alone[name] == whole[name], name
