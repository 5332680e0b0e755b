"""Peak memory of one call beside its inputs: the process that bench/processes.py starts.

    REQUEST='{"case": {"lengths": [[2048, 2048]], "dense": true}, "direction": "forward", "peer": "ours"}'
    echo $REQUEST | python -m bench.peak

A short call first compiles what there is to compile, so that the compiler's own memory is not counted; then the
high-water mark of the resident set (Linux: VmHWM; on a GPU the allocator's) is reset, and read after one call. Its
results are held against float64 afterwards.
"""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .cases import Case, Direction, Inputs
from .parity import PEER_SLACK, Reference
from .race import prepare, results

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WARMUP_LENGTH = 600  # more than a tile, so that every kind of tile occurs


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most since the last reset)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def start(device: torch.device) -> int:
    """Reset the high-water mark -> bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)  # else what earlier calls freed would be used again, unseen
    CLEAR.write_text("5")
    return resident("VmRSS")


def highest(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def measure(case: Case, direction: Direction, peer: str, device: torch.device) -> dict[str, Any]:
    """peak_bytes beside inputs, and results_bytes, the part of it that is out and gradients."""
    short = replace(case, lengths=((WARMUP_LENGTH, WARMUP_LENGTH),))
    prepared = prepare(peer, Inputs.of(short, device))
    results(prepared, direction, prepared.attend)
    del prepared
    inputs = Inputs.of(case, device)
    prepared = prepare(peer, inputs)
    before = start(device)
    found = results(prepared, direction, prepared.attend)
    peak = highest(device) - before
    kept = sum(x.numel() * x.itemsize for x in found)
    packed = tuple(prepared.packed(x) for x in found)
    complaint = Reference(inputs, direction).complaint(packed, 1.0 if peer == "ours" else PEER_SLACK)
    return {"peak_bytes": peak, "results_bytes": kept, "complaint": complaint}


def main() -> None:
    request = json.load(sys.stdin)
    case = Case.from_json(request["case"])
    device = torch.device(request.get("device", "cpu"))
    print(json.dumps(measure(case, request["direction"], request["peer"], device)))


if __name__ == "__main__":
    main()
