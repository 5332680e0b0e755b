"""Measurements that need a process of their own: peak memory, and the time of first use."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from .cases import Case, Direction
from .peers import PEERS
from .records import ROOT, described
from .suites import Entry
from .timing import Timing

FIRST_USE_PEERS = ("ours", "SDPA", "flex")
WARM_ROUNDS = 3
FIRST_USE_CASE = Case.uniform(1024, causal=True)


class ChildFailedError(RuntimeError):
    """A measuring process ended without a result; the message is its last line."""


def _child(module: str, *arguments: str, request: object = None, environment: dict[str, str] | None = None) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"killed, status {done.returncode}"])[-1]
        raise ChildFailedError(last[:200])
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(case: Case, direction: Direction, peer: str, device: torch.device) -> dict[str, Any]:
    """-> what a record says of it: status, and peak_bytes, results_bytes, extra_bytes (the rest)."""
    if reason := PEERS[peer].refusal(case, direction, device.type):
        return {"peer": peer, "status": "refused", "reason": reason}
    request = {"case": case.to_json(), "direction": direction, "peer": peer, "device": str(device)}
    try:
        found = _child("bench.peak", request=request)
    except ChildFailedError as error:
        return {"peer": peer, "status": "unable", "reason": str(error)}
    if found["complaint"]:
        return {"peer": peer, "status": "mismatch", "reason": found["complaint"]}
    extra = found["peak_bytes"] - found["results_bytes"]
    tokens = sum(q for q, _ in case.lengths)
    sizes = {name: found[name] for name in ("peak_bytes", "results_bytes")}
    return {"peer": peer, "status": "timed", **sizes, "extra_bytes": extra, "extra_bytes_per_token": extra / tokens}


def memory_records(entries: list[Entry], device: torch.device) -> Iterator[dict[str, Any]]:
    for entry in entries:
        for direction in entry.directions:
            for peer in entry.peers:
                yield described(entry.case, direction) | peak_memory(entry.case, direction, peer, device)


def first_use_records(quick: bool) -> Iterator[dict[str, Any]]:
    """Each peer in new processes: once with an empty Inductor cache, then with what that left behind."""
    for peer in FIRST_USE_PEERS[:2] if quick else FIRST_USE_PEERS:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                yield described(FIRST_USE_CASE, "forward") | _first_use(peer, state, cache, quick)


def _first_use(peer: str, state: str, cache: str, quick: bool) -> dict[str, Any]:
    rounds = 1 if state == "cold" or quick else WARM_ROUNDS
    environment = {"TORCHINDUCTOR_CACHE_DIR": cache}
    try:
        found = [_child("bench.first_use", peer, environment=environment) for _ in range(rounds)]
    except ChildFailedError as error:
        return {"peer": peer, "cache": state, "status": "unable", "reason": str(error)}
    timing = Timing.of([one["total_s"] for one in found])
    parts = {
        name: statistics.median(one[name] for one in found) for name in ("import_torch_s", "import_s", "first_call_s")
    }
    times = {"median_s": timing.median, "iqr_s": timing.iqr, "rounds": timing.rounds}
    return {"peer": peer, "cache": state, "status": "timed", **times, **parts}
