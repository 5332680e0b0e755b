"""Records: a JSON object a line, complete in itself. The first line of a file is the command that made it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .cases import Case, Direction
from .race import Outcome

ROOT = Path(__file__).resolve().parent.parent


def _commit() -> str:
    """The commit of the checkout, marked where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+changes", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def cpu_model() -> str:
    """The CPU's model by name and by its maker's numbers, which tell generations apart that share a name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    said: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        said[name.strip()] = value.strip()
    named = [said[name] for name in ("model name",) if name in said] or [platform.processor() or platform.machine()]
    return ", ".join([*named, *(f"{name} {said[name]}" for name in ("cpu family", "model") if name in said)])


def circumstances(device: torch.device) -> dict[str, Any]:
    """What identifies the code and the machine of a measurement."""
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def described(case: Case, direction: Direction) -> dict[str, Any]:
    """A case in a record; of many sequences, the totals."""
    return {
        "case": case.label,
        "shape": {
            "batch": case.batch,
            "max_seqlen_q": case.max_seqlen_q,
            "max_seqlen_k": case.max_seqlen_k,
            "total_q": sum(q for q, _ in case.lengths),
            "total_k": sum(k for _, k in case.lengths),
            "nheads": case.nheads,
            "nheads_k": case.nheads_k,
            "head_dim": case.head_dim,
        },
        "options": {
            "varlen": case.varlen,
            "causal": case.causal,
            "window_size": list(case.window_size),
            "softcap": case.softcap,
            "alibi": case.alibi,
            "dropout_p": case.dropout_p,
            "page_size": case.page_size,
            "compiled": case.compiled,
            "layer": case.layer,
        },
        "useful_scores": case.useful_scores,
        "key_bytes": case.key_bytes,
        "dtype": case.dtype_name,
        "direction": direction,
    }


def of_outcome(outcome: Outcome) -> dict[str, Any]:
    found: dict[str, Any] = {"peer": outcome.peer, "status": outcome.status}
    if outcome.timing is None:
        return {**found, "reason": outcome.reason}
    timing = outcome.timing
    times = {"median_s": timing.median, "iqr_s": timing.iqr, "rounds": timing.rounds}
    return {**found, **times, "tflops": outcome.tflops}


class Writer:
    """Appends records to a new file; without a path it keeps nothing."""

    def __init__(self, path: Path | None, command: str) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")
            self.write({"command": command})

    def write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records of these files, without the commands."""
    found = []
    for path in paths:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line]
        found += [line for line in lines if "command" not in line]
    return found
