"""A Python program in place of this process, with modules of ours in its PYTHONPATH and its children's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from compiled_fa_turing import config, site_hook

ON_PATH = Path(__file__).parent / "on_path"


def command(arguments: Sequence[str]) -> list[str]:
    """python's own command line for a program and its arguments, with this interpreter's options."""
    own = sys.orig_argv[1:]
    options = own[: own.index("-m")] if "-m" in own else []
    return [sys.executable, *options, *arguments]


def become(line: list[str]) -> int:
    """Does not return where a process can become another program (not on Windows); there: its exit code."""
    sys.stdout.flush()
    if os.name != "nt":  # where exec makes a new process, and its parent ends
        os.execv(line[0], line)
    return subprocess.run(line, check=False).returncode


def run_with_turing(arguments: Sequence[str]) -> int:
    """script.py args, or -m module args, as a program that has the stage in all its processes.

    Raises:
        RuntimeError: this Python ignores PYTHONPATH, and the environment has no file of ours either
    """
    if not site_hook.is_installed():
        if sys.flags.ignore_environment:
            raise RuntimeError("this python ignores PYTHONPATH (-E, -I), by which its children are told; use --enable")
        ours = Path(__file__).resolve().parents[1]
        if str(ours) not in site_hook.folders():  # a checkout, which only this process may have found
            config.add_to_python_path(str(ours))
        config.add_to_python_path(str(ON_PATH))
    config.ask_for_turing()
    return become(command(arguments))
