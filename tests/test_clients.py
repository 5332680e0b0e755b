"""Other people's packages on our ops: each program of clients/ runs in a process of its own, and finds itself right.

They are flash_attn's clients, run as docs/migrating.md says, by `python -m compiled_fa.run`. What is not installed is
skipped: none of them is wanted by this package.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
PROGRAMS = sorted((HERE / "clients").glob("*.py"))
# What each needs, and Python's options.
NEEDS: dict[str, tuple[list[str], list[str]]] = {
    "diffusers_flash": (["diffusers"], []),
    "kernels_layout": (["kernels", "transformers"], []),
    "peft_lora": (["transformers", "accelerate", "peft"], []),
    "point_transformer": ([], []),
    "transformers_paged": (["kernels", "transformers"], []),
    "x_transformers_flash": (["x_transformers"], ["-O"]),
    "xformers_operator": (["xformers"], []),
}


def test_every_program_is_known():
    assert [path.stem for path in PROGRAMS] == sorted(NEEDS)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_client_is_right(program):
    packages, options = NEEDS[program.stem]
    if missing := [name for name in packages if find_spec(name) is None]:
        pytest.skip(f"there is no {missing[0]}")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *options, "-m", "compiled_fa.run", str(program)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "right"
