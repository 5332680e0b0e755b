"""Seconds of several calls, run in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

ROUNDS = 5  # timings of each peer, interleaved; the median counts


def interleaved_medians(peers: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Median seconds of each, run in turns, so that what else the machine does slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(ROUNDS + 1):  # the first is for warming up
        for name, call in peers.items():
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
