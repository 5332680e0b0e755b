"""How much memory attention takes, how much it moves, and how long a sequence fits: naive, and ours.

    python -m tools.memory_model --batch 32 --seqlen 512 --nheads 16
    python -m tools.memory_model --seqlen 16384 --direction training --card rtx2080ti --plot memory.png
    python -m tools.memory_model --measure                          # hold the model against peaks measured here

attention_memory.py has the model and its accounting; this is its command. MiB and GiB are powers of 2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.attention_memory import ENGINES, Config, Direction, intensity, kept, longest, moved

MIB, GIB = 1 << 20, 1 << 30
# Memory that a card reports as its own; a CUDA context and everything else of a model has to fit as well.
CARDS = {"t4": ("T4", 15360 * MIB), "rtx2080ti": ("RTX 2080 Ti", 11264 * MIB)}
IMPLEMENTATIONS = ("naive", *ENGINES)
ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 0.1
# Measured in fp32, which a CPU computes in as it stands, at sizes beside which a process's small change is nothing.
MEASURED: tuple[tuple[str, Direction, Config], ...] = (
    ("naive", "forward", Config(1, 3072, 3072, dtype="float32")),
    ("naive", "training", Config(1, 3072, 3072, dtype="float32")),
    ("tiled", "forward", Config(8, 2048, 2048, dtype="float32", causal=True)),
    ("tiled", "training", Config(8, 2048, 2048, dtype="float32", causal=True)),
)


def modelled(config: Config, direction: Direction, memory: int) -> dict[str, Any]:
    """Everything the model says, as JSON takes it."""
    found: dict[str, Any] = {"config": vars(config), "direction": direction, "flops": config.flops(direction)}
    for name in IMPLEMENTATIONS:
        tensors, traffic = kept(config, direction, name), moved(config, direction, name)
        found[name] = {
            "kept_bytes": tensors,
            "kept_total": sum(tensors.values()),
            "moved_bytes": traffic,
            "moved_total": sum(traffic.values()),
            "flop_per_byte": intensity(config, direction, name),
            "longest_seqlen": longest(config, direction, name, memory),
        }
        if name in ENGINES:
            tiling = ENGINES[name](config, direction)
            found[name]["tile"] = {"queries": tiling.queries, "keys": tiling.keys, "scratch_bytes": tiling.scratch}
    return found


def table(found: dict[str, Any], card: str) -> str:
    lines = []
    for name in IMPLEMENTATIONS:
        part = found[name]
        tile = f", tiles of {part['tile']['queries']} x {part['tile']['keys']}" if "tile" in part else ""
        lines.append(f"{name}, {found['direction']}{tile}")
        for heading, sizes, total in (
            ("kept", part["kept_bytes"], part["kept_total"]),
            ("moved", part["moved_bytes"], part["moved_total"]),
        ):
            lines += [f"  {heading:<8}{label:<36}{size / MIB:>12.1f} MiB" for label, size in sizes.items()]
            lines.append(f"  {heading:<8}{'together':<36}{total / MIB:>12.1f} MiB")
        lines.append(f"  {'intensity':<44}{part['flop_per_byte']:>12.1f} FLOP/B")
        lines.append(f"  {'longest sequence on ' + card:<44}{part['longest_seqlen']:>12} tokens\n")
    return "\n".join(lines)


def measured_peak(name: str, direction: Direction, config: Config) -> tuple[int, str]:
    """Bytes beside q, k, v and dout that a process of its own took at its peak, and what was wrong in its results."""
    case = {
        "lengths": [[config.seqlen_q, config.seqlen_k]] * config.batch,
        "dense": True,
        "heads_per_key": config.nheads // config.nheads_k,
        **{field: getattr(config, field) for field in ("nheads_k", "head_dim", "dtype", "causal")},
    }
    way = "forward" if direction == "forward" else "forward+backward"
    request = {"case": case, "direction": way, "peer": "naive" if name == "naive" else "ours"}
    command = [sys.executable, "-m", "bench.peak"]
    environment = os.environ | ({} if name == "naive" else {"COMPILED_FA_ENGINE": name})
    done = subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(f"measuring {name} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["peak_bytes"], found["complaint"] or ""


def measure() -> bool:
    """Print model and measurement side by side -> whether all are within TOLERANCE."""
    print(f"{'peak beside inputs':<48}{'model MiB':>12}{'measured':>12}{'model / measured':>18}")
    within = True
    for name, direction, config in MEASURED:
        tensors = kept(config, direction, name)
        expected = sum(size for label, size in tensors.items() if label not in ("q", "k", "v", "dout"))
        peak, complaint = measured_peak(name, direction, config)
        good = not complaint and abs(expected / peak - 1) <= TOLERANCE
        within &= good
        label = f"{name} {direction}, B{config.batch} N{config.seqlen_q} H{config.nheads} D{config.head_dim} fp32"
        verdict = complaint or ("" if good else f"  MORE THAN {TOLERANCE:.0%} OFF")
        print(f"{label:<48}{expected / MIB:>12.1f}{peak / MIB:>12.1f}{expected / peak:>18.3f}{verdict}", flush=True)
    return within


def plot(path: Path, config: Config, direction: Direction, figure_class: Any) -> None:
    """Memory, traffic and arithmetic intensity against seqlen."""
    figure = figure_class(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3)
    lengths = [2**power for power in range(8, 17)]
    for name in IMPLEMENTATIONS:
        configs = [config.at(seqlen) for seqlen in lengths]
        label = "naive" if name == "naive" else f"ours ({name})"
        style = {"label": label, "marker": "o", "markersize": 3}
        axes[0].plot(lengths, [sum(kept(c, direction, name).values()) / GIB for c in configs], **style)
        axes[1].plot(lengths, [sum(moved(c, direction, name).values()) / GIB for c in configs], **style)
        axes[2].plot(lengths, [intensity(c, direction, name) for c in configs], **style)
    for (card, memory), side in zip(CARDS.values(), ("bottom", "top"), strict=True):
        axes[0].axhline(memory / GIB, color="grey", linestyle="--", linewidth=0.8)
        axes[0].annotate(card, (lengths[-1], memory / GIB), fontsize=7, ha="right", va=side, color="grey")
    for axis, title in zip(axes, ("memory (GiB)", "traffic (GiB)", "intensity (FLOP/B)"), strict=True):
        axis.set(yscale="log", xlabel="sequence length", ylabel=title)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths[::2], [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths[::2]])
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    shape = f"batch {config.batch}, {config.nheads} heads of {config.head_dim}, {config.dtype}"
    figure.suptitle(f"attention {direction}, {shape}{', causal' if config.causal else ''}", fontsize=10)
    for kind in {path.suffix or ".png", ".svg"}:
        figure.savefig(path.with_suffix(kind), dpi=200)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    summary, _, details = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=raw)
    add = parser.add_argument
    add("--batch", type=int, default=1)
    add("--seqlen", type=int, default=2048)
    add("--seqlen-k", type=int, help="default: --seqlen")
    add("--nheads", type=int, default=8)
    add("--nheads-k", type=int, help="key heads; default: --nheads")
    add("--head-dim", type=int, default=64)
    add("--dtype", default="float16", choices=("float16", "bfloat16", "float32", "float64"))
    add("--causal", action="store_true")
    add("--direction", default="forward", choices=("forward", "training"))
    add("--card", default="t4", choices=CARDS, help="whose memory the longest sequence has to fit into (default: t4)")
    add("--memory", type=float, metavar="GIB", help="in place of a card's")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add("--plot", type=Path, metavar="FILE", help="draw memory, traffic and intensity, to this image and as SVG")
    add("--kernels", action="store_true", help="the fused kernels' traffic: by their tiles, and as their PTX moves it")
    within = f"{TOLERANCE:.0%}%"  # argparse makes one % of two
    add("--measure", action="store_true", help=f"hold the model against measured peaks, within {within}; Linux")
    return parser, parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    parser, options = parse_arguments(argv)
    if options.measure:
        return 0 if measure() else 1
    if options.kernels:
        command = [sys.executable, "-m", "tools.kernel_traffic", "--head-dim", str(options.head_dim)]
        return subprocess.run(command, cwd=ROOT, check=False).returncode
    nheads_k = options.nheads_k or options.nheads
    for name in ("batch", "seqlen", "nheads", "head_dim"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.nheads % nheads_k:
        parser.error(f"--nheads {options.nheads} must be a multiple of --nheads-k {nheads_k}")
    seqlen_k = options.seqlen_k or options.seqlen
    shape = options.batch, options.seqlen, seqlen_k, options.nheads, nheads_k, options.head_dim
    config = Config(*shape, options.dtype, options.causal)
    card, memory = CARDS[options.card]
    if options.memory is not None:
        card, memory = f"{options.memory:g} GiB", int(options.memory * GIB)
    found = modelled(config, options.direction, memory)
    print(json.dumps(found, indent=2) if options.json else table(found, card))
    if options.plot:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            parser.error("--plot needs matplotlib: pip install 'compiled-fa[plots]'")
        plot(options.plot, config, options.direction, Figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
