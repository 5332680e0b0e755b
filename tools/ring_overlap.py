"""Does context_parallel.attention compute while keys travel? A trace of gloo ranks on this CPU, and what it says.

    python -m tools.ring_overlap --ranks 2 --seqlen 4096 --trace ring.json

Of rank 0, forward and backward: each transfer is begun before a step of attention and waited for behind it, but for the
last in backward, which has none beside it. What is waited for is set beside what such a transfer takes by itself; ranks
that share cores wait for each other, too. The trace is torch.profiler's, for Perfetto or chrome://tracing: gloo:recv
lies over compiled_fa::attention.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from compiled_fa import context_parallel


@dataclass(frozen=True)
class Interval:
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Transfer:
    """Of one transfer: how long it was under way, how much of that attention was computed, what was waited for then."""

    under_way: float
    computing: float
    waited: float


def transfers(intervals: Sequence[Interval]) -> list[Transfer]:
    """Of what a rank receives, in its order."""
    steps = [each for each in intervals if each.name.startswith("compiled_fa::")]
    found = []
    for each in sorted(intervals, key=lambda interval: interval.start):
        if each.name != "gloo:recv":
            continue
        beside = [step for step in steps if step.start < each.end and step.end > each.start]
        computing = sum(min(step.end, each.end) - max(step.start, each.start) for step in beside)
        last = max((min(step.end, each.end) for step in beside), default=each.start)
        found.append(Transfer(each.end - each.start, computing, each.end - last))
    return found


def _alone(elements: int, dtype: torch.dtype, ranks: int) -> float:
    """Milliseconds of a transfer around the ring while nobody computes; median of 9."""
    rank = dist.get_rank()
    mine, other = torch.zeros(2, elements, dtype=dtype).unbind(0)
    times = []
    for _ in range(9):
        dist.barrier()
        start = time.perf_counter()
        messages = [
            dist.P2POp(dist.isend, mine, (rank + 1) % ranks),
            dist.P2POp(dist.irecv, other, (rank - 1) % ranks),
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _on_rank(rank: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=options.ranks)
    shape = 1, options.seqlen // options.ranks, options.nheads, options.head_dim
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))

    def step() -> None:
        context_parallel.attention(q, k, v, causal=True).sum().backward()

    step()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    alone = _alone(k.numel() + v.numel(), k.dtype, options.ranks)
    if rank == 0:
        if options.trace is not None:
            profiled.export_chrome_trace(str(options.trace))
        events = [
            Interval(event.name, event.time_range.start / 1e3, event.time_range.end / 1e3)
            for event in profiled.events() or []
        ]
        _tell(transfers(events), alone, (k.nbytes + v.nbytes) / 1e6)
    dist.destroy_process_group()


def _tell(found: Sequence[Transfer], alone: float, megabytes: float) -> None:
    print(f"a transfer of {megabytes:.1f} MB by itself: {alone:.1f} ms")
    print("transfer   under way   attention meanwhile   then waited (ms)")
    for number, each in enumerate(found, 1):
        print(f"{number:>8}{each.under_way:>12.1f}{each.computing:>22.1f}{each.waited:>14.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.ring_overlap", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=4096, help="of all ranks together")
    parser.add_argument("--nheads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--trace", type=Path, help="where to write torch.profiler's trace")
    options = parser.parse_args()
    if options.seqlen % (2 * options.ranks):
        parser.error(f"--seqlen must be a multiple of 2 · {options.ranks} (--ranks), got {options.seqlen}")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_on_rank, args=(rank, options, folder)) for rank in range(options.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        raise SystemExit(f"a rank failed: exit codes {codes}")


if __name__ == "__main__":
    main()
