"""Where figures come from: what a file of results begins with."""

import datetime
import pathlib
import shlex
import subprocess
import sys
from typing import Any

import torch
import triton

ROOT = pathlib.Path(__file__).parents[2]


def provenance(module: str) -> dict[str, Any]:
    """Of this run of `python -m module`, in a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout.strip()

    return {
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "device": "none: compiled for sm_75",
    }
