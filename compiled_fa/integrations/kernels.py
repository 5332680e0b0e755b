"""flash_attn's functions as a kernel in the layout of Hugging Face's `kernels` package, for any device.

    python -m compiled_fa.integrations.kernels FOLDER

    LOCAL_KERNELS=our/flash-attn=FOLDER python train.py  # with attn_implementation="our/flash-attn" in it

The folder is whole: it holds a copy of this package, for where compiled_fa is not installed, and uploaded to the Hub it
is a kernel that others name. `kernels` takes it for every backend, since its build variant is torch-universal.

Private layout: build/VARIANT/__init__.py and metadata.json beside it, tried with kernels 0.17.2.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import compiled_fa

VARIANT = Path("build") / "torch-universal"
PACKAGE = Path(compiled_fa.__file__).parent
COPIED = (PACKAGE, PACKAGE.parent / "compiled_fa_turing")
INTERFACE = PACKAGE / "drop_in" / "v2_7_4" / "flash_attn" / "flash_attn_interface.py"

INIT = '''"""flash_attn 2's functions by compiled_fa, as a kernel: any device, torch 2.11 or newer."""

import sys
from pathlib import Path

try:
    import compiled_fa
except ModuleNotFoundError:  # the copy beside this file, for processes that compile, too: they are given sys.path
    sys.path.append(str(Path(__file__).parent))

from . import flash_attn_interface
from .flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
'''


def metadata() -> dict[str, object]:
    """What `kernels` reads of a build variant; id: the name under which it imports it."""
    version = compiled_fa.__version__
    return {
        "id": f"_compiled_fa_kernel_{version.replace('.', '_')}",
        "name": "compiled-fa",
        "version": 1,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cpu"},  # one must be named; what is checked of it is the variant's name
    }


def write(folder: Path) -> Path:
    """Write the kernel into a folder, which is made if it is not there -> the build variant in it.

    Raises:
        ValueError: there is a build variant of that name in the folder.
    """
    variant = folder / VARIANT
    if variant.exists():
        raise ValueError(f"there is a {variant} already: remove it, or name another folder")
    variant.mkdir(parents=True)
    for package in COPIED:
        shutil.copytree(package, variant / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(INTERFACE, variant / INTERFACE.name)
    (variant / "__init__.py").write_text(INIT)
    (variant / "metadata.json").write_text(json.dumps(metadata(), indent=2) + "\n")
    return variant


def main(arguments: Sequence[str] | None = None) -> int:
    """-> exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m compiled_fa.integrations.kernels",
        description="Write flash_attn's functions as a kernel that Hugging Face's kernels package loads.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; made if it is not there")
    asked = parser.parse_args(arguments)
    try:
        variant = write(asked.folder)
    except ValueError as error:
        print(f"compiled_fa.integrations.kernels: {error}", file=sys.stderr)
        return 1
    print(f"{variant}\nLOCAL_KERNELS=compiled-fa/flash-attn={asked.folder.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
