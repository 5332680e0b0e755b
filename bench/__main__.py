"""The command `python -m bench`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compiled_fa import use_engine
from compiled_fa.tuning import described as described_tuning
from compiled_fa.tuning.classes import cpu_class

from . import choice, models, serve, table
from .latency import MODES, latency_records
from .peers import PEERS
from .processes import first_use_records, memory_records
from .progress import Progress
from .race import race
from .records import ROOT, Writer, circumstances, cpu_model, described, of_outcome
from .suites import ENGINES, RACES, Entry, latency, memory

SUITES = (*RACES, "models", "latency", "serve", "memory", "compile", "choice")
RESULTS = ROOT / "bench" / "results"
EPILOG = """suites: dense, varlen, variants (window, ALiBi, softcap, dropout), decode, short, scale (one head, long),
classes (of CPUs: a case of each kind), published (the shapes of flash-attention's README, for a GPU), tiles (the tiled
engine, for a GPU without a fused one), kernels (of our own beside flex_attention's, for a GPU), latency (what a short
call costs: the host, the device, launches, eagerly, compiled and in a CUDA graph), models (layers of models: a Llama's
of transformers, the same on packed sequences, a ViT block, a UNet's attention block; ours by each road beside eager and
SDPA attention), serve (requests that come and go, on pages and on padded rows), memory (peaks, each in a process of its
own), compile (first use in a new process, cache cold and warm), choice (random calls on a CPU: how much slower is auto
than the fastest engine? --calls of them, of --seed; the first time they compile for minutes).
`python -m bench plot [FILE ...]` draws records. Without --quick the whole takes hours on two cores."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Speed and memory of compiled_fa beside every peer present; who computes it wrong is not timed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("suites", nargs="*", metavar="NAME", help=f"some of {', '.join(SUITES)}; none: all of them")
    add("--quick", action="store_true", help="tiny cases and few rounds: to see that it works, not to be quoted")
    add("--match", default="", metavar="TEXT", help="only cases whose label contains this, such as 'D64 fp32 causal'")
    add("--peers", metavar="NAMES", help="only these peers, separated by commas; ours is always among them")
    add("--seconds", type=float, default=5.0, help="about how long a case is timed (default: 5; choice: at most half)")
    add("--rounds", type=int, help="rounds of a case, in place of --seconds")
    add("--calls", type=int, default=choice.CALLS, help=f"random calls of choice (default: {choice.CALLS})")
    add("--seed", type=int, default=0, help="of those calls (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, metavar="FILE", help="JSON lines (default: bench/results/NAME.jsonl; parts: none)")
    return parser


def _chosen(entries: list[Entry], options: argparse.Namespace) -> list[Entry]:
    found = []
    for entry in entries:
        if options.match not in entry.case.label:
            continue
        wanted = options.peers.split(",") if options.peers else entry.peers
        peers = tuple(name for name in entry.peers if name == "ours" or name in wanted)
        found.append(replace(entry, peers=peers))
    return found


def _race_suite(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Records of a suite of races, its table printed as it grows."""
    entries = _chosen(RACES[name](options.quick), options)
    pairs = [(entry, direction) for entry in entries for direction in entry.directions]
    if not pairs:
        return
    peers = list(dict.fromkeys(peer for entry in entries for peer in entry.peers))
    able = [p for p in peers if any(PEERS[p].refusal(entry.case, way, device.type) is None for entry, way in pairs)]
    print(table.header(able))
    progress = Progress(len(pairs))
    rounds = options.rounds or (3 if options.quick else None)
    everything = []
    for number, (entry, direction) in enumerate(pairs):
        label = f"{entry.case.label}, {direction}"
        progress.show(number, label)

        def tick(done: float, number: int = number, label: str = label) -> None:
            progress.show(number + done, label)

        with use_engine(ENGINES[name]) if name in ENGINES else nullcontext():
            outcomes = race(entry.case, direction, entry.peers, device, options.seconds, rounds, tick, entry.apart)
        records = [described(entry.case, direction) | of_outcome(outcome) for outcome in outcomes]
        progress.clear()
        print(table.row([record for record in records if record["peer"] in able]), flush=True)
        everything += records
        yield from records
    print(*table.notes(everything), sep="\n")


def _other_suite(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Records of a suite that is no race."""
    if name == "memory":
        entries = _chosen(memory(options.quick), options)
        total = sum(len(entry.directions) * len(entry.peers) for entry in entries)
        records, line, head = memory_records(entries, device), table.memory_row, table.MEMORY_HEADER
    elif name == "latency":
        entries = _chosen(latency(options.quick), options)
        total = sum(len(entry.directions) * len(entry.peers) * len(MODES) for entry in entries)
        records = latency_records(entries, device, options.seconds, options.quick)
        line, head = table.latency_row, table.LATENCY_HEADER
    else:
        total = 4 if options.quick else 6
        records, line, head = first_use_records(options.quick), table.first_use_row, table.FIRST_USE_HEADER
    print(head)
    progress = Progress(total)
    progress.show(0, name)
    for number, record in enumerate(records, 1):
        progress.clear()
        print(line(record), flush=True)
        progress.show(number, name)
        yield record
    progress.clear()


def _serve_suite(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Records of the service of requests."""
    print(table.SERVE_HEADER)
    for records in serve.records(
        options.quick, device, options.seconds, options.rounds or (1 if options.quick else None)
    ):
        print(table.serve_row(records), flush=True)
        yield from records


def _choice_suite(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Records of random calls, and what they say of the choice of engines."""
    if device.type != "cpu":
        print(f"not on {device.type}: it is about engines on a CPU")
        return
    drawn = choice.calls(3 if options.quick else options.calls, options.seed)
    drawn = [(case, direction) for case, direction in drawn if options.match in case.label]
    print(f"tuning: {described_tuning()}\n{choice.HEADER}")
    progress, found = Progress(len(drawn)), []
    rounds = options.rounds or (3 if options.quick else None)
    for number, (case, direction) in enumerate(drawn):
        progress.show(number, f"{case.label}, {direction}")
        measured = choice.measure(case, direction, options.seconds / 2, rounds)
        record = {"cpu": cpu_model(), "class": cpu_class(), **choice.record_of(measured)}
        progress.clear()
        print(choice.row(record), flush=True)
        found.append(record)
        yield record
    print(*choice.told(found), sep="\n")


def _models_suite(name: str, options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """Records of layers of models."""
    print(table.MODELS_HEADER)
    everything = []
    rounds = options.rounds or (2 if options.quick else None)
    for records in models.records(options.quick, device, options.seconds, rounds, options.match):
        print(table.models_row(records), flush=True)
        everything += records
        yield from records
    print(*table.notes(everything), sep="\n")


OTHER_SUITES = {"serve": _serve_suite, "models": _models_suite, "choice": _choice_suite}
OF_A_CLASS = ("classes", "choice")  # whose records differ from one class of CPU to another


def main(arguments: list[str] | None = None) -> int:
    """-> exit status: 1 when a peer, or ours, was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["plot"]:
        from . import plot

        return plot.main(arguments[1:])
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.suites if name not in SUITES]:
        parser.error(f"no suite {unknown[0]!r}; there are {', '.join(SUITES)}")
    device = torch.device(options.device)
    command = shlex.join(["python", "-m", "bench", *arguments])
    whole = not (options.quick or options.match or options.peers)
    known = circumstances(device)
    wrong = False
    print(", ".join(f"{name} {value}" for name, value in known.items()))
    shared = Writer(options.output, command) if options.output else None
    for name in options.suites or SUITES:
        print(f"\n{name}")
        suite = _race_suite if name in RACES else OTHER_SUITES.get(name, _other_suite)
        records = suite(name, options, device)
        file = f"{name}_{cpu_class()}.jsonl" if name in OF_A_CLASS else f"{name}.jsonl"
        writer = shared or Writer(RESULTS / file if whole else None, command)
        for record in records:
            wrong |= record["status"] == "mismatch"
            writer.write({**known, "suite": name, **record})
        if writer is not shared:
            writer.close()
    if shared is not None:
        shared.close()
    print("\nColumns '/ peer' are ours / peer: below 1, ours is faster.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
