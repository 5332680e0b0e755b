"""Four gloo ranks for all tests that need several, forked from one process that has imported everything.

A check is a function that every rank runs, with the others of some modules, in order; `outcomes` gives what went wrong.
"""

from __future__ import annotations

import functools
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parent
OURS = ("ranks_sharding", "ranks_ring")  # together, since a group of ranks takes seconds to start
RANKS = 4
TIMEOUT = timedelta(seconds=120)  # of a collective that a rank does not come to

CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # first of all: a forked process has no other threads
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=TIMEOUT)
    wrong: dict[str, str] = {}
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function()
        except Exception:  # on this rank; others may wait for it
            wrong[name] = f"rank {rank}: {traceback.format_exc()}"
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(wrong))
    if not wrong:
        dist.barrier()
    dist.destroy_process_group()


def names_in(module: str) -> list[str]:
    """The checks of a module that has been imported."""
    return [name for name, function in CHECKS.items() if function.__module__ == module]


def run() -> None:
    """What `outcomes` starts: prints what went wrong, by check of the modules that its arguments name."""
    for module in sys.argv[1:]:
        getattr(importlib.import_module(module), "prepare", lambda: None)()
    torch.compile(torch.sin, backend="aot_eager")(torch.zeros(1))  # imports what ranks compile with
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(rank, folder)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        found: dict[str, str] = {}
        for rank in range(RANKS):
            file = Path(folder, f"{rank}.json")
            told = json.loads(file.read_text()) if file.exists() else {}
            for name, text in told.items():
                found[name] = found.get(name, "") + text
        complete = all(process.exitcode == 0 for process in ranks)
    names = list(CHECKS)
    first = min((names.index(name) for name in found), default=len(names) if complete else 0)
    for name in names[first:]:
        found.setdefault(name, f"not finished: {names[min(first, len(names) - 1)]} failed")
    json.dump({name: found.get(name, "") for name in names}, sys.stdout)


@functools.cache
def outcomes(*modules: str) -> dict[str, str]:
    """By check of these modules, "" where all ranks found it right. Once a process."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import ranks; ranks.run()", *modules],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found
